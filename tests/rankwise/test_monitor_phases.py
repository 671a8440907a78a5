import threading
import time
from typing import Any

import pytest

from rankwise.monitor import phases
from rankwise.monitor.clocks import DeviceClock, HostClock
from rankwise.monitor.phases import MAX_PENDING_STEPS, Timeline


class Device:
    """A stream that comes to its events when the test says so; the time of each is when it came to it."""

    def __init__(self, max_events: int = 8192) -> None:
        self.seconds = 0.0
        self.is_capturing = False
        self.num_events = 0
        self.queued: list[Event] = []
        self.clock = DeviceClock(self._make, lambda: self, lambda: self.is_capturing, max_events)

    def _make(self) -> "Event":
        self.num_events += 1
        return Event()

    def work(self, seconds: float, num_events: int | None = None) -> None:
        """Come to the next events; `seconds` go by before the first of them."""
        self.seconds += seconds
        count = len(self.queued) if num_events is None else num_events
        for event in self.queued[:count]:
            event.at = self.seconds
        del self.queued[:count]


class Event:
    at: float | None

    def record(self, device: Device) -> None:
        self.at = None
        device.queued.append(self)

    def query(self) -> bool:
        return self.at is not None

    def elapsed_time(self, later: "Event") -> float:
        if self.at is None or later.at is None:
            raise RuntimeError("not ready")
        return (later.at - self.at) * 1e3


class Ticking:
    """A host's clock that a test moves."""

    kind = "host"
    is_for_any_thread = True

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def is_reached(self, mark: float) -> bool:
        return True

    def seconds(self, marks: Any) -> list[float]:
        return HostClock().seconds(marks)

    def free(self, marks: Any) -> None:
        pass

    def follow(self) -> None:
        pass


def test_a_phase_has_its_own_time_and_the_rest_is_other() -> None:
    clock = Ticking()
    timeline = Timeline(clock)
    timeline.enter("data")
    clock.now = 1
    timeline.leave("data")
    clock.now = 3
    timeline.enter("backward")
    clock.now = 7
    timeline.enter("communication")
    clock.now = 15
    timeline.leave("communication")
    clock.now = 31
    timeline.leave("backward")
    clock.now = 63
    timeline.step()
    (step,) = timeline.take()
    assert step.number == 1
    assert step.seconds == 63
    assert step.phases == {"other": 34, "data": 1, "backward": 20, "communication": 8}


def test_the_first_step_begins_with_its_first_phase_and_the_next_with_the_end_of_the_last() -> None:
    clock = Ticking()
    timeline = Timeline(clock)
    timeline.begin_wait("barrier")
    clock.now = 90
    timeline.end_wait()
    clock.now = 100
    for _ in range(2):
        timeline.enter("forward")
        clock.now += 5
        timeline.leave("forward")
        clock.now += 1
        timeline.step()
        clock.now += 2
    first, second = timeline.take()
    assert (first.seconds, first.phases["other"], first.phases["forward"]) == (6, 1, 5)
    assert (second.seconds, second.phases["other"], second.phases["forward"]) == (8, 3, 5)
    assert "communication" not in first.phases


def test_a_loop_without_phases_is_other_from_the_start() -> None:
    clock = Ticking()
    timeline = Timeline(clock)
    clock.now = 4
    timeline.step()
    assert timeline.take()[0].phases == {"other": 4}


def test_a_phase_that_goes_on_over_a_step_counts_in_both() -> None:
    clock = Ticking()
    timeline = Timeline(clock)
    timeline.enter("epoch")
    clock.now = 2
    timeline.step()
    clock.now = 5
    timeline.leave("epoch")
    timeline.step()
    assert [step.phases["epoch"] for step in timeline.take()] == [2, 3]


