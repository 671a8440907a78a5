"""`rankwise report` on whole and on poor run directories."""

import json
import math
import os
from pathlib import Path

import pytest

from rankwise.report import main, make_report
from rankwise.telemetry import Event, Start, Steps, Tick, events_path, monitor_path, to_json


def write_run(folder: Path, seconds: list[float], rank: int = 0) -> Path:
    """A run of which `monitor/` has one rank's steps."""
    path = monitor_path(folder, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = Start(1.0, rank, rank, 0, 1, "host", 1, "cpu")
    tick = Tick(2.0, len(seconds), None, 0.0, Steps(1, seconds, {"other": seconds}))
    path.write_text(to_json(start) + "\n" + to_json(tick) + "\n")
    return folder


def test_report_lies_in_the_run_directory_and_is_replaced(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_dir)]) == 0
    assert str(run_dir / "report.html") in capsys.readouterr().out
    assert main([str(run_dir)]) == 0
    assert [path.name for path in run_dir.iterdir() if "report" in path.name] == ["report.html"]


def test_a_file_that_is_no_report_is_not_overwritten(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<html>mine</html>")
    assert main([str(run_dir), "-o", str(mine)]) == 2
    assert mine.read_text() == "<html>mine</html>"
    assert "is no report" in capsys.readouterr().err
    assert main([str(run_dir), "-o", str(mine), "--force"]) == 0
    assert mine.read_text().startswith("<!DOCTYPE html>")


def test_dash_writes_the_page_alone_to_stdout(run_dir: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main([str(run_dir), "-o", "-"]) == 0
    out = capfdbinary.readouterr().out
    assert out.startswith(b"<!DOCTYPE html>")
    assert out.endswith(b"</html>\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no folder 'nowhere'"),
        (["empty"], "'empty' is no run directory"),
        (["empty", "--colour"], "unrecognized arguments: --colour"),
        ([], "required: RUN"),
        (["empty", "-o", "."], "'.' is a folder"),
    ],
)
def test_what_is_no_run_is_told_in_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_target_that_cannot_be_written_gives_1(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_dir), "-o", "/proc/report.html"]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_steps_far_apart_are_refused_and_do_not_fill_the_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = monitor_path(write_run(tmp_path, [1.0]), 0)
    with open(path, "a") as file:
        file.write(to_json(Tick(3.0, 10**15, None, 0.0, Steps(10**15, [1.0], {}))) + "\n")
    assert main([str(tmp_path)]) == 2
    assert "at most 16,000,000" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [[], [0.5], [math.nan], [0.0, 0.0]], ids=["none", "one", "nan", "no time"])
def test_a_run_of_few_steps_has_a_report(seconds: list[float], tmp_path: Path) -> None:
    assert "What slowed this run" in make_report(write_run(tmp_path, seconds))


def test_a_run_without_monitor_metrics_or_logs_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"ranks": [{"rank": 0, "host": 5, "local_rank": "x"}]}))
    assert "What slowed this run" in make_report(tmp_path)


def test_damaged_files_leave_a_report_of_the_rest(tmp_path: Path) -> None:
    write_run(tmp_path, [0.5, 0.6])
    with open(monitor_path(tmp_path, 0), "a") as file:
        file.write('{"is":"tick","time":4.0,"st')
    for name in ("metrics", "events", "logs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.jsonl").write_bytes(b'{"step": 1, "nll": NaN}\n{"step": \xff\xfe\n[]\n')
    (tmp_path / "run.json").write_text("{")
    page = make_report(tmp_path)
    assert "run.json cannot be read" in page


def test_names_that_are_no_text_are_shown_as_far_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / os.fsdecode(b"run-\xff")
    write_run(folder, [0.5, 0.6])
    info = {"command": ["\ud800"], "ranks": [{"rank": 0, "host": "\ud800<b>"}, {"rank": 1, "host": "b"}]}
    (folder / "run.json").write_text(json.dumps(info))
    events_path(folder, 0).parent.mkdir()
    events_path(folder, 0).write_text(to_json(Event("hang", 1.0, 2, "\ud800<b>", [0])) + "\n")
    assert main([str(folder)]) == 0
    assert "run-?" in capsys.readouterr().out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<title>run-?" in page
    assert "?&lt;b&gt;" in page
    assert "<b>" not in page


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "rankwise report" in capsys.readouterr().out
