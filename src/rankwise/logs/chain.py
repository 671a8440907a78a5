"""The way of a record to our handler, whatever else is done to loggers, and consoles that are silent meanwhile."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable

TAKEN = "rankwise_taken"
"""Set on a record that our handler has had, while other handlers have it: one may send it on to our handler."""

_STDOUT, _STDERR = 1, 2


class Chain:
    """Brings every enabled record of every logger to the handler, once, until it is closed.

    A handler on the root logger alone misses the loggers that do not propagate, as those of transformers, datasets and
    Lightning, and is taken off by `logging.basicConfig(force=True)` and `logging.config.dictConfig`. All of them pass
    `Logger.callHandlers`, which a call that is filtered out never reaches, so that such a call costs what it did.

    Handlers that are a plain `logging.StreamHandler` on stdout or stderr, and Python's last resort, say nothing
    meanwhile: every rank would print there what the main process shows once. Handlers of any other class, files and
    streams elsewhere get what they always got.

    What loggers keep from the root is kept from the console too, unless it is a warning or a silent console would have
    shown it; and from the file, if nothing but a `logging.NullHandler` has it.

    Args:
        level: of the session. What a logger's own level lets through below it is for the console only where a silent
            console would have shown it, or there is none.
    """

    def __init__(self, handler: logging.Handler, level: int) -> None:
        self._handler = handler
        self._level = level
        self._is_closed = False
        self._silenced: weakref.WeakSet[logging.Handler] = weakref.WeakSet()
        if logging.lastResort is not None:
            self._silence(logging.lastResort)
        self._previous = logging.Logger.callHandlers
        self._call = self._wrapped(self._previous)
        logging.Logger.callHandlers = self._call  # type: ignore[method-assign, assignment]

    def close(self) -> None:
        """Restore what was there; where others have put their own around ours, it stays inside and only passes on.

        Ranks: local.
        """
        self._is_closed = True
        if logging.Logger.callHandlers is self._call:
            logging.Logger.callHandlers = self._previous  # type: ignore[method-assign]
        for other in list(self._silenced):
            for silence in [found for found in other.filters if isinstance(found, _Silence)]:
                other.removeFilter(silence)
        self._silenced.clear()

    def _wrapped(
        self, previous: Callable[[logging.Logger, logging.LogRecord], None]
    ) -> Callable[[logging.Logger, logging.LogRecord], None]:
        handler = self._handler

        def call_handlers(logger: logging.Logger, record: logging.LogRecord) -> None:
            if self._is_closed:
                previous(logger, record)
                return
            is_on_way = False
            others: list[logging.Handler] = []
            link: logging.Logger | None = logger
            last = logger
            while link is not None:
                last = link
                for other in link.handlers:
                    if other is handler:
                        is_on_way = True
                    else:
                        others.append(other)
                        if type(other) is logging.StreamHandler and other not in self._silenced:
                            self._silence(other)
                link = link.parent if link.propagate else None
            is_wanted = self._is_wanted(record, others, is_whole=last.parent is None)
            if is_on_way or not is_wanted or getattr(record, TAKEN, False):
                previous(logger, record)
                return
            # Ours first: it is in the file even if another handler hangs.
            handler.handle(record)
            setattr(record, TAKEN, True)
            try:
                previous(logger, record)
            finally:
                delattr(record, TAKEN)

        return call_handlers

    def _is_wanted(self, record: logging.LogRecord, others: list[logging.Handler], *, is_whole: bool) -> bool:
        """Whether the record is for the file; where it is not for the console it is marked so.

        Args:
            is_whole: the record goes on to the root logger, where our handler stands or stood.
        """
        level = record.levelno
        if is_whole and level >= self._level:
            return True
        consoles = [other for other in others if other in self._silenced and _is_on_console(other)]
        is_for_console = any(level >= other.level for other in consoles)
        if is_whole:
            is_for_file = True
            is_for_console = is_for_console or not consoles
        else:
            # A handler that does nothing, alone, is how libraries switch a logger off.
            is_off = bool(others) and all(isinstance(other, logging.NullHandler) for other in others)
            is_for_console = is_for_console or (level >= logging.WARNING and not is_off)
            is_for_file = is_for_console or (level >= self._level and not is_off)
        if not is_for_console:
            record.rankwise_file_only = True
        return is_for_file

    def _silence(self, other: logging.Handler) -> None:
        other.addFilter(_Silence(other, self))
        self._silenced.add(other)

    @property
    def is_closed(self) -> bool:
        """Whether other consoles may speak again.

        Ranks: local.
        """
        return self._is_closed


class _Silence(logging.Filter):
    """Refuses all records of a handler while it writes to the console."""

    def __init__(self, handler: logging.Handler, chain: Chain) -> None:
        super().__init__()
        self._handler = weakref.ref(handler)  # a cycle would keep it until the collector comes
        self._chain = chain

    def filter(self, record: logging.LogRecord) -> bool:
        handler = self._handler()
        return self._chain.is_closed or handler is None or not _is_on_console(handler)


def _is_on_console(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", None)
    if stream in (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__):
        return True
    try:
        return stream is not None and stream.fileno() in (_STDOUT, _STDERR)
    except Exception:
        return False  # no file, or a closed one
