"""What is kept of a rank's history."""

from pathlib import Path

import numpy as np

from rankwise.report.loading import load_ranks
from rankwise.runreader import read_run
from rankwise.telemetry import Start, Steps, Tick, monitor_path, to_json


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


def test_steps_made_again_without_a_rank_are_not_compared_with_its_own(tmp_path: Path) -> None:
    def write(rank: int, first: int, last: int, seconds: float) -> None:
        monitor_path(tmp_path, rank).parent.mkdir(exist_ok=True)
        steps = Steps(first, [seconds] * (last - first + 1), {"data": [seconds] * (last - first + 1)})
        with monitor_path(tmp_path, rank).open("a") as file:
            file.write(to_json(Start(1.0, rank, rank, 0, 2, "a", 7, "cpu")) + "\n")
            file.write(to_json(Tick(2.0, last, None, 0.0, steps)) + "\n")

    write(0, 1, 10, 1.0)
    write(1, 1, 10, 1.0)
    write(0, 6, 20, 2.0)
    (tmp_path / "run.json").write_text('{"world_size": 1, "ranks": [{"rank": 0}]}')
    kept, gone = load_ranks(read_run(tmp_path)).ranks
    assert kept.steps.steps.tolist() == list(range(1, 21))
    assert gone.steps.steps.tolist() == [1, 2, 3, 4, 5]
    assert gone.steps.phases["data"].size == gone.steps.seconds.size == 5


def test_a_rank_without_a_file_has_its_place(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes((run_dir / "run.json").read_bytes())
    data = load_ranks(read_run(tmp_path))
    assert len(data.ranks) == 16
    assert data.span is None
