"""What is shown of a look at a run: a row for each rank, and the job in a few words."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rankwise.runreader import Look, RankState
from rankwise.telemetry import ALARMING_REASONS, Event, is_finite

STALE_SECONDS = 15.0
"""A rank writes once a second; file systems of clusters may show that some seconds later."""
HOT_CELSIUS = 85.0
"""Where accelerators of data centres begin to slow down, give or take some degrees."""
MARKS = ("hang", "stale", "straggler", "throttled", "hot", "ended")
"""What may be said of a rank, the worst in front."""
_LONG_SECONDS, _LONG_STEPS = 10.0, 5.0
_BUSY_SHARE = 0.03


@dataclass(frozen=True)
class Row:
    """One rank, as it is now; None where something is not known."""

    rank: int
    host: str | None = None
    device: str | None = None
    step: int | None = None
    steps_per_second: float | None = None
    """Of the recent steps."""
    phases: Mapping[str, float] = field(default_factory=dict)
    """By name its share of the recent steps, from 0 to 1."""
    phase: str | None = None
    """The one that it is in."""
    phase_seconds: float | None = None
    """For how long."""
    utilisation_percent: float | None = None
    memory_used_gib: float | None = None
    memory_total_gib: float | None = None
    temperature_celsius: float | None = None
    cpu_percent: float | None = None
    rss_gib: float | None = None
    age_seconds: float | None = None
    """Since it last told something."""
    lag_steps: int | None = None
    """Steps behind the foremost."""
    own_seconds: float | None = None
    """Of a recent step, the median, without `communication`, where those are who wait for others."""
    marks: tuple[str, ...] = ()
    """Of `MARKS`, in their order."""
    is_stuck: bool = False
    """Whether it has been in one phase for much longer than a step takes."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that a frame is made of.

    Attributes:
        step: the last step that every rank with a file has finished; None before the first.
        steps_per_second: the median of the ranks.
        remaining_seconds: at that pace; None where the length of the run is not known, or it is over.
        state: running, ended, silent, or waiting for the first line.
        slowest: which rank the others wait for, in words; None where none stands out.
    """

    run: str
    rows: tuple[Row, ...] = ()
    world_size: int = 0
    num_nodes: int = 0
    job_id: str | None = None
    state: str = "waiting"
    step: int | None = None
    num_steps: int | None = None
    steps_per_second: float | None = None
    remaining_seconds: float | None = None
    slowest: str | None = None
    events: tuple[Event, ...] = ()
    trouble: tuple[str, ...] = ()


def make_snapshot(run: str, look: Look, *, stale_seconds: float = STALE_SECONDS) -> Snapshot:
    """The rows of a look, and the job.

    Ranks: local.
    """
    has_ended = bool(look.info.get("ended"))
    ticks = [state.tick for state in look.states.values() if state.tick is not None]
    steps = [tick.step for tick in ticks]
    foremost = max(steps, default=None)
    rows = tuple(_row(rank, look, foremost, stale_seconds, has_ended) for rank in sorted({*look.rows, *look.states}))
    pace = _median(row.steps_per_second for row in rows)
    is_over = has_ended or (bool(look.states) and all(state.ended for state in look.states.values()))
    step = min(steps, default=None)
    remaining = None
    if not is_over and pace and step is not None and look.num_steps is not None:
        remaining = max(look.num_steps - step, 0) / pace
    return Snapshot(
        run=run,
        rows=rows,
        world_size=_count(look.info.get("world_size")) or len(rows),
        num_nodes=_count(look.info.get("num_nodes")) or len({row.host for row in rows if row.host}),
        job_id=str(look.info["job_id"]) if look.info.get("job_id") else None,
        state=_state(look, rows, is_over),
        step=step,
        num_steps=look.num_steps,
        steps_per_second=pace,
        remaining_seconds=remaining,
        slowest=None if is_over else _slowest(rows, look.stragglers),
        events=look.events,
        trouble=look.trouble,
    )


def _row(rank: int, look: Look, foremost: int | None, stale_seconds: float, has_ended: bool) -> Row:
    told = look.rows.get(rank, {})
    host, device = (None if told.get(name) is None else str(told[name]) for name in ("host", "device"))
    state = look.states.get(rank)
    if state is None:
        return Row(rank, host, device)
    tick, recent = state.tick, state.recent_seconds
    is_over = has_ended or state.ended
    readings: Mapping[str, Any] = tick.device if tick is not None else {}
    process: Mapping[str, Any] = tick.process if tick is not None else {}
    pace = state.num_recent_steps / recent if recent > 0 else None
    celsius = _number(readings.get("temperature_celsius"))
    marks = {
        "hang": rank in look.hangs and not is_over,
        "stale": state.age_seconds > stale_seconds and not is_over,
        "straggler": rank in look.stragglers and not is_over,
        "throttled": _is_throttled(readings.get("throttle_reasons")) and not is_over,
        "hot": celsius is not None and celsius >= HOT_CELSIUS and not is_over,
        "ended": is_over,
    }
    return Row(
        rank,
        host,
        device,
        step=None if tick is None else tick.step,
        steps_per_second=pace,
        phases={name: seconds / recent for name, seconds in state.recent_phases.items()} if recent > 0 else {},
        phase=None if tick is None or is_over else tick.phase,
        phase_seconds=None if tick is None or is_over else float(tick.seconds),
        utilisation_percent=_number(readings.get("utilisation_percent")),
        memory_used_gib=_number(readings.get("memory_used_gib")),
        memory_total_gib=_number(readings.get("memory_total_gib")),
        temperature_celsius=celsius,
        cpu_percent=_number(process.get("cpu_percent")),
        rss_gib=_number(process.get("rss_gib")),
        age_seconds=round(state.age_seconds, 3),
        lag_steps=None if tick is None or foremost is None else foremost - tick.step,
        own_seconds=state.own_seconds,
        marks=tuple(mark for mark in MARKS if marks[mark]),
        is_stuck=not is_over and _is_stuck(state, pace),
    )


def _is_throttled(reasons: Any) -> bool:
    return isinstance(reasons, list) and any(str(reason) in ALARMING_REASONS for reason in reasons)


def _is_stuck(state: RankState, pace: float | None) -> bool:
    if state.tick is None or not pace:
        return False
    # What has been quiet since the newest tick has not moved on either.
    return state.tick.seconds > max(_LONG_SECONDS, _LONG_STEPS / pace)


def _state(look: Look, rows: tuple[Row, ...], is_over: bool) -> str:
    if is_over:
        return "ended"
    if not look.states:
        return "waiting"
    silent = [row for row in rows if row.age_seconds is not None]
    return "silent" if silent and all("stale" in row.marks for row in silent) else "running"


def _slowest(rows: tuple[Row, ...], stragglers: Mapping[int, Event]) -> str | None:
    """Who has most to do in a step, and so makes the others wait."""
    own = {row.rank: row for row in rows if row.own_seconds is not None}
    if stragglers:
        named = sorted(stragglers)
        return f"rank {', '.join(map(str, named[:4]))}{', ...' if len(named) > 4 else ''} (told as straggler)"
    if len(own) < 2:
        return None
    busiest = max(own.values(), key=lambda row: row.own_seconds or 0.0)
    # The lower one of two in the middle: of two ranks the other one is what is usual.
    usual = statistics.median_low(row.own_seconds or 0.0 for row in own.values())
    excess = (busiest.own_seconds or 0.0) - usual
    if not busiest.steps_per_second or excess * busiest.steps_per_second < _BUSY_SHARE:
        return None
    return f"rank {busiest.rank}{_place(busiest)}: {excess * 1000:.0f} ms a step more to do than most"


def _place(row: Row) -> str:
    told = ", ".join(part for part in (row.host, row.device) if part)
    return f" ({told})" if told else ""


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _number(value: Any) -> float | None:
    return float(value) if is_finite(value) else None


def _count(value: Any) -> int:
    return value if type(value) is int and value > 0 else 0
