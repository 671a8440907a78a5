"""One record: taken up on the calling thread as cheaply as can be, put into words on another."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii as _quoted
from types import TracebackType
from typing import Any, NamedTuple

from rankwise.identity import Identity
from rankwise.logs import state
from rankwise.redact import make_live_redactor

FILE_ONLY = {"rankwise_file_only": True}
"""Pass as `extra=` for a record that belongs into the file and not on the console."""
SHOWN = {"rankwise_shown": True}
"""As `extra=`: the record belongs on the console, whatever its rank and level."""


class Item(NamedTuple):
    """A record as it waits in a queue; nothing in it changes any more."""

    created: float
    monotonic_ns: int
    level_number: int
    level: str
    logger: str
    message: str
    pid: int | None
    step: int | None
    error: dict[str, str] | None
    worker: int | str | None
    stack: str | None = None


def make_item(record: logging.LogRecord) -> Item:
    """Take up a record: formatted here, since its arguments may change as soon as the call returns.

    Ranks: local.
    """
    error = None
    if isinstance(record.exc_info, tuple) and record.exc_info[0] is not None:
        # As text, since a traceback keeps everything alive that its frames hold.
        error = {
            "type": safe_text(getattr(record.exc_info[0], "__name__", record.exc_info[0])),
            "message": safe_text(record.exc_info[1]),
            "traceback": _traceback(*record.exc_info),
        }
    return Item(
        record.created,
        time.monotonic_ns(),
        record.levelno,
        str(record.levelname),
        str(record.name),
        _message(record),
        record.process,
        state.step,
        error,
        _worker_name(record) if state.is_worker else None,
        None if not record.stack_info else safe_text(record.stack_info),
    )


def _message(record: logging.LogRecord) -> str:
    try:
        # Classes of records may put their messages together in their own way.
        return str(record.getMessage())
    except Exception:
        return render(record.msg, record.args)


def notice(message: str) -> Item:
    """A warning of the logs about themselves.

    Ranks: local.
    """
    created, now = time.time(), time.monotonic_ns()
    return Item(created, now, logging.WARNING, "WARNING", "rankwise.logs", message, os.getpid(), None, None, None)


def render(message: object, arguments: Any) -> str:
    """The message with its arguments; where they do not fit, both as they are.

    Ranks: local.
    """
    try:
        return str(message) % arguments if arguments else str(message)
    except Exception as error:
        told = ", ".join(map(_safe_repr, arguments)) if isinstance(arguments, tuple) else _safe_repr(arguments)
        told = f"({told}{',' * (len(arguments) == 1)})" if isinstance(arguments, tuple) else told
        return f"{_safe_repr(message)} with {told} ({type(error).__name__}: {safe_text(error)})"


def safe_text(value: object) -> str:
    """`str`, or what can be said of a value whose `__str__` raises.

    Ranks: local.
    """
    try:
        return str(value)
    except Exception:
        return _safe_repr(value)


def _safe_repr(value: object) -> str:
    try:
        return repr(value)
    except Exception as error:
        return f"<{type(value).__name__} that has no text: {type(error).__name__}>"


def _traceback(kind: Any, error: Any, trace: Any) -> str:
    try:
        return "".join(traceback.format_exception(kind, error, trace))
    except Exception:
        # The frames are worth more than the words of the exception.
        frames = traceback.format_tb(trace) if isinstance(trace, TracebackType) else []
        return "".join([*frames, f"{_safe_repr(kind)}: {safe_text(error)}\n"])


class Form:
    """How the records of one rank are written: with its place, and without secrets.

    Args:
        device: where the rank computes; only the console names it.
    """

    def __init__(self, identity: Identity, device: str = "", environ: Mapping[str, str] = os.environ) -> None:
        self._place = {
            "rank": identity.rank,
            "local_rank": identity.local_rank,
            "node_rank": identity.node_rank,
            "host": identity.hostname,
        }
        self._place_text = json.dumps(self._place)[1:-1]
        self._device = device
        self._clean: Callable[[str], str] = make_live_redactor(environ)

    def fields(self, item: Item) -> dict[str, Any]:
        """The record as it stands in the file.

        Ranks: local.
        """
        fields: dict[str, Any] = {
            "time": _utc(item.created),
            "monotonic_ns": item.monotonic_ns,
            "level": item.level,
            "logger": item.logger,
            "message": self._clean(item.message),
            **self._place,
            "pid": item.pid,
        }
        if item.step is not None:
            fields["step"] = item.step
        if item.error is not None:
            fields["exception"] = {name: self._clean(text) for name, text in item.error.items()}
        if item.stack is not None:
            fields["stack"] = self._clean(item.stack)
        if item.worker is not None:
            fields["worker"] = item.worker
        return fields

    def line(self, item: Item) -> bytes:
        """The record as a line of the file.

        Ranks: local.
        """
        if item.error is not None or item.worker is not None or item.stack is not None:
            return (json.dumps(self.fields(item)) + "\n").encode()
        # By hand for the common record: it takes the GIL from the training thread a third less long than json.dumps.
        step = "" if item.step is None else f', "step": {item.step}'
        return (
            f'{{"time": "{_utc(item.created)}", "monotonic_ns": {item.monotonic_ns}, "level": {_quoted(item.level)}, '
            f'"logger": {_quoted(item.logger)}, "message": {_quoted(self._clean(item.message))}, '
            f'{self._place_text}, "pid": {json.dumps(item.pid)}{step}}}\n'
        ).encode()

    def told(self, item: Item) -> dict[str, Any]:
        """The record as it goes to the console, of this process or another.

        Ranks: local.
        """
        return {**self.fields(item), "device": self._device}


def _utc(created: float) -> str:
    return datetime.fromtimestamp(created, UTC).isoformat(timespec="microseconds")


def _worker_name(record: logging.LogRecord) -> int | str | None:
    """The number of a torch data loader's worker, or the name of any other process."""
    data = sys.modules.get("torch.utils.data")
    info = data.get_worker_info() if data is not None else None
    return info.id if info is not None else record.processName
