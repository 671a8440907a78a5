"""The run as one object for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankwise.errors import RankwiseError
from rankwise.logs.fold import ranks_as_text
from rankwise.report import summary
from rankwise.report.arrays import Packer
from rankwise.report.devices import build_devices, node_of
from rankwise.report.heat import build_heat, build_totals, choose_phases
from rankwise.report.loading import RankData, RunData
from rankwise.report.logsummary import MAX_GROUPS, LogSummary, as_row, shortened
from rankwise.report.lost_time import find_blame
from rankwise.report.thinning import thin_line
from rankwise.runreader import Series
from rankwise.telemetry import PHASES, Event, is_finite

MAX_STEPS = 16_000_000
"""A step number far from all others is no step of this run, and would make the picture as wide."""
_MAX_POINTS = 2_000
_MAX_EVENTS = 2_000
_MAX_BLAMED = 3
_MAX_METRICS = 60


@dataclass(frozen=True)
class Content:
    """What the page shows: the object with its arrays as text, and what stands in the page as words."""

    packed: str
    findings: Sequence[summary.Finding]
    facts: Sequence[tuple[str, str]]
    has_steps: bool


def build_content(data: RunData, logs: LogSummary | None) -> Content:
    """Everything that the page shows.

    Raises:
        RankwiseError: the steps lie too far apart to be one run.
    Ranks: local.
    """
    packer = Packer()
    span = data.span
    if span is not None and span[1] - span[0] >= MAX_STEPS:
        raise RankwiseError(
            f"the steps in monitor/ go from {span[0]} to {span[1]}, but a report shows at most {MAX_STEPS:,}. Look for "
            "a file in it that does not belong to the run."
        )
    all_steps = [rank.steps for rank in data.ranks]
    phases = choose_phases(all_steps, (*PHASES, "other"))
    totals = build_totals(all_steps, phases)
    blames = find_blame(all_steps, span, _MAX_BLAMED) if span else []
    told = [event for event in data.run.events if event.kind != "checkpoint"]
    suspects = {blame.rank for blame in blames} | {rank for event in told for rank in event.ranks}
    content = {
        "ranks": _ranks(data),
        "suspects": sorted(suspects)[:1000],
        "work": {
            "phases": phases,
            "numSteps": packer.add(totals["num_steps"]),
            "worstStep": packer.add(totals["worst_step"].astype(np.int32)),
            "seconds": packer.add_seconds(totals["phases"]),
            **{name: packer.add_seconds(totals[name]) for name in ("mean", "median", "own", "worst")},
        },
        "heat": build_heat(all_steps, phases, span, packer) if span else None,
        "metrics": [_metric(name, series, packer) for name, series in list(data.run.metrics.items())[:_MAX_METRICS]],
        "devices": build_devices(data, suspects, packer),
        "events": _events(data.run.events),
        "checkpoints": _checkpoints(data),
        "sessions": summary.sessions_of(data),
        "logs": _logs(logs),
    }
    findings = summary.find_all(data, totals, phases, blames, logs)
    return Content(packer.pack(content), findings, _facts(data, span), span is not None)


def _ranks(data: RunData) -> dict[str, list[Any]]:
    """Columns, since ten thousand objects would repeat every name."""
    rows = [_rank(data, rank) for rank in data.ranks]
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else _rank_names())}


def _rank_names() -> tuple[str, ...]:
    return ("rank", "local_rank", "node", "host", "device", "device_name", "uuid", "pid", "last_step", "state")


def _rank(data: RunData, rank: RankData) -> dict[str, Any]:
    row = data.run.rows.get(rank.rank, {})
    start = rank.spans[-1].start if rank.spans else None

    def told(name: str) -> Any:
        value = row.get(name)
        return value if value is not None else getattr(start, name, None)

    state = "" if not rank.spans else "ended" if rank.spans[-1].ended else "no end told"
    return {
        "rank": rank.rank,
        "local_rank": _whole(told("local_rank")),
        "node": node_of(data, rank.rank),
        "host": _text(told("host")),
        "device": _text(told("device")),
        "device_name": _text(told("device_name")),
        "uuid": _text(told("device_uuid")),
        "pid": _whole(told("pid")),
        "last_step": rank.spans[-1].last_step if rank.spans else None,
        "state": state,
    }


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else None


def _text(value: Any) -> str:
    return "" if value is None else shortened(str(value), 200)


def _metric(name: str, series: Series, packer: Packer) -> dict[str, Any]:
    steps, values = thin_line(series.steps.astype(np.float64), series.values, _MAX_POINTS)
    with np.errstate(over="ignore"):
        small = values.astype(np.float32)
    return {
        "name": shortened(name, 100),
        "steps": packer.add(np.clip(steps, 0, 2**31 - 1).astype(np.int32)),
        "values": packer.add(np.where(np.isfinite(small), small, np.nan).astype(np.float32)),
        "logged": int(series.steps.size),
        "notFinite": int(np.isnan(series.values).sum()),
    }


def _events(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Each event, and of a straggler's since and until which step it was one.

    It is told of windows of steps later, and told so again when it is over, so the two say how many steps it was.
    """
    rows: list[dict[str, Any]] = []
    lasting: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    shown = [event for event in events if event.kind != "checkpoint"]
    for event in shown[-_MAX_EVENTS:]:
        row = {
            "kind": shortened(event.kind, 40),
            "time": event.time,
            "step": event.step,
            "message": shortened(event.message, 2_000),
            "ranks": sorted(event.ranks)[:1000],
            "phase": _text(event.phase),
        }
        rows.append(row)
        num_steps = event.details.get("num_steps")
        num_steps = num_steps if type(num_steps) is int and 0 < num_steps <= event.step else None
        begun = lasting.pop((event.kind.removesuffix("_over"), tuple(event.ranks)), None)
        if event.kind.endswith("_over"):
            if begun is not None:
                last = begun["since"] + num_steps - 1 if num_steps and "since" in begun else event.step
                begun["until"] = min(max(last, begun["step"]), max(event.step, begun["step"]))
        else:
            if num_steps:
                row["since"] = event.step - num_steps + 1
            lasting[event.kind, tuple(event.ranks)] = row
    return rows


