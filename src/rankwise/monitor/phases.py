"""The time line of the training thread: which phase each moment of a step belongs to."""

from __future__ import annotations

import bisect
import time
from collections import deque
from dataclasses import dataclass
from threading import get_ident
from time import perf_counter

from rankwise.monitor.clocks import Clock, Mark
from rankwise.monitor.position import Position
from rankwise.telemetry import OTHER

MAX_PENDING_STEPS = 256
"""Steps that the device has not come to yet; of more than these it is only known that they were."""

_MAX_STEPS = 100_000
"""Steps that nobody has taken yet; the oldest are forgotten."""

_MAX_WAITING_STEPS = 1000
"""Steps whose moments wait to be added up by another thread; if a disk or driver holds that, this one does it."""

_MAX_PARTS = 2048
"""Moments of one step that are kept; a host's clock adds them up then, and goes on."""

_MANY_MOMENTS = 100
"""Beginnings and ends of phases; an evaluation before a run that has nothing to train makes a few."""

COMMUNICATION = "communication"


@dataclass(frozen=True)
class FinishedStep:
    """How long a step took, and each phase's own share of it."""

    number: int
    seconds: float
    phases: dict[str, float]
    """Without those of phases inside; what is left is under `OTHER`."""


class Timeline:
    """Which phase the training thread is in, and when that changed.

    The training thread only appends moments; when a step is over, and the clock has come to its end, they become a
    `FinishedStep`. That is done by whoever takes the steps, at its leisure, where the clock allows it: between steps of
    20 ms the same lines take ten times as long, for nothing of them is in the processor's caches then. Phases of any
    other thread are ignored.
    """

    def __init__(self, clock: Clock, step: int = 0) -> None:
        self.num_untimed = 0
        """Steps that went by without being timed."""
        self.num_steps = 0
        """Calls of `step`."""
        self._clock = clock
        self._mark = clock.mark
        self._thread = get_ident()
        self._step = step
        self._stack = [OTHER]
        self._collective: str | None = None
        self._is_begun = False
        self._begin: Mark | None = clock.mark()
        self._begun_at = perf_counter()
        self._moments: list[_Moment] = []
        self._num_moments = 0
        """Those that are in `_moments` no more."""
        self._carried: dict[str, float] = {}
        self._pending: deque[_Pending] = deque()
        self._finished: deque[FinishedStep] = deque(maxlen=_MAX_STEPS)

    def is_mine(self) -> bool:
        """Whether this is the training thread."""
        return get_ident() == self._thread

    def is_without_steps(self) -> bool:
        """Whether so many phases went by without a single step that `step` must have been forgotten."""
        return self.num_steps == 0 and self._num_moments + len(self._moments) > _MANY_MOMENTS

    def enter(self, name: str) -> None:
        """A phase begins."""
        if get_ident() != self._thread:
            return
        if not self._is_begun:
            self._restart()
        if len(self._moments) > _MAX_PARTS:
            self._shorten()
        self._moments.append((self._stack[-1], self._mark(), perf_counter()))
        self._stack.append(name)

    def leave(self, name: str) -> None:
        """The innermost phase of this name is over, and with it whatever inside was left by an error."""
        if get_ident() == self._thread:
            self._leave(name)

    def begin_wait(self, what: str) -> bool:
        """The training thread begins to wait for other ranks in `what`; True where this is that thread."""
        if get_ident() != self._thread:
            return False
        self.begin_wait_anywhere(what)
        return True

    def begin_wait_anywhere(self, what: str) -> None:
        """As `begin_wait`, by another thread on behalf of the training thread, which stands still."""
        if len(self._moments) > _MAX_PARTS:
            self._shorten()
        self._moments.append((self._stack[-1], self._mark(), perf_counter()))
        self._stack.append(COMMUNICATION)
        self._collective = what

    def end_wait(self) -> None:
        """The wait is over."""
        self._collective = None
        self._leave(COMMUNICATION)

    def step(self, number: int | None = None) -> int:
        """A step is over: the one after the last, unless `number` says otherwise. Gives its number."""
        # The thread that makes the steps is the training thread, whoever made the Monitor.
        self._thread = get_ident()
        self._is_begun = True
        self.num_steps += 1
        self._step = self._step + 1 if number is None else number
        begin, moments, end = self._begin, self._moments, self._mark()
        now = perf_counter()
        moments.append((self._stack[-1], end, now))
        self._begin, self._begun_at = end, now
        self._num_moments += len(moments)
        self._moments = []
        self._pending.append((self._step, begin, moments, self._carried))
        self._carried = {}
        if not self._clock.is_for_any_thread:
            self._clock.follow()
            self.resolve()
        elif len(self._pending) > _MAX_WAITING_STEPS:
            self._finish_oldest()
        return self._step

    def take(self) -> list[FinishedStep]:
        """The steps that were finished since the last call; from any one thread."""
        if self._clock.is_for_any_thread:
            for _ in range(len(self._pending)):
                self._finish_oldest()
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def resolve(self) -> None:
        """Turn the steps whose end the device has come to into finished ones; in the training thread."""
        # Two at most: this is the training thread's time.
        for _ in range(2):
            if self._pending and self._is_reached(self._pending[0]):
                self._finish(self._pending.popleft())
        while len(self._pending) > MAX_PENDING_STEPS:
            self._drop(self._pending.popleft())

    def drain(self, timeout_seconds: float) -> None:
        """Wait for the clock to come to the end of the last step, at most so long."""
        deadline = time.monotonic() + timeout_seconds
        while self._pending and not self._clock.is_for_any_thread:
            self.resolve()
            if self._pending and not self._is_reached(self._pending[0]):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.005)

    def position(self) -> Position:
        """Where the training thread is now; from any thread."""
        # What is read here changes meanwhile, so the number is read first: a change shows as progress next time.
        moments = self._moments
        number = self._num_moments + len(moments)
        at = moments[-1][2] if moments else self._begun_at
        phase = self._stack[-1]
        since = time.monotonic() - max(0.0, perf_counter() - at)
        return Position(self._step, None if phase is OTHER else phase, since, number, self._collective)

    def _leave(self, name: str) -> None:
        stack = self._stack
        if len(stack) == 1 or (stack[-1] != name and name not in stack[1:]):
            return
        self._moments.append((stack[-1], self._mark(), perf_counter()))
        while stack.pop() != name:
            pass

    def _restart(self) -> None:
        """The first step begins with its first phase: what comes before it is no step's."""
        self._is_begun = True
        self._clock.free([self._begin, *[mark for _, mark, _ in self._moments]])
        self._num_moments += len(self._moments)
        self._moments, self._carried = [], {}
        self._begin = self._mark()

    def _shorten(self) -> None:
        """Keep memory bounded where a step has many phases, or never ends: add up what the clock has come to."""
        marks = [self._begin, *[mark for _, mark, _ in self._moments]]
        if None in marks:  # this step is lost
            self._clock.free(marks)
            self._begin = None
            self._forget(len(self._moments))
            return
        num_reached = bisect.bisect_left(marks, True, key=lambda mark: not self._clock.is_reached(mark))
        seconds = self._clock.seconds(marks[:num_reached]) if num_reached > 1 else None
        if seconds is not None:
            _add(self._carried, self._moments[: len(seconds)], seconds)
            self._clock.free(marks[: len(seconds)])
            self._begin = marks[len(seconds)]
            self._forget(len(seconds))

    def _forget(self, num_moments: int) -> None:
        """Leave out the first so many."""
        if num_moments == len(self._moments):
            self._begun_at = self._moments[-1][2]
        self._num_moments += num_moments
        self._moments = self._moments[num_moments:]

    def _is_reached(self, pending: _Pending) -> bool:
        _, end, _ = pending[2][-1]
        return end is None or self._clock.is_reached(end)

    def _finish(self, pending: _Pending) -> None:
        number, begin, moments, phases = pending
        marks = [begin, *[mark for _, mark, _ in moments]]
        seconds = None if None in marks else self._clock.seconds(marks)
        if seconds is None:
            self._drop(pending)
            return
        _add(phases, moments, seconds)
        self._finished.append(FinishedStep(number, sum(phases.values()), phases))
        self._free(pending)

    def _finish_oldest(self) -> None:
        """The one that waits longest, if another thread was not faster."""
        try:
            pending = self._pending.popleft()
        except IndexError:
            return
        self._finish(pending)

    def _drop(self, pending: _Pending) -> None:
        self.num_untimed += 1
        self._free(pending)

    def _free(self, pending: _Pending) -> None:
        # The end of a step is the beginning of the next, and is freed with that.
        _, begin, moments, _ = pending
        if not self._clock.is_for_any_thread:
            self._clock.free([begin, *[mark for _, mark, _ in moments[:-1]]])


_Moment = tuple[str, Mark | None, float]
"""The phase that it ends, when by the clock, and when by `perf_counter`."""

_Pending = tuple[int, Mark | None, list[_Moment], dict[str, float]]
"""A step that the clock may not have come to the end of: number, beginning, moments, and what `_shorten` added up."""


def _add(phases: dict[str, float], moments: list[_Moment], seconds: list[float]) -> None:
    for (name, _, _), value in zip(moments, seconds, strict=True):
        phases[name] = phases[name] + value if name in phases else value
