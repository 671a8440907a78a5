"""A sensor gives what can be had of a device, and nothing in place of what cannot."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rankwise.monitor import accelerators
from rankwise.monitor.accelerators import ALARMING_REASONS, Sensor, find_sensor
from rankwise.monitor.accelerators.allocator import Allocator
from rankwise.monitor.accelerators.amd import VIOLATIONS
from rankwise.monitor.accelerators.nvidia import REASONS
from rankwise.monitor.accelerators.readings import Driver, Failure, Readings

GIB = 2**30
DEVICE = torch.device("cuda", 0)


class FakeModule:
    """torch.cuda with an allocator of known numbers."""

    def __init__(self) -> None:
        self.current, self.peak = 3 * GIB, 4 * GIB
        self.has_begun = True
        self.asked: list[torch.device] = []

    def is_initialized(self) -> bool:
        return self.has_begun

    def memory_stats_as_nested_dict(self, device: torch.device) -> dict[str, Any]:
        self.asked.append(device)
        return {
            "allocated_bytes": {"all": {"current": self.current, "peak": self.peak}},
            "reserved_bytes": {"all": {"current": 6 * GIB, "peak": 7 * GIB}},
        }

    def get_device_properties(self, device: object) -> Any:
        return SimpleNamespace(name="Some GPU", pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)

    def get_device_name(self, device: object) -> str:
        return "Some GPU"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> FakeModule:
    fake = FakeModule()
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    return fake


def driver(*ways: Any) -> Driver:
    return Driver("A name", "GPU-1", Readings([list(ways)], lambda error: Failure.NOT_NOW), lambda: None)


def test_cpu_has_no_device_readings_and_no_names() -> None:
    sensor = find_sensor(torch.device("cpu"))
    assert sensor.read() == {}
    assert sensor.identify() == {"device_name": None, "device_uuid": None}
    sensor.close()


def test_allocator_tells_allocated_reserved_and_peak(module: FakeModule) -> None:
    assert Allocator(DEVICE).read() == {
        "memory_allocated_gib": 3.0,
        "memory_reserved_gib": 6.0,
        "memory_peak_gib": 4.0,
    }
    assert module.asked == [DEVICE]


def test_allocator_is_not_asked_before_torch_has_begun_on_the_device(module: FakeModule) -> None:
    module.has_begun = False
    assert Allocator(DEVICE).read() == {}
    assert module.asked == []


def test_peak_survives_its_reset_by_the_program(module: FakeModule) -> None:
    allocator = Allocator(DEVICE)
    allocator.read()
    module.peak = module.current
    assert allocator.read()["memory_peak_gib"] == 4.0


def test_backend_without_such_an_allocator_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(is_initialized=lambda: True))
    assert Allocator(DEVICE).read() == {}


def test_allocator_is_left_alone_where_the_caller_says_so(module: FakeModule) -> None:
    sensor = Sensor(DEVICE, driver(lambda: {"power_watts": 1.0}), Allocator(DEVICE))
    assert sensor.read(allocator=False) == {"power_watts": 1.0}
    assert module.asked == []
    assert sensor.read()["memory_allocated_gib"] == 3.0


def test_numbers_that_the_training_thread_took_are_told_once(module: FakeModule) -> None:
    sensor = Sensor(DEVICE, driver(lambda: {"power_watts": 1.0}), Allocator(DEVICE))
    sensor.note_allocator()
    module.current = GIB
    assert sensor.read(allocator=False)["memory_allocated_gib"] == 3.0
    assert sensor.read(allocator=False) == {"power_watts": 1.0}
    sensor.close()
    sensor.note_allocator()
    assert sensor.read() == {}


def test_device_of_a_vendor_without_driver_tells_what_torch_knows(module: FakeModule) -> None:
    sensor = find_sensor(torch.device("xpu", 0))
    assert sensor.identify() == {"device_name": "Some GPU", "device_uuid": "0000:3b:00.0"}
    assert sensor.read().keys() == {"memory_allocated_gib", "memory_reserved_gib", "memory_peak_gib"}


@pytest.mark.parametrize(
    ("device_type", "hip", "finder"),
    [("cuda", None, "find_nvidia"), ("cuda", "6.4", "find_amd"), ("npu", None, "find_ascend")],
)
def test_vendor_is_asked_by_the_kind_of_device_and_of_torch(
    monkeypatch: pytest.MonkeyPatch, module: FakeModule, device_type: str, hip: str | None, finder: str
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    for name in ("find_nvidia", "find_amd", "find_ascend"):
        monkeypatch.setattr(accelerators, name, lambda device, name=name: driver(lambda: {"asked": name}))
    device = SimpleNamespace(type=device_type, index=0)
    assert find_sensor(device).read(allocator=False) == {"asked": finder}  # type: ignore[arg-type]


def test_driver_that_breaks_while_closing_is_no_error(module: FakeModule) -> None:
    def close() -> None:
        raise RuntimeError("gone")

    sensor = Sensor(DEVICE, Driver(None, None, Readings([], lambda error: Failure.NOT_NOW), close), None)
    sensor.close()
    assert sensor.read() == {}


def test_one_question_that_fails_takes_no_other_with_it() -> None:
    def fail() -> dict[str, Any]:
        raise OSError("no")

    readings = Readings([[fail], [lambda: {"clock_mhz": 1.0, "clock_max_mhz": None}]], lambda error: Failure.NOT_NOW)
    assert readings.read() == {"clock_mhz": 1.0}


def test_next_way_is_taken_for_good_where_the_first_never_works() -> None:
    calls: list[str] = []

    def fail() -> dict[str, Any]:
        calls.append("first")
        raise OSError("no")

    readings = Readings([[fail, lambda: {"clock_mhz": 2.0}]], lambda error: Failure.NEVER)
    assert [readings.read(), readings.read()] == [{"clock_mhz": 2.0}] * 2
    assert calls == ["first"]


def test_reading_from_another_thread_is_the_same(module: FakeModule) -> None:
    sensor = Sensor(DEVICE, driver(lambda: {"power_watts": 1.0}), Allocator(DEVICE))
    told: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: told.append(sensor.read()))
    thread.start()
    thread.join()
    assert told == [sensor.read()]


def test_alarming_reasons_are_words_that_a_driver_may_say() -> None:
    assert {*REASONS.values(), *VIOLATIONS.values()} >= ALARMING_REASONS
    assert not ALARMING_REASONS & {"idle", "power", "application_clocks", "sync_boost", "display_clocks"}
