"""The process tells its own CPU, memory, threads and storage, as far as the system lets it."""

import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from rankwise.monitor.accelerators import ProcessSensor
from rankwise.telemetry import PROCESS_READINGS

MIB = 2**20


class FakeProcess:
    """A process of known numbers."""

    def __init__(self) -> None:
        self.storage = [10 * MIB, 100 * MIB]
        self.errors: dict[str, Exception] = {}
        self.num_asked = 0

    def _maybe_fail(self, name: str) -> None:
        if name in self.errors:
            raise self.errors[name]

    def memory_info(self) -> Any:
        self._maybe_fail("memory")
        return SimpleNamespace(rss=3 * 2**30)

    def num_threads(self) -> int:
        return 12

    def io_counters(self) -> Any:
        self.num_asked += 1
        self._maybe_fail("storage")
        return SimpleNamespace(read_bytes=self.storage[0], write_bytes=self.storage[1])


class Clock:
    now = 5.0

    def __call__(self) -> float:
        return self.now


def sensor(process: FakeProcess, clock: Clock) -> ProcessSensor:
    # One and a half cores are at work all the time.
    return ProcessSensor(process, clock, lambda: 1.5 * clock.now)  # type: ignore[arg-type]


def test_rates_are_those_since_the_last_reading() -> None:
    process, clock = FakeProcess(), Clock()
    readings = sensor(process, clock)
    process.storage = [16 * MIB, 101 * MIB]
    clock.now += 2.0
    assert readings.read() == {
        "cpu_percent": 150.0,
        "rss_gib": 3.0,
        "num_threads": 12,
        "read_mib_per_second": 3.0,
        "write_mib_per_second": 0.5,
    }
    clock.now += 1.0
    assert readings.read()["read_mib_per_second"] == 0.0


def test_rates_are_absent_where_no_time_has_passed() -> None:
    readings = sensor(FakeProcess(), Clock())
    assert readings.read().keys() == {"rss_gib", "num_threads"}


@pytest.mark.parametrize("error", [psutil.AccessDenied(1), AttributeError("io_counters"), NotImplementedError()])
def test_what_is_not_allowed_is_absent_and_not_asked_for_again(error: Exception) -> None:
    process, clock = FakeProcess(), Clock()
    process.errors["storage"] = error
    readings = sensor(process, clock)
    clock.now += 1.0
    assert readings.read().keys() == {"cpu_percent", "rss_gib", "num_threads"}
    assert process.num_asked == 1


def test_what_fails_once_comes_back() -> None:
    process, clock = FakeProcess(), Clock()
    readings = sensor(process, clock)
    process.errors["memory"] = OSError("too many open files")
    clock.now += 1.0
    assert "rss_gib" not in readings.read()
    process.errors.clear()
    assert readings.read()["rss_gib"] == 3.0


def test_this_process_is_measured() -> None:
    readings = ProcessSensor()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=work)
    thread.start()
    begun = time.process_time()
    while time.process_time() - begun < 0.2:
        time.sleep(0.01)
    told = readings.read()
    stop.set()
    thread.join()
    assert told.keys() <= PROCESS_READINGS.keys()
    assert told["cpu_percent"] > 0.0
    assert told["rss_gib"] * 2**30 == pytest.approx(psutil.Process(os.getpid()).memory_info().rss, rel=0.2)
    assert told["num_threads"] >= 2
