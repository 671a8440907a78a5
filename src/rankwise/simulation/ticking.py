"""The lines of `monitor/` of one rank of a simulated run."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.simulation.plan import HANG_SECONDS, Plan, Session
from rankwise.simulation.work import Floats, Timing, ends_of, phases_of
from rankwise.telemetry import OTHER, End, Start, Steps, Tick, to_json

DEVICE_NAME = "Simulated 80 GiB"
_ORDER = ("data", "forward", "backward", "communication", "optimizer", OTHER, "checkpoint", "validation")
"""In which a step goes through its phases."""
_HOT_CELSIUS, _THROTTLE_CELSIUS = 24.0, 87.0


def device_uuid(plan: Plan, rank: int) -> str:
    """The name of the rank's device, the same for the same plan."""
    return f"GPU-{uuid.UUID(int=(plan.seed << 64 | 1 << 40 | rank) % 2**128)}"


def start_line(plan: Plan, rank: int, session: Session) -> Start:
    """Who writes the lines of a session."""
    return Start(
        time=session.started,
        rank=rank,
        local_rank=rank % plan.ranks_per_node,
        node_rank=rank // plan.ranks_per_node,
        world_size=plan.num_ranks,
        host=plan.host(rank),
        pid=plan.pid(rank, session),
        device=plan.device(rank),
        device_name=DEVICE_NAME,
        device_uuid=device_uuid(plan, rank),
        clock="device",
    )


