"""Groups of records one after another, once and, with --follow, from then on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

from rankwise.logreader.folding import Folder, Group, fold, single
from rankwise.logreader.merge import Streams

WINDOW_SECONDS = 5.0
"""Ranks of a large job come to the same line seconds apart: imports, the first batch, a slow node."""
FOLLOW_WINDOW_SECONDS = 1.0
"""A person waits for these."""
POLL_SECONDS = 0.25
_TAIL_BYTES = 16 << 10
"""Of each file, at first."""


def read_groups(streams: Streams, *, is_folded: bool, tail: int | None, is_final: bool) -> Iterator[Group]:
    """All there is now, or the last `tail` of it.

    Ranks: local.
    """
    if tail is not None:
        yield from _read_tail(streams, is_folded=is_folded, tail=tail, is_final=is_final)
    else:
        yield from _groups(streams, is_folded=is_folded, is_final=is_final)


def _read_tail(streams: Streams, *, is_folded: bool, tail: int, is_final: bool) -> deque[Group]:
    """The last groups, read from the ends of the files: from further back until there are enough of them."""
    num_bytes = _TAIL_BYTES
    while True:
        has_more = streams.go_back(num_bytes)
        last: deque[Group] = deque(maxlen=tail)
        for group in _groups(streams, is_folded=is_folded, is_final=is_final):
            # What is earlier is not whole: of some ranks it has not been read.
            if not has_more or group.first.time > streams.complete_from():
                last.append(group)
        if len(last) == tail or not has_more:
            return last
        num_bytes *= 16


def _groups(streams: Streams, *, is_folded: bool, is_final: bool) -> Iterator[Group]:
    entries = streams.entries(is_final=is_final)
    return fold(entries, WINDOW_SECONDS) if is_folded else map(single, entries)


def follow_groups(streams: Streams, *, is_folded: bool) -> Iterator[Group | None]:
    """What is written from now on, without end; None where there is nothing more for the moment.

    Records come at most a second after they are in their files; between two looks at the files they are in order of
    time. A generator that is closed loses the groups it holds back: see `Folder.flush`.

    Ranks: local.
    """
    folder = Folder(FOLLOW_WINDOW_SECONDS)
    try:
        while True:
            streams.refresh()
            for entry in streams.entries(is_final=False):
                if is_folded:
                    yield from folder.add(entry, time.monotonic())
                else:
                    yield single(entry)
            yield from folder.flush(time.monotonic() - FOLLOW_WINDOW_SECONDS)
            yield None
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        # Ctrl-C is how a person ends it: what was held back is shown.
        yield from folder.flush()
