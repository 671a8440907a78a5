import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rankwise import telemetry
from rankwise.identity import Identity
from rankwise.monitor import sampler as sampler_module
from rankwise.monitor.clocks import HostClock
from rankwise.monitor.phases import FinishedStep, Timeline
from rankwise.monitor.recorder import Recorder
from rankwise.monitor.sampler import Exporter, Sampler, device_events
from rankwise.telemetry import End, Event, Start, Tick

IDENTITY = Identity(1, 1, 0, 2, 2, 1, hostname="node-a")


class Sensor:
    """A device that the test makes say things."""

    def __init__(self, *readings: dict[str, Any] | Exception) -> None:
        self.readings = list(readings)
        self.asked_allocator: list[bool] = []
        self.num_noted = 0
        self.is_closed = False

    def identify(self) -> dict[str, str | None]:
        return {"device_name": "Tester 3000", "device_uuid": "GPU-7"}

    def read(self, *, allocator: bool = True) -> dict[str, Any]:
        self.asked_allocator.append(allocator)
        said = self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]
        if isinstance(said, Exception):
            raise said
        return said

    def note_allocator(self) -> None:
        self.num_noted += 1

    def close(self) -> None:
        self.is_closed = True


class Process:
    def read(self) -> dict[str, Any]:
        return {"rss_gib": 2.5}


class Served:
    def __init__(self) -> None:
        self.ticks: list[Tick] = []
        self.events: list[Event] = []
        self.is_closed = False

    def tell(self, event: Event) -> None:
        self.events.append(event)

    def update(self, tick: Tick) -> None:
        self.ticks.append(tick)

    def close(self) -> None:
        self.is_closed = True


def start(
    run_dir: Path,
    timeline: Timeline,
    sensor: Sensor,
    *,
    every_seconds: float = 0.02,
    exporter: Exporter | None = None,
    on_step: Callable[[FinishedStep], None] = lambda step: None,
    on_look: Callable[[], None] = lambda: None,
    tell: Callable[[Event], None] = lambda event: None,
) -> Sampler:
    return Sampler(
        IDENTITY,
        "cuda:1",
        timeline,
        Recorder(run_dir, 1),
        clock_kind="device",
        every_seconds=every_seconds,
        sensor=sensor,
        process=Process(),
        exporter=exporter,
        on_step=on_step,
        on_look=on_look,
        tell=tell,
    )


def lines_of(run_dir: Path) -> list[telemetry.Line]:
    found = [telemetry.from_json(line) for line in telemetry.monitor_path(run_dir, 1).read_text().splitlines()]
    assert None not in found
    return [line for line in found if line is not None]


