"""Whole run directories: what is there is read, what is not is no error, what is no run is said."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rankwise.errors import RankwiseError
from rankwise.runreader import read_run
from rankwise.simulation import make_run
from rankwise.telemetry import Event, Start, Steps, Tick, events_path, monitor_path, to_json


def test_simulated_run_is_read_whole(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 4, 60)
    run = read_run(tmp_path / "run")
    assert run.trouble == ()
    assert run.monitored == (0, 1, 2, 3)
    assert run.rows[2]["host"] == "node-0000"
    assert run.num_steps == 60
    assert [event.time for event in run.events] == sorted(event.time for event in run.events)
    assert run.metrics["nll"].steps.tolist() == list(range(3, 61, 3))
    assert np.isfinite(run.metrics["heldout/psnr_db"].values).all()
    assert [checkpoint.step for checkpoint in run.checkpoints] == list(range(6, 61, 6))
    assert all(checkpoint.num_bytes > 10**9 and checkpoint.time > 1.7e9 for checkpoint in run.checkpoints)
    assert [history.rank for history in run.histories()] == [0, 1, 2, 3]


def test_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match=r"there is no folder .*nowhere"):
        read_run(tmp_path / "nowhere")


def test_file_instead_of_a_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RankwiseError, match="cannot be listed: Not a directory"):
        read_run(tmp_path / "file")


def test_folder_that_is_no_run_is_said(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with pytest.raises(RankwiseError, match=r"is no run directory: it has none of run\.json"):
        read_run(tmp_path)


def test_run_without_monitor_gives_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "rank-00000.jsonl").write_text('{"step": 1, "time": 5.0, "nll": 0.5}\n')
    (tmp_path / "run.json").write_text(json.dumps({"ranks": [{"rank": 0, "host": "a"}]}))
    run = read_run(tmp_path)
    assert (run.monitored, run.events, run.checkpoints, run.trouble, run.num_steps) == ((), (), (), (), None)
    assert run.rows == {0: {"rank": 0, "host": "a"}}
    assert run.metrics["nll"].values.tolist() == [0.5]
    assert list(run.histories()) == []
    with pytest.raises(RankwiseError, match=r"rank-00000\.jsonl cannot be read: No such file"):
        run.history(0)


def test_without_run_json_the_ranks_say_themselves_where_they_are(tmp_path: Path) -> None:
    path = monitor_path(tmp_path, 1)
    path.parent.mkdir()
    path.write_text(to_json(Start(0.0, 1, 1, 0, 2, "node-b", 7, "cuda:1", device_uuid="GPU-1")) + "\n")
    monitor_path(tmp_path, 0).write_text("no line of ours")
    rows = read_run(tmp_path).rows
    assert list(rows) == [1]
    assert (rows[1]["host"], rows[1]["device"], rows[1]["device_uuid"]) == ("node-b", "cuda:1", "GPU-1")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"ranks": 5}', '{"ranks": [null, {"rank": "0"}]}'])
def test_damaged_run_json_does_not_hide_the_rest(tmp_path: Path, content: str) -> None:
    make_run(tmp_path / "run", 2, 5)
    (tmp_path / "run" / "run.json").write_text(content)
    run = read_run(tmp_path / "run")
    assert list(run.rows) == [0, 1]
    assert len(run.history(1).steps) == 5
    assert bool(run.trouble) == (not content.startswith('{"'))


def test_later_line_of_a_metric_counts_and_null_is_nan(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    lines = [
        '{"step": 2, "time": 1, "nll": 0.5}',
        '{"step": 4, "time": 2, "nll": null}',
        '{"step": 2, "time": 3, "nll": 0.25, "name": "words", "flag": true}',
        '{"step": "six", "nll": 1}',
        '{"nll": 1}',
        "[]",
        '{"step": 6, "ti',
    ]
    (tmp_path / "metrics" / "rank-00000.jsonl").write_text("\n".join(lines))
    metrics = read_run(tmp_path).metrics
    assert list(metrics) == ["nll"]
    assert metrics["nll"].steps.tolist() == [2, 4]
    assert metrics["nll"].values[0] == 0.25
    assert math.isnan(metrics["nll"].values[1])
    assert metrics["nll"].times.tolist() == [3, 2]


def test_events_of_all_ranks_are_one_list_by_time(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    early, late = Event("hang", 5.0, 1, "a", [1]), Event("device", 7.0, 2, "b", [0])
    events_path(tmp_path, 0).write_text(f'{to_json(late)}\n{{"kind": "hang"}}\n{{"kind": 5, "tim\n')
    strange = to_json(Event("hang", 6.0, 1, "c", ["one"]))  # type: ignore[list-item]
    events_path(tmp_path, 1).write_text(f"{to_json(early)}\n{strange}\n")
    assert [event.message for event in read_run(tmp_path).events] == ["a", "b"]


def test_damaged_checkpoint_is_told_and_the_others_are_there(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 1, 10)
    (tmp_path / "run" / "checkpoints" / "step-00000003" / "manifest.json").write_text("{}")
    (tmp_path / "run" / "checkpoints" / ".staging-1").mkdir()
    run = read_run(tmp_path / "run")
    assert [checkpoint.step for checkpoint in run.checkpoints] == [1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert len(run.trouble) == 1
    assert "step-00000003" in run.trouble[0]


def test_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 1, 5)
    path = tmp_path / "run" / "events" / "rank-00000.jsonl"
    path.unlink()
    path.mkdir()
    assert "events/rank-00000.jsonl cannot be read: Is a directory" in read_run(tmp_path / "run").trouble


def test_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 2, 5)
    names = ("run.json", "config.json", "monitor/rank-00001.jsonl", "checkpoints/step-00000002/manifest.json")
    for name in names:
        (tmp_path / "run" / name).unlink()
        os.mkfifo(tmp_path / "run" / name)
    run = read_run(tmp_path / "run")
    assert (run.info, run.num_steps, run.monitored) == ({}, None, (0,))
    for name in ("run.json", *names[2:]):
        assert f"{name} cannot be read: it is no file" in run.trouble


def test_numbers_beyond_all_reason_are_left_out(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 1, 5)
    huge = 10**400
    for folder, line in (
        ("metrics", {"step": huge, "nll": 1.0}),
        ("metrics", {"step": 4, "time": huge, "nll": huge}),
        ("events", {"kind": "hang", "time": huge, "step": 1, "message": "a"}),
        ("events", {"kind": "hang", "time": 1.0, "step": huge, "message": "a"}),
        ("monitor", json.loads(to_json(Tick(1.0, 5, None, 0.0, Steps(5, [0.5], {"data": [0.5]})))) | {"step": huge}),
        ("monitor", json.loads(to_json(Tick(1.0, 5, None, 0.0, device={"power_watts": huge})))),
    ):
        with open(tmp_path / "run" / folder / "rank-00000.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    run = read_run(tmp_path / "run")
    series = run.metrics["nll"]
    assert math.isnan(series.values[series.steps.tolist().index(4)])
    assert series.steps.max() <= 5
    assert "hang" not in {event.kind for event in run.events}
    history = run.history(0)
    assert history.num_foreign == 1
    assert history.steps.tolist() == [1, 2, 3, 4, 5]
    assert math.isnan(history.device["power_watts"][-1])


def test_reading_needs_no_torch() -> None:
    code = "import sys, rankwise.runreader, rankwise.top; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
