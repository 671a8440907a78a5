"""How long each rank takes for each step of a simulated run.

Ranks train together: each step takes as long as the slowest rank's own work and the exchange of gradients after it, and
who is done before waits in `communication`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankwise.simulation.plan import HANG_SECONDS, PAUSE_SECONDS, Plan, Session
from rankwise.telemetry import OTHER

Floats = NDArray[np.float64]

SHARES = {"data": 0.03, "forward": 0.27, "backward": 0.48, "optimizer": 0.06, OTHER: 0.01}
"""Of a usual step, each rank's own work; what is missing is the exchange of gradients."""
_EXCHANGE = 0.08
_NOISE = {"data": 0.25, "forward": 0.012, "backward": 0.015, "optimizer": 0.02, OTHER: 0.1}
"""Standard deviation of the logarithm: what reads from storage varies most."""
_SPIKE_SHARE, _SPIKE = 1e-3, 0.6
_SLOW_DATA, _HOT_COMPUTE = 0.25, 1.22
_SAVE_SECONDS, _VALIDATE_SECONDS = 1.6, 2.4
_START_SECONDS = 6.0
_FIRST_STEP = 8.0


@dataclass(frozen=True)
class Timing:
    """For all ranks: `seconds[i]` is the length of step `i + 1`, `exchange[i]` the end of it that all wait in."""

    seconds: Floats
    exchange: Floats


def own_work(plan: Plan, rank: int) -> dict[str, Floats]:
    """Seconds of the rank's own work by phase and step; the same for the same plan."""
    random = np.random.default_rng([plan.seed, 2, rank])
    steps = np.arange(1, plan.num_steps + 1)
    unit = plan.seconds_per_step
    work = {
        phase: unit * share * np.exp(_NOISE[phase] * random.standard_normal(plan.num_steps))
        for phase, share in SHARES.items()
    }
    # Devices of one kind differ by a percent or two, for good.
    work["forward"] *= (pace := 1 + 0.008 * random.standard_normal())
    work["backward"] *= pace
    spikes = random.random(plan.num_steps) < _SPIKE_SHARE
    work["data"] += spikes * unit * _SPIKE * random.random(plan.num_steps)
    work["forward"][0] += unit * _FIRST_STEP * SHARES["forward"]
    work["backward"][0] += unit * _FIRST_STEP * SHARES["backward"]
    if plan.slow is not None and plan.slow.rank == rank:
        work["data"] += unit * _SLOW_DATA * ((steps >= plan.slow.first) & (steps <= plan.slow.last))
    if plan.hot is not None and plan.hot.rank == rank:
        factor = np.where((steps >= plan.hot.first) & (steps <= plan.hot.last), _HOT_COMPUTE, 1.0)
        work["forward"] *= factor
        work["backward"] *= factor
    save, validate = steps % plan.save_every == 0, steps % plan.validate_every == 0
    work["checkpoint"] = save * _SAVE_SECONDS * np.exp(0.1 * random.standard_normal(plan.num_steps))
    work["validation"] = validate * _VALIDATE_SECONDS * np.exp(0.03 * random.standard_normal(plan.num_steps))
    return work


def time_steps(plan: Plan) -> Timing:
    """How long each step takes, for all ranks alike."""
    longest = np.zeros(plan.num_steps)
    for rank in range(plan.num_ranks):
        np.maximum(longest, sum(own_work(plan, rank).values()), out=longest)
    random = np.random.default_rng([plan.seed, 3])
    width = 0.0 if plan.num_ranks == 1 else 1 + 0.04 * np.log2(plan.num_ranks)
    exchange = plan.seconds_per_step * _EXCHANGE * width * np.exp(0.08 * random.standard_normal(plan.num_steps))
    return Timing(longest + exchange, exchange)


def phases_of(plan: Plan, rank: int, timing: Timing) -> dict[str, Floats]:
    """Seconds of the rank by phase and step, with its waiting; they add up to the steps'."""
    work = own_work(plan, rank)
    wait = timing.seconds - sum(work.values())
    return {**work, "communication": np.maximum(wait, 0.0)}


def sessions_of(plan: Plan, timing: Timing) -> list[Session]:
    """The starts of the program: one, or two where a rank is lost in between."""
    lost = plan.lost
    if lost is None:
        return [Session(1, plan.num_steps, plan.started, False, 0)]
    saved = (lost.last - 1) // plan.save_every * plan.save_every
    first = Session(1, lost.last, plan.started, True, 0)
    again = ends_of(first, timing)[-1] + HANG_SECONDS + PAUSE_SECONDS
    return [first, Session(saved + 1, plan.num_steps, float(again), False, 1)]


def ends_of(session: Session, timing: Timing) -> Floats:
    """When each step of the session ends, seconds since 1970."""
    seconds = timing.seconds[session.first - 1 : session.last]
    return session.started + _START_SECONDS + np.cumsum(seconds)
