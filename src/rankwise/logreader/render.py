"""A group of records as a line for people, or as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import IO

from rankwise.logreader.filters import level_number
from rankwise.logreader.folding import Group
from rankwise.logreader.records import stack_of, step_of, traceback_of
from rankwise.logs.fold import ranks_as_text

Paint = Callable[[str, str], str]
"""Gives a text in a style of rich: paint("bold red", text)."""

_INDENT = "    "
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_MAX_RANKS_LENGTH = 120


class Renderer:
    """Writes groups as lines with columns: time, level, rank, then logger and message.

    Args:
        ranks: those there may be; they give the width of the column.
        paint: for a terminal, which gets colour, and the date on a line of its own when it changes; else None.

    Ranks: local.
    """

    def __init__(self, ranks: Iterable[int], paint: Paint | None) -> None:
        self._width = len(f"rank {max(ranks, default=0)}")
        self._paint = paint
        self._day = ""

    def render(self, group: Group) -> str:
        """The lines of one group, with their ends."""
        fields = group.first.fields
        time = group.first.time.decode()[:-3]
        first, *others = _safe(str(fields["message"])).splitlines() or [""]
        others += _safe(traceback_of(fields)).splitlines() + _safe(stack_of(fields)).splitlines()
        level = _word(fields.get("level", ""))
        label = f"rank {group.first.rank}"  # of a group the first, whose numbers the message has
        columns = (f"{level:<8}", f"{label:<{self._width}}", _word(fields.get("logger", "")))
        notes = _notes(group)
        if self._paint is None:
            text = f"{time}Z {columns[0]} {columns[1]}  {columns[2]}: {first}{notes}\n"
        else:
            text = self._painted(time, level_number(level), columns, first, notes)
        return text + "".join(f"{_INDENT}{line}\n" for line in others)

    def _painted(self, time: str, level: int, columns: tuple[str, str, str], message: str, notes: str) -> str:
        assert self._paint is not None
        day, _, clock = time.partition("T")
        header = self._paint("dim", f"-- {day} UTC --") + "\n" if day != self._day else ""
        self._day = day
        style = _style(level)
        head = (self._paint("dim", clock), self._paint(style, columns[0]), self._paint("cyan", columns[1]))
        said = self._paint(style, message) if level >= 30 else message
        return f"{header}{' '.join(head)}  {self._paint('dim', columns[2] + ':')} {said}{self._paint('cyan', notes)}\n"


def render_json(group: Group, *, is_folded: bool) -> str:
    """The record as it stands in the file; folded, the first, and with it the ranks and how many there were.

    Ranks: local.
    """
    if not is_folded:
        return group.first.line.decode() + "\n"
    fields = group.first.fields | {"count": group.count, "ranks": list(group.ranks), "numbers_differ": group.differs}
    return json.dumps(fields) + "\n"


def painter(stream: IO[str]) -> Paint | None:
    """Colours for the stream where it is a terminal that has them; None elsewhere, and with NO_COLOR.

    Ranks: local.
    """
    if not stream.isatty():
        return None
    from rich.color import ColorSystem
    from rich.console import Console
    from rich.style import Style

    console = Console(file=stream)
    if console.color_system is None or console.no_color:
        return lambda style, text: text
    return lambda style, text: Style.parse(style).render(text, color_system=ColorSystem.STANDARD)


def _notes(group: Group) -> str:
    notes = []
    if group.count > 1:
        notes.append(f"x{group.count}")
        ranks = group.ranks
        notes.append(("ranks " if len(ranks) > 1 else "rank ") + _shortened(ranks_as_text(ranks)))
        if group.differs:
            notes.append("numbers differ")
    elif group.first.worker is not None:
        notes.append(f"worker {_word(group.first.fields.get('worker', group.first.worker))}")
    step = step_of(group.first.fields)
    if step is not None:
        notes.append(f"step {step}")
    return f"  ({', '.join(notes)})" if notes else ""


def _shortened(ranks: str) -> str:
    if len(ranks) <= _MAX_RANKS_LENGTH:
        return ranks
    return ranks[:_MAX_RANKS_LENGTH].rpartition(",")[0] + ", ..."


def _style(level: int) -> str:
    if level >= 40:
        return "bold red"
    if level >= 30:
        return "yellow"
    return "green" if level >= 20 else "dim"


def _word(value: object) -> str:
    return " ".join(_safe(str(value)).splitlines())


def _safe(text: str) -> str:
    """The text without what a terminal would obey: another's log must not move the cursor or set the title."""
    if text.isprintable():
        return text
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text.replace("\r\n", "\n"))
