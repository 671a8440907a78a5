"""Logs of many processes: one console to read, one file per rank to search.

The interface is stdlib `logging`: records of every logger, ours or not, go to the console and to
RUN/logs/rank-00000.jsonl of the rank that made them.
"""

from __future__ import annotations

import atexit
import logging
import os
from pathlib import Path
from typing import Any

from rankwise.errors import RankwiseError
from rankwise.identity import Identity
from rankwise.logs import screen, state
from rankwise.logs.bars import hide_tqdm
from rankwise.logs.capture import Capture
from rankwise.logs.chain import Chain
from rankwise.logs.children import WorkerInit
from rankwise.logs.files import DEFAULT_MAX_BYTES
from rankwise.logs.fold import Line
from rankwise.logs.handler import RankHandler
from rankwise.logs.logger import RankLogger, get_logger, said_once
from rankwise.logs.record import FILE_ONLY
from rankwise.logs.screen import console
from rankwise.redact import redact, redact_command

__all__ = [
    "FILE_ONLY",
    "LogHandle",
    "RankLogger",
    "configure",
    "configure_worker",
    "console",
    "get_logger",
    "receive",
    "redact",
    "redact_command",
    "set_channel",
    "set_step",
    "worker_init",
]

_open: LogHandle | None = None


class LogHandle:
    """What `configure` installed; `close` takes it away again."""

    def __init__(self, handler: RankHandler, level: int | str, device: str, *, capture_prints: bool) -> None:
        self.path: Path | None = handler.writer.path if handler.writer is not None else None
        self._handler: RankHandler | None = handler
        root = logging.getLogger()
        self._previous_level = root.level
        root.setLevel(level)
        self._level = root.level
        root.addHandler(handler)
        self._chain = Chain(handler, self._level)
        self._capture = Capture(handler.teller.flush, prints=capture_prints)
        self._restore_bars = hide_tqdm() if handler.identity.rank != 0 else lambda: None
        handler.at_exit = self._finish_child
        self._worker_init = WorkerInit(
            handler.identity,
            None if self.path is None else os.path.abspath(self.path.parent.parent),
            level,
            device,
            handler.children,
        )

    def flush(self) -> None:
        """Bring the file and the console up to date.

        Ranks: local.
        """
        if self._handler is not None:
            self._handler.flush()

    def close(self) -> None:
        """Show and write what waits, and restore what was there before; a second call does nothing.

        Ranks: local.
        """
        global _open
        handler, self._handler = self._handler, None
        if handler is None:
            return
        root = logging.getLogger()
        try:
            self._restore_bars()
            self._capture.close()
            root.removeHandler(handler)
            self._chain.close()
            if root.level == self._level:  # else somebody has chosen another meanwhile
                root.setLevel(self._previous_level)
            handler.end()
        finally:
            if _open is self:
                _open = None
                said_once.clear()
                state.rank = state.step = state.send = None
                state.is_worker = False

    def _finish_child(self) -> None:
        self._capture.end_lines()
        self.flush()

    def _after_fork_in_parent(self) -> None:
        if self._handler is not None:
            self._handler.after_fork_in_parent()

    def _after_fork_in_child(self) -> None:
        self._capture.after_fork_in_child()
        if self._handler is not None:
            self._handler.after_fork_in_child()


def configure(
    identity: Identity,
    run_dir: str | os.PathLike[str] | None,
    level: int | str = "INFO",
    *,
    device: str = "",
    max_bytes: int = DEFAULT_MAX_BYTES,
    num_backups: int | None = None,
    capture_prints: bool = False,
) -> LogHandle:
    """Send every log record to the console and, given a run directory, to this rank's file there.

    Every record that its logger's own level lets through comes there, whether the logger propagates or not, and
    whatever handlers others put on or take off later. Uncaught exceptions and warnings become records too. Plain stream
    handlers on stderr or stdout, of any logger, say nothing until the handle is closed, and tqdm draws no bars on ranks
    other than the main process. Processes that are forked later, such as the workers of a data loader, write files
    of their own beside it; spawned ones do so with `worker_init`.

    Args:
        device: where this rank computes, for the console's labels.
        max_bytes, num_backups: size at which a new file is begun, and how many full ones are kept (None keeps all).
        capture_prints: make INFO records of what `print` writes to stdout.
    Raises:
        OSError: this rank's file cannot be opened.
        RankwiseError: they are set up already in this process.
        ValueError: there is no such level.
    Ranks: local; each rank opens a file of its own.
    """
    global _open
    if _open is not None and state.is_worker:
        # A forked process that becomes a rank of its own.
        _open.close()
    if _open is not None:
        where = "without a file" if _open.path is None else f"to {_open.path}"
        raise RankwiseError(
            f"logs are set up already in this process ({where}), and would hold every record twice. Close the session, "
            "or the handle that `configure` gave, first."
        )
    logging.Logger("level").setLevel(level)  # before anything is opened
    handler = RankHandler(identity, run_dir, device=device, max_bytes=max_bytes, num_backups=num_backups)
    state.rank = identity.rank
    _open = LogHandle(handler, level, device, capture_prints=capture_prints)
    return _open


def configure_worker(
    identity: Identity, run_dir: str | os.PathLike[str] | None, level: int | str = "INFO", *, device: str = ""
) -> bool:
    """`configure` in a process that was spawned by a rank; nothing where it was forked, which needs nothing.

    Returns:
        Whether anything was done.
    Ranks: in a spawned process.
    """
    if _open is not None:
        return False
    state.is_worker = True
    configure(identity, run_dir, level, device=device)
    return True


def worker_init() -> WorkerInit:
    """What a data loader whose workers are spawned takes as `worker_init_fn`, so that their records have a file.

    Any other process that multiprocessing spawns takes it as an argument, and calls it first.

    Ranks: local.
    """
    return _open._worker_init if _open is not None else WorkerInit(None, None, "INFO", "")


def set_step(step: int | None) -> None:
    """The step that records carry from now on; None for none.

    Ranks: local.
    """
    state.step = None if step is None else int(step)


def set_channel(send: state.Send | None) -> None:
    """How this rank's records at WARNING and above reach the main process's console; None where they cannot.

    Args:
        send: takes a record and says whether it was handed over; called on a thread of the logs. Where it gives False
            or raises, this rank prints the record itself.
    Ranks: local; on ranks other than the main process.
    """
    state.send = send


def receive(record: dict[str, Any]) -> None:
    """Show a record that another rank has sent, folded with equal ones; never waits.

    Ranks: main process only.
    """
    handler = _open._handler if _open is not None else None
    if handler is not None:
        handler.teller.put(record)
    else:
        screen.show([Line(record, ranks=(record["rank"],))], None)


class _AtExit(logging.Handler):
    """Closes the logs when `logging` closes its handlers: last of all, when others have said their last words."""

    def close(self) -> None:
        super().close()
        if _open is not None:
            _open.close()


_at_exit: _AtExit | None = None


def _await_exit() -> None:
    global _at_exit
    # Made now, since whoever sets up logging anew makes it forget the handlers that it knew.
    if _open is not None:
        _at_exit = _AtExit()


def _after_fork_in_parent() -> None:
    if _open is not None:
        _open._after_fork_in_parent()


def _after_fork_in_child() -> None:
    if _open is not None:
        _open._after_fork_in_child()


atexit.register(_await_exit)
os.register_at_fork(after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
