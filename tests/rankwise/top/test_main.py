"""`rankwise top` without a terminal: text and JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rankwise.simulation import make_run
from rankwise.top import main

CALL = "import sys; from rankwise.top import main; sys.exit(main(sys.argv[1:]))"


def top(*arguments: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "error", "-c", CALL, *arguments]
    environ = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environ |= more.pop("environ", {})
    options = {"capture_output": True, "text": True, "timeout": 60, "check": False, "env": environ} | more
    return subprocess.run(command, **options)


def told_ranks(text: str) -> list[int]:
    lines = text.splitlines()
    head = next(number for number, line in enumerate(lines) if line.split()[:1] in (["rank"], ["rank^"], ["rankv"]))
    return [int(line.split()[0]) for line in lines[head + 1 :] if line.split()[0].isdecimal()]


def test_once_prints_the_job_and_every_rank_as_plain_text(four: Any) -> None:
    done = top(str(four.folder), "--once")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert told_ranks(done.stdout) == [0, 1, 2, 3]
    assert "slowest: rank 1 (node-a, cuda:1): 80 ms a step more to do than most" in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.split()[:2] == ["2", "node-b"])
    assert line.split()[-6:] == ["92%", "40/80", "91", line.split()[-3], "0", "hot"]


def test_without_a_terminal_it_prints_once(four: Any) -> None:
    assert told_ranks(top(str(four.folder), stdin=subprocess.DEVNULL).stdout) == [0, 1, 2, 3]


def test_sort_and_filter_choose_the_lines(four: Any) -> None:
    assert told_ranks(top(str(four.folder), "--once", "--sort", "-temp").stdout)[0] == 2
    assert told_ranks(top(str(four.folder), "--once", "--filter", "lag>0").stdout) == [3]
    assert told_ranks(top(str(four.folder), "--once", "--filter", "host=node-b", "--sort=-rank").stdout) == [3, 2]


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_lines_are_no_longer_than_columns_says(four: Any, columns: str) -> None:
    done = top(str(four.folder), "--once", environ={"COLUMNS": columns})
    assert max(map(len, done.stdout.splitlines())) <= int(columns)


def test_json_is_one_object_with_the_documented_keys(four: Any) -> None:
    (four.folder / "config.json").write_text('{"num_steps": 100}')
    done = top(str(four.folder), "--json", "--filter", "rank=1-2")
    told = json.loads(done.stdout)
    page = (Path(__file__).parents[3] / "docs" / "top.md").read_text()
    for name in (*told, *told["ranks"][0]):
        assert f"`{name}`" in page, f"docs/top.md lacks {name}"
    assert (told["state"], told["step"], told["num_steps"]) == ("running", 8, 100)
    assert [row["rank"] for row in told["ranks"]] == [1, 2]
    assert told["ranks"][1]["marks"] == ["hot"]
    assert told["ranks"][0]["phases"]["data"] == pytest.approx(0.26)


def test_json_has_null_for_what_json_lacks(maker: Any) -> None:
    maker.start(0)
    maker.tick(0, 1)
    with (maker.folder / "events" / "rank-00000.jsonl").open("w") as file:
        file.write('{"kind":"x","time":1,"step":1,"message":"m","details":{"value":NaN}}\n')
    done = top(str(maker.folder), "--json")
    assert json.loads(done.stdout, parse_constant=pytest.fail)["events"][0]["details"] == {"value": None}


def test_run_without_monitor_shows_its_ranks_and_says_what_is_missing(tmp_path: Path) -> None:
    rows = [{"rank": rank, "host": "node-a", "device": "cpu"} for rank in (0, 1)]
    (tmp_path / "run.json").write_text(json.dumps({"ranks": rows, "world_size": 2}))
    done = top(str(tmp_path), "--once")
    assert done.returncode == 0
    assert told_ranks(done.stdout) == [0, 1]
    assert "no rank has written to monitor/ yet" in done.stdout


def test_run_that_ended_without_monitor_says_what_was_missing(tmp_path: Path) -> None:
    rows = [{"rank": 0, "host": "node-a", "device": "cpu"}]
    (tmp_path / "run.json").write_text(json.dumps({"ranks": rows, "world_size": 1, "ended": 1.8e9}))
    assert "no rank has written to monitor/; rankwise.Monitor does" in top(str(tmp_path), "--once").stdout


def test_damaged_run_json_is_noted(four: Any) -> None:
    (four.folder / "run.json").write_text("{")
    assert "note: run.json cannot be read" in top(str(four.folder), "--once").stdout


def test_what_is_no_run_is_said_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert main([str(tmp_path), "--once"]) == 2
    assert main([]) == 2
    assert main([str(tmp_path), "--sort", "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True] * 4


def test_help_names_columns_and_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert "rank, host, device, step" in told
    assert "Exit status" in told


def test_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 2000, 2)
    line = f"{sys.executable} -c '{CALL}' {tmp_path / 'run'} --once | head -2"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2


def test_full_disk_and_closed_stdout_are_said(four: Any) -> None:
    with open("/dev/full", "w") as full:
        done = top(str(four.folder), "--once", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: the output cannot be written: No space left on device"]
    line = f"{sys.executable} -c '{CALL}' {four.folder} --once >&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
