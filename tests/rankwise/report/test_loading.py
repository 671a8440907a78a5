"""What is kept of a rank's history."""

from pathlib import Path

import numpy as np

from rankwise.report.loading import load_ranks
from rankwise.runreader import read_run


def test_every_rank_is_there_with_its_steps_and_readings(run_dir: Path) -> None:
    run = read_run(run_dir)
    data = load_ranks(run)
    assert [rank.rank for rank in data.ranks] == list(range(16))
    assert data.span == (1, 400)
    history = run.history(5)
    kept = data.ranks[5]
    np.testing.assert_allclose(kept.steps.seconds, history.seconds, rtol=1e-6)
    times, values = kept.lines["temperature_celsius"]
    assert values.max() == history.device["temperature_celsius"].max()
    assert times.size == values.size
    assert kept.highest["memory_total_gib"] == 79.6


def test_a_restart_is_seen_by_the_first_step_of_the_second_session(run_dir: Path) -> None:
    data = load_ranks(read_run(run_dir))
    assert len(data.ranks[0].first_steps) == 2
    assert data.ranks[0].first_steps[0] == 1


def test_a_rank_without_a_file_has_its_place(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes((run_dir / "run.json").read_bytes())
    data = load_ranks(read_run(tmp_path))
    assert len(data.ranks) == 16
    assert data.span is None
