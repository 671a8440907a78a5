"""Run directories of training runs that never ran, to try readers on: as large as wished, the same for the same seed.

    python -m rankwise.simulation OUT --ranks 64 --steps 10000

A run of 20 steps or more, with two ranks or more, has a rank whose data comes late for a while, one whose device gets
hot and slow, and one that vanishes in the middle, after which the job is started again from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankwise.errors import RankwiseError
from rankwise.simulation import story
from rankwise.simulation.plan import Plan
from rankwise.simulation.ticking import lines
from rankwise.simulation.work import sessions_of, time_steps
from rankwise.telemetry import events_path, monitor_path, to_json

__all__ = ["Plan", "make_run", "play_run"]

_FOLDERS = ("monitor", "events", "metrics", "logs", "checkpoints")


def make_run(
    folder: str | os.PathLike[str],
    num_ranks: int,
    num_steps: int,
    *,
    seed: int = 0,
    ranks_per_node: int = 8,
    **options: Any,
) -> Plan:
    """Write a whole run directory.

    Args:
        folder: it must not be there yet, or be empty.
        options: further fields of `Plan`.
    Returns:
        What happens in the run: who is slow, hot and lost, and when.
    Raises:
        RankwiseError: a number is out of bounds, or the folder is in use.
        OSError: it cannot be written.
    Ranks: local, in no job.
    """
    plan = Plan(num_ranks, num_steps, seed, ranks_per_node, **options)
    _write(_prepare(folder), plan, until=float("inf"))
    return plan


def play_run(
    folder: str | os.PathLike[str], plan: Plan, *, is_over: Callable[[], bool], num_seconds_before: float = 60.0
) -> None:
    """Write a run as if it ran now: what lies in the past at once, the rest when its time comes, until it is over.

    Args:
        plan: its `started` counts for nothing: the run began `num_seconds_before` ago.
        is_over: asked every tenth of a second.
    Raises:
        RankwiseError, OSError: as `make_run`.
    Ranks: local, in no job.
    """
    plan = Plan(**vars_of(plan) | {"started": time.time() - num_seconds_before, "finished": False})
    waiting = _write(_prepare(folder), plan, until=time.time())
    while waiting and not is_over():
        now = time.time()
        for rank, (at, line, rest) in list(waiting.items()):
            text = ""
            while at <= now:
                text += line
                if (following := next(rest, None)) is None:
                    del waiting[rank]
                    break
                at, line = following
                waiting[rank] = at, line, rest
            if text:
                with open(monitor_path(Path(folder), rank), "a") as file:
                    file.write(text)
        time.sleep(0.1)


def vars_of(plan: Plan) -> dict[str, Any]:
    """The fields of a plan, without what it has worked out.

    Ranks: local.
    """
    return {name: getattr(plan, name) for name in Plan.__dataclass_fields__}


def _prepare(folder: str | os.PathLike[str]) -> Path:
    run_dir = Path(folder)
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise RankwiseError(f"{run_dir} is there and not empty. Give a new folder: a simulated run replaces nothing.")
    for name in _FOLDERS:
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    return run_dir


def _write(run_dir: Path, plan: Plan, until: float) -> dict[int, tuple[float, str, Any]]:
    """Write all that happens until then; gives by rank the first line after it, and those behind it."""
    timing = time_steps(plan)
    sessions = sessions_of(plan, timing)
    (run_dir / "run.json").write_text(json.dumps(story.run_file(plan, timing, sessions), indent=1) + "\n")
    (run_dir / "config.json").write_text(json.dumps({"num_steps": plan.num_steps, "seed": plan.seed}) + "\n")
    events = story.events(plan, timing, sessions)
    for rank, own in events.items():
        past = [event for event in own if event.time <= until]
        events_path(run_dir, rank).write_text("".join(to_json(event) + "\n" for event in past))
    with open(run_dir / "metrics" / "rank-00000.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for at, row in story.metrics(plan, timing, sessions) if at <= until)
    for session in sessions:
        for step in story.checkpoint_steps(plan, session):
            body = story.manifest(plan, step, session, timing)
            if until == float("inf") or step * plan.seconds_per_step < until - plan.started:
                place = run_dir / "checkpoints" / f"step-{step:08d}"
                place.mkdir(exist_ok=True)
                (place / "manifest.json").write_text(json.dumps(body, indent=1) + "\n")
    waiting = {}
    for rank in range(plan.num_ranks):
        with open(run_dir / "logs" / f"rank-{rank:05d}.jsonl", "wb") as log:
            log.writelines(story.records(plan, rank, timing, sessions, events.get(rank, ()), until))
        rest = lines(plan, rank, timing, sessions)
        with open(monitor_path(run_dir, rank), "w") as file:
            for at, line in rest:
                if at > until:
                    waiting[rank] = at, line, rest
                    break
                file.write(line)
    return waiting