def wait_until(is_true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_session_has_start_ticks_and_end(tmp_path: Path) -> None:
    timeline = Timeline(HostClock())
    sensor = Sensor({"temperature_celsius": 61.0})
    sampler = start(tmp_path, timeline, sensor)
    timeline.enter("data")
    timeline.leave("data")
    timeline.step()
    timeline.enter("forward")
    wait_until(lambda: len(sensor.asked_allocator) > 2)
    timeline.step()
    sampler.close(failed=False)
    first, *ticks, end = lines_of(tmp_path)
    assert isinstance(first, Start)
    assert (first.rank, first.host, first.device, first.clock) == (1, "node-a", "cuda:1", "device")
    assert (first.device_name, first.device_uuid) == ("Tester 3000", "GPU-7")
    assert isinstance(end, End)
    assert end.step == 2
    seen: dict[int, float] = {}
    for tick in ticks:
        assert isinstance(tick, Tick)
        assert tick.device == {"temperature_celsius": 61.0}
        assert tick.process == {"rss_gib": 2.5}
        if tick.steps is not None:
            seen |= dict(enumerate(tick.steps.seconds, tick.steps.first))
    assert sorted(seen) == [1, 2]
    assert ticks[-1].phase == "forward"  # type: ignore[union-attr]
    assert sensor.is_closed


def test_a_failed_session_has_no_end(tmp_path: Path) -> None:
    timeline = Timeline(HostClock())
    sampler = start(tmp_path, timeline, Sensor({}))
    timeline.step()
    sampler.close(failed=True)
    lines = lines_of(tmp_path)
    assert isinstance(lines[-1], Tick)
    assert lines[-1].step == 1


def test_a_gap_in_the_steps_makes_a_line_more_without_readings(tmp_path: Path) -> None:
    timeline = Timeline(HostClock())
    sampler = start(tmp_path, timeline, Sensor({"power_watts": 90.0}), every_seconds=60)
    timeline.step()
    timeline.step(5)
    sampler.close(failed=False)
    ticks = [line for line in lines_of(tmp_path) if isinstance(line, Tick)]
    assert [tick.steps and tick.steps.first for tick in ticks] == [1, 5]
    assert [bool(tick.device) for tick in ticks] == [False, True]


def test_every_finished_step_is_passed_on_once_and_in_order(tmp_path: Path) -> None:
    timeline = Timeline(HostClock())
    seen: list[int] = []
    sampler = start(tmp_path, timeline, Sensor({}), on_step=lambda step: seen.append(step.number))
    for _ in range(200):
        timeline.step()
        time.sleep(0.0005)
    sampler.close(failed=False)
    assert seen == list(range(1, 201))


def test_the_allocator_is_asked_by_the_training_thread_once_for_each_line(tmp_path: Path) -> None:
    # torch answers with the interpreter's lock held: a thread of ours that asks could stop all others.
    timeline, sensor = Timeline(HostClock()), Sensor({})
    sampler = start(tmp_path, timeline, sensor, every_seconds=0.05)
    assert sampler.is_allocator_due
    sampler.note_allocator()
    assert sensor.num_noted == 1
    num_read = len(sensor.asked_allocator)
    wait_until(lambda: len(sensor.asked_allocator) > num_read + 1)
    assert sampler.is_allocator_due
    sampler.close(failed=False)
    assert True not in sensor.asked_allocator


def test_each_look_comes_after_the_steps_it_has_taken(tmp_path: Path) -> None:
    said: list[str] = []
    timeline = Timeline(HostClock())
    timeline.step()
    sampler = start(
        tmp_path, timeline, Sensor({}), on_step=lambda step: said.append("step"), on_look=lambda: said.append("look")
    )
    wait_until(lambda: said.count("look") > 1)
    sampler.close(failed=False)
    assert said[:2] == ["step", "look"]


def test_what_a_part_raises_is_told_once_and_the_thread_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    timeline = Timeline(HostClock())
    sensor = Sensor(OSError("the driver is gone"))
    with caplog.at_level(logging.WARNING):
        sampler = start(tmp_path, timeline, sensor)
        wait_until(lambda: len(sensor.asked_allocator) > 3)
        sensor.readings = [{"power_watts": 90.0}]
        timeline.step()
        sampler.close(failed=False)
    assert [record.getMessage() for record in caplog.records] == [
        "the monitor cannot do all it should (readings), training goes on"
    ]
    ticks = [line for line in lines_of(tmp_path) if isinstance(line, Tick)]
    assert ticks[-1].device == {"power_watts": 90.0}


def test_what_cannot_judge_or_read_does_not_keep_steps_from_the_file(tmp_path: Path) -> None:
    def fail(step: FinishedStep | None = None) -> None:
        raise ValueError("no judge today")

    timeline = Timeline(HostClock())
    sampler = start(tmp_path, timeline, Sensor(OSError("the driver is gone")), on_step=fail, on_look=fail)
    for _ in range(3):
        timeline.step()
    sampler.close(failed=False)
    written = [line.steps for line in lines_of(tmp_path) if isinstance(line, Tick) and line.steps is not None]
    assert sum(len(steps.seconds) for steps in written) == 3


def test_the_exporter_gets_the_ticks_and_is_closed(tmp_path: Path) -> None:
    served = Served()
    timeline = Timeline(HostClock())
    sampler = start(tmp_path, timeline, Sensor({"power_watts": 90.0}), exporter=served)
    timeline.step()
    sampler.close(failed=False)
    assert served.ticks[-1].device == {"power_watts": 90.0}
    assert served.ticks[-1].step == 1
    assert served.is_closed


def test_a_driver_that_hangs_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sampler_module, "CLOSE_SECONDS", 0.2)
    release = threading.Event()

    class Stuck(Sensor):
        def read(self, *, allocator: bool = True) -> dict[str, Any]:
            release.wait(30)
            return {}

    sampler = start(tmp_path, Timeline(HostClock()), Stuck())
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING):
        sampler.close(failed=False)
    assert time.monotonic() - begin < 10
    assert "is left behind" in caplog.text
    release.set()
    sampler._thread.join(10)


def said(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [event.message for event in device_events(before, now, "cuda:1", IDENTITY, 9)]


def test_new_errors_and_alarming_throttling_of_a_device_are_events() -> None:
    assert said({}, {"xid_errors": [79]}) == ["rank 1 (node-a, cuda:1): the driver reports XID 79"]
    assert said({"ecc_uncorrected": 1}, {"ecc_uncorrected": 3}) == [
        "rank 1 (node-a, cuda:1): 2 uncorrected memory errors more"
    ]
    hot = {"throttle_reasons": ["power", "thermal"], "temperature_celsius": 91.0}
    assert said({"throttle_reasons": ["power"]}, hot) == ["rank 1 (node-a, cuda:1): it is held back (thermal) at 91 C"]


def test_what_is_old_or_harmless_of_a_device_is_no_event() -> None:
    assert said({}, {"ecc_uncorrected": 3, "xid_errors": [], "throttle_reasons": ["power"]}) == []
    hot = {"throttle_reasons": ["thermal"]}
    assert said(hot, hot) == []
    assert said(hot, {}) == []


def test_throttling_that_comes_and_goes_is_told_once(tmp_path: Path) -> None:
    told: list[Event] = []
    hot: dict[str, Any] = {"throttle_reasons": ["thermal"]}
    sensor = Sensor({}, hot, {"throttle_reasons": []}, hot, {}, hot, {"ecc_uncorrected": 0}, {"ecc_uncorrected": 1})
    sampler = start(tmp_path, Timeline(HostClock()), sensor, tell=told.append)
    wait_until(lambda: len(told) == 2)
    sampler.close(failed=False)
    assert ["held back" in event.message for event in told] == [True, False]


def test_events_of_the_device_are_told(tmp_path: Path) -> None:
    told: list[Event] = []
    sensor = Sensor({"ecc_uncorrected": 0}, {"ecc_uncorrected": 1})
    sampler = start(tmp_path, Timeline(HostClock()), sensor, tell=told.append)
    wait_until(lambda: told)
    sampler.close(failed=False)
    (event,) = told
    assert (event.kind, event.ranks) == ("device", (1,))
