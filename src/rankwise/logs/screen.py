"""Lines for a person on stderr: coloured columns that leave progress bars whole in a terminal, else plain text."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rankwise.logs import state
from rankwise.logs.files import say_on_stderr
from rankwise.logs.fold import Line, Record, level_number, ranks_as_text
from rankwise.logs.logger import current_rank

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_STYLES = ((logging.CRITICAL, "bold reverse red"), (logging.ERROR, "bold red"), (logging.WARNING, "yellow"))
_printing = threading.RLock()
"""Held while the one terminal is made, while a line is printed there, and while a live display begins there."""


def console() -> Console:
    """The terminal on stderr that log lines go to; one live display on it (a progress bar) is not broken by them.

    On ranks other than the main process it shows nothing, so that a progress bar is drawn once.

    Ranks: local.
    """
    return _terminal(state.is_worker or current_rank() != 0)


def forget_terminal() -> None:
    """Make a new one when it is needed: after a fork a thread that is no longer there may hold its lock.

    Ranks: local.
    """
    global _printing
    _printing = threading.RLock()
    _make_terminal.cache_clear()
    # The same is true of the lock that tqdm has for threads; the one it has for processes is let go by its holder.
    module: Any = sys.modules.get("tqdm.std")
    if hasattr(module, "TqdmDefaultWriteLock"):
        locks = module.TqdmDefaultWriteLock
        locks.th_lock = threading.RLock()
        if isinstance(getattr(module.tqdm, "_lock", None), locks):
            module.tqdm.set_lock(locks())


def _terminal(is_quiet: bool) -> Console:
    # A cache alone makes two where two threads ask first at once, and a bar on one is torn by lines on the other.
    with _printing:
        return _make_terminal(is_quiet)


@functools.cache
def _make_terminal(is_quiet: bool) -> Console:
    from rich.console import Console, RenderHook

    class Terminal(Console):
        num_hooks = 0

        def push_render_hook(self, hook: RenderHook) -> None:
            # A line that was begun without the bar, and ends after its first drawing, would stand in the bar's row.
            with _printing:
                super().push_render_hook(hook)
                self.num_hooks += 1

        def pop_render_hook(self) -> None:
            super().pop_render_hook()
            self.num_hooks -= 1

    return Terminal(stderr=True, quiet=is_quiet)


def show(lines: Iterable[Line], own_rank: int | None) -> None:
    """Print lines.

    Args:
        own_rank: whose records need no label; None labels all.
    Ranks: local.
    """
    for line in lines:
        if sys.stderr is None:
            return
        if not _is_terminal():
            say_on_stderr(as_text(line, own_rank))
            continue
        # Under tqdm's lock also while there is no bar: the first drawing of one that begins now waits for the line.
        bars = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
        with bars.get_lock() if bars is not None else contextlib.nullcontext():
            if not _show_above_tqdm(line, own_rank) and not _show_above_rich(line, own_rank):
                table = _as_table(line, own_rank)
                with _printing:
                    _terminal(False).print(table)


def as_text(line: Line, own_rank: int | None) -> str:
    """The line as plain text; a traceback follows on lines of its own.

    Ranks: local.
    """
    return f"{_clock(line.record)} {line.record['level']:<7} {_label(line, own_rank)}{_said(line)}"


def _said(line: Line) -> str:
    record = line.record
    exception = record.get("exception") or {}
    # In the order of logging.Formatter.
    below = [text.rstrip("\n") for text in (exception.get("traceback"), record.get("stack")) if text]
    return "\n".join([f"{record['logger']}: {record['message']}{_count(line)}", *below])


def _label(line: Line, own_rank: int | None) -> str:
    """Who speaks, where that is one rank and not the reader's own."""
    record = line.record
    worker = f"worker {record['worker']}" if record.get("worker") is not None else ""
    is_own = line.record["rank"] == own_rank
    if len(line.ranks) > 1 or (is_own and not worker):
        return ""
    parts = (f"rank {record['rank']}", record.get("host"), record.get("device"), worker)
    return f"[{', '.join(str(part) for part in parts if part)}] "


def _count(line: Line) -> str:
    """How many records, and of whom, the line stands for."""
    parts = []
    if line.is_repeat and line.count > 1:
        parts.append(f"... {line.count:,} more like this")
    elif line.count > 1:
        parts.append(f"x{line.count:,}")
    if len(line.ranks) > 1:
        parts.append(f"ranks {ranks_as_text(line.ranks)}")
    if not line.is_exact and not line.is_repeat:
        parts.append("numbers differ")
    return f" ({', '.join(parts)})" if parts else ""


def _clock(record: Record) -> str:
    with contextlib.suppress(KeyError, ValueError):
        return datetime.fromisoformat(record["time"]).astimezone().strftime("%H:%M:%S")
    return "--:--:--"


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except Exception:
        return False  # closed, or replaced by something that is no stream


def _as_table(line: Line, own_rank: int | None) -> Table:
    from rich.table import Table
    from rich.text import Text

    number = level_number(line.record["level"])
    style = next((style for least, style in _STYLES if number >= least), "blue" if number >= logging.INFO else "dim")
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(style=style, width=8, no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    said = Text(_label(line, own_rank), style="cyan")
    said.append(_said(line), style="default")
    table.add_row(_clock(line.record), line.record["level"], said)
    return table


def _show_above_tqdm(line: Line, own_rank: int | None) -> bool:
    """Print above tqdm's bars, if there are any."""
    bars = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    if bars is None or not getattr(bars, "_instances", None):
        return False
    bars.write(_as_columns(line, own_rank), file=sys.stderr)
    return True


def _show_above_rich(line: Line, own_rank: int | None) -> bool:
    """Print above a live display of rich on another console than ours, if there is one: it replaces stderr."""
    if not hasattr(sys.stderr, "rich_proxied_file") or getattr(_terminal(False), "num_hooks", None):
        return False
    sys.stderr.write(_as_columns(line, own_rank) + "\n")
    return True


def _as_columns(line: Line, own_rank: int | None) -> str:
    with _printing, _terminal(False).capture() as captured:
        _terminal(False).print(_as_table(line, own_rank))
    return captured.get().rstrip("\n")