def test_phases_that_an_error_left_open_end_with_the_one_around_them() -> None:
    clock = Ticking()
    timeline = Timeline(clock)
    timeline.enter("backward")
    timeline.enter("backward")
    timeline.begin_wait_anywhere("gradients")  # its end never comes
    clock.now = 1
    timeline.leave("backward")
    clock.now = 3
    timeline.leave("backward")
    clock.now = 7
    timeline.step()
    (step,) = timeline.take()
    assert step.phases["communication"] == 1
    assert step.phases["backward"] == 2
    assert step.phases["other"] == 4


def test_the_end_of_a_phase_that_never_began_changes_nothing() -> None:
    timeline = Timeline(Ticking())
    timeline.enter("data")
    timeline.leave("forward")
    assert timeline.position().phase == "data"


def test_phases_in_other_threads_count_nothing() -> None:
    clock = Ticking()
    timeline = Timeline(clock)
    timeline.enter("forward")

    def load() -> None:
        timeline.enter("data")
        assert not timeline.begin_wait("barrier")
        timeline.leave("forward")

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    clock.now = 3
    timeline.step()
    assert timeline.take()[0].phases == {"forward": 3, "other": 0}


def test_the_thread_that_makes_the_steps_is_the_training_thread() -> None:
    clock = Ticking()
    timeline = Timeline(clock)

    def train() -> None:
        timeline.step()
        timeline.enter("forward")
        clock.now = 2
        timeline.leave("forward")
        timeline.step()

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert timeline.take()[1].phases["forward"] == 2


def test_steps_are_counted_on_or_get_the_number_that_is_said() -> None:
    timeline = Timeline(Ticking(), step=7)
    assert timeline.position().step == 7
    assert [timeline.step(), timeline.step(20), timeline.step()] == [8, 20, 21]
    assert [step.number for step in timeline.take()] == [8, 20, 21]


def test_the_position_tells_phase_collective_and_age() -> None:
    timeline = Timeline(HostClock())
    first = timeline.position()
    assert (first.step, first.phase, first.collective) == (0, None, None)
    timeline.enter("checkpoint")
    assert timeline.position().phase == "checkpoint"
    assert timeline.begin_wait("barrier 'save'")
    waiting = timeline.position()
    assert (waiting.phase, waiting.collective) == ("communication", "barrier 'save'")
    assert waiting.number > first.number
    time.sleep(0.05)
    assert timeline.position() == waiting or abs(timeline.position().since - waiting.since) < 0.01
    assert time.monotonic() - timeline.position().since >= 0.05
    timeline.end_wait()
    after = timeline.position()
    assert (after.phase, after.collective) == ("checkpoint", None)
    assert after.number > waiting.number


def test_on_a_device_times_are_those_of_its_stream_and_nobody_waits_for_it() -> None:
    device = Device()
    timeline = Timeline(device.clock)
    # The host runs two steps ahead, at once.
    for _ in range(2):
        timeline.enter("data")
        timeline.leave("data")
        timeline.enter("forward")
        timeline.leave("forward")
        timeline.step()
    assert not timeline.take()
    # The event at the beginning, then `other`, data, `other`, forward, `other`: five moments in a step.
    device.work(0, 3)  # opening, beginning of the first step, beginning of data
    for seconds in (0, 0, 3, 0, 0, 0, 0, 4, 0):
        device.work(seconds, 1)
    timeline.resolve()
    first, second = timeline.take()
    assert first.phases == {"other": 0, "data": 0, "forward": 3}
    assert second.phases == {"other": 0, "data": 0, "forward": 4}


def test_steps_come_in_order_once_the_device_has_come_to_their_end() -> None:
    device = Device()
    timeline = Timeline(device.clock)
    timeline.step()
    timeline.step()
    opening, first, second = device.queued
    opening.at, second.at = 0.0, 3.0
    timeline.resolve()
    assert not timeline.take()
    first.at = 1.0
    timeline.resolve()
    assert [(step.number, step.seconds) for step in timeline.take()] == [(1, 1.0), (2, 2.0)]


def test_events_are_used_again() -> None:
    device = Device()
    timeline = Timeline(device.clock)
    for _ in range(100):
        timeline.enter("forward")
        timeline.leave("forward")
        device.work(0.1)
        timeline.step()
    assert device.num_events < 12
    device.work(0.1)
    timeline.drain(1.0)
    assert len(timeline.take()) == 100


