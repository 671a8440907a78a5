"""Records of many ranks that say the same, near each other in time, as one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from rankwise.logreader.merge import Entry
from rankwise.logreader.records import message_of, step_of
from rankwise.logs.fold import pattern

_MAX_OPEN = 2000
"""Groups that still take records; more different lines than this in one window are not folded."""
_MAX_ALIKE = 32
"""Open groups of one pattern that are tried."""

Key = tuple[int | None, str, str, str]


@dataclass
class Group:
    """The first of records that say the same, and who said it."""

    first: Entry
    deadline: bytes
    opened: float
    count: int
    rank_bits: int
    """Bit n stands for rank n: a thousand open groups of a thousand ranks each stay small."""
    differs: bool = False
    """Whether numbers in the messages differ."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that said it, ascending."""
        bits = self.rank_bits
        found = []
        while bits:
            lowest = bits & -bits
            found.append(lowest.bit_length() - 1)
            bits ^= lowest
        return tuple(found)

    def add(self, rank: int, *, is_equal: bool) -> None:
        """Count a record."""
        self.count += 1
        self.rank_bits |= 1 << rank
        self.differs = self.differs or not is_equal


class Folder:
    """Folds a merged stream of records.

    Equal records join from any rank. One that differs in numbers joins a group that lacks its rank: the losses of one
    rank step by step stay lines of their own, and meet those of the other ranks line by line.

    Args:
        window_seconds: how long after its first record a group takes more.

    Ranks: local.
    """

    def __init__(self, window_seconds: float) -> None:
        self._window = timedelta(seconds=window_seconds)
        self._open: deque[Group] = deque()  # in the order of their first records, and so of their deadlines
        self._equal: dict[Key, Group] = {}
        self._alike: dict[Key, deque[Group]] = {}

    def add(self, entry: Entry, now: float = 0.0) -> list[Group]:
        """Take a record; gives the groups that are complete by its time. `now` is only kept, as `Group.opened`."""
        complete = []
        while self._open and (self._open[0].deadline < entry.time or len(self._open) >= _MAX_OPEN):
            complete.append(self._close_first())
        key = _key(entry)
        group = self._equal.get(key)
        if group is not None:
            group.add(entry.rank, is_equal=True)
            return complete
        alike = self._alike.setdefault(_key_without_numbers(key), deque(maxlen=_MAX_ALIKE))
        for group in alike:
            if not group.rank_bits >> entry.rank & 1:
                group.add(entry.rank, is_equal=False)
                return complete
        group = Group(entry, _later(entry.time, self._window), now, 1, 1 << entry.rank)
        self._open.append(group)
        self._equal[key] = group
        alike.append(group)
        return complete

    def flush(self, opened_before: float = float("inf")) -> Iterator[Group]:
        """The groups opened before a moment, complete or not."""
        while self._open and self._open[0].opened < opened_before:
            yield self._close_first()

    def _close_first(self) -> Group:
        group = self._open.popleft()
        key = _key(group.first)
        del self._equal[key]
        key = _key_without_numbers(key)
        alike = self._alike[key]
        if alike[0] is group:  # else it left when there were too many
            alike.popleft()
        if not alike:
            del self._alike[key]
        return group


def single(entry: Entry) -> Group:
    """A record alone, for where nothing is folded.

    Ranks: local.
    """
    return Group(entry, entry.time, 0.0, 1, 1 << entry.rank)


def fold(entries: Iterable[Entry], window_seconds: float) -> Iterator[Group]:
    """The groups of a merged stream that has an end, in the order of their first records.

    Ranks: local.
    """
    folder = Folder(window_seconds)
    for entry in entries:
        complete = folder.add(entry)
        if complete:
            yield from complete
    yield from folder.flush()


def _key(entry: Entry) -> Key:
    fields = entry.fields
    return step_of(fields), str(fields.get("level", "")), str(fields.get("logger", "")), message_of(fields)


def _key_without_numbers(key: Key) -> Key:
    step, level, logger, message = key
    return step, level, logger, pattern(message)


def _later(time: bytes, window: timedelta) -> bytes:
    try:
        return (datetime.fromisoformat(time.decode()) + window).isoformat(timespec="microseconds").encode()
    except (ValueError, OverflowError):  # February 31, or after the year 9999
        return time
