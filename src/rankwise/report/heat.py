"""Step times as a picture: rows are ranks, columns steps, both in buckets where there are many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.report.arrays import Packer
from rankwise.report.thinning import Columns, Floats, build_columns, median_of, worst_of

MAX_ROWS = 256
"""More ranks than this share rows."""
MAX_CELLS = 65_536
MIN_COLUMNS, MAX_COLUMNS = 256, 2_000
MAX_PHASES = 12
"""The phases with the most time are told apart; a program may name any number."""
WAITING = "communication"


@dataclass(frozen=True)
class RankSteps:
    """The steps that one rank finished, ascending."""

    rank: int
    steps: NDArray[np.int64]
    seconds: Floats
    phases: Mapping[str, Floats]

    @property
    def own_seconds(self) -> Floats:
        """Without communication, in which a rank waits for slower ones."""
        waited = self.phases.get(WAITING)
        return self.seconds if waited is None else np.maximum(self.seconds - np.nan_to_num(waited), 0.0)


@dataclass
class _Row:
    """One row of the picture: the worst of its ranks in each column, the one with the most own work."""

    step: Floats
    worst_seconds: Floats
    worst_step: NDArray[np.uint16]
    worst_rank: NDArray[np.uint16]
    at_worst: Floats
    typical: Floats
    own: Floats
    most: Floats


def build_heat(
    all_steps: Sequence[RankSteps], phases: Sequence[str], span: tuple[int, int], packer: Packer
) -> dict[str, Any]:
    """The picture as it goes into the page; assets/heatmap.js reads it.

    A cell stands for some steps of one rank or of some: it has the one with the most own work, which step and rank that
    was, how long it took, and its phases; the longest step; the median, of the rank whose median is longest; and the
    most that each phase took in any of them. Own work, since in step all ranks take equally long.

    Args:
        all_steps: by rank, ascending; ranks without steps too, so that every rank has its place.
        span: the first and the last step of the run.
    Ranks: local.
    """
    ranks_per_row = -(-len(all_steps) // MAX_ROWS)
    num_rows = -(-len(all_steps) // ranks_per_row)
    most = min(max(MAX_CELLS // num_rows, MIN_COLUMNS), MAX_COLUMNS)
    columns = build_columns(*span, most)
    rows = [
        _build_row(all_steps[begin : begin + ranks_per_row], phases, columns)
        for begin in range(0, len(all_steps), ranks_per_row)
    ]

    def gathered(name: str) -> NDArray[Any]:
        return np.stack([getattr(row, name) for row in rows])

    at_worst, longest = gathered("at_worst"), gathered("most")
    return {
        "first": columns.first,
        "last": span[1],
        "width": columns.width,
        "columns": columns.num,
        "rows": num_rows,
        "ranksPerRow": ranks_per_row,
        "phases": list(phases),
        "step": packer.add_seconds(gathered("step")),
        "typical": packer.add_seconds(gathered("typical")),
        "own": packer.add_seconds(gathered("own")),
        "worstSeconds": packer.add_seconds(gathered("worst_seconds")),
        "worstStep": packer.add(gathered("worst_step")),
        "worstRank": packer.add(gathered("worst_rank")),
        "atWorst": [packer.add_seconds(at_worst[:, place]) for place in range(len(phases))],
        "most": [packer.add_seconds(longest[:, place]) for place in range(len(phases))],
    }


def _build_row(ranks: Iterable[RankSteps], phases: Sequence[str], columns: Columns) -> _Row:
    row = _Row(
        step=np.full(columns.num, np.nan),
        worst_seconds=np.full(columns.num, np.nan),
        worst_step=np.zeros(columns.num, np.uint16),
        worst_rank=np.zeros(columns.num, np.uint16),
        at_worst=np.full((len(phases), columns.num), np.nan),
        typical=np.full(columns.num, np.nan),
        own=np.full(columns.num, np.nan),
        most=np.full((len(phases), columns.num), np.nan),
    )
    for number, rank in enumerate(ranks):
        if rank.steps.size:
            _add_rank(row, number, rank, phases, columns)
    return row


def _add_rank(row: _Row, number: int, rank: RankSteps, phases: Sequence[str], columns: Columns) -> None:
    laid = columns.lay(rank.steps, rank.seconds)
    longest, _ = worst_of(laid)
    row.step = np.fmax(row.step, longest)
    own, place = worst_of(columns.lay(rank.steps, rank.own_seconds))
    is_worse = ~(own <= row.own) & ~np.isnan(own)
    row.own[is_worse], row.worst_rank[is_worse] = own[is_worse], number
    row.worst_seconds[is_worse] = laid[is_worse, place[is_worse]]
    # A column is at most 65,536 steps wide: 256 columns of them are 16 million steps.
    row.worst_step[is_worse] = place[is_worse]
    row.typical = np.fmax(row.typical, median_of(laid) if columns.width > 1 else longest)
    for index, phase in enumerate(phases):
        seconds = rank.phases.get(phase)
        if seconds is None:
            row.at_worst[index, is_worse] = np.nan
            continue
        laid = columns.lay(rank.steps, seconds)
        row.at_worst[index, is_worse] = laid[is_worse, place[is_worse]]
        row.most[index] = np.fmax(row.most[index], worst_of(laid)[0])


def build_totals(all_steps: Sequence[RankSteps], phases: Sequence[str]) -> dict[str, NDArray[Any]]:
    """What each rank did over the whole run, an array by name with a number for each rank.

    `num_steps`, `mean` and `median` of its steps, `own` (the mean of its own work), `worst`, `worst_step`, and
    `phases`: mean seconds per step, ranks x phases. nan where a rank has no steps.

    Ranks: local.
    """
    count = len(all_steps)
    totals: dict[str, NDArray[Any]] = {
        "num_steps": np.array([rank.steps.size for rank in all_steps], np.int32),
        "worst_step": np.zeros(count, np.int32),
        "phases": np.full((count, len(phases)), np.nan),
        **{name: np.full(count, np.nan) for name in ("median", "own", "worst", "mean")},
    }
    for index, rank in enumerate(all_steps):
        if not rank.steps.size or np.isnan(rank.seconds).all():
            continue
        worst = int(np.nanargmax(rank.seconds))
        totals["worst"][index], totals["worst_step"][index] = rank.seconds[worst], rank.steps[worst]
        totals["mean"][index], totals["median"][index] = np.nanmean(rank.seconds), np.nanmedian(rank.seconds)
        totals["own"][index] = np.nanmean(rank.own_seconds)
        for place, phase in enumerate(phases):
            seconds = rank.phases.get(phase)
            if seconds is not None and not np.isnan(seconds).all():
                # A phase that a step has not is no time in it.
                totals["phases"][index, place] = np.nansum(seconds) / rank.steps.size
    return totals


def choose_phases(all_steps: Sequence[RankSteps], known: Sequence[str]) -> list[str]:
    """The phases that took any time: the known ones in their order, then others by how much; no more than fit.

    Ranks: local.
    """
    seconds: dict[str, float] = {}
    for rank in all_steps:
        for phase, values in rank.phases.items():
            seconds[phase] = seconds.get(phase, 0.0) + float(np.nansum(values))
    found = sorted((phase for phase in seconds if seconds[phase] > 0), key=lambda phase: -seconds[phase])[:MAX_PHASES]
    return [phase for phase in known if phase in found] + [phase for phase in found if phase not in known]
