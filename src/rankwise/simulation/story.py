"""What a simulated run tells besides the ticks: events, losses, log records, checkpoints, and who ran."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from rankwise.checkpoint.manifest import FORMAT, checksum
from rankwise.simulation.plan import HANG_SECONDS, Plan, Session
from rankwise.simulation.ticking import DEVICE_NAME, device_uuid
from rankwise.simulation.work import Timing, ends_of, phases_of
from rankwise.telemetry import Event

_ALARM_STEPS = 50
_SHARD_BYTES = 1_400_000_000
_CRASH = (
    "Traceback (most recent call last):\n"
    '  File "train.py", line 88, in generator_step\n'
    "    loss.backward()\n"
    "RuntimeError: Connection closed by peer\n"
)
Dated = tuple[float, dict[str, Any]]


def run_file(plan: Plan, timing: Timing, sessions: list[Session]) -> dict[str, Any]:
    """The content of run.json, which says that it is simulated."""
    newest = sessions[-1]
    rows = [
        {
            "rank": rank,
            "local_rank": rank % plan.ranks_per_node,
            "node_rank": rank // plan.ranks_per_node,
            "host": plan.host(rank),
            "pid": plan.pid(rank, newest),
            "process": f"simulated-{newest.number}",
            "device": plan.device(rank),
            "device_name": DEVICE_NAME,
            "device_uuid": device_uuid(plan, rank),
        }
        for rank in range(plan.num_ranks)
    ]
    told = {
        "format": 1,
        "simulated": True,
        "started": _utc(newest.started, "seconds"),
        "versions": {"rankwise": "simulated", "torch": "simulated", "python": "simulated"},
        "command": ["python", "train.py", "--num-steps", str(plan.num_steps)],
        "git_revision": None,
        "launcher": "torchrun",
        "job_id": f"simulated-{plan.seed}",
        "world_size": plan.num_ranks,
        "num_nodes": plan.num_nodes,
        "ranks": rows,
    }
    if plan.finished:
        told["ended"] = _utc(float(ends_of(newest, timing)[-1]) + 2, "seconds")
    return told


def checkpoint_steps(plan: Plan, session: Session) -> list[int]:
    """The steps that the session saves."""
    done = session.last - session.is_lost
    return [step for step in range(plan.save_every, done + 1, plan.save_every) if step >= session.first]


def manifest(plan: Plan, step: int, session: Session, timing: Timing) -> dict[str, Any]:
    """The content of the manifest.json of a checkpoint."""
    saved = float(ends_of(session, timing)[step - session.first])
    random = np.random.default_rng([plan.seed, 6, step])
    shards = range(min(plan.num_ranks, 64))
    body = {
        "format": FORMAT,
        "step": step,
        "epoch": session.number + 1,
        "nonce": f"{plan.seed:08x}-{step:08x}",
        "world_size": plan.num_ranks,
        "shared_items": ["config", "ema", "loader", "vae", "vae_optimizer"],
        "per_rank_items": ["rng"],
        "files": {
            f"__{shard}_0.distcp": {
                "bytes": _SHARD_BYTES + int(random.integers(10_000)),
                "xxh3": f"{int(random.integers(2**62)):032x}",
            }
            for shard in shards
        },
        "config_digest": "",
        "saved": _utc(saved, "seconds"),
        "versions": {"rankwise": "simulated", "torch": "simulated"},
    }
    return {**body, "xxh3": checksum(json.dumps(body, sort_keys=True).encode())}


def metrics(plan: Plan, timing: Timing, sessions: list[Session]) -> Iterator[Dated]:
    """Losses and quality of logged steps, with their times."""
    for session in sessions:
        ends = ends_of(session, timing)
        for step in range(session.first, session.last + (not session.is_lost)):
            time = float(ends[step - session.first])
            random = np.random.default_rng([plan.seed, 7, step])
            progress = step / plan.num_steps
            if step % plan.log_every == 0:
                yield time, {"step": step, "time": round(time, 3), **_losses(plan, step, progress, random, timing)}
            if step % plan.validate_every == 0:
                psnr = 21 + 11 * (1 - math.exp(-4 * progress)) + 0.08 * random.standard_normal()
                quality = {"heldout/psnr_db": round(psnr, 4), "heldout/psnr_ema_db": round(psnr + 0.4 * progress, 4)}
                yield time, {"step": step, "time": round(time, 3), **quality}


def _losses(plan: Plan, step: int, progress: float, random: np.random.Generator, timing: Timing) -> dict[str, float]:
    noise = random.standard_normal(4)
    nll = 0.16 + 1.3 * math.exp(-9 * progress) + 0.012 * noise[0]
    losses = {
        "clips_per_second": plan.num_ranks / float(timing.seconds[step - 1]),
        "skipped_videos": int(12 * progress),
        "nll": nll,
        "kl": 900 + 2600 * (1 - math.exp(-6 * progress)) + 30 * noise[1],
        "wavelet": 0.05 + 0.3 * math.exp(-7 * progress) + 0.004 * noise[2],
        "generator": nll + 0.05,
    }
    if progress > 0.25:
        losses |= {"adversarial": 0.4 + 0.1 * noise[3], "discriminator": 0.93 + 0.03 * noise[1]}
    return {name: round(value, 6) for name, value in losses.items()}


def events(plan: Plan, timing: Timing, sessions: list[Session]) -> dict[int, list[Event]]:
    """By rank the events that it writes, in order."""
    told = [_saved(plan, step, session, timing) for session in sessions for step in checkpoint_steps(plan, session)]
    told += _straggling(plan, timing, sessions)
    if plan.lost is not None:
        told.append(_hang(plan, plan.lost.rank, sessions[0], timing))
    found = {0: sorted(told, key=lambda event: event.time)}
    if plan.hot is not None:
        hot = plan.hot
        message = f"rank {hot.rank} ({plan.host(hot.rank)}, {plan.device(hot.rank)}) is throttled: thermal, 87 C"
        time = float(ends_of(sessions[-1], timing)[hot.first - sessions[-1].first])
        found.setdefault(hot.rank, []).append(
            Event("device", round(time, 3), hot.first, message, [hot.rank], None, {"throttle_reasons": ["thermal"]})
        )
    return found


def _saved(plan: Plan, step: int, session: Session, timing: Timing) -> Event:
    time = float(ends_of(session, timing)[step - session.first])
    num_bytes = min(plan.num_ranks, 64) * _SHARD_BYTES
    return Event(
        "checkpoint",
        round(time, 3),
        step,
        f"checkpoint of step {step} is saved: {num_bytes / 2**30:.1f} GiB",
        [],
        "checkpoint",
        {"bytes": num_bytes, "seconds": 1.6},
    )


def _straggling(plan: Plan, timing: Timing, sessions: list[Session]) -> list[Event]:
    found = []
    windows = ((plan.slow, "data"), (plan.hot, "backward"))
    for window, phase in windows:
        if window is None:
            continue
        session = sessions[0] if window.first < sessions[-1].first else sessions[-1]
        ends = ends_of(session, timing)
        alarm = min(window.first + _ALARM_STEPS - 1, (window.first + window.last) // 2)
        own = slice(window.first - 1, alarm)
        waiting = phases_of(plan, 0, timing)["communication"][own] - timing.exchange[own]
        excess, step_seconds = float(np.median(waiting)), float(np.median(timing.seconds[own]))
        rank, share = window.rank, excess / step_seconds
        place = f"rank {rank} ({plan.host(rank)}, {plan.device(rank)})"
        num_steps, num_slow = alarm - window.first + 1, window.last - window.first + 1
        for kind, step, told_steps, message in (
            (
                "straggler",
                alarm,
                num_steps,
                f"{place} holds the others up by {excess * 1000:.0f} ms of {step_seconds * 1000:.0f} ms a step "
                f"({share:.0%}) in {phase}, for {num_steps} steps",
            ),
            (
                "straggler_over",
                window.last,
                num_slow,
                f"{place} is no longer slow; it was for {num_slow} steps",
            ),
        ):
            time = float(ends[min(step, session.last) - session.first]) + 0.4
            details = {"excess_seconds": round(excess, 4), "share": round(share, 4), "num_steps": told_steps}
            found.append(Event(kind, round(time, 3), step, message, [rank], phase, details))
    return found


def _hang(plan: Plan, rank: int, session: Session, timing: Timing) -> Event:
    # As long after the last finished step as the limit is, and a little before the job is ended.
    time = float(ends_of(session, timing)[-1]) + HANG_SECONDS - 5
    message = (
        f"no progress for {HANG_SECONDS - 5:.0f} s: rank {rank} ({plan.host(rank)}, {plan.device(rank)}, "
        f"pid {plan.pid(rank, session)}) is gone in backward of step {session.last}; "
        f"the {plan.num_ranks - 1} others wait in communication"
    )
    return Event("hang", round(time, 3), session.last - 1, message, [rank], "backward", {"waiting": plan.num_ranks - 1})


def records(
    plan: Plan, rank: int, timing: Timing, sessions: list[Session], events: Sequence[Event], until: float
) -> Iterator[bytes]:
    """The lines of the rank's log file up to a time; `events` are those that it writes."""
    told: list[_Said] = [
        (event.time, "WARNING", "rankwise.monitor", event.message, event.step, None)
        for event in events
        if event.kind != "checkpoint"
    ]
    for session in sessions:
        is_newest = session is sessions[-1]
        own = [said for said in told if (said[0] >= sessions[-1].started) == is_newest]
        said = [*_said(plan, rank, timing, session), *own]
        for time, level, logger, message, step, error in sorted(said, key=lambda one: one[0]):
            if time > until:
                return
            fields = {
                "time": _utc(time, "microseconds"),
                "monotonic_ns": int((time - plan.started) * 1e9),
                "level": level,
                "logger": logger,
                "message": message,
                "rank": rank,
                "local_rank": rank % plan.ranks_per_node,
                "node_rank": rank // plan.ranks_per_node,
                "host": plan.host(rank),
                "pid": plan.pid(rank, session),
            }
            fields |= {} if step is None else {"step": step}
            fields |= {} if error is None else {"exception": error}
            yield (json.dumps(fields) + "\n").encode()


