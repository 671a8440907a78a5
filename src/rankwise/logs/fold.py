"""Many lines that say the same as one: what two messages have in common, and which ranks said it."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

WINDOW_SECONDS = 1.0
"""How long a record waits for equal ones of other ranks."""
MAX_WINDOW_SECONDS = 10.0
"""How long at most the repeats of a line that does not end are counted before they are a line again."""
FLOOD_SECONDS = 2.0
"""A line that comes again after a longer pause is no repeat, but news."""
MAX_KNOWN_PATTERNS = 1000
MAX_PATTERN_LENGTH = 4096
"""Characters in which numbers are looked for: the search holds the GIL, a third of a second for a million."""

_NUMBER = re.compile(
    r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b"  # a UUID
    r"|\b0x[0-9a-f]+"
    r"|\b(?=[a-f]*[0-9])[0-9a-f]{8,}\b"  # a digest
    r"|[+-]?[0-9]+(?:,[0-9]{3}\b)*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?",
    re.IGNORECASE,
)


def pattern(message: str) -> str:
    """The message with every number in it as `#`: messages of one pattern differ in numbers only.

    Digits, decimals, exponents, hexadecimal numbers, digests and UUIDs count as numbers; nan and inf do not, since a
    loss that became nan is news. What comes after 4,096 characters has to be equal, and is told by its hash.

    Ranks: local.
    """
    head = _NUMBER.sub("#", message[:MAX_PATTERN_LENGTH])
    return head if len(message) <= MAX_PATTERN_LENGTH else f"{head}{hash(message[MAX_PATTERN_LENGTH:])}"


def ranks_as_text(ranks: Iterable[int]) -> str:
    """Ranks in ascending order, neighbours as a range: "0-3, 7, 9-12".

    Ranks: local.
    """
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


Record = Mapping[str, Any]
"""A record as in the file of its rank; `level`, `logger`, `message` and `rank` must be there."""


@dataclass(frozen=True)
class Line:
    """One line for a person: a record, and how many others it stands for."""

    record: Record
    """The first of them; the newest where the line is a repeat."""
    count: int = 1
    ranks: tuple[int, ...] = ()
    is_exact: bool = True
    """Whether all messages are equal to the letter."""
    is_repeat: bool = False
    """Whether a line of the same pattern was shown a short time before."""

    def as_record(self) -> dict[str, Any]:
        """The line as a record that another `Folder` takes for as many as it stands for.

        Ranks: local.
        """
        folded = {"count": self.count, "numbers_differ": not self.is_exact} if self.count > 1 else {}
        return {**self.record, **folded}


@dataclass
class _Batch:
    """Records of one pattern that wait to become a line."""

    first: Record | None = None
    newest: Record | None = None
    count: int = 0
    ranks: set[int] = field(default_factory=set)
    is_exact: bool = True
    due: float = 0.0
    num_lines: int = 0
    """Lines in a row, none of which came long after the one before."""
    last_shown: float = -math.inf
    last_seen: float = -math.inf
    known_ranks: set[int] = field(default_factory=set)


_Key = tuple[str, str, str, str]


class Folder:
    """Makes few lines of many records, and loses none: each is in the count of some line.

    A record below WARNING of the rank itself is a line at once, until there are more than `max_lines` within a window.
    Others wait for a window, in which those that differ in rank and numbers only become one line. Where the same goes
    on and on, with no pause of two seconds, the window doubles up to ten seconds, but a rank that had not said it
    before is shown after a short one.

    Args:
        own_rank: whose records below WARNING are lines at once.
        is_alone: no other rank will say the same, so the first record of a pattern waits for none.
        max_lines: how many lines a window may show at once, and how many patterns may wait; what is more is counted.
            WARNING and above has as much room again, of its own, so that nothing below it takes it away.
    """

    def __init__(
        self, own_rank: int, *, is_alone: bool = False, window_seconds: float = WINDOW_SECONDS, max_lines: int = 100
    ) -> None:
        self._own_rank = own_rank
        self._is_alone = is_alone
        self._window_seconds = window_seconds
        self._max_lines = max_lines
        self._batches: dict[_Key, _Batch] = {}
        self._waiting: dict[_Key, _Batch] = {}
        self._num_waiting = {True: 0, False: 0}
        # When the window began, and how many lines were shown in it; for WARNING and above, and for what is below.
        self._windows = {True: (-math.inf, 0), False: (-math.inf, 0)}

    def add(self, record: Record, now: float) -> list[Line]:
        """Take a record up, and give the lines that are due.

        Ranks: local.
        """
        key = _key(record)
        is_plain = record["rank"] == self._own_rank and not is_urgent(record["level"])
        has_room = (is_plain or self._is_alone) and key not in self._waiting and self._has_room(key, now)
        if is_plain and has_room:
            return [*self.due(now), _as_line(record)]
        self._put(key, record, now, holds=not has_room)
        return self.due(now)

    def due(self, now: float) -> list[Line]:
        """The lines whose time has come.

        Ranks: local.
        """
        lines = []
        for key in [key for key, batch in self._waiting.items() if batch.due <= now]:
            lines.append(self._finish(key, now))
        return lines

    def next_due(self) -> float | None:
        """When `due` has the next line; None where nothing waits.

        Ranks: local.
        """
        return min((batch.due for batch in self._waiting.values()), default=None)

    def num_records(self) -> int:
        """How many records wait to become lines.

        Ranks: local.
        """
        return sum(batch.count for batch in list(self._waiting.values()))

    def flush(self, now: float) -> list[Line]:
        """All that waits, as lines.

        Ranks: local.
        """
        return [self._finish(key, now) for key in list(self._waiting)]

    def _put(self, key: _Key, record: Record, now: float, *, holds: bool) -> None:
        if key not in self._waiting and self._num_waiting[is_urgent(key[0])] >= self._max_lines:
            key = (key[0], "", "", "")
        batch = self._batches.setdefault(key, _Batch())
        rank = record["rank"]
        if batch.first is None:
            batch.first = record
            self._set_due(batch, now, holds)
            self._waiting[key] = batch
            self._num_waiting[is_urgent(key[0])] += 1
        if rank not in batch.known_ranks:
            batch.due = min(batch.due, now + self._window_seconds)
        if _words(record) != _words(batch.first) or record.get("numbers_differ"):
            batch.is_exact = False
        batch.newest = record
        batch.last_seen = now
        batch.count += record.get("count", 1)
        batch.ranks.add(rank)
        batch.known_ranks.add(rank)

    def _set_due(self, batch: _Batch, now: float, holds: bool) -> None:
        window = self._window_seconds
        interval = min(window * 2 ** max(0, batch.num_lines - 1), MAX_WINDOW_SECONDS)
        if now - batch.last_seen > FLOOD_SECONDS:
            batch.num_lines = 0
            batch.due = now + (window if holds else 0.0)
            return
        batch.due = max(batch.last_shown + interval, now)

    def _finish(self, key: _Key, now: float) -> Line:
        batch = self._waiting.pop(key)
        self._num_waiting[is_urgent(key[0])] -= 1
        record = batch.newest if batch.num_lines else batch.first
        assert record is not None, "what waits has a record"
        line = Line(record, batch.count, tuple(sorted(batch.ranks)), batch.is_exact, batch.num_lines > 0)
        if not key[1]:
            # Without a number in the words: the counts of many ranks add up.
            words = "lines of other kinds, too many to show; the files of the ranks hold them"
            told = {**record, "logger": "rankwise.logs", "message": words, "exception": None, "stack": None}
            line = Line(told, batch.count, line.ranks)
        batch.first, batch.newest, batch.count, batch.ranks, batch.is_exact = None, None, 0, set(), True
        batch.num_lines += 1
        batch.last_shown = now
        # The newest last, so that the first ones are those to forget.
        self._batches[key] = self._batches.pop(key)
        if len(self._batches) > MAX_KNOWN_PATTERNS:
            oldest = next((known for known in self._batches if known not in self._waiting), key)
            del self._batches[oldest]
        return line

    def _has_room(self, key: _Key, now: float) -> bool:
        urgent = is_urgent(key[0])
        begin, num_lines = self._windows[urgent]
        if now - begin >= self._window_seconds:
            begin, num_lines = now, 0
        self._windows[urgent] = (begin, num_lines + 1)
        return num_lines < self._max_lines


def _as_line(record: Record) -> Line:
    return Line(record, record.get("count", 1), (record["rank"],), not record.get("numbers_differ"))


def is_urgent(level: str) -> bool:
    """Whether records of the level are those that no flood of others may displace.

    Ranks: local.
    """
    return level_number(level) >= logging.WARNING


def level_number(name: str) -> int:
    """The number of a level; INFO where nobody knows it.

    Ranks: local.
    """
    number = logging.getLevelName(name)
    if isinstance(number, int):
        return number
    digits = name.removeprefix("Level ")
    return int(digits) if digits.isdecimal() else logging.INFO


def _words(record: Record) -> tuple[str, str, str]:
    """What a record says: its message, and its exception's type and message, but not the lines of the traceback."""
    exception = record.get("exception") or {}
    return record["message"], str(exception.get("type", "")), str(exception.get("message", ""))


def _key(record: Record) -> _Key:
    message, error, reason = _words(record)
    return record["level"], record["logger"], pattern(message), f"{error}: {pattern(reason)}" if error else ""
