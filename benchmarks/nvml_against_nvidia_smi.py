"""Are our readings of a GPU those of nvidia-smi? Both are asked in turn while it computes, and printed side by side.

    python benchmarks/nvml_against_nvidia_smi.py --device 0

nvidia-smi is asked about the UUID that torch tells, so that a wrong device shows as wrong numbers. Each of its answers
stands between two of ours; a reading agrees where nearly every answer lies between them, give or take a tolerance.
The exit status is 1 where a reading differs, 2 where there is no GPU to ask.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rankwise.monitor.accelerators import find_sensor
from rankwise.monitor.accelerators.nvidia import throttle_words

GIB_PER_MIB = 1 / 1024
SHARE_THAT_AGREES = 0.8
"""Of the answers: load changes between ours and theirs."""
MATRIX_SIZE = 4096


@dataclass(frozen=True)
class Field:
    """One reading: how nvidia-smi calls it, what its unit is in ours, and how far the two may be apart."""

    name: str
    factor: float
    tolerance: float


FIELDS: Mapping[str, Field] = {
    "utilisation_percent": Field("utilization.gpu", 1, 10),
    "memory_used_gib": Field("memory.used", GIB_PER_MIB, 0.05),
    "memory_total_gib": Field("memory.total", GIB_PER_MIB, 0.01),
    "power_watts": Field("power.draw", 1, 15),
    "power_limit_watts": Field("enforced.power.limit", 1, 0.5),
    "temperature_celsius": Field("temperature.gpu", 1, 2),
    "clock_mhz": Field("clocks.sm", 1, 60),
    "clock_max_mhz": Field("clocks.max.sm", 1, 0.5),
    "memory_clock_mhz": Field("clocks.mem", 1, 0.5),
    "ecc_corrected": Field("ecc.errors.corrected.volatile.total", 1, 0),
    "ecc_uncorrected": Field("ecc.errors.uncorrected.volatile.total", 1, 0),
}
"""By the name of our reading."""
REASON_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""Newer and older drivers."""


@dataclass(frozen=True)
class Row:
    """What came out for one reading; None where nobody told."""

    reading: str
    ours: Any
    theirs: Any
    verdict: str
    """`agrees`, `DIFFERS`, or `absent` in both."""


Answer = dict[str, Any]


def ask_nvidia_smi(program: str, uuid: str, reason_field: str | None) -> Answer:
    """What nvidia-smi tells now, in our names and units; what it does not tell is absent."""
    names = [field.name for field in FIELDS.values()]
    told = _query(program, uuid, names)
    answer: Answer = {}
    for (reading, field), text in zip(FIELDS.items(), told, strict=True):
        try:
            answer[reading] = float(text) * field.factor
        except ValueError:  # "[N/A]", "[Not Supported]"
            continue
    if reason_field is not None:
        (text,) = _query(program, uuid, [reason_field])
        if text.startswith("0x"):
            answer["throttle_reasons"] = throttle_words(int(text, 16))
    return answer


def find_reason_field(program: str, uuid: str) -> str | None:
    """How this nvidia-smi calls the reasons, None where it knows neither name."""
    for name in REASON_FIELDS:
        try:
            _query(program, uuid, [name])
        except subprocess.CalledProcessError:
            continue
        return name
    return None


def _query(program: str, uuid: str, names: Sequence[str]) -> list[str]:
    command = [program, f"--id={uuid}", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return [text.strip() for text in done.stdout.strip().split(",")]


def compare(samples: Sequence[tuple[Answer, Answer, Answer]]) -> list[Row]:
    """One row per reading, from samples of ours, theirs, and ours again."""
    rows = []
    for reading in [*FIELDS, "throttle_reasons"]:
        triples = [tuple(answer.get(reading) for answer in sample) for sample in samples]
        ours = [value for before, _, after in triples for value in (before, after) if value is not None]
        theirs = [value for _, value, _ in triples if value is not None]
        if not ours or not theirs:
            verdict = "absent" if not ours and not theirs else "DIFFERS"
        else:
            num_agreeing = sum(_agrees(reading, *triple) for triple in triples)
            verdict = "agrees" if num_agreeing >= SHARE_THAT_AGREES * len(triples) else "DIFFERS"
        rows.append(Row(reading, _typical(ours), _typical(theirs), verdict))
    return rows


def _agrees(reading: str, before: Any, theirs: Any, after: Any) -> bool:
    if before is None or theirs is None or after is None:
        return False
    if reading == "throttle_reasons":
        return theirs in (before, after)
    tolerance = FIELDS[reading].tolerance
    return bool(min(before, after) - tolerance <= theirs <= max(before, after) + tolerance)


def _typical(values: Sequence[Any]) -> Any:
    if not values:
        return None
    if isinstance(values[0], list):
        return values[-1]
    return round(statistics.median(values), 3)


class Load:
    """Keeps the device busy from a thread while open."""

    def __init__(self, device: torch.device) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(device,), daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self, device: torch.device) -> None:
        matrix = torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device, dtype=torch.bfloat16)
        while not self._stop.is_set():
            for _ in range(50):
                torch.mm(matrix, matrix)
            torch.accelerator.synchronize(device)


def measure(device: torch.device, program: str, num_samples: int, num_warm_up: int) -> tuple[list[Row], Answer]:
    """The rows, and what was compared: device, versions, and how long one reading of ours takes."""
    torch.accelerator.set_device_index(device.index)
    sensor = find_sensor(device)
    uuid = str(sensor.identify()["device_uuid"])
    reason_field = find_reason_field(program, uuid)
    samples, durations = [], []
    with Load(device):
        for sample in range(num_warm_up + num_samples):
            begun = time.perf_counter()
            before = sensor.read(allocator=False)
            duration = time.perf_counter() - begun
            theirs = ask_nvidia_smi(program, uuid, reason_field)
            if sample >= num_warm_up:
                samples.append((before, theirs, sensor.read(allocator=False)))
                durations.append(duration)
            time.sleep(0.5)
    sensor.close()
    about = sensor.identify() | {
        "driver": _query(program, uuid, ["driver_version"])[0],
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "num_samples": num_samples,
        "reading_takes_ms": round(statistics.median(durations) * 1000, 2),
    }
    return compare(samples), about


def main() -> int:
    """Compare, print, and give the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=int, default=0, help="torch's number of the device (default: 0)")
    parser.add_argument("--num-samples", type=int, default=20)
    parser.add_argument("--num-warm-up", type=int, default=5, help="samples that are not counted: power rises slowly")
    parser.add_argument("--nvidia-smi", default="nvidia-smi", help="the program (default: that on PATH)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.version.hip or shutil.which(options.nvidia_smi) is None:
        print("error: needs an NVIDIA GPU that torch can use, and nvidia-smi", file=sys.stderr)
        return 2
    device = torch.device("cuda", options.device)
    if " MIG " in torch.cuda.get_device_name(device):
        print("error: nvidia-smi tells whole GPUs alone; MIG slices cannot be compared", file=sys.stderr)
        return 2
    rows, about = measure(device, options.nvidia_smi, options.num_samples, options.num_warm_up)
    if options.json:
        print(json.dumps(about | {"readings": [asdict(row) for row in rows]}, indent=1))
    else:
        table = Table("reading", "ours", "nvidia-smi", "verdict")
        for row in rows:
            table.add_row(row.reading, str(row.ours), str(row.theirs), row.verdict)
        Console().print(about, table)
    return int(any(row.verdict == "DIFFERS" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
