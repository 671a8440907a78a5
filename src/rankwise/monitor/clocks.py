"""What phases are measured with: the host's clock, or events on the accelerator's stream, which nobody waits for."""

from __future__ import annotations

import contextlib
import itertools
import operator
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

MAX_EVENTS = 8192
"""How many events may be on their way at once. A device can be behind by a thousand or two kernels, not by these."""

Mark = Any
"""A moment: of the host, in seconds, or an event on a stream."""


class Clock(Protocol):
    """Moments that are noted now, and how far they lie apart, which may be known later only."""

    kind: str
    """`host` or `device`, as in `telemetry.Start.clock`."""
    is_for_any_thread: bool
    """Whether moments are reached at once and may be asked about anywhere; otherwise all is for the training thread."""

    def mark(self) -> Mark | None:
        """This moment; None where it cannot be noted."""

    def is_reached(self, mark: Mark) -> bool:
        """Whether the device has come to this moment, and so to all before it."""

    def seconds(self, marks: Sequence[Mark]) -> list[float] | None:
        """From each moment to the next, once the last is reached; None where that cannot be known."""

    def free(self, marks: Sequence[Mark | None]) -> None:
        """These are not needed any more."""

    def follow(self) -> None:
        """Moments are those of the stream that is current now, until this is called again."""


class HostClock:
    """The processor's clock: a moment is passed as soon as it is noted."""

    kind = "host"
    is_for_any_thread = True
    mark: Callable[[], float] = staticmethod(time.perf_counter)

    def is_reached(self, mark: float) -> bool:
        return True

    def seconds(self, marks: Sequence[float]) -> list[float]:
        return list(map(operator.sub, marks[1:], marks))

    def free(self, marks: Sequence[float | None]) -> None:
        pass

    def follow(self) -> None:
        pass


class DeviceClock:
    """Timing events on one stream of the accelerator; they are used again.

    Once the device has failed, every call about it raises that: the training's own shall, and what is asked here gives
    no time instead, so that the error that a phase is left by stays the one that is seen.

    The training thread alone touches them: while a program captures a CUDA graph, a question about an event from
    another thread would spoil the capture, and nobody tells that thread.

    Args:
        make_event: gives a new one.
        current_stream: gives that of the calling thread.
        is_capturing: whether what the calling thread does now goes into a graph.
    """

    kind = "device"
    is_for_any_thread = False

    def __init__(
        self,
        make_event: Callable[[], Any],
        current_stream: Callable[[], Any],
        is_capturing: Callable[[], bool] = lambda: False,
        max_events: int = MAX_EVENTS,
    ) -> None:
        self._make_event = make_event
        self._current_stream = current_stream
        self._is_capturing = is_capturing
        self._num_left = max_events
        self._pool: deque[Any] = deque()
        self._stream = current_stream()

    def mark(self) -> Any | None:
        try:
            if self._is_capturing():
                return None
            if self._pool:
                event = self._pool.pop()
            elif self._num_left:
                self._num_left -= 1
                event = self._make_event()
            else:
                return None
            event.record(self._stream)
        except RuntimeError:
            return None
        return event

    def is_reached(self, mark: Any) -> bool:
        try:
            return not self._is_capturing() and bool(mark.query())
        except RuntimeError:
            return True  # what lies before it is asked for, and told to be unknown

    def seconds(self, marks: Sequence[Any]) -> list[float] | None:
        try:
            return [max(0.0, earlier.elapsed_time(later) / 1e3) for earlier, later in itertools.pairwise(marks)]
        except RuntimeError:  # of another stream, which has not come so far
            return None

    def free(self, marks: Sequence[Any | None]) -> None:
        self._pool.extend(mark for mark in marks if mark is not None)

    def follow(self) -> None:
        with contextlib.suppress(RuntimeError):
            if not self._is_capturing():
                self._stream = self._current_stream()


def make_clock(device: torch.device) -> Clock:
    """The clock for work on `device`: its own where it has timing events.

    Ranks: local; on an accelerator it must be the current device of this thread.
    """
    if device.type == "cpu":
        return HostClock()
    try:
        clock = _device_clock(device)
        marks = [clock.mark(), clock.mark()]
        torch.accelerator.synchronize(device)
        if None in marks or not clock.is_reached(marks[1]) or clock.seconds(marks) is None:
            return HostClock()
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return HostClock()
    clock.free(marks)
    return clock


def _device_clock(device: torch.device) -> DeviceClock:
    if device.type == "cuda":
        return DeviceClock(
            lambda: torch.cuda.Event(enable_timing=True),  # type: ignore[no-untyped-call]
            lambda: torch.cuda.current_stream(device),
            torch.cuda.is_current_stream_capturing,
        )
    return DeviceClock(
        lambda: torch.Event(device=device, enable_timing=True), lambda: torch.accelerator.current_stream(device)
    )
