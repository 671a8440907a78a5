"""The warnings of a whole run, equal ones as one, and how many records there are of each level."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.errors import RankwiseError
from rankwise.logreader.filters import level_number
from rankwise.logreader.folding import Group
from rankwise.logreader.follow import read_groups
from rankwise.logreader.merge import Streams
from rankwise.logreader.records import Head, message_of, read_fields, step_of, traceback_of
from rankwise.logreader.streams import find_streams
from rankwise.logs.fold import pattern, ranks_as_text

_WARNING = 30
MAX_GROUPS = 300
"""Messages of different words; the most serious and most frequent ones."""
_MAX_MESSAGE = 2_000
_MAX_TRACEBACK = 6_000


@dataclass
class Said:
    """One message, numbers aside, over the whole run."""

    first: Group
    count: int = 0
    rank_bits: int = 0
    last_time: bytes = b""
    differs: bool = False

    def add(self, group: Group) -> None:
        """Count a group of the folder."""
        self.count += group.count
        self.rank_bits |= group.rank_bits
        self.last_time = max(self.last_time, group.first.time)
        is_equal = message_of(group.first.fields) == message_of(self.first.first.fields)
        self.differs = self.differs or group.differs or not is_equal


@dataclass(frozen=True)
class LogSummary:
    """Levels with the number of their records, and the messages from WARNING on, the worst first."""

    levels: dict[str, int]
    said: list[Said]
    num_foreign: int = 0
    """Lines that are no whole records."""


def summarise_logs(run_dir: Path) -> LogSummary | None:
    """What the logs say; None where there are none.

    Raises:
        RankwiseError: their folder cannot be listed.
    Ranks: local.
    """
    folder = run_dir / "logs"
    levels: Counter[str] = Counter()

    def select(head: Head, line: bytes) -> tuple[dict[str, Any] | None, bool]:
        levels[head.level] += 1
        if level_number(head.level) < _WARNING:
            return None, True
        fields = head.fields if head.fields is not None else read_fields(line)
        return fields, fields is not None

    try:
        if not find_streams(os.listdir(folder)):
            return None
        streams = Streams(folder, None, select)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RankwiseError(f"{folder} cannot be listed: {error.strerror}.") from error
    said: dict[tuple[str, str, str], Said] = {}
    try:
        for group in read_groups(streams, is_folded=True, tail=None, is_final=True):
            fields = group.first.fields
            key = str(fields.get("level")), str(fields.get("logger")), pattern(message_of(fields))
            said.setdefault(key, Said(group)).add(group)
    finally:
        streams.close()
    ordered = sorted(said.values(), key=lambda one: (-level_number(level_of(one)), -one.count))
    return LogSummary(dict(levels), ordered, sum(streams.tally.num_foreign.values()))


def level_of(said: Said) -> str:
    """The level of a message, as its record names it.

    Ranks: local.
    """
    return str(said.first.first.fields.get("level", ""))


def as_row(said: Said) -> dict[str, Any]:
    """The message as it goes into the page.

    Ranks: local.
    """
    fields = said.first.first.fields
    return {
        "level": level_of(said),
        "logger": str(fields.get("logger", "")),
        "message": shortened(message_of(fields), _MAX_MESSAGE),
        "traceback": shortened(traceback_of(fields), _MAX_TRACEBACK),
        "count": said.count,
        "ranks": ranks_text(said.rank_bits),
        "differs": said.differs,
        "step": step_of(fields),
        "first": said.first.first.time.decode()[:19].replace("T", " "),
        "last": said.last_time.decode()[:19].replace("T", " "),
    }


def ranks_text(bits: int, most: int = 60) -> str:
    """The ranks that bits stand for, as "0-3, 7"; a long list is cut, and counted.

    Ranks: local.
    """
    ranks = [index for index, bit in enumerate(reversed(f"{bits:b}")) if bit == "1"]
    text = ranks_as_text(ranks)
    return text if len(text) <= most else f"{len(ranks):,} ranks: {text[:most].rpartition(',')[0]}, ..."


def shortened(text: str, most: int) -> str:
    """The text, cut where it is too long for a page; half characters are replaced.

    Ranks: local.
    """
    whole = text if len(text) <= most else f"{text[:most]} ... ({len(text) - most} more characters)"
    return whole.encode("utf-8", "replace").decode()
