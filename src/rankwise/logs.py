"""Logs of many processes: one console to read, one file per rank to search.

The interface is stdlib `logging`: records of every logger, ours or not, go to the console and to
RUN/logs/rank-00000.jsonl of the rank that made them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import MutableMapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rankwise.errors import LaunchError
from rankwise.identity import Identity

if TYPE_CHECKING:
    from rich.console import Console

Ranks = Literal["main", "all"] | Sequence[int]

FILE_ONLY = {"rankwise_file_only": True}
"""Pass as `extra=` for a record that belongs into the file and not on the console."""

_identity: Identity | None = None
_said_once: set[tuple[str, int, str]] = set()


class RankLogger(logging.LoggerAdapter[logging.Logger]):
    """A stdlib logger whose calls take `ranks=` and `once=` too.

    ranks: which ranks make the record. "all" (the default) writes it to every calling rank's file and shows the
        main process's INFO and every rank's WARNING; "main" makes it on the main process alone; a list of ranks
        makes it there and shows it, labelled.
    once: drop the record when this process has already made an equal one.

    Ranks: local; a call never waits for another rank.
    """

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger, {})

    def log(  # type: ignore[override]
        self,
        level: int,
        msg: object,
        *args: object,
        ranks: Ranks = "all",
        once: bool = False,
        **kwargs: Any,
    ) -> None:
        """Make one record, where and when `ranks` and `once` allow it."""
        if not self.isEnabledFor(level):
            return
        rank = _current_rank()
        listed = not isinstance(ranks, str)
        if (ranks == "main" and rank != 0) or (listed and rank not in ranks):
            return
        if once:
            key = (self.logger.name, level, _render(msg, args))
            if key in _said_once:
                return
            _said_once.add(key)
        if listed:
            kwargs["extra"] = {**(kwargs.get("extra") or {}), "rankwise_shown": True}
        # Frames of this file would otherwise be named as the place of the call.
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        self.logger.log(level, msg, *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Leave message and arguments as they are."""
        return msg, kwargs


def get_logger(name: str) -> RankLogger:
    """A logger that knows ranks; use it as any stdlib logger, before, during and after a session.

    Ranks: local.
    """
    return RankLogger(logging.getLogger(name))


class LogHandle:
    """What `configure` installed; `close` takes it away again."""

    def __init__(self, handlers: list[logging.Handler], path: Path | None, level: int | str) -> None:
        self.path = path
        self._handlers = handlers
        root = logging.getLogger()
        self._previous_level = root.level
        self._previous_show = warnings.showwarning
        root.setLevel(level)
        for handler in handlers:
            root.addHandler(handler)
        logging.captureWarnings(True)
        self._captures_warnings = warnings.showwarning is not self._previous_show

    def close(self) -> None:
        """Restore what was there before; a second call does nothing.

        Ranks: local.
        """
        global _identity
        root = logging.getLogger()
        if not self._handlers:
            return
        if self._captures_warnings:
            logging.captureWarnings(False)
        for handler in self._handlers:
            root.removeHandler(handler)
            handler.close()
        self._handlers = []
        root.setLevel(self._previous_level)
        _said_once.clear()
        _identity = None


def configure(identity: Identity, run_dir: str | os.PathLike[str] | None, level: int | str = "INFO") -> LogHandle:
    """Send every log record to the console and, given a run directory, to this rank's file there.

    Raises:
        OSError: this rank's file cannot be opened.
    Ranks: local; each rank opens a file of its own.
    """
    global _identity
    handlers: list[logging.Handler] = []
    path = Path(run_dir, "logs", f"rank-{identity.rank:05d}.jsonl") if run_dir is not None else None
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(JsonLinesHandler(path, identity))
    handlers.append(_console_handler(identity))
    _identity = identity
    return LogHandle(handlers, path, level)