def _checkpoints(data: RunData) -> list[dict[str, Any]]:
    """Those that are there now, and those that an event tells of."""
    found: dict[int, dict[str, Any]] = {}
    for event in data.run.events:
        if event.kind == "checkpoint":
            size, took = (_finite(event.details.get(name)) for name in ("bytes", "seconds"))
            found[event.step] = {"step": event.step, "time": event.time, "bytes": size, "took": took, "isThere": False}
    for saved in data.run.checkpoints:
        row = found.setdefault(saved.step, {"step": saved.step, "time": _finite(saved.time), "took": None})
        row |= {"bytes": saved.num_bytes, "isThere": True}
    return [found[step] for step in sorted(found)][-_MAX_EVENTS:]


def _finite(value: Any) -> float | None:
    return float(value) if is_finite(value) else None


def _logs(logs: LogSummary | None) -> dict[str, Any]:
    if logs is None:
        return {"groups": [], "levels": {}, "num": 0, "numForeign": 0, "isThere": False}
    return {
        "groups": [as_row(said) for said in logs.said[:MAX_GROUPS]],
        "levels": {shortened(level, 20): count for level, count in list(logs.levels.items())[:20]},
        "num": len(logs.said),
        "numForeign": logs.num_foreign,
        "isThere": True,
    }


def _facts(data: RunData, span: tuple[int, int] | None) -> list[tuple[str, str]]:
    """What stands at the top: what ran, from which code, when, on what."""
    info = data.run.info
    command, versions = info.get("command"), info.get("versions")
    told: list[tuple[str, Any]] = [
        ("state", _state(data)),
        ("started", info.get("started")),
        ("ended", info.get("ended")),
        ("steps", None if span is None else f"{span[0]:,} to {span[1]:,}" + _planned(data)),
        ("ranks", _size(data)),
        ("launcher", " ".join(str(info[name]) for name in ("launcher", "job_id") if info.get(name))),
        ("command", " ".join(map(str, command)) if isinstance(command, list) else command),
        ("git revision", info.get("git_revision")),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else versions),
        ("not read", "; ".join(data.run.trouble)),
    ]
    if info.get("simulated"):
        told.insert(0, ("simulated", "this run never ran: its numbers were made up"))
    return [(name, shortened(str(value), 2_000)) for name, value in told if value]


def _planned(data: RunData) -> str:
    return f" of {data.run.num_steps:,}" if data.run.num_steps else ""


def _size(data: RunData) -> str:
    nodes = {node_of(data, rank.rank) for rank in data.ranks}
    world = _whole(data.run.info.get("world_size"))
    missing = f"; run.json tells of {world:,}" if world is not None and world != len(data.ranks) else ""
    unmonitored = len(data.ranks) - sum(1 for rank in data.ranks if rank.spans)
    silent = f"; {unmonitored:,} told nothing to monitor/" if 0 < unmonitored < len(data.ranks) else ""
    return f"{len(data.ranks):,} on {len(nodes):,} node{'s' if len(nodes) != 1 else ''}{missing}{silent}"


def _state(data: RunData) -> str:
    has_ended = bool(data.run.info.get("ended"))
    # Of those of the newest session: others stopped telling when there were more ranks.
    known = data.run.rows
    own = {rank.rank: rank.spans[-1].ended for rank in data.ranks if rank.spans and (not known or rank.rank in known)}
    if own and all(own.values()):
        return "ended in good order" if has_ended else "every rank ended in good order"
    if not has_ended:
        return "no end was told: it still ran when this report was made, or was killed"
    if not own:
        return "ended"
    failed = ranks_as_text([rank for rank, is_good in own.items() if not is_good][:64])
    return f"ended, but not in good order (ranks {failed})"
