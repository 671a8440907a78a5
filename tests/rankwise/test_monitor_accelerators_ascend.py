"""DCMI is asked about the chip of this logical number: a C library with the published declarations stands in for it."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.errors import DeviceError
from rankwise.monitor.accelerators import ascend, find_sensor
from rankwise.monitor.accelerators.ascend import Dcmi, DcmiError, find_ascend
from rankwise.telemetry import DEVICE_READINGS

# Structures as dcmi_interface_api.h declares them. Two chips a card; every number depends on card and chip.
LIBRARY = """
struct hbm { unsigned long long memory_size; unsigned int freq; unsigned long long memory_usage; int temp;
             unsigned int bandwith_util_rate; };
struct ecc { int enable_flag; unsigned int single_bit_error_cnt, double_bit_error_cnt, total_single_bit_error_cnt,
             total_double_bit_error_cnt, single_bit_isolated_pages_cnt, double_bit_isolated_pages_cnt; };
struct pcie { unsigned int venderid, subvenderid, deviceid, subdeviceid; int domain;
              unsigned int bdf_busid, bdf_deviceid, bdf_funcid; unsigned char reserve[32]; };
struct chip { unsigned char chip_type[32], chip_name[32], chip_ver[32]; unsigned int aicore_cnt; };
enum kind { LOWEST = 0, HIGHEST = 255 };

static int is_open, failure;
void fail_with(int number) { failure = number; }
int dcmi_init(void) { is_open = 1; return failure; }
int dcmi_get_card_id_device_id_from_logicid(int *card, int *chip, unsigned int number)
{ if (!is_open || number > 7) return -8007; *card = number / 2; *chip = number % 2; return 0; }
int dcmi_get_device_utilization_rate(int card, int chip, int kind, unsigned int *rate)
{ if (kind == 13) return -8255; if (kind != 2) return -8001; *rate = 10 * card + chip; return failure; }
int dcmi_get_device_hbm_info(int card, int chip, struct hbm *told)
{ told->memory_size = 65536; told->memory_usage = 1024 * (card + 1); told->freq = 1; told->temp = 2; return failure; }
int dcmi_get_device_power_info(int card, int chip, int *power) { *power = 3005 + 10 * card; return failure; }
int dcmi_get_device_temperature(int card, int chip, int *celsius) { *celsius = -5 + card; return failure; }
int dcmi_get_device_frequency(int card, int chip, enum kind input, unsigned int *mhz)
{ *mhz = input == 7 ? 800 + card : input == 9 ? 1800 : input == 6 ? 1600 : 0; return failure; }
int dcmi_get_device_ecc_info(int card, int chip, enum kind input, struct ecc *told)
{ if (input != 2) return -8001; told->enable_flag = 1; told->single_bit_error_cnt = 4 + card;
  told->double_bit_error_cnt = card; told->total_single_bit_error_cnt = 99; told->total_double_bit_error_cnt = 99;
  return failure; }
int dcmi_get_device_pcie_info_v2(int card, int chip, struct pcie *told)
{ told->domain = 0; told->bdf_busid = 0xc1 + card; told->bdf_deviceid = chip; told->bdf_funcid = 0; return failure; }
int dcmi_get_device_chip_info(int card, int chip, struct chip *told)
{ __builtin_strcpy((char *)told->chip_type, "Ascend"); __builtin_strcpy((char *)told->chip_name, "910B3");
  return failure; }
"""


@pytest.fixture(scope="module")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None and os.environ.get("CI") != "true":
        pytest.skip("needs a C compiler")
    assert compiler is not None
    folder = tmp_path_factory.mktemp("dcmi")
    (folder / "dcmi.c").write_text(LIBRARY)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libdcmi.so", folder / "dcmi.c"], check=True)
    return folder / "libdcmi.so"


@pytest.fixture
def library(library_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(ascend, "_LIBRARIES", (str(library_path.parent / "absent.so"), str(library_path)))
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    loaded = ctypes.CDLL(str(library_path))
    loaded.fail_with(0)
    return loaded


class Npu:
    """A device of a type that this torch does not know."""

    def __init__(self, index: int) -> None:
        self.type, self.index = "npu", index

    def __str__(self) -> str:
        return f"npu:{self.index}"


def find(index: int) -> Any:
    return find_ascend(Npu(index))  # type: ignore[arg-type]


@pytest.mark.parametrize(("visible", "index", "card", "chip"), [(None, 5, 2, 1), ("6,4", 0, 3, 0), ("6,4", 1, 2, 0)])
def test_readings_are_those_of_the_chip_of_this_logical_number(
    library: Any, monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, card: int, chip: int
) -> None:
    if visible is not None:
        monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
    driver = find(index)
    told = driver.readings.read()
    assert (driver.name, driver.uuid) == ("Ascend 910B3", f"0000:{0xC1 + card:02x}:{chip:02x}.0")
    assert told == {
        "utilisation_percent": 10.0 * card + chip,
        "memory_used_gib": card + 1.0,
        "memory_total_gib": 64.0,
        "power_watts": pytest.approx(300.5 + card),
        "temperature_celsius": -5.0 + card,
        "clock_mhz": 800.0 + card,
        "clock_max_mhz": 1800.0,
        "memory_clock_mhz": 1600.0,
        "ecc_corrected": 4 + card,
        "ecc_uncorrected": card,
    }
    assert told.keys() <= DEVICE_READINGS.keys()


def test_reading_that_fails_once_comes_back_and_one_that_is_not_supported_does_not(library: Any) -> None:
    readings = find(0).readings
    library.fail_with(-8010)
    assert readings.read() == {}
    library.fail_with(0)
    assert len(readings.read()) == 10
    library.fail_with(-8255)
    assert readings.read() == {}
    library.fail_with(0)
    assert readings.read() == {}


def test_chip_that_the_driver_does_not_know_is_an_error(library: Any) -> None:
    with pytest.raises(DcmiError, match="dcmi_get_card_id_device_id_from_logicid failed with -8007"):
        Dcmi(library, 8)


def test_number_beyond_the_visible_devices_is_an_error(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "6,4")
    with pytest.raises(DeviceError, match="npu:2 is not among ASCEND_RT_VISIBLE_DEVICES=6,4"):
        find(2)


def test_older_library_leaves_out_what_it_lacks(library: Any) -> None:
    class Older:
        def __getattr__(self, name: str) -> Any:
            if name in ("dcmi_get_device_ecc_info", "dcmi_get_device_pcie_info_v2"):
                raise AttributeError(name)
            return getattr(library, name)

    dcmi = Dcmi(Older(), 0)
    told = ascend.Readings(ascend._questions(dcmi), ascend.judge).read()
    assert dcmi.address() is None
    assert len(told) == 8


def test_missing_library_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(ascend, "_LIBRARIES", (str(tmp_path / "libdcmi.so"),))
    monkeypatch.setattr(torch, "get_device_module", lambda device: None)
    sensor = find_sensor(Npu(0))  # type: ignore[arg-type]
    assert sensor.read() == {}
    assert "no readings of npu:0 from its driver: " in caplog.text
    assert "libdcmi.so on LD_LIBRARY_PATH" in caplog.text
