"""The records of all ranks by time, in memory that does not grow with their number.

Clocks of hosts differ, and one may be set back while a run goes on: between streams the time decides, within a stream
always the order of its lines.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rankwise.logreader.options import Ranges, is_within
from rankwise.logreader.records import Head, read_head
from rankwise.logreader.streams import Stream, Tally, find_streams, rank_of

_BLOCKS_BYTES = 48 << 20
"""What the blocks of all streams may take together, so that 1024 ranks need no more memory than 16."""
_MIN_BLOCK_BYTES, _MAX_BLOCK_BYTES = 16 << 10, 1 << 20
_NUM_OTHER_FILES = 64

Select = Callable[[Head, bytes], tuple[dict[str, Any] | None, bool]]


class Entry(NamedTuple):
    """One record in its place; entries compare by time, and at the same time by stream."""

    time: bytes
    order: int
    line: bytes
    fields: dict[str, Any]
    rank: int
    worker: int | None


class Streams:
    """All streams in a folder; new files are found by `refresh`.

    Raises:
        OSError: the folder is there and cannot be listed.
    Ranks: local; it only reads.
    """

    def __init__(self, folder: Path, ranks: Ranges | None, select: Select) -> None:
        self.tally = Tally()
        self.known_ranks: set[int] = set()
        self._folder, self._ranks, self._select = folder, ranks, select
        self._streams: dict[str, Stream] = {}
        self._cut: dict[str, bytes | None] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self._streams)

    def refresh(self) -> None:
        """Find files that are new, and those that were rotated."""
        try:
            found = find_streams(os.listdir(self._folder))
        except FileNotFoundError:  # the run has not begun to write
            return
        self.known_ranks = {rank_of(stem) for stem in found}
        if self._ranks is not None:
            found = {stem: names for stem, names in found.items() if is_within(rank_of(stem), self._ranks)}
        keep_open = _may_open(len(found))
        block_bytes = min(max(_BLOCKS_BYTES // max(len(found), 1), _MIN_BLOCK_BYTES), _MAX_BLOCK_BYTES)
        for stem, rotated in found.items():
            if stem not in self._streams:
                self._streams[stem] = Stream(
                    self._folder, stem, self.tally, block_bytes=block_bytes, keep_open=keep_open
                )
            self._streams[stem].update(rotated)

    def entries(self, *, is_final: bool) -> Iterator[Entry]:
        """What has been written and not been read yet, merged; see `Stream.lines` for the last line of a file."""
        yield from heapq.merge(
            *(self._select_from(order, stream, is_final) for order, stream in enumerate(self._streams.values()))
        )

    def go_back(self, num_bytes: int) -> bool:
        """Go to about so many bytes before the end of each stream; False where that is the beginning of all."""
        self.tally.num_foreign.clear()
        self._cut = {stem: None for stem, stream in self._streams.items() if stream.go_back(num_bytes)}
        return bool(self._cut)

    def complete_from(self) -> bytes:
        """The time since when all records are read; told once `entries` has given one, or ended."""
        return max((time for time in self._cut.values() if time is not None), default=b"")

    def close(self) -> None:
        """Close every file."""
        for stream in self._streams.values():
            stream.close()

    def _select_from(self, order: int, stream: Stream, is_final: bool) -> Iterator[Entry]:
        for line in stream.lines(is_final=is_final):
            head = read_head(line)
            if stream.stem in self._cut and self._cut[stream.stem] is None and head is not None:
                self._cut[stream.stem] = head.time
            fields, is_record = self._select(head, line) if head is not None else (None, False)
            if not is_record:
                self.tally.add_foreign(stream.file)
            elif head is not None and fields is not None:
                yield Entry(head.time, order, line, fields, stream.rank, stream.worker)


def _may_open(num_files: int) -> bool:
    """Whether so many files may be open at once; the process's own limit is raised where the system lets it."""
    needed = num_files + _NUM_OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed and (hard == resource.RLIM_INFINITY or needed <= hard):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft == resource.RLIM_INFINITY or needed <= soft
