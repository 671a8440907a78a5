"""Whom the others waited for: in each step all wait for the rank whose own work takes longest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankwise.report.heat import WAITING, RankSteps
from rankwise.report.thinning import Floats

_CHUNK_NUMBERS = 4_000_000
"""Ranks times steps that are laid beside each other at once."""
_MAX_COMPARED = 64
"""Ranks whose phases a slow rank's are compared with."""


@dataclass(frozen=True)
class Blame:
    """What one rank cost the run.

    Attributes:
        seconds: how long the others waited for it: in the steps in which it was last, its own work beyond that of the
            rank in the middle.
        num_steps, first_step, last_step: those steps: how many, and between which all but a few lie.
        phase: where it lost most of that, None where the phases do not tell.
        slowdown: how many times as long its own work took in those steps as the middle rank's.
    """

    rank: int
    seconds: float
    num_steps: int
    first_step: int
    last_step: int
    phase: str | None
    slowdown: float


def find_blame(all_steps: Sequence[RankSteps], span: tuple[int, int], most: int) -> list[Blame]:
    """The ranks that cost most, the worst first; only those that stand out.

    By chance each rank is last now and then: one stands out with a hundredth of the run, and three times what the
    others cost on average.

    Ranks: local.
    """
    present = [rank for rank in all_steps if rank.steps.size]
    if len(present) < 2:
        return []
    last, excess, middle = _last_of_each_step(present, span)
    lost = np.bincount(last[last >= 0], weights=excess[last >= 0], minlength=len(present))
    whole = max(float(np.nansum(rank.seconds)) for rank in present)
    found = []
    for index in np.argsort(-lost)[:most]:
        usual = float(lost.sum() - lost[index]) / (len(present) - 1)
        if lost[index] < max(3 * usual, whole / 100):
            break
        places = np.flatnonzero((last == index) & (excess > 0.05 * middle))
        if places.size:
            slowdown = float(np.median(1 + excess[places] / np.maximum(middle[places], 1e-9)))
            phase = _phase_of(present, int(index), places + span[0])
            low, high = np.quantile(places, (0.02, 0.98), method="nearest") + span[0]
            steps = (int(low), int(high))
            found.append(Blame(present[index].rank, float(lost[index]), int(places.size), *steps, phase, slowdown))
    return found


def _last_of_each_step(present: Sequence[RankSteps], span: tuple[int, int]) -> tuple[NDArray[np.int64], Floats, Floats]:
    """For each step which rank was last (-1: nobody knows), by how much beyond the middle, and the middle."""
    num_steps = span[1] - span[0] + 1
    last, excess, middle = np.full(num_steps, -1), np.zeros(num_steps), np.zeros(num_steps)
    chunk = max(_CHUNK_NUMBERS // len(present), 1)
    for begin in range(0, num_steps, chunk):
        end = min(begin + chunk, num_steps)
        laid = np.full((len(present), end - begin), np.nan)
        for row, rank in zip(laid, present, strict=True):
            inside = slice(*np.searchsorted(rank.steps, (begin + span[0], end + span[0])))
            row[rank.steps[inside] - span[0] - begin] = rank.own_seconds[inside]
        is_told = (~np.isnan(laid)).sum(axis=0) >= 2
        if is_told.any():
            told = laid[:, is_told]
            places = np.flatnonzero(is_told) + begin
            last[places] = np.nanargmax(told, axis=0)
            middle[places] = _median(told)
            excess[places] = np.nanmax(told, axis=0) - middle[places]
    return last, excess, middle


def _median(laid: Floats) -> Floats:
    """The lower middle of each column: with two ranks the slow one is compared with the quick one."""
    ordered = np.sort(laid, axis=0)
    count = (~np.isnan(laid)).sum(axis=0)
    middle: Floats = np.take_along_axis(ordered, ((count - 1) // 2)[None], axis=0)[0]
    return middle


def _phase_of(present: Sequence[RankSteps], index: int, steps: NDArray[np.int64]) -> str | None:
    """The phase in which the rank took longer than others in these steps, by the largest difference."""
    others = [other for number, other in enumerate(present) if number != index]
    others = others[:: -(-len(others) // _MAX_COMPARED)]
    own = _means(present[index], steps)
    compared = [_means(other, steps) for other in others]
    differences = {
        phase: seconds - float(np.median([means.get(phase, 0.0) for means in compared]))
        for phase, seconds in own.items()
        if phase != WAITING
    }
    phase = max(differences, key=differences.__getitem__, default=None)
    return phase if phase is not None and differences[phase] > 0 else None


def _means(rank: RankSteps, steps: NDArray[np.int64]) -> dict[str, float]:
    is_in = np.isin(rank.steps, steps, assume_unique=True)
    return {
        phase: float(np.nansum(seconds[is_in]) / max(int(is_in.sum()), 1)) for phase, seconds in rank.phases.items()
    }
