"""benchmarks/nvml_against_nvidia_smi.py reads what nvidia-smi prints, and finds readings that differ from it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "nvml_against_nvidia_smi.py"
UUID = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
# As nvidia-smi answers with csv,noheader,nounits; it refuses the whole query for one name that it does not know.
NVIDIA_SMI = f"""#!/bin/sh
test "$1" = "--id={UUID}" || {{ echo "No devices were found"; exit 6; }}
case "$2" in
--query-gpu=clocks_event_reasons.active) echo 'Field "clocks_event_reasons.active" is not a valid field'; exit 2 ;;
--query-gpu=clocks_throttle_reasons.active) echo 0x0000000000000024 ;;
--query-gpu=driver_version) echo 535.161.08 ;;
*) echo "97, 10240, 81559, 612.35, 700.00, 61, 1755, 1980, 2619, [N/A], 0" ;;
esac
"""
OURS: dict[str, Any] = {
    "utilisation_percent": 100.0,
    "memory_used_gib": 10.0,
    "memory_total_gib": 79.647,
    "power_watts": 608.0,
    "power_limit_watts": 700.0,
    "temperature_celsius": 60.0,
    "clock_mhz": 1770.0,
    "clock_max_mhz": 1980.0,
    "memory_clock_mhz": 2619.0,
    "ecc_uncorrected": 0,
    "throttle_reasons": ["power", "thermal"],
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nvml_against_nvidia_smi", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "nvidia-smi"
    path.write_text(NVIDIA_SMI)
    path.chmod(0o755)
    return str(path)


def answer(script: ModuleType, program: str) -> dict[str, Any]:
    told = script.ask_nvidia_smi(program, UUID, script.find_reason_field(program, UUID))
    assert isinstance(told, dict)
    return told


def verdicts(script: ModuleType, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, str]:
    return {row.reading: row.verdict for row in script.compare([(ours, theirs, ours)] * 5)}


def test_answers_are_in_our_names_and_units(script: ModuleType, program: str) -> None:
    told = answer(script, program)
    assert told["memory_used_gib"] == 10.0
    assert told["power_watts"] == 612.35
    assert told["clock_max_mhz"] == 1980.0
    assert told["throttle_reasons"] == ["power", "thermal"]
    assert "ecc_corrected" not in told


def test_equal_readings_agree_and_what_nobody_tells_is_absent(script: ModuleType, program: str) -> None:
    found = verdicts(script, OURS, answer(script, program))
    assert found.pop("ecc_corrected") == "absent"
    assert set(found.values()) == {"agrees"}
    assert found.keys() == OURS.keys()


@pytest.mark.parametrize(
    ("reading", "value"),
    [
        ("memory_used_gib", 20.0),
        ("temperature_celsius", 40.0),
        ("power_watts", 300.0),
        ("throttle_reasons", []),
        ("ecc_corrected", 0),  # nvidia-smi tells none
        ("clock_mhz", None),
    ],
)
def test_reading_of_another_device_differs(script: ModuleType, program: str, reading: str, value: Any) -> None:
    ours = {name: told for name, told in (OURS | {reading: value}).items() if told is not None}
    found = verdicts(script, ours, answer(script, program))
    assert {name for name, verdict in found.items() if verdict == "DIFFERS"} == {reading}


def test_answer_between_two_of_ours_agrees(script: ModuleType, program: str) -> None:
    before, after = OURS | {"power_watts": 200.0}, OURS | {"power_watts": 700.0}
    rows = script.compare([(before, answer(script, program), after)])
    assert {row.reading: row.verdict for row in rows}["power_watts"] == "agrees"