_Said = tuple[float, str, str, str, int | None, dict[str, str] | None]


def _said(plan: Plan, rank: int, timing: Timing, session: Session) -> Iterator[_Said]:
    random = np.random.default_rng([plan.seed, 8, rank, session.number])
    ends = ends_of(session, timing)
    begin = session.started + 0.5 + 0.3 * float(random.random())
    yield begin, "INFO", "videovae.data", f"rank {rank} reads shard {rank % 512} with 8 workers", None, None
    yield begin + 2, "WARNING", "py.warnings", "UserWarning: the default of weights_only has changed", None, None
    for step in np.flatnonzero(random.random(session.last - session.first) < 2e-3).tolist():
        video = int(random.integers(100_000))
        words = f"clip {video} of part-{rank % 512:05d}.tar cannot be decoded; another one is taken"
        yield float(ends[step]), "WARNING", "videovae.data", words, session.first + step, None
    if rank == 0:
        for step in checkpoint_steps(plan, session):
            words = f"checkpoint of step {step} is saved"
            yield float(ends[step - session.first]), "INFO", "rankwise.checkpoint", words, step, None
    if session.is_lost and plan.lost is not None and rank != plan.lost.rank:
        error = {"type": "RuntimeError", "message": "Connection closed by peer", "traceback": _CRASH}
        moment = float(ends[-1]) + HANG_SECONDS
        yield moment, "ERROR", "rankwise.session", "the job ends: a rank is lost", session.last - 1, error


def _utc(time: float, timespec: str) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat(timespec=timespec)
