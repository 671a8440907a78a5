"""The one handler that every record of this process passes, to the file and to the console."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from rankwise.identity import Identity
from rankwise.logs import screen, state
from rankwise.logs.chain import TAKEN
from rankwise.logs.children import ChildLine, at_exit_of_child, log_path
from rankwise.logs.files import say_on_stderr
from rankwise.logs.record import Form, make_item, safe_text
from rankwise.logs.teller import Teller
from rankwise.logs.writer import FileWriter
from rankwise.redact import redact


class RankHandler(logging.Handler):
    """Gives each record to this rank's file, and to the console where one person wants to see it.

    Nothing here waits but for a record at WARNING and above, which waits for the file. `close`, which whoever sets up
    logging anew calls for handlers of all others, ends nothing: `end` does.

    Raises:
        OSError: the file cannot be opened.
    Ranks: local.
    """

    def __init__(
        self,
        identity: Identity,
        run_dir: str | os.PathLike[str] | None,
        *,
        device: str,
        max_bytes: int,
        num_backups: int | None,
    ) -> None:
        super().__init__()
        form = Form(identity, device)
        self.identity = identity
        self.writer: FileWriter | None = None
        self._run_dir = run_dir
        self._least_told = logging.WARNING if not identity.is_main_process or state.is_worker else 0
        self.at_exit: Callable[[], object] = self.flush
        """What a process that was forked or spawned by a rank does at its end."""
        self._is_exit_known: Callable[[], bool] = lambda: False
        if run_dir is not None:
            path = log_path(run_dir, identity.rank, os.getpid() if state.is_worker else None)
            self.writer = FileWriter(path, form, max_bytes, num_backups)
            self.writer.open()
        self.teller = Teller(form, rank=identity.rank, world_size=identity.world_size)
        self.children = ChildLine(self.teller.put)

    def createLock(self) -> None:
        """None: `handle` takes no lock, since one that waits for the disk must not keep others from the queue."""
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        """Take the record up, if that was not done already, and never raise."""
        if getattr(record, TAKEN, False):
            return True
        try:
            if self.filters and not self.filter(record):
                return False
        except Exception as error:
            _say_lost(record, error, "is not filtered")
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Take the record up, and never raise."""
        try:
            item = make_item(record)
            if state.is_worker and not self._is_exit_known():
                self._is_exit_known = at_exit_of_child(self.at_exit)
            if self.writer is not None:
                self.writer.put(item)
            if self._is_told(record) and not self.teller.is_current_thread():
                self.teller.put(item)
        except Exception as error:
            _say_lost(record, error, "is lost")

    def flush(self) -> None:
        """Bring file and console up to date."""
        if self.writer is not None:
            self.writer.flush()
        self.teller.flush()

    def close(self) -> None:
        """Bring the file up to date."""
        if self.writer is not None:
            self.writer.flush()

    def end(self) -> None:
        """Bring file and console up to date, and let go of both."""
        self.children.close()
        if self.writer is not None:
            self.writer.close()
        self.teller.close()
        super().close()

    def after_fork_in_parent(self) -> None:
        """There may be a child now that has something to say."""
        self.children.listen()

    def after_fork_in_child(self) -> None:
        """This process has the rank's place, but a file of its own, and speaks through its parent."""
        state.is_worker = True
        state.send = self.children.send
        self.children.leave_rank()
        self._least_told = logging.WARNING
        if self.writer is not None and self._run_dir is not None:
            self.writer.move_to(log_path(self._run_dir, self.identity.rank, os.getpid()))
        self.teller.reset()
        screen.forget_terminal()

    def _is_told(self, record: logging.LogRecord) -> bool:
        if getattr(record, "rankwise_file_only", False):
            return False
        return record.levelno >= self._least_told or getattr(record, "rankwise_shown", False)


def _say_lost(record: logging.LogRecord, error: Exception, how: str) -> None:
    what = f"{type(error).__name__}: {safe_text(error)}"
    say_on_stderr(f"rankwise: a log record {how} ({redact(what)}): {redact(safe_text(record.msg)):.200}")
