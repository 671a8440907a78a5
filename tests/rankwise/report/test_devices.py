"""Readings of devices by node, on one grid of times."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankwise.report import devices
from rankwise.report.devices import build_devices
from rankwise.report.heat import RankSteps
from rankwise.report.loading import RankData, RunData, load_ranks
from rankwise.runreader import Run, read_run


class Unpacked:
    """Takes arrays as a Packer does and gives them back."""

    def add_short(self, values: Any) -> Any:
        return values


def build(data: RunData, interesting: set[int] = frozenset()) -> dict[str, Any] | None:  # type: ignore[assignment]
    return build_devices(data, interesting, Unpacked())  # type: ignore[arg-type]


def test_lines_stand_by_node_and_keep_the_highest(run_dir: Path) -> None:
    data = load_ranks(read_run(run_dir))
    made = build(data)
    assert made is not None
    assert [node["places"] for node in made["nodes"]] == [list(range(8)), list(range(8, 16))]
    which = [reading["name"] for reading in made["readings"]].index("temperature_celsius")
    for rank in data.ranks:
        line = made["nodes"][rank.rank // 8]["lines"][which][rank.rank % 8]
        assert line.size == 2 * made["buckets"]
        assert np.nanmax(line) == rank.lines["temperature_celsius"][1].max()
    highest = max(rank.highest["temperature_celsius"] for rank in data.ranks)
    assert np.nanmax(made["all"][which]["high"]) == highest


def test_clocks_of_hosts_are_not_compared() -> None:
    nothing = np.zeros(0)
    ranks = [
        RankData(
            rank,
            RankSteps(rank, nothing.astype(int), nothing, {}),
            {"power_watts": (1e9 * rank + np.arange(4.0), np.arange(4.0))},
            num_samples=4,
        )
        for rank in range(2)
    ]
    made = build(RunData(Run(Path(), rows={0: {"node_rank": 0}, 1: {"node_rank": 1}}), ranks))
    assert made is not None
    assert made["seconds"] == 3.0
    np.testing.assert_array_equal(made["nodes"][0]["lines"][0][0], made["nodes"][1]["lines"][0][0])


def test_of_many_nodes_the_suspicious_ones_are_shown(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "MAX_RANKS", 8)
    made = build(load_ranks(read_run(run_dir)), {12})
    assert made is not None
    assert made["numNodes"] == 2
    assert [node["node"] for node in made["nodes"]] == [1]


def test_a_run_without_readings_has_no_devices(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes((run_dir / "run.json").read_bytes())
    assert build(load_ranks(read_run(tmp_path))) is None
