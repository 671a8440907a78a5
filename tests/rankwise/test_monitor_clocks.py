import time

import pytest
import torch

from rankwise.monitor import clocks
from rankwise.monitor.clocks import DeviceClock, HostClock, make_clock


class Stream:
    def __init__(self, name: str) -> None:
        self.name = name


class Event:
    def __init__(self) -> None:
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.stream = stream

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: "Event") -> float:
        assert self.stream is not None
        assert later.stream is not None
        if self.stream is not later.stream:
            raise RuntimeError("one has not been reached")
        return 250.0


def test_the_cpu_is_measured_with_the_hosts_clock() -> None:
    clock = make_clock(torch.device("cpu"))
    assert clock.kind == "host"
    marks = [clock.mark()]
    for seconds in (0.01, 0.02):
        time.sleep(seconds)
        marks.append(clock.mark())
    assert clock.is_reached(marks[-1])
    found = clock.seconds(marks)
    assert found is not None
    first, second = found
    assert first >= 0.01
    assert second >= 0.02


def test_a_device_without_timing_events_is_measured_with_the_hosts_clock() -> None:
    assert isinstance(make_clock(torch.device("meta")), HostClock)


def test_a_device_whose_events_do_not_work_is_measured_with_the_hosts_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> DeviceClock:
        raise RuntimeError("no timing here")

    monkeypatch.setattr(clocks, "_device_clock", broken)
    assert isinstance(make_clock(torch.device("cuda", 0)), HostClock)


def test_a_device_that_passes_the_trial_is_measured_with_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream("default")
    monkeypatch.setattr(clocks, "_device_clock", lambda device: DeviceClock(Event, lambda: stream))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    assert make_clock(torch.device("cuda", 0)).kind == "device"


def test_events_give_seconds() -> None:
    stream = Stream("default")
    clock = DeviceClock(Event, lambda: stream)
    assert clock.seconds([clock.mark(), clock.mark(), clock.mark()]) == [0.25, 0.25]


def test_moments_are_of_one_stream_until_it_is_followed_anew() -> None:
    current = Stream("default")
    clock = DeviceClock(Event, lambda: current)
    first = clock.mark()
    current = Stream("side")
    second = clock.mark()
    assert first is not None
    assert second is not None
    assert first.stream is second.stream
    clock.follow()
    third = clock.mark()
    assert third is not None
    assert third.stream is current
    assert clock.seconds([second, third]) is None


def test_no_more_events_than_allowed_are_made_and_freed_ones_serve_again() -> None:
    clock = DeviceClock(Event, lambda: Stream("default"), max_events=2)
    first, second = clock.mark(), clock.mark()
    assert clock.mark() is None
    clock.free([first, None])
    assert clock.mark() is first
    assert clock.mark() is None
    assert second is not first


def test_nothing_is_asked_or_noted_while_a_graph_is_captured() -> None:
    is_capturing = False
    clock = DeviceClock(Event, lambda: Stream("default"), lambda: is_capturing)
    mark = clock.mark()
    is_capturing = True
    assert clock.mark() is None
    assert not clock.is_reached(mark)


def test_a_device_that_has_failed_gives_no_times_and_hides_no_error_of_the_training() -> None:
    class Failed(Event):
        def record(self, stream: Stream) -> None:
            fail()

        def query(self) -> bool:
            return fail()

        def elapsed_time(self, later: Event) -> float:
            return fail()

    def fail() -> bool:
        raise RuntimeError("device-side assert triggered")

    clock = DeviceClock(Failed, lambda: Stream("default"))
    assert clock.mark() is None
    assert clock.is_reached(Failed())
    assert clock.seconds([Failed(), Failed()]) is None
    clock = DeviceClock(Event, lambda: Stream("default"), fail)
    assert clock.mark() is None
    clock.follow()


def test_a_device_that_fails_the_trial_is_measured_with_the_hosts_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def capturing() -> bool:
        raise RuntimeError("no capture here")

    monkeypatch.setattr(clocks, "_device_clock", lambda device: DeviceClock(Event, lambda: Stream("x"), capturing))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    assert isinstance(make_clock(torch.device("cuda", 0)), HostClock)
