"""Fewer numbers than there are, with the extremes among them: pure functions over arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Columns:
    """How steps are laid into columns: `num` of them, each of `width` steps, from step `first` on."""

    first: int
    width: int
    num: int

    def lay(self, steps: NDArray[np.int64], values: Floats) -> Floats:
        """A row for each column, with its steps' values; nan where there is none."""
        laid = np.full(self.num * self.width, np.nan)
        laid[steps - self.first] = values
        return laid.reshape(self.num, self.width)


def build_columns(first_step: int, last_step: int, most: int) -> Columns:
    """At most `most` columns, all equally wide but the last one, for the steps from first to last, both included.

    Ranks: local.
    """
    num_steps = max(last_step - first_step + 1, 1)
    width = -(-num_steps // most)
    return Columns(first_step, width, -(-num_steps // width))


def worst_of(laid: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Of each row its largest value and where in the row that is; nan and 0 where the row has no value.

    Ranks: local.
    """
    filled = np.where(np.isnan(laid), -np.inf, laid)
    place = filled.argmax(axis=1)
    worst = np.take_along_axis(filled, place[:, None], axis=1)[:, 0]
    return np.where(np.isneginf(worst), np.nan, worst), place


def median_of(laid: Floats) -> Floats:
    """Of each row the lower middle one of its values, a value that was really there; nan where there is none.

    Ranks: local.
    """
    ordered = np.sort(laid, axis=1)  # nan comes last
    count = (~np.isnan(laid)).sum(axis=1)
    middle = np.maximum(count - 1, 0) // 2
    return np.take_along_axis(ordered, middle[:, None], axis=1)[:, 0]


def thin_line(x: Floats, y: Floats, most: int) -> tuple[Floats, Floats]:
    """At most `most` points of a line: of each bucket of neighbours the lowest and the highest, in their order.

    The first and the last point stay; a bucket without any number keeps one nan, so that a gap stays a gap.

    Args:
        x: ascending. y: nan where there is no value.
    Ranks: local.
    """
    if x.size <= most:
        return x, y
    num_buckets = max((most - 2) // 2, 1)
    edges = np.linspace(1, x.size - 1, num_buckets + 1).astype(np.int64)
    starts = np.unique(edges[:-1])
    # nan would win every comparison: it loses both here, and a bucket of nan alone gives its first one.
    low = _places(np.where(np.isnan(y), np.inf, y), starts, x.size - 1, np.argmin)
    high = _places(np.where(np.isnan(y), -np.inf, y), starts, x.size - 1, np.argmax)
    kept = np.unique(np.concatenate([[0], low, high, [x.size - 1]]))
    return x[kept], y[kept]


def _places(y: Floats, starts: NDArray[np.int64], end: int, choose: Callable[[Floats], np.intp]) -> NDArray[np.int64]:
    ends = np.append(starts[1:], end)
    chosen = [start + choose(y[start:stop]) for start, stop in zip(starts, ends, strict=True)]
    return np.array(chosen, dtype=np.int64)


def thin_grid(times: Floats, values: Floats, num_buckets: int, span_seconds: float) -> Floats:
    """Two numbers for each of the equal parts of a span: the lowest and the highest, in the order they came in.

    Every line that is laid on the same grid has its numbers at the same places, whenever it was sampled. Where a part
    has one number it stands twice; where it has none both are nan.

    Args:
        times: ascending seconds from the span's begin.
    Ranks: local.
    """
    grid = np.full((num_buckets, 2), np.nan)
    is_known = np.isfinite(values)
    times, values = times[is_known], values[is_known]
    if not times.size:
        return grid.ravel()
    bucket = np.clip((times / max(span_seconds, 1e-9) * num_buckets).astype(np.int64), 0, num_buckets - 1)
    order = np.lexsort((values, bucket))
    first = np.flatnonzero(np.diff(bucket[order], prepend=-1))
    last = np.append(first[1:], order.size) - 1
    low, high = order[first], order[last]
    pair = np.sort(np.stack([low, high], axis=1), axis=1)
    grid[bucket[low]] = values[pair]
    return grid.ravel()
