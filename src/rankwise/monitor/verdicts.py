"""What the main process makes of the rows of all ranks: whom it names, in which words, and when it takes that back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankwise.monitor.network import NetworkWatch
from rankwise.monitor.probe import Link, SlowLinks
from rankwise.monitor.statistics import COMMUNICATION, DEFAULT_LIMITS, History, Judgement, Limits, Row, Window, judge
from rankwise.telemetry import Event

MAX_OPEN_WINDOWS = 4
"""Windows that wait for rows of slow senders; the oldest is then judged by the rows that are there."""

MAX_EVENTS = 8
"""Events of one window; what is more becomes one."""

_MAX_AHEAD = 64
_LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Place:
    """Where a rank is, in words for people."""

    host: str
    device: str
    node_rank: int


@dataclass(frozen=True)
class _Alarm:
    """Ranks that were told of together."""

    ranks: tuple[int, ...]
    who: str
    phase: str
    begun: int
    """The window in which it began."""


class Judge:
    """Takes rows and links in from the thread of messages, and judges them in the thread that calls `poll`.

    Args:
        places, machines: of all ranks, in their order.
        tell: gets the events.
        begin_probe: has every rank measure its links, and hand them to `put_links`.
    Ranks: main process only.
    """

    def __init__(
        self,
        places: Sequence[Place],
        machines: Sequence[str],
        every_steps: int,
        tell: Callable[[Event], None],
        begin_probe: Callable[[], None] = lambda: None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.num_judged = 0
        self._places = places
        self._every_steps = every_steps
        self._tell = tell
        self._limits = limits
        self._lock = threading.Lock()
        self._polling = threading.Lock()
        self._windows: dict[int, Window] = {}
        self._next = 0
        self._history = History(len(places), limits)
        self._alarms: list[_Alarm] = []
        self._step = 0
        self._num_on_node = np.bincount([place.node_rank for place in places])
        self._network = NetworkWatch(machines, begin_probe)
        self._network_alarm: _Alarm | None = None

    def put(self, rank: int, number: int, row: Row) -> None:
        """Keep a rank's row; one of a window that is over is too late."""
        with self._lock:
            if not self._next <= number < self._next + _MAX_AHEAD or not 0 <= rank < len(self._places):
                return
            if number not in self._windows:
                self._windows[number] = Window(len(self._places))
            self._windows[number].put(rank, row)

    def put_links(self, rank: int, links: list[Link]) -> None:
        """Keep what a rank has measured of its links."""
        self._network.put(rank, links)

    def poll(self, step: int) -> None:
        """Judge what is complete, or has waited too long; from any thread that may write and log."""
        with self._polling:
            self._step = step
            while (ready := self._take()) is not None:
                number, window = ready
                if window.present.mean() >= _LEAST_SHARE:
                    self._judge_window(number, window)
                self.num_judged = number + 1
            verdict = self._network.poll()
            if verdict is not None:
                self._tell_network(verdict)

    def _take(self) -> tuple[int, Window] | None:
        with self._lock:
            if not self._windows:
                return None
            first = min(self._windows)
            if not self._windows[first].is_whole and max(self._windows) - first < MAX_OPEN_WINDOWS:
                return None
            self._next = first + 1
            return first, self._windows.pop(first)

    def _judge_window(self, number: int, window: Window) -> None:
        judgement = judge(window, self._limits)
        change = self._history.add(judgement)
        ended = set(change.ended.tolist())
        for alarm in [alarm for alarm in self._alarms if ended & set(alarm.ranks)]:
            if not self._history.alarmed[list(alarm.ranks)].any():
                self._alarms.remove(alarm)
                self._tell_over(alarm, number)
        if len(change.begun):
            self._tell_begun(number, judgement, change.begun.tolist())
        is_somebody_late = bool(self._history.bad_now().any() or self._history.alarmed.any())
        self._network.add(judgement.step_seconds, judgement.transfer_seconds, is_somebody_late)
        if self._network_alarm is not None and not self._network.is_alarmed:
            self._tell_over(self._network_alarm, number)
            self._network_alarm = None

    def _tell_begun(self, number: int, judgement: Judgement, ranks: list[int]) -> None:
        groups = self._grouped(ranks)
        if len(groups) > MAX_EVENTS:
            groups = [tuple(sorted(rank for group in groups for rank in group))]
        for group in groups:
            self._history.alarmed[list(group)] = True
            held = float(np.mean([self._history.mean_bad(rank) for rank in group]))
            phases = [self._history.phase(rank) for rank in group]
            phase = max(phases, key=phases.count)
            num_windows = max(self._history.num_windows(rank) for rank in group)
            who, num_steps, step = self._who(group), num_windows * self._every_steps, judgement.step_seconds
            self._alarms.append(_Alarm(group, who, phase, number + 1 - num_windows))
            share = 100 * held / step
            verb = "hold" if who.startswith("ranks") else "holds"
            message = (
                f"{who} {verb} the others up by {_amount(held, step)} of {_amount(step, step)} a step ({share:.0f} %) "
                f"in {phase}, for {num_steps} steps"
            )
            details = {
                "held_seconds": round(held, 6),
                "step_seconds": round(step, 6),
                "percent": round(share, 1),
                "num_steps": num_steps,
            } | self._place_details(group)
            self._tell(Event("straggler", time.time(), self._step, message, group, phase, details))

    def _tell_over(self, alarm: _Alarm, number: int) -> None:
        num_steps = (number + 1 - alarm.begun - self._limits.num_bad) * self._every_steps
        num_steps = max(num_steps, self._every_steps)
        what = "is no longer slow" if alarm.phase == COMMUNICATION else "no longer hold the others up"
        what = what if alarm.who.startswith("ranks") or alarm.phase == COMMUNICATION else what.replace("hold", "holds")
        message = f"{alarm.who} {what} ({alarm.phase}; it was so for {num_steps} steps)"
        details = {"num_steps": num_steps} | self._place_details(alarm.ranks)
        self._tell(Event("straggler_over", time.time(), self._step, message, alarm.ranks, alarm.phase, details))

    def _tell_network(self, slow: SlowLinks) -> None:
        ranks = tuple(slow.ranks)
        who = f"the network of {self._who(ranks)}"
        share = 100 * self._network.transfer_seconds / self._network.step_seconds
        self._network_alarm = _Alarm(ranks, who, COMMUNICATION, self._next - self._network.num_long)
        message = (
            f"{who} is slow: a transfer takes {_amount(slow.transfer_seconds)}, {_amount(slow.usual_seconds)} between "
            f"others; all ranks spend {share:.0f} % of each step in communication, and nobody is late"
        )
        details = {
            "transfer_seconds": round(slow.transfer_seconds, 6),
            "usual_transfer_seconds": round(slow.usual_seconds, 6),
            "round_trip_seconds": round(slow.round_trip_seconds, 6),
            "usual_round_trip_seconds": round(slow.usual_round_trip_seconds, 6),
            "percent": round(share, 1),
            "step_seconds": round(self._network.step_seconds, 6),
            "num_steps": self._network.num_long * self._every_steps,
        } | self._place_details(ranks)
        self._tell(Event("straggler", time.time(), self._step, message, ranks, COMMUNICATION, details))

    def _grouped(self, ranks: list[int]) -> list[tuple[int, ...]]:
        """Ranks by themselves, but a node where all of it is slow."""
        slow = self._history.bad_now()
        by_node: dict[int, list[int]] = {}
        for rank in ranks:
            by_node.setdefault(self._places[rank].node_rank, []).append(rank)
        groups: list[tuple[int, ...]] = []
        for node, some in by_node.items():
            whole = [rank for rank in np.flatnonzero(slow).tolist() if self._places[rank].node_rank == node]
            is_node = len(whole) == self._num_on_node[node] > 1 and len(self._num_on_node) > 1
            groups += [tuple(whole)] if is_node else [(rank,) for rank in some]
        return groups

    def _who(self, ranks: Sequence[int]) -> str:
        first = self._places[ranks[0]]
        if len(ranks) == 1:
            return f"rank {ranks[0]} ({first.host}, {first.device})"
        nodes = {self._places[rank].node_rank for rank in ranks}
        if len(nodes) == 1 and len(ranks) == self._num_on_node[first.node_rank]:
            return f"{first.host} (ranks {_listed(ranks)})"
        return f"ranks {_listed(ranks)}"

    def _place_details(self, ranks: Sequence[int]) -> dict[str, Any]:
        hosts = list(dict.fromkeys(self._places[rank].host for rank in ranks))
        found: dict[str, Any] = {"hosts": hosts[:MAX_EVENTS]}
        return found | ({"device": self._places[ranks[0]].device} if len(ranks) == 1 else {})


def _amount(seconds: float, like: float | None = None) -> str:
    """For people; in the unit that suits `like`."""
    like = seconds if like is None else like
    if like >= 10:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.0f} ms" if like >= 0.01 else f"{seconds * 1e3:.2g} ms"


def _listed(ranks: Sequence[int]) -> str:
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]} to {ranks[-1]}"
    shown = ", ".join(map(str, ranks[:MAX_EVENTS]))
    return f"{shown} and {len(ranks) - MAX_EVENTS} more" if len(ranks) > MAX_EVENTS else shown
