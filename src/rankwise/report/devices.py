"""What the devices said over time, by node and local rank, as it goes into the page."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from rankwise.report.arrays import Packer
from rankwise.report.loading import READINGS, RankData, RunData
from rankwise.report.thinning import Floats, thin_grid

MAX_RANKS = 256
"""Of more ranks than this only some nodes are in the page one by one; all of them are in its summary."""
_MAX_NUMBERS = 500_000
_MIN_BUCKETS, _MAX_BUCKETS = 30, 150


def build_devices(data: RunData, interesting: Collection[int], packer: Packer) -> dict[str, Any] | None:
    """Lines of each node's ranks, and of all ranks the middle one with the lowest and the highest; None without any.

    Every rank's time begins with its node's first sample, so clocks of hosts are not compared. Each part of the time
    keeps its lowest and its highest value.

    Args:
        interesting: ranks whose nodes are shown first, and one by one however many ranks there are.
    Ranks: local.
    """
    readings = _readings_of(data.ranks)
    if not readings:
        return None
    nodes = _nodes_of(data)
    begins = {node: min(_first_time(rank) for rank in ranks) for node, ranks in nodes.items()}
    span = max(_last_time(rank) - begins[node] for node, ranks in nodes.items() for rank in ranks)
    shown = _choose_nodes(nodes, interesting)
    num_ranks = sum(len(nodes[node]) for node in shown)
    num_buckets = int(np.clip(_MAX_NUMBERS // (2 * num_ranks * len(readings)), _MIN_BUCKETS, _MAX_BUCKETS))
    num_buckets = min(num_buckets, max(max(rank.num_samples for rank in data.ranks), 1))
    grids: dict[str, dict[int, Floats]] = {
        name: {
            rank.rank: thin_grid(rank.lines[name][0] - begins[node], rank.lines[name][1], num_buckets, span)
            for node, ranks in nodes.items()
            for rank in ranks
            if name in rank.lines
        }
        for name in readings
    }
    place = {rank.rank: index for index, rank in enumerate(data.ranks)}
    return {
        "seconds": span,
        "buckets": num_buckets,
        "numNodes": len(nodes),
        "numThinned": max(rank.num_samples for rank in data.ranks),
        "readings": [{"name": name, "label": READINGS[name][0], "unit": READINGS[name][1]} for name in readings],
        "all": [_summary(list(grids[name].values()), packer) for name in readings],
        "nodes": [
            {
                "node": node,
                "places": [place[rank.rank] for rank in nodes[node]],
                "lines": [[_packed(grids[name].get(rank.rank), packer) for rank in nodes[node]] for name in readings],
            }
            for node in shown
        ],
    }


def _readings_of(ranks: Sequence[RankData]) -> list[str]:
    return [name for name in READINGS if any(name in rank.lines for rank in ranks)]


def _nodes_of(data: RunData) -> dict[int, list[RankData]]:
    nodes: dict[int, list[RankData]] = {}
    for rank in data.ranks:
        if rank.lines:
            nodes.setdefault(node_of(data, rank.rank), []).append(rank)
    return dict(sorted(nodes.items()))


def node_of(data: RunData, rank: int) -> int:
    """The node that a rank stands on, 0 where nobody says.

    Ranks: local.
    """
    node = data.run.rows.get(rank, {}).get("node_rank")
    return node if isinstance(node, int) else 0


def _first_time(rank: RankData) -> float:
    return min(float(x[0]) for x, _ in rank.lines.values())


def _last_time(rank: RankData) -> float:
    return max(float(x[-1]) for x, _ in rank.lines.values())


def _packed(grid: Floats | None, packer: Packer) -> dict[str, Any] | None:
    return None if grid is None else packer.add_short(grid)


def _choose_nodes(nodes: dict[int, list[RankData]], interesting: Collection[int]) -> list[int]:
    if sum(map(len, nodes.values())) <= MAX_RANKS:
        return list(nodes)
    largest = max(map(len, nodes.values()))
    most = max(MAX_RANKS // largest, 1)
    chosen = [node for node, ranks in nodes.items() if any(rank.rank in interesting for rank in ranks)][:most]
    hottest = sorted(nodes, key=lambda node: -max(rank.highest.get("temperature_celsius", 0.0) for rank in nodes[node]))
    spread = list(nodes)[:: -(-len(nodes) // most)]
    for node in [*hottest[: most // 4], *spread]:
        if len(chosen) < most and node not in chosen:
            chosen.append(node)
    return sorted(chosen)


def _summary(grids: Sequence[Floats], packer: Packer) -> dict[str, Any]:
    together = np.stack(grids)
    with warnings.catch_warnings():
        # A part of the time in which nobody said anything is a gap.
        warnings.simplefilter("ignore", RuntimeWarning)
        rows = {"low": np.nanmin(together, 0), "middle": np.nanmedian(together, 0), "high": np.nanmax(together, 0)}
    return {name: packer.add_short(values) for name, values in rows.items()}
