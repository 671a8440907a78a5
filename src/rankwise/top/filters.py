"""Which ranks are shown: `lag>0`, `host=node-3`, `rank=0-7,12`, `data>20 stale`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection

from rankwise.logreader.options import is_within, parse_ranges
from rankwise.telemetry import OTHER, PHASES
from rankwise.top.columns import COLUMNS
from rankwise.top.rows import MARKS, Row

Keep = Callable[[Row], bool]
"""Whether a row is shown."""

_TERM = re.compile(r"([A-Za-z_/]\w*(?:/s)?)(>=|<=|!=|>|<|=)(.*)", re.ASCII)
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "=": operator.eq,
    "!=": operator.ne,
}
_NUMBERS = {column.name: column.value for column in COLUMNS if column.name not in ("host", "device", "note", "rank")}
_TEXTS: dict[str, Callable[[Row], str | None]] = {
    "host": lambda row: row.host,
    "device": lambda row: row.device,
    "phase": lambda row: row.phase,
}
_SIGNS = {"it/s": "pace", "phases": "own"}


def parse_filter(text: str, phases: Collection[str] = ()) -> Keep | None:
    """What the filter keeps; None where it is empty. All terms, which blanks part, have to hold.

    A term compares (`lag>0`, `age>=5`, `util<50`; a phase's name is its share in percent: `data>20`), gives ranks
    (`rank=0-7,12`), looks for a part of a name (`host=node-3`, `phase=backward`), names a mark (`note=stale`), or is a
    word that the host, the device, the phase or a mark has in it, or a number, which is a rank. A rank of which
    something is not known is not kept by a comparison with it.

    Args:
        phases: that the program has, besides those that every reader knows.
    Raises:
        ValueError: a term cannot be understood; the message is for the user.
    Ranks: local.
    """
    terms = [_term(term, {*PHASES, OTHER, *phases}) for term in text.split()]
    if not terms:
        return None
    return lambda row: all(keep(row) for keep in terms)


def _term(term: str, phases: Collection[str]) -> Keep:
    match = _TERM.fullmatch(term)
    if match is None:
        return _word(term)
    name, sign, value = match.groups()
    name = name if name in phases else _SIGNS.get(name.lower(), name.lower())
    if not value:
        raise ValueError(f"{term!r} lacks a value, as in lag>0 or host=node-3")
    if name == "rank" and sign in ("=", "!="):
        ranges = parse_ranges(value)
        return lambda row: is_within(row.rank, ranges) == (sign == "=")
    if name in (*_TEXTS, "note"):
        if sign not in ("=", "!="):
            raise ValueError(f"{term!r} compares a name; write {name}=...")
        return _naming(name, value.lower(), wanted=sign == "=")
    if name not in ("rank", *_NUMBERS, *phases):
        known = ", ".join(["rank", "host", "device", "phase", "note", *_NUMBERS])
        raise ValueError(f"{term!r} is about nothing that is there; there are {known} and the phases' names")
    try:
        number = float(value)
    except ValueError as error:
        raise ValueError(f"{term!r} lacks a number, as in {name}>5") from error
    return _comparing(name, _COMPARE[sign], number)


def _naming(name: str, value: str, *, wanted: bool) -> Keep:
    if name == "note":
        if value not in MARKS:
            raise ValueError(f"{value!r} is no note; there are {', '.join(MARKS)}")
        return lambda row: (value in row.marks) == wanted
    text = _TEXTS[name]
    return lambda row: (value in (text(row) or "").lower()) == wanted


def _comparing(name: str, compare: Callable[[float, float], bool], number: float) -> Keep:
    def keep(row: Row) -> bool:
        if name == "rank":
            return compare(row.rank, number)
        value = _NUMBERS[name](row) if name in _NUMBERS else _percent(row, name)
        return value is not None and compare(value, number)

    return keep


def _percent(row: Row, phase: str) -> float | None:
    return row.phases.get(phase, 0.0) * 100 if row.phases else None


def _word(term: str) -> Keep:
    if term.isdecimal():
        rank = int(term)
        return lambda row: row.rank == rank
    wanted = term.lower()
    return lambda row: any(
        wanted in text.lower() for text in (row.host, row.device, row.phase, *row.marks) if text is not None
    )
