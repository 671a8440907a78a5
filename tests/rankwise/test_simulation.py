"""Simulated run directories keep to the contract, and what is to be found in them is there."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from rankwise.checkpoint.manifest import read_manifest
from rankwise.errors import RankwiseError
from rankwise.runreader import Tail, read_run
from rankwise.simulation import Plan, make_run, play_run
from rankwise.simulation.work import phases_of, time_steps
from rankwise.telemetry import PHASES, Start, Tick, event_from_json, from_json


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_run(tmp_path / name, 4, 40, seed=seed)
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert first == again
    assert first["monitor/rank-00001.jsonl"] != other["monitor/rank-00001.jsonl"]


def test_every_line_is_of_the_contract_but_the_one_that_the_kill_cut(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 4, 60)
    for rank in range(4):
        lines = (tmp_path / "run" / "monitor" / f"rank-{rank:05d}.jsonl").read_bytes().splitlines()
        read = [from_json(line) for line in lines]
        assert read.count(None) == 1
        assert [type(line).__name__ for line in read if isinstance(line, Start)] == ["Start", "Start"]
        assert isinstance(read[0], Start)
        assert (read[0].rank, read[0].device) == (rank, f"cuda:{rank}")
        for line in read:
            if isinstance(line, Tick) and line.steps is not None:
                assert {len(values) for values in line.steps.phases.values()} == {len(line.steps.seconds)}
                totals = np.sum(list(line.steps.phases.values()), axis=0)
                np.testing.assert_allclose(totals, line.steps.seconds, atol=1e-5)
    for path in (tmp_path / "run" / "events").iterdir():
        assert all(event_from_json(line) is not None for line in path.read_bytes().splitlines())


def test_run_says_that_it_is_simulated(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 2, 30)
    told = json.loads((tmp_path / "run" / "run.json").read_bytes())
    assert told["simulated"] is True
    assert [row["rank"] for row in told["ranks"]] == [0, 1]


def test_checkpoints_pass_as_manifests_of_the_checkpoint_layout(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 2, 30)
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(steps) == 10
    assert all(read_manifest(tmp_path / "run" / "checkpoints" / step).world_size == 2 for step in steps)


def test_slow_rank_has_more_data_time_and_the_others_wait_for_it() -> None:
    plan = Plan(8, 400, seed=5)
    assert plan.slow is not None
    timing = time_steps(plan)
    slow = phases_of(plan, plan.slow.rank, timing)
    other = phases_of(plan, 0, timing)
    window = slice(plan.slow.first - 1, plan.slow.last)
    assert np.median(slow["data"][window]) > 5 * np.median(other["data"][window])
    assert np.median(other["communication"][window]) > 2 * np.median(slow["communication"][window])
    np.testing.assert_allclose(sum(slow.values()), timing.seconds)


def test_restart_makes_steps_again_and_the_lost_rank_falls_silent_first(tmp_path: Path) -> None:
    plan = make_run(tmp_path / "run", 8, 200)
    assert plan.lost is not None
    run = read_run(tmp_path / "run")
    lost, other = run.history(plan.lost.rank), run.history(0)
    assert [span.ended for span in other.spans] == [False, True]
    assert lost.spans[0].last_time < other.spans[0].last_time - 30
    assert other.steps.tolist() == list(range(1, 201))
    hangs = [event for event in run.events if event.kind == "hang"]
    assert [list(event.ranks) for event in hangs] == [[plan.lost.rank]]


def test_hot_device_is_throttled_and_slow(tmp_path: Path) -> None:
    plan = make_run(tmp_path / "run", 8, 200)
    assert plan.hot is not None
    history = read_run(tmp_path / "run").history(plan.hot.rank)
    is_hot = history.device["temperature_celsius"] >= 85
    assert is_hot.any()
    assert not is_hot.all()
    assert [index for index, _ in history.words["throttle_reasons"]] == np.flatnonzero(is_hot).tolist()


def test_stragglers_of_the_plan_are_told_as_events(tmp_path: Path) -> None:
    plan = make_run(tmp_path / "run", 8, 300)
    assert plan.slow is not None
    assert plan.hot is not None
    told = [(event.kind, event.ranks[0], event.phase) for event in read_run(tmp_path / "run").events if event.ranks]
    for kind in ("straggler", "straggler_over"):
        assert (kind, plan.slow.rank, "data") in told
        assert (kind, plan.hot.rank, "backward") in told


@pytest.mark.parametrize(("ranks", "steps"), [(1, 1), (1, 500), (3, 5), (2, 20), (9, 21)])
def test_small_runs_are_whole(tmp_path: Path, ranks: int, steps: int) -> None:
    make_run(tmp_path / "run", ranks, steps)
    run = read_run(tmp_path / "run")
    assert run.trouble == ()
    assert [history.steps.tolist() for history in run.histories()] == [list(range(1, steps + 1))] * ranks
    assert set(run.history(0).phases) <= {*PHASES, "other"}


def test_without_trouble_nothing_goes_wrong(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 4, 100, with_trouble=False)
    run = read_run(tmp_path / "run")
    assert {event.kind for event in run.events} == {"checkpoint"}
    assert [len(history.spans) for history in run.histories()] == [1] * 4


def test_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("dear")
    with pytest.raises(RankwiseError, match="is there and not empty"):
        make_run(tmp_path, 1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_ranks": 0}, "num_ranks is 0"),
        ({"num_steps": -1}, "num_steps is -1"),
        ({"seconds_per_step": 0.0}, "0.001"),
    ],
)
def test_numbers_out_of_bounds_are_refused(change: dict[str, float], said: str) -> None:
    with pytest.raises(RankwiseError, match=said):
        Plan(**{"num_ranks": 1, "num_steps": 1} | change)  # type: ignore[arg-type]


def test_played_run_grows_as_time_passes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    over = threading.Event()
    plan = Plan(2, 1000, with_trouble=False)
    player = threading.Thread(target=play_run, args=(run, plan), kwargs={"is_over": over.is_set})
    player.start()
    try:
        wait_until(lambda: (run / "monitor" / "rank-00001.jsonl").exists())
        tail = Tail(run)
        before = tail.look().states
        wait_until(lambda: all(tail.look().states[rank].tick != before[rank].tick for rank in (0, 1)))
    finally:
        over.set()
        player.join()
    last = tail.look().states[0].tick
    assert last is not None
    assert 0 < last.step < 1000


def wait_until(is_so: object) -> None:
    over = threading.Event()
    for _ in range(300):
        if is_so():  # type: ignore[operator]
            return
        over.wait(0.1)
    raise AssertionError("it did not come to that in 30 s")


def test_command_writes_a_run_and_says_who_is_slow(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rankwise.simulation", str(tmp_path / "run"), "--ranks", "3", "--steps", "40"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "slow: rank" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (again.returncode, "not empty" in again.stderr) == (2, True)
