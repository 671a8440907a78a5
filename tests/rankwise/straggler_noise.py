"""Jobs that are not real: durations of every step of every rank, with noise, and what the statistics make of them.

Every step of such a job ends with all ranks together, as with DDP: who is early waits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rankwise.monitor.statistics import COMMUNICATION, History, Window, judge, summarise

EVERY_STEPS = 50
NAMES = ("data", "forward", "backward", "optimizer", "other")
SHARES = np.array([0.05, 0.30, 0.50, 0.10, 0.05])
STEP_SECONDS = 0.2
RECORDED = Path(__file__).parent / "data" / "step_noise.json"

Extra = Callable[[int, np.ndarray], None]
"""Is given the number of a window and its own seconds (steps, ranks, phases), and may add to them."""


@dataclass(frozen=True)
class Noise:
    """How ranks differ from each other and from themselves, as shares of a step where no unit is named."""

    sigma: float = 0.03
    """Of each phase of each step, lognormal."""
    spike_rate: float = 0.002
    """Share of steps in which a rank is held up by something, each by a Pareto-distributed time."""
    spike: float = 0.5
    """Least length of a spike; the tail's exponent is 1.5, so there is no variance."""
    static: float = 0.01
    """Ranks are never equally fast."""
    drift: float = 0.01
    """Of all ranks together, slowly."""
    rank_drift: float = 0.005
    """Of each rank, over some hundred steps."""
    gc_every_steps: int = 120
    """Every rank collects garbage, each at its own time."""
    gc: float = 1.0
    save_every_steps: int = 500
    """The main process writes a checkpoint, and all others wait."""
    save: float = 20.0


def simulate(
    world_size: int,
    num_windows: int,
    noise: Noise,
    rng: np.random.Generator,
    *,
    extra: Extra | None = None,
    measured: bool = True,
    source: Callable[[int], np.ndarray] | None = None,
) -> Iterator[Window]:
    """The rows of all ranks, window by window.

    Args:
        measured: whether waiting is told as communication; else it hides in `backward`.
        source: gives own seconds (steps, ranks, phases) of a window in place of the noise above.
    """
    static = 1 + noise.static * rng.standard_normal(world_size)
    offsets = rng.integers(0, noise.gc_every_steps, world_size)
    drift, rank_drift = 0.0, np.zeros(world_size)
    for number in range(num_windows):
        if source is not None:
            own = source(number)
        else:
            drift = 0.95 * drift + 0.3 * noise.drift * rng.standard_normal()
            rank_drift = 0.9 * rank_drift + 0.44 * noise.rank_drift * rng.standard_normal(world_size)
            own = rng.lognormal(0.0, noise.sigma, (EVERY_STEPS, world_size, len(NAMES))) * SHARES * STEP_SECONDS
            own *= ((1 + drift) * static * (1 + rank_drift))[None, :, None]
            spiked = rng.random((EVERY_STEPS, world_size)) < noise.spike_rate
            lengths = noise.spike * (1 + rng.pareto(1.5, int(spiked.sum())))
            own[spiked, rng.integers(0, len(NAMES), len(lengths))] += lengths * STEP_SECONDS
            steps = number * EVERY_STEPS + np.arange(EVERY_STEPS)
            own[(steps[:, None] + offsets) % noise.gc_every_steps == 0, 4] += noise.gc * STEP_SECONDS
            own[steps % noise.save_every_steps == 0, 0, 4] += noise.save * STEP_SECONDS
        if extra is not None:
            extra(number, own)
        yield to_window(own, 0.02 * rng.lognormal(0.0, 0.2, len(own)), measured=measured)


def to_window(own: np.ndarray, transfer: np.ndarray, *, measured: bool = True) -> Window:
    """The rows of ranks that wait for each other at the end of each step."""
    total = own.sum(axis=2)
    seconds = total.max(axis=1) + transfer
    waits = seconds[:, None] - total
    if not measured:
        own = own.copy()
        own[:, :, 2] += waits
        total = own.sum(axis=2)
    window = Window(own.shape[1])
    window.present[:] = True
    window.seconds[:] = seconds.mean()
    window.own[:], window.own_errors[:] = summarise(total)
    means, errors = summarise(own)
    for index, name in enumerate(NAMES):
        window.phases[name] = np.stack([means[:, index], errors[:, index]])
    if measured:
        window.phases[COMMUNICATION] = np.stack([waits.mean(axis=0), summarise(waits)[1]])
    return window


def alarms(windows: Iterator[Window], world_size: int) -> list[tuple[int, int, str]]:
    """Window, rank and phase of each alarm."""
    history = History(world_size)
    found = []
    for number, window in enumerate(windows):
        change = history.add(judge(window))
        found += [(number, rank, history.phase(rank)) for rank in change.begun.tolist()]
    return found


def recorded_source(
    world_size: int, rng: np.random.Generator, *, run: str | None = None, block: int = 10
) -> Callable[[int], np.ndarray]:
    """Own seconds put together from blocks of steps of real ranks, each for any rank: slow spells stay whole."""
    runs = json.loads(RECORDED.read_text())["runs"]
    real = [np.array(rank) for name, ranks in runs.items() if run in (None, name) for rank in ranks]
    # Each at the pace of all: a rank that was slow all the time would be rightly blamed.
    middle = np.median([np.median(rank.sum(axis=1)) for rank in real])
    real = [rank * (middle / np.median(rank.sum(axis=1))) * 1e-6 for rank in real]
    length = min(map(len, real))
    stacked = np.stack([rank[:length] for rank in real])

    def source(number: int) -> np.ndarray:
        num_blocks = EVERY_STEPS // block
        begins = rng.integers(0, length - block, (num_blocks, world_size))
        which = rng.integers(0, len(real), (num_blocks, world_size))
        steps = begins[:, None, :] + np.arange(block)[None, :, None]
        own = stacked[which[:, None, :], steps]
        return own.reshape(EVERY_STEPS, world_size, -1)

    return source
