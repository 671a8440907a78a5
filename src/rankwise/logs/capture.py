"""What reaches people by other ways than logging: uncaught exceptions, warnings, and prints where that is asked for."""

from __future__ import annotations

import builtins
import logging
import sys
import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

from rankwise.logs.record import FILE_ONLY, SHOWN

_print_logger = logging.getLogger("print")
_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


class Capture:
    """Puts hooks in place that make records; `close` takes them out where they are still the outermost.

    Where another hook was put around one of them, it stays inside and only passes on.

    Args:
        flush: brings the console up to date, so that the traceback of a dying process stands last.
        prints: make INFO records of what `print` writes to stdout.
    """

    def __init__(self, flush: Callable[[], object], *, prints: bool = False) -> None:
        self._flush = flush
        self._is_closed = False
        self._thread = threading.local()
        self._begun: dict[threading.Thread, str] = {}
        self._hooks: list[tuple[Any, str, Any, Any]] = []
        self._put(sys, "excepthook", self._on_exception(sys.excepthook))
        self._put(threading, "excepthook", self._on_thread_exception(threading.excepthook))
        self._put(warnings, "showwarning", self._on_warning(warnings.showwarning))
        if prints:
            self._put(builtins, "print", self._on_print(builtins.print))

    def close(self) -> None:
        """Restore what was there before.

        Ranks: local.
        """
        self.end_lines()
        self._is_closed = True
        for home, name, hook, previous in reversed(self._hooks):
            if getattr(home, name) is hook:
                setattr(home, name, previous)

    def end_lines(self) -> None:
        """Make records of what threads have printed without ending the line.

        Ranks: local.
        """
        for thread in list(self._begun):
            self._end_line(thread)

    def after_fork_in_child(self) -> None:
        """Leave the lines that were begun to the parent, which has them too.

        Ranks: local.
        """
        self._begun.clear()

    def _put(self, home: Any, name: str, hook: Any) -> None:
        self._hooks.append((home, name, hook, getattr(home, name)))
        setattr(home, name, hook)

    def _on_exception(self, previous: _Hook) -> _Hook:
        def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            if not self._is_closed:
                words = f"uncaught {kind.__name__} in the main thread"
                # The console has the traceback from the hooks before this one.
                logging.getLogger("rankwise.logs").critical(words, exc_info=(kind, error, trace), extra=FILE_ONLY)
                self._flush()
            previous(kind, error, trace)

        return hook

    def _on_thread_exception(
        self, previous: Callable[[threading.ExceptHookArgs], object]
    ) -> Callable[[threading.ExceptHookArgs], None]:
        def hook(args: threading.ExceptHookArgs) -> None:
            # Threading's own hook would print what the console of the main process shows; anybody else's is called.
            is_default = previous is threading.__excepthook__
            if not self._is_closed and args.exc_value is not None and args.exc_type is not SystemExit:
                name = args.thread.name if args.thread is not None else "unknown"
                logging.getLogger("rankwise.logs").error(
                    "uncaught %s in thread %s",
                    args.exc_type.__name__,
                    name,
                    exc_info=(args.exc_type, args.exc_value, args.exc_traceback),
                    extra=SHOWN if is_default else FILE_ONLY,
                )
                if is_default:
                    return
            previous(args)

        return hook

    def _on_warning(self, previous: Callable[..., None]) -> Callable[..., None]:
        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if self._is_closed or file is not None:
                previous(message, category, filename, lineno, file, line)
                return
            logging.getLogger("py.warnings").warning("%s: %s (%s:%d)", category.__name__, message, filename, lineno)

        return show

    def _on_print(self, previous: Callable[..., None]) -> Callable[..., None]:
        def print_(*values: object, sep: str | None = " ", end: str | None = "\n", **options: Any) -> None:
            file = options.get("file")
            is_elsewhere = file is not None and file is not sys.stdout
            # A handler that prints what it is given would come back here without end.
            is_inside = getattr(self._thread, "is_saying", False)
            if self._is_closed or is_elsewhere or is_inside or not _print_logger.isEnabledFor(logging.INFO):
                previous(*values, sep=sep, end=end, **options)
                return
            said = (" " if sep is None else sep).join(map(str, values)) + ("\n" if end is None else end)
            thread = threading.current_thread()
            *lines, rest = (self._begun.pop(thread, "") + said).split("\n")
            if rest:
                for ended in [other for other in list(self._begun) if not other.is_alive()]:
                    self._end_line(ended)  # else they would gather until the end
                self._begun[thread] = rest
            for text in lines:
                self._say_printed(text)

        return print_

    def _end_line(self, thread: threading.Thread) -> None:
        if begun := self._begun.pop(thread, ""):
            self._say_printed(begun)

    def _say_printed(self, text: str) -> None:
        self._thread.is_saying = True
        try:
            # What was written over is not what the line says.
            _print_logger.info("%s", text.rstrip("\r").rpartition("\r")[2])
        finally:
            self._thread.is_saying = False
