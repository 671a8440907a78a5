"""The time line of the training thread: which phase each moment of a step belongs to."""

from __future__ import annotations

import bisect
import threading
import time
from collections import deque
from dataclasses import dataclass

from rankwise.monitor.clocks import Clock, Mark
from rankwise.monitor.position import Position
from rankwise.telemetry import OTHER

MAX_PENDING_STEPS = 256
"""Steps that the device has not come to yet; of more than these it is only known that they were."""

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
    `FinishedStep`. Calls from any other thread are ignored.
    """

    def __init__(self, clock: Clock, step: int = 0) -> None:
        self.finished: deque[FinishedStep] = deque(maxlen=100_000)
        """Whoever reads them takes them off on the left, from any one thread."""
        self.num_untimed = 0
        """Steps that went by without being timed."""
        self.num_steps = 0
        """Calls of `step`."""
        self._clock = clock
        self._thread = threading.get_ident()
        self._step = step
        self._stack: list[str] = []
        self._current = OTHER
        self._collective: str | None = None
        self._number = 0
        self._at = time.perf_counter()
        self._is_begun = False
        self._mark = clock.mark
        self._begin: Mark | None = clock.mark()
        self._names: list[str] = []
        self._marks: list[Mark | None] = []
        self._carried: dict[str, float] = {}
        self._pending: deque[_Pending] = deque()

    def is_mine(self) -> bool:
        """Whether this is the training thread."""
        return threading.get_ident() == self._thread

    def is_without_steps(self) -> bool:
        """Whether so many phases went by without a single step that `step` must have been forgotten."""
        return self.num_steps == 0 and self._number > _MANY_MOMENTS

    def enter(self, name: str) -> None:
        """A phase begins."""
        if threading.get_ident() != self._thread:
            return
        if not self._is_begun:
            self._restart()
        if len(self._marks) > _MAX_PARTS:
            self._shorten()
        self._note()
        self._stack.append(name)
        self._current = name

    def leave(self, name: str) -> None:
        """The innermost phase of this name is over, and with it whatever inside was left by an error."""
        if threading.get_ident() == self._thread:
            self._leave(name)

    def begin_wait(self, what: str) -> bool:
        """The training thread begins to wait for other ranks in `what`; True where this is that thread."""
        if threading.get_ident() != self._thread:
            return False
        self.begin_wait_anywhere(what)
        return True

    def begin_wait_anywhere(self, what: str) -> None:
        """As `begin_wait`, by another thread on behalf of the training thread, which stands still."""
        if len(self._marks) > _MAX_PARTS:
            self._shorten()
        self._note()
        self._stack.append(COMMUNICATION)
        self._current, self._collective = COMMUNICATION, what

    def end_wait(self) -> None:
        """The wait is over."""
        self._collective = None
        self._leave(COMMUNICATION)

    def step(self, number: int | None = None) -> int:
        """A step is over: the one after the last, unless `number` says otherwise. Gives its number."""
        # The thread that makes the steps is the training thread, whoever made the Monitor.
        self._thread = threading.get_ident()
        self._is_begun = True
        self.num_steps += 1
        end = self._note()
        self._clock.follow()
        self._step = self._step + 1 if number is None else number
        names, marks, begin = self._names, self._marks, self._begin
        self._names, self._marks, self._begin = [], [], end
        carried, self._carried = self._carried, {}
        self._pending.append(_Pending(self._step, begin, names, marks, carried))
        self.resolve()
        return self._step

    def resolve(self) -> None:
        """Turn the steps whose end the clock has come to into finished ones."""
        # Two at most: this is the training thread's time.
        for _ in range(2):
            if self._pending and self._is_reached(self._pending[0]):
                self._finish(self._pending.popleft())
        while len(self._pending) > MAX_PENDING_STEPS:
            self._drop(self._pending.popleft())

    def drain(self, timeout_seconds: float) -> None:
        """Wait for the clock to come to the end of the last step, at most so long."""
        deadline = time.monotonic() + timeout_seconds
        while self._pending:
            self.resolve()
            if self._pending and not self._is_reached(self._pending[0]):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.005)

    def position(self) -> Position:
        """Where the training thread is now; from any thread."""
        # What is read here changes meanwhile, so the number is read first: a change shows as progress next time.
        number, at = self._number, self._at
        phase = None if self._current is OTHER else self._current
        since = time.monotonic() - max(0.0, time.perf_counter() - at)
        return Position(self._step, phase, since, number, self._collective)

    def _leave(self, name: str) -> None:
        stack = self._stack
        if name not in stack:
            return
        self._note()
        while stack.pop() != name:
            pass
        self._current = stack[-1] if stack else OTHER

    def _note(self) -> Mark | None:
        """What lies between the last moment and this one belongs to the current phase."""
        mark = self._mark()
        self._names.append(self._current)
        self._marks.append(mark)
        self._number += 1
        self._at = time.perf_counter()
        return mark

    def _restart(self) -> None:
        """The first step begins with its first phase: what comes before it is no step's."""
        self._is_begun = True
        self._clock.free([self._begin, *self._marks])
        self._names, self._marks, self._carried = [], [], {}
        self._begin = self._mark()

    def _shorten(self) -> None:
        """Keep memory bounded where a step has many phases, or never ends: add up what the clock has come to."""
        marks = [self._begin, *self._marks]
        if None in marks:  # this step is lost
            self._clock.free(marks)
            self._begin, self._names, self._marks = None, [], []
            return
        num_reached = bisect.bisect_left(marks, True, key=lambda mark: not self._clock.is_reached(mark))
        seconds = self._clock.seconds(marks[:num_reached]) if num_reached > 1 else None
        if seconds is not None:
            _add(self._carried, self._names[: len(seconds)], seconds)
            self._clock.free(marks[: len(seconds)])
            self._begin, self._marks = marks[len(seconds)], marks[len(seconds) + 1 :]
            self._names = self._names[len(seconds) :]

    def _is_reached(self, pending: _Pending) -> bool:
        end = pending.marks[-1]
        return end is None or self._clock.is_reached(end)

    def _finish(self, pending: _Pending) -> None:
        marks = [pending.begin, *pending.marks]
        seconds = None if None in marks else self._clock.seconds(marks)
        if seconds is None:
            self._drop(pending)
            return
        phases = pending.carried
        _add(phases, pending.names, seconds)
        self.finished.append(FinishedStep(pending.number, sum(phases.values()), phases))
        self._free(pending)

    def _drop(self, pending: _Pending) -> None:
        self.num_untimed += 1
        self._free(pending)

    def _free(self, pending: _Pending) -> None:
        # The end of a step is the beginning of the next, and is freed with that.
        self._clock.free([pending.begin, *pending.marks[:-1]])


@dataclass
class _Pending:
    """A step whose end the clock may not have come to."""

    number: int
    begin: Mark | None
    names: list[str]
    marks: list[Mark | None]
    carried: dict[str, float]


def _add(phases: dict[str, float], names: list[str], seconds: list[float]) -> None:
    for name, value in zip(names, seconds, strict=True):
        phases[name] = phases.get(name, 0.0) + value
