"""The lines of `monitor/` and `events/` in a run directory: what each rank tells of itself, once a second.

Standard library only: readers of a run directory start without torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

TELEMETRY_FORMAT = 1
"""Version of these lines; each `start` line carries it."""

PHASES = ("data", "forward", "backward", "optimizer", "communication", "checkpoint", "validation")
"""The phases that every reader knows; a program may name others."""

OTHER = "other"
"""What no phase covers."""


@dataclass(frozen=True)
class Start:
    """The first line of each session: who writes here."""

    time: float
    """Seconds since 1970."""
    rank: int
    local_rank: int
    node_rank: int
    world_size: int
    host: str
    pid: int
    device: str
    device_name: str | None = None
    device_uuid: str | None = None
    clock: str = "host"
    """What the phases are measured with: `host`, or `device` for events of the accelerator's stream."""
    format: int = TELEMETRY_FORMAT


@dataclass(frozen=True)
class Steps:
    """Finished steps, in order, without gaps: `first`, `first` + 1, ...

    A phase's seconds are its own: without those of phases inside it. What a step has beyond its phases is `OTHER`.
    """

    first: int
    seconds: Sequence[float]
    phases: Mapping[str, Sequence[float]]
    """By phase, as many numbers as `seconds` has; `OTHER` is among them."""


@dataclass(frozen=True)
class Tick:
    """One second of a rank: where it is, what it has finished since the last line, what its device says."""

    time: float
    """Seconds since 1970, by this host's clock: for display, never for comparing hosts."""
    step: int
    """The last step that was finished, 0 before the first."""
    phase: str | None
    """The phase that the training thread is in, None outside."""
    seconds: float
    """How long it has been there: since the last sign of progress."""
    steps: Steps | None = None
    device: Mapping[str, Any] = field(default_factory=dict)
    """Readings of the accelerator, by the names of `DEVICE_READINGS`; those that it does not give are absent."""
    process: Mapping[str, Any] = field(default_factory=dict)
    """Readings of the process, by the names of `PROCESS_READINGS`."""


DEVICE_READINGS = {
    "utilisation_percent": "share of the last sampling period in which a kernel ran",
    "memory_used_gib": "of the whole device, by everybody",
    "memory_total_gib": "of the device",
    "memory_allocated_gib": "in tensors of this process",
    "memory_reserved_gib": "held by this process's allocator",
    "memory_peak_gib": "most that was in tensors of this process since it began",
    "power_watts": "drawn now",
    "power_limit_watts": "allowed",
    "temperature_celsius": "of the chip",
    "clock_mhz": "of the compute units",
    "clock_max_mhz": "of the compute units at most",
    "memory_clock_mhz": "of the memory",
    "throttle_reasons": "list of words, such as `thermal` or `power`; empty when nothing holds it back",
    "ecc_uncorrected": "memory errors that were not corrected, since the driver started",
    "ecc_corrected": "memory errors that were corrected, since then",
    "xid_errors": "list of the driver's error numbers that came since the last line",
}
"""By name what it is; units end the names. GiB are 2**30 bytes."""

ALARMING_REASONS = frozenset(
    {
        "board_limit",
        "hardware",
        "hardware_thermal",
        "memory_thermal",
        "power_brake",
        "regulator_thermal",
        "reliability",
        "thermal",
    }
)
"""Those of `throttle_reasons` that a healthy device in a healthy rack does not show; `power` is common at full load."""

PROCESS_READINGS = {
    "cpu_percent": "of one core: 200 are two busy cores",
    "rss_gib": "resident memory",
    "read_mib_per_second": "read from storage",
    "write_mib_per_second": "written to storage",
    "num_threads": "threads of the process",
}
"""By name what it is."""


@dataclass(frozen=True)
class End:
    """The last line of a session that ended in good order."""

    time: float
    step: int


@dataclass(frozen=True)
class Event:
    """Something that a person wants to see on the time line."""

    kind: str
    """`straggler`, `straggler_over`, `hang`, `hang_over`, `checkpoint`, `device` (throttled, memory errors)."""
    time: float
    """Seconds since 1970, by the host of the rank that writes."""
    step: int
    message: str
    """The line that the console showed."""
    ranks: Sequence[int] = ()
    """Whom it is about."""
    phase: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


Line = Start | Tick | End
_KINDS: dict[str, type[Start] | type[Tick] | type[End]] = {"start": Start, "tick": Tick, "end": End}
_MOST = 1e300
"""What is beyond is no reading: it only makes sums overflow."""
_NAMES = {kind: name for name, kind in _KINDS.items()}


def to_json(line: Line | Event) -> str:
    """One line without its newline, in ASCII; numbers that are not finite become null.

    Ranks: local.
    """
    told: dict[str, Any] = {} if isinstance(line, Event) else {"is": _NAMES[type(line)]}
    for name, value in vars(line).items():
        if isinstance(value, Steps):
            told[name] = {"first": value.first, "seconds": _short(value.seconds)} | {
                "phases": {phase: _short(seconds) for phase, seconds in value.phases.items()}
            }
        elif not (isinstance(value, dict) and not value):
            told[name] = value
    try:
        return json.dumps(told, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_finite(told), separators=(",", ":"))


def from_json(text: str | bytes) -> Line | None:
    """The line, or None for what is none: half a line of a killed rank, one of a later version, or a damaged one.

    The step numbers, times, phase and readings of what is given are of their kind; single readings and durations may be
    anything.

    Ranks: local.
    """
    try:
        told = json.loads(text)
        kind = _KINDS[told.pop("is")]
        if kind is Tick and told.get("steps") is not None:
            told["steps"] = Steps(**{name: told["steps"][name] for name in Steps.__dataclass_fields__})
        known = kind.__dataclass_fields__
        line = kind(**{name: value for name, value in told.items() if name in known})
        return line if _is_sound(line) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def event_from_json(text: str | bytes) -> Event | None:
    """The event, or None for what is none.

    Ranks: local.
    """
    try:
        told = json.loads(text)
        known = Event.__dataclass_fields__
        return Event(**{name: value for name, value in told.items() if name in known})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def monitor_path(run_dir: Path, rank: int) -> Path:
    """Where a rank's lines are.

    Ranks: local.
    """
    return run_dir / "monitor" / f"rank-{rank:05d}.jsonl"


def events_path(run_dir: Path, rank: int) -> Path:
    """Where the events are that a rank tells of; the main process tells of most.

    Ranks: local.
    """
    return run_dir / "events" / f"rank-{rank:05d}.jsonl"


def is_finite(value: object) -> TypeGuard[float]:
    """Whether it is a number that counts: no bool, not infinite, and not too large for a float.

    Ranks: local.
    """
    return isinstance(value, int | float) and type(value) is not bool and -_MOST < value < _MOST


def is_step(value: object) -> TypeGuard[int]:
    """Whether it can be the number of a step, or of a rank: what a float, and a page's script, can hold.

    Ranks: local.
    """
    return type(value) is int and 0 <= value < 2**53


def _is_sound(line: Line) -> bool:
    if not is_finite(line.time):
        return False
    if isinstance(line, Start):
        return True
    return is_step(line.step) and (
        isinstance(line, End)
        or (
            (line.phase is None or type(line.phase) is str)
            and is_finite(line.seconds)
            and type(line.device) is dict
            and type(line.process) is dict
        )
    )


def _short(seconds: Sequence[float]) -> list[float]:
    """Microseconds are as exact as these clocks are."""
    return [round(value, 6) for value in seconds]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
