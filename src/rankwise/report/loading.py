"""What the report needs of each rank's history, and no more: many ranks have to fit into memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.report.heat import RankSteps
from rankwise.report.thinning import Floats, thin_line
from rankwise.runreader import RankHistory, Run, Span
from rankwise.telemetry import ALARMING_REASONS

READINGS = {
    "utilisation_percent": ("utilisation", "%"),
    "memory_used_gib": ("memory used", "GiB"),
    "memory_allocated_gib": ("memory in tensors", "GiB"),
    "memory_reserved_gib": ("memory reserved", "GiB"),
    "temperature_celsius": ("temperature", "C"),
    "power_watts": ("power", "W"),
    "clock_mhz": ("clock", "MHz"),
    "cpu_percent": ("process CPU", "% of a core"),
    "rss_gib": ("resident memory", "GiB"),
    "read_mib_per_second": ("read from storage", "MiB/s"),
    "write_mib_per_second": ("written to storage", "MiB/s"),
}
"""The readings that are drawn, each with its heading and unit, in this order; the last four are the process's."""

_LONGEST_SECONDS = 1e9
"""Thirty years: what is beyond is damaged, and would be infinite in 32 bits."""
_MAX_POINTS = 1200
_MAX_RANKS_IN_FULL = 256


@dataclass(frozen=True)
class RankData:
    """One rank.

    Attributes:
        lines: by name of `READINGS` times (seconds since 1970) and values.
        words: by name (`throttle_reasons`, `xid_errors`) how many samples told each word.
        highest: by name of a device's reading the most there was, such as `memory_total_gib`.
    """

    rank: int
    steps: RankSteps
    lines: dict[str, tuple[Floats, Floats]] = field(default_factory=dict)
    words: dict[str, Counter[str]] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)
    num_samples: int = 0
    num_held_back: int = 0
    """Samples that told a reason of `ALARMING_REASONS`."""
    spans: tuple[Span, ...] = ()
    first_steps: tuple[int | None, ...] = ()
    """Of each span the first step that it made, None where it made none that was not made again."""


@dataclass(frozen=True)
class RunData:
    """A run with what its ranks told; `ranks` are all that are known of, in order."""

    run: Run
    ranks: Sequence[RankData]

    @property
    def span(self) -> tuple[int, int] | None:
        """The first and the last step that any rank finished; None without any."""
        edges = [(int(rank.steps.steps[0]), int(rank.steps.steps[-1])) for rank in self.ranks if rank.steps.steps.size]
        if not edges:
            return None
        return min(first for first, _ in edges), max(last for _, last in edges)


def load_ranks(run: Run) -> RunData:
    """Read every rank's history, one after another.

    Ranks: local.
    """
    is_large = len(run.monitored) > _MAX_RANKS_IN_FULL
    told = {history.rank: _take(history, _MAX_POINTS // (2 if is_large else 1)) for history in run.histories()}
    begun = [data.first_steps[-1] for rank, data in told.items() if rank in run.rows and data.first_steps]
    again = min((step for step in begun if step is not None), default=None)
    if again is not None:
        # Where the job went on with fewer ranks: steps made again without one are not compared with those it made.
        for rank in set(told) - set(run.rows):
            told[rank] = replace(told[rank], steps=_before(told[rank].steps, again))
    known = sorted(set(run.rows) | set(told))
    return RunData(run, [told.get(rank) or _silent(rank) for rank in known])


def _before(steps: RankSteps, end: int) -> RankSteps:
    kept = steps.steps < end
    phases = {phase: seconds[kept] for phase, seconds in steps.phases.items()}
    return RankSteps(steps.rank, steps.steps[kept], steps.seconds[kept], phases)


def _silent(rank: int) -> RankData:
    nothing = np.zeros(0)
    return RankData(rank, RankSteps(rank, nothing.astype(np.int64), nothing, {}))


def _take(history: RankHistory, most: int) -> RankData:
    lines, highest = {}, {}
    readings = {**history.process, **history.device}
    for name, values in readings.items():
        is_known = np.isfinite(values)
        if is_known.any():
            highest[name] = float(values[is_known].max())
        if name in READINGS and is_known.any():
            lines[name] = thin_line(history.sample_times, values, most)
    throttled = history.words.get("throttle_reasons", ())
    return RankData(
        history.rank,
        RankSteps(
            history.rank,
            history.steps,
            _small(history.seconds),
            {phase: _small(seconds) for phase, seconds in history.phases.items()},
        ),
        lines,
        {name: Counter(word for _, said in told for word in said) for name, told in history.words.items()},
        highest,
        history.sample_times.size,
        sum(1 for _, said in throttled if ALARMING_REASONS.intersection(said)),
        history.spans,
        tuple(_first_step(history, place) for place in range(len(history.spans))),
    )


def _small(seconds: NDArray[Any]) -> NDArray[Any]:
    """Half the memory; durations in seconds are told to a microsecond, which is as exact below 8 s."""
    small: NDArray[Any] = np.clip(seconds, 0.0, _LONGEST_SECONDS).astype(np.float32)
    return small


def _first_step(history: RankHistory, place: int) -> int | None:
    steps = history.steps[history.sessions == place]
    return int(steps[0]) if steps.size else None