def test_a_device_far_behind_costs_bounded_memory_and_its_steps_are_untimed() -> None:
    device = Device(max_events=100)
    timeline = Timeline(device.clock)
    for _ in range(200):
        timeline.enter("forward")
        timeline.leave("forward")
        timeline.step()
    assert device.num_events == 100
    device.work(1.0)
    timeline.drain(1.0)
    num_timed = len(timeline.take())
    assert timeline.num_untimed + num_timed == 200
    assert 10 < num_timed < 40
    # It has caught up.
    timeline.step()
    timeline.enter("forward")
    device.work(1.0)
    timeline.step()
    device.work(1.0)
    timeline.drain(1.0)
    assert timeline.take()[-1].number == 202


def test_steps_that_the_device_does_not_come_to_are_given_up() -> None:
    device = Device()
    timeline = Timeline(device.clock)
    for _ in range(MAX_PENDING_STEPS + 10):
        timeline.step()
    assert timeline.num_untimed == 10


def test_a_step_in_which_a_graph_is_captured_is_untimed_and_touches_no_event() -> None:
    device = Device()
    timeline = Timeline(device.clock)
    timeline.step()
    device.work(1.0)
    num_queued = device.num_events
    device.is_capturing = True
    timeline.enter("forward")
    timeline.leave("forward")
    assert device.num_events == num_queued
    assert not device.queued
    device.is_capturing = False
    timeline.step()
    device.work(1.0)
    timeline.step()
    device.work(1.0)
    timeline.drain(1.0)
    assert [step.number for step in timeline.take()] == [1, 3]
    assert timeline.num_untimed == 1


def test_draining_ends_when_the_time_is_up() -> None:
    device = Device()
    timeline = Timeline(device.clock)
    timeline.step()
    begin = time.monotonic()
    timeline.drain(0.1)
    assert 0.1 <= time.monotonic() - begin < 5


@pytest.mark.parametrize("host", [True, False])
def test_a_step_that_never_ends_costs_bounded_memory(host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "_MAX_PARTS", 64)
    device, clock = Device(), Ticking()
    timeline = Timeline(clock if host else device.clock)
    for _ in range(1000):
        timeline.enter("forward")
        clock.now += 1
        device.work(1.0)
        timeline.leave("forward")
        assert len(timeline._moments) <= 64 + 3
    assert device.num_events <= 64 + 5
    device.work(1.0)
    timeline.step()
    device.work(0)
    timeline.drain(1.0)
    assert timeline.take()[0].phases["forward"] == pytest.approx(1000)


def test_a_phase_that_is_called_other_is_one_like_all() -> None:
    clock = Ticking()
    timeline = Timeline(clock)
    for _ in range(3):
        timeline.enter("forward")
        timeline.enter("other")
        clock.now += 1
        timeline.leave("other")
        clock.now += 10
        timeline.leave("forward")
        timeline.step()
    assert [step.phases for step in timeline.take()] == [{"forward": 10, "other": 1}] * 3
    assert timeline._stack == ["other"]


def test_steps_are_taken_while_others_are_made() -> None:
    timeline = Timeline(HostClock())
    taken: list[int] = []
    is_over = threading.Event()

    def take() -> None:
        while not is_over.is_set():
            taken.extend(step.number for step in timeline.take())

    thread = threading.Thread(target=take)
    thread.start()
    for _ in range(20_000):
        timeline.enter("forward")
        timeline.leave("forward")
        timeline.step()
    is_over.set()
    thread.join()
    taken += [step.number for step in timeline.take()]
    assert sorted(taken) == list(range(1, 20_001))


def test_a_thread_that_takes_no_steps_leaves_few_moments() -> None:
    timeline = Timeline(HostClock())
    for _ in range(5000):
        timeline.step()
    assert len(timeline._pending) <= phases._MAX_WAITING_STEPS + 1
    assert len(timeline.take()) == 5000