def lines(plan: Plan, rank: int, timing: Timing, sessions: list[Session]) -> Iterator[tuple[float, str]]:
    """The rank's lines with their line ends, each with its time, in order."""
    phases = phases_of(plan, rank, timing)
    for session in sessions:
        yield session.started, to_json(start_line(plan, rank, session)) + "\n"
        last = ""
        for tick in _ticks(plan, rank, session, timing, phases):
            last = to_json(tick) + "\n"
            yield tick.time, last
        if session.is_lost:
            # What a killed process was just writing; the next session ends the line.
            yield session.started, last[: len(last) // 2] + "\n"
        elif plan.finished:
            ended = float(ends_of(session, timing)[-1]) + 1.5
            yield ended, to_json(End(time=ended, step=session.last)) + "\n"


def _ticks(plan: Plan, rank: int, session: Session, timing: Timing, phases: Mapping[str, Floats]) -> Iterator[Tick]:
    ends = ends_of(session, timing)
    is_lost = session.is_lost and plan.lost is not None and plan.lost.rank == rank
    # The lost rank is gone in its last step; the others wait for it there, in vain.
    num_done = len(ends) - 1 if session.is_lost else len(ends)
    stop = ends[-1] + (0.0 if is_lost else HANG_SECONDS if session.is_lost else 1.0)
    times = np.arange(session.started + 1 + (rank * 0.618) % 1, stop, 1.0)
    done = np.minimum(np.searchsorted(ends, times, side="right"), num_done)
    own = slice(session.first - 1, session.last)
    rows = {phase: np.round(seconds[own], 6).tolist() for phase, seconds in phases.items()}
    seconds = np.round(timing.seconds[own], 6).tolist()
    now, since = _positions(times, done, ends, {phase: values[own] for phase, values in phases.items()})
    devices, processes = _device(plan, rank, session, done, times), _process(plan, rank, session, done)
    previous = 0
    for index, (time, count) in enumerate(zip(times.tolist(), done.tolist(), strict=True)):
        steps = None
        if count > previous:
            batch = slice(previous, count)
            steps = Steps(session.first + previous, seconds[batch], {name: row[batch] for name, row in rows.items()})
        previous = count
        yield Tick(
            time=round(time, 3),
            step=session.first - 1 + count,
            phase=now[index],
            seconds=round(since[index], 6),
            steps=steps,
            device={name: values[index] for name, values in devices.items()},
            process={name: values[index] for name, values in processes.items()},
        )


def _positions(
    times: Floats, done: NDArray[np.intp], ends: Floats, phases: Mapping[str, Floats]
) -> tuple[list[str | None], list[float]]:
    """At each time the phase that the rank is in, and since when."""
    names = [name for name in _ORDER if name in phases]
    step = np.minimum(done, len(ends) - 1)
    borders = np.cumsum([phases[name][step] for name in names], axis=0)
    inside = times - (ends[step] - borders[-1])
    number = np.minimum((borders <= inside).sum(axis=0), len(names) - 1)
    begun = np.where(number > 0, np.take_along_axis(borders, np.maximum(number - 1, 0)[None], 0)[0], 0.0)
    is_over = (done >= len(ends)) | (inside < 0)
    # Whoever is left when another vanished waits for the gradients.
    is_stuck = (inside > borders[-1]) & ~is_over
    waiting = names.index("communication")
    number = np.where(is_stuck, waiting, number)
    begun = np.where(is_stuck, borders[waiting - 1], begun)
    now: list[str | None] = [
        None if over or names[which] == OTHER else names[which]
        for which, over in zip(number.tolist(), is_over.tolist(), strict=True)
    ]
    since = np.where(is_over, np.maximum(times - ends[step], 0.0), inside - begun)
    return now, since.tolist()


def _device(plan: Plan, rank: int, session: Session, done: NDArray[np.intp], times: Floats) -> dict[str, list[Any]]:
    random = np.random.default_rng([plan.seed, 4, rank, session.number])
    count = len(times)
    warm = 1 - np.exp(-(times - session.started) / 120)
    celsius = 34 + (26 + 3 * random.standard_normal()) * warm + 0.7 * random.standard_normal(count)
    step = session.first - 1 + done
    is_hot = np.zeros(count, dtype=bool)
    if plan.hot is not None and plan.hot.rank == rank:
        is_hot = (step >= plan.hot.first) & (step <= plan.hot.last)
    celsius = np.where(is_hot, np.maximum(celsius + _HOT_CELSIUS, _THROTTLE_CELSIUS), celsius)
    is_busy = done > 0
    utilisation = np.clip(np.where(is_busy, 93 + 3 * random.standard_normal(count), 2), 0, 100)
    if session.is_lost:
        utilisation = np.where(times > times[-1] - HANG_SECONDS + 2, 100.0, utilisation)
    allocated = np.where(is_busy, 51.4 + 0.3 * random.standard_normal(count), 9.0)
    watts = np.where(is_busy, 610 + 18 * random.standard_normal(count), 115) * np.where(is_hot, 0.72, 1.0)
    clock = np.where(is_hot, 1275, np.where(is_busy, 1755, 345)) + random.integers(-15, 15, count)
    return {
        "utilisation_percent": np.round(utilisation).astype(int).tolist(),
        "memory_used_gib": np.round(allocated + 8.2, 2).tolist(),
        "memory_total_gib": [79.6] * count,
        "memory_allocated_gib": np.round(allocated, 2).tolist(),
        "memory_reserved_gib": np.round(np.where(is_busy, 57.5, 9.5), 2).tolist(),
        "memory_peak_gib": np.round(np.maximum.accumulate(allocated) if count else allocated, 2).tolist(),
        "power_watts": np.round(watts, 1).tolist(),
        "power_limit_watts": [700.0] * count,
        "temperature_celsius": np.round(celsius).astype(int).tolist(),
        "clock_mhz": clock.tolist(),
        "clock_max_mhz": [1980] * count,
        "throttle_reasons": [["thermal"] if hot else [] for hot in is_hot.tolist()],
        "ecc_uncorrected": [0] * count,
        "ecc_corrected": [int(rank % 97 == 5)] * count,
    }


def _process(plan: Plan, rank: int, session: Session, done: NDArray[np.intp]) -> dict[str, list[Any]]:
    random = np.random.default_rng([plan.seed, 5, rank, session.number])
    count = len(done)
    return {
        "cpu_percent": np.round(160 + 40 * random.random(count), 1).tolist(),
        "rss_gib": np.round(
            6.1 + 0.4 * np.minimum(np.arange(count) / 600, 1) + 0.02 * random.random(count), 3
        ).tolist(),
        "read_mib_per_second": np.round(30 * random.lognormal(0, 0.5, count), 2).tolist(),
        "write_mib_per_second": np.round(0.2 * random.random(count), 3).tolist(),
        "num_threads": [46] * count,
    }