class JsonLinesHandler(logging.Handler):
    """Appends one JSON object a line, each with one system call: none is lost when the process dies.

    A disk that is full, or gone, costs records, which are counted, and never an exception in training.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        super().__init__()
        self.path = path
        self.num_dropped = 0
        self._torn = False
        self._place = {
            "rank": identity.rank,
            "local_rank": identity.local_rank,
            "node_rank": identity.node_rank,
            "host": identity.hostname,
        }
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, or count it as dropped."""
        try:
            line = (json.dumps(self._fields(record)) + "\n").encode()
            # The rest of a line that did not fit on a full disk must not run into this one.
            content = b"\n" + line if self._torn else line
            num_written = os.write(self._descriptor, content)
            self._torn = num_written < len(content)
            if self._torn:
                raise OSError(f"{num_written} of {len(content)} bytes written")
        except Exception as error:
            self._drop(error)

    def close(self) -> None:
        """Close the file, and say how many records it lacks."""
        with self.lock or contextlib.nullcontext():
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
                if self.num_dropped:
                    _say_on_stderr(f"rankwise: {self.num_dropped} log records are missing in {self.path}")
        super().close()

    def _fields(self, record: logging.LogRecord) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _render(record.msg, record.args),
            **self._place,
            "pid": record.process,
        }
        if record.exc_info and record.exc_info[0] is not None:
            fields["exception"] = {
                "type": record.exc_info[0].__name__,
                "message": str(record.exc_info[1]),
                "traceback": "".join(traceback.format_exception(*record.exc_info)),
            }
        return fields

    def _drop(self, error: Exception) -> None:
        self.num_dropped += 1
        if self.num_dropped == 1:
            _say_on_stderr(f"rankwise: cannot write {self.path} ({error}); the run goes on without it")


class ConsoleFilter(logging.Filter):
    """Lets through what one person in front of many ranks wants to see."""

    def __init__(self, identity: Identity) -> None:
        super().__init__()
        self._identity = identity

    def filter(self, record: logging.LogRecord) -> bool:
        """Main process: everything; other ranks: WARNING and above, and what was addressed to them."""
        if getattr(record, "rankwise_file_only", False):
            return False
        if self._identity.is_main_process or getattr(record, "rankwise_shown", False):
            return True
        return record.levelno >= logging.WARNING


class _PlainFormatter(logging.Formatter):
    def __init__(self, identity: Identity) -> None:
        label = "" if identity.is_main_process else f"[rank {identity.rank}] "
        super().__init__(f"%(asctime)s %(levelname)-7s {label}%(name)s: %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        safe = logging.makeLogRecord(record.__dict__)
        safe.msg, safe.args = _render(record.msg, record.args), None
        return super().format(safe)


class _StderrHandler(logging.Handler):
    """Writes to whatever `sys.stderr` is now, each record with one call so that ranks do not cut into each other."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _say_on_stderr(self.format(record))
        except Exception:
            self.handleError(record)


def _console_handler(identity: Identity) -> logging.Handler:
    if sys.stderr is not None and sys.stderr.isatty():
        handler = _rich_handler(identity)
    else:
        handler = _StderrHandler()
        handler.setFormatter(_PlainFormatter(identity))
    handler.addFilter(ConsoleFilter(identity))
    return handler


@functools.cache
def console() -> Console:
    """The terminal on stderr that log lines go to; one live display on it (a progress bar) is not broken by them.

    Ranks: local.
    """
    from rich.console import Console

    return Console(stderr=True)


def _rich_handler(identity: Identity) -> logging.Handler:
    from rich.logging import RichHandler

    handler = RichHandler(console=console(), show_path=False, markup=False, log_time_format="%H:%M:%S")
    label = "" if identity.is_main_process else f"[rank {identity.rank}] "
    handler.setFormatter(logging.Formatter(f"{label}%(name)s: %(message)s"))
    return handler


def _current_rank() -> int:
    """This process's rank; read from the environment where no session has said it."""
    global _identity
    if _identity is None:
        try:
            return Identity.resolve(os.environ).rank
        except LaunchError:
            return 0
    return _identity.rank


def _render(message: object, arguments: Any) -> str:
    try:
        return str(message) % arguments if arguments else str(message)
    except Exception as error:
        return f"{message!r} with {arguments!r} ({type(error).__name__}: {error})"


def _say_on_stderr(line: str) -> None:
    with contextlib.suppress(Exception):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
