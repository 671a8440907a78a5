"""When the ranks measure their links: all of them communicate long, and nobody is late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from rankwise.monitor.probe import Link, SlowLinks, find_slow_ranks

LONG_SHARE = 0.2
"""Of a step, that the transfer itself takes: then the network may be to blame."""

NUM_LONG = 3
"""Windows for which that is so before anybody measures."""

ANSWER_SECONDS = 20.0
"""How long the ranks have for it."""

_FIRST_PAUSE, _LAST_PAUSE = 10, 1280
_GROWTH = 1.5


class NetworkWatch:
    """The main process's view of the network; a job that always communicates long measures ever more seldom.

    Args:
        machines: of all ranks, to tell links between hosts from those within.
        begin_probe: starts a measurement on every rank; each then comes back through `put`.
    Ranks: main process only.
    """

    def __init__(self, machines: Sequence[str], begin_probe: Callable[[], None]) -> None:
        self.is_alarmed = False
        self.num_long = 0
        """Windows for which communication has been long."""
        self.step_seconds = self.transfer_seconds = 0.0
        self._machines = machines
        self._begin_probe = begin_probe
        self._lock = threading.Lock()
        self._links: dict[int, list[Link]] = {}
        self._until: float | None = None
        self._num_well = 0
        self._pause = _FIRST_PAUSE
        self._num_waited = _FIRST_PAUSE
        self._measured_at = 0.0
        self._suspected: set[int] = set()

    def add(self, step_seconds: float, transfer_seconds: float, is_somebody_late: bool) -> None:
        """Take in the next window, and begin to measure if that is due.

        Args:
            transfer_seconds: of each step, what communication took for the rank that waited least.
        """
        self.step_seconds, self.transfer_seconds = step_seconds, transfer_seconds
        is_long = transfer_seconds > LONG_SHARE * step_seconds and not is_somebody_late
        self.num_long = self.num_long + 1 if is_long else 0
        self._num_well = 0 if is_long else self._num_well + 1
        self._num_waited += 1
        if self._num_well >= NUM_LONG:
            self.is_alarmed = False
        has_grown = transfer_seconds > _GROWTH * self._measured_at
        is_due = self._num_waited >= self._pause or (has_grown and not self.is_alarmed)
        if self.num_long >= NUM_LONG and is_due and self._until is None:
            self._num_waited, self._measured_at = 0, transfer_seconds
            self._measure()

    def put(self, rank: int, links: list[Link]) -> None:
        """Keep what a rank has measured; from any thread."""
        with self._lock:
            self._links[rank] = links

    def poll(self) -> SlowLinks | None:
        """Whose links are slow, once, when two measurements in a row have found the same ranks."""
        if self._until is None:
            return None
        with self._lock:
            if len(self._links) < len(self._machines) and time.monotonic() < self._until:
                return None
            links = [link for found in self._links.values() for link in found]
        self._until = None
        known = range(len(self._machines))
        slow = find_slow_ranks([link for link in links if link.target in known], self._machines)
        if slow is not None and not self.is_alarmed and not self._suspected & set(slow.ranks):
            self._suspected = set(slow.ranks)  # somebody may have been busy with something else
            self._measure()
            return None
        self._suspected = set()
        self._pause = _FIRST_PAUSE if slow is not None else min(2 * self._pause, _LAST_PAUSE)
        was_alarmed, self.is_alarmed = self.is_alarmed, slow is not None
        return None if was_alarmed else slow

    def _measure(self) -> None:
        self._until = time.monotonic() + ANSWER_SECONDS
        with self._lock:
            self._links = {}
        self._begin_probe()
