"""AMD SMI is asked about the device at the PCI address that torch tells; its answers here are those it documents."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from rankwise.errors import DeviceError
from rankwise.monitor.accelerators import find_sensor
from rankwise.monitor.accelerators.amd import find_amd, violation_words
from rankwise.telemetry import DEVICE_READINGS

GIB = 2**30
NOT_SUPPORTED, RETRY = 2, 8
VIOLATIONS = {
    "active_prochot_thrm": False,
    "active_ppt_pwr": True,
    "active_socket_thrm": False,
    "active_vr_thrm": "N/A",
    "active_hbm_thrm": True,
}


class AmdSmiLibraryException(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"Error code: {code}")
        self.err_code = code


class FakeAmdSmi(ModuleType):
    """AMD SMI over GPUs that stand in another order than torch's; what it tells differs from GPU to GPU."""

    AmdSmiTemperatureType = SimpleNamespace(HOTSPOT=1, EDGE=0)
    AmdSmiTemperatureMetric = SimpleNamespace(CURRENT=0)
    AmdSmiMemoryType = SimpleNamespace(VRAM=0)
    AmdSmiClkType = SimpleNamespace(GFX=0, MEM=4)
    amdsmi_wrapper = SimpleNamespace(
        AMDSMI_STATUS_NOT_SUPPORTED=NOT_SUPPORTED, AMDSMI_STATUS_NOT_YET_IMPLEMENTED=3, AMDSMI_STATUS_NO_PERM=10
    )

    def __init__(self) -> None:
        super().__init__("amdsmi")
        self.addresses = ["0000:c1:00.0", "0000:41:00.0", "0000:81:00.0"]
        self.errors: dict[str, int] = {}
        self.is_open = False
        self.power: dict[str, Any] = {
            "current_socket_power": 500,
            "average_socket_power": "N/A",
            "power_limit": 750,
        }

    def _maybe_fail(self, name: str) -> None:
        assert self.is_open
        if name in self.errors:
            raise AmdSmiLibraryException(self.errors[name])

    def amdsmi_init(self) -> None:
        self.is_open = True

    def amdsmi_get_processor_handles(self) -> list[int]:
        return list(range(len(self.addresses)))

    def amdsmi_get_gpu_device_bdf(self, handle: int) -> str:
        return self.addresses[handle]

    def amdsmi_get_gpu_asic_info(self, handle: int) -> dict[str, Any]:
        return {"market_name": f"AMD Instinct MI300X #{handle}"}

    def amdsmi_get_gpu_activity(self, handle: int) -> dict[str, Any]:
        self._maybe_fail("activity")
        return {"gfx_activity": 90 + handle, "umc_activity": 5, "mm_activity": "N/A"}

    def amdsmi_get_gpu_memory_usage(self, handle: int, kind: int) -> int:
        return (handle + 1) * GIB

    def amdsmi_get_gpu_memory_total(self, handle: int, kind: int) -> int:
        return 192 * GIB

    def amdsmi_get_power_info(self, handle: int) -> dict[str, Any]:
        return self.power

    def amdsmi_get_temp_metric(self, handle: int, sensor: int, metric: int) -> int:
        self._maybe_fail("hotspot" if sensor else "edge")
        return 60 + handle if sensor else 50 + handle

    def amdsmi_get_clock_info(self, handle: int, kind: int) -> dict[str, Any]:
        return {"clk": 1300 if kind else 2100, "max_clk": "N/A" if kind else 2100}

    def amdsmi_get_violation_status(self, handle: int) -> dict[str, Any]:
        self._maybe_fail("violation")
        return VIOLATIONS

    def amdsmi_get_gpu_total_ecc_count(self, handle: int) -> dict[str, Any]:
        return {"correctable_count": 3, "uncorrectable_count": handle, "deferred_count": 0}


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch) -> FakeAmdSmi:
    fake = FakeAmdSmi()
    buses = [0x41, 0x81, 0xC1]

    def properties(device: torch.device) -> Any:
        return SimpleNamespace(name="AMD", pci_domain_id=0, pci_bus_id=buses[device.index], pci_device_id=0)

    module = SimpleNamespace(
        get_device_properties=lambda device: properties(torch.device("cuda", device)),
        get_device_name=lambda device: "AMD",
        is_initialized=lambda: False,
    )
    monkeypatch.setitem(sys.modules, "amdsmi", fake)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_readings_are_those_of_the_device_at_this_address(smi: FakeAmdSmi) -> None:
    driver = find_amd(torch.device("cuda", 0))  # at bus 41, which AMD SMI counts as 1
    told = driver.readings.read()
    assert (driver.name, driver.uuid) == ("AMD Instinct MI300X #1", "0000:41:00.0")
    assert told == {
        "utilisation_percent": 91.0,
        "memory_used_gib": 2.0,
        "memory_total_gib": 192.0,
        "power_watts": 500.0,
        "power_limit_watts": 750.0,
        "temperature_celsius": 61.0,
        "clock_mhz": 2100.0,
        "clock_max_mhz": 2100.0,
        "memory_clock_mhz": 1300.0,
        "throttle_reasons": ["power", "memory_thermal"],
        "ecc_corrected": 3,
        "ecc_uncorrected": 1,
    }
    assert told.keys() <= DEVICE_READINGS.keys()


def test_what_is_not_known_is_absent(smi: FakeAmdSmi) -> None:
    smi.power = dict.fromkeys(smi.power, "N/A")
    smi.errors["violation"] = NOT_SUPPORTED
    told = find_amd(torch.device("cuda", 2)).readings.read()
    assert not {"power_watts", "power_limit_watts", "throttle_reasons"} & told.keys()
    assert told["utilisation_percent"] == 90.0


def test_older_devices_tell_their_average_power(smi: FakeAmdSmi) -> None:
    smi.power = {"current_socket_power": "N/A", "average_socket_power": 210, "power_limit": 300}
    assert find_amd(torch.device("cuda", 0)).readings.read()["power_watts"] == 210.0


def test_edge_is_read_where_there_is_no_hotspot(smi: FakeAmdSmi) -> None:
    smi.errors["hotspot"] = NOT_SUPPORTED
    assert find_amd(torch.device("cuda", 0)).readings.read()["temperature_celsius"] == 51.0


def test_reading_that_fails_once_comes_back(smi: FakeAmdSmi) -> None:
    readings = find_amd(torch.device("cuda", 0)).readings
    smi.errors["activity"] = RETRY
    assert "utilisation_percent" not in readings.read()
    smi.errors.clear()
    assert readings.read()["utilisation_percent"] == 91.0


def test_part_of_a_partitioned_device_is_not_guessed(
    smi: FakeAmdSmi, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi.addresses = ["0000:41:00.0", "0000:41:00.1"]
    with pytest.raises(DeviceError, match="AMD SMI knows 2 devices at 0000:41:00, where cuda:0 is one"):
        find_amd(torch.device("cuda", 0))
    assert find_sensor(torch.device("cuda", 0)).read() == {}
    assert "no readings of cuda:0 from its driver: AMD SMI knows 2 devices" in caplog.text


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (VIOLATIONS, ["power", "memory_thermal"]),
        ({"active_prochot_thrm": True, "active_socket_thrm": 1}, ["hardware_thermal", "thermal"]),
        (dict.fromkeys(VIOLATIONS, False), []),
        (dict.fromkeys(VIOLATIONS, "N/A"), None),
        ({}, None),
    ],
)
def test_violations_are_words(status: dict[str, Any], words: list[str] | None) -> None:
    assert violation_words(status) == words
