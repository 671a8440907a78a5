"""What slowed the run, in words."""

import json
from pathlib import Path

import pytest

from rankwise.report.content import build_content
from rankwise.report.loading import load_ranks
from rankwise.report.logsummary import summarise_logs
from rankwise.report.summary import duration, sessions_of
from rankwise.runreader import read_run
from rankwise.simulation import make_run


def findings(run_dir: Path) -> dict[str, str]:
    content = build_content(load_ranks(read_run(run_dir)), summarise_logs(run_dir))
    return {finding.title: f"{finding.level}: {finding.text}" for finding in content.findings}


def test_the_slow_rank_the_hang_and_the_hot_device_are_named(run_dir: Path) -> None:
    events = [json.loads(line) for path in (run_dir / "events").iterdir() for line in path.read_text().splitlines()]
    slow = next(event for event in events if event["kind"] == "straggler" and event["phase"] == "data")["ranks"][0]
    hot = next(event for event in events if event["kind"] == "device")["ranks"][0]
    found = findings(run_dir)
    assert "most of it in data" in found[f"Rank {slow} held the others up"]
    assert "thermal" in found[f"The device of rank {hot} was held back"]
    assert any(title.startswith("Hang at step") and text.startswith("bad") for title, text in found.items())
    assert "backward" in found["Where the time went"]
    assert "steps were made twice" in found["Started 2 times"]


def test_a_run_without_trouble_is_told_so(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 8, 200, seed=1, with_trouble=False)
    found = findings(tmp_path / "run")
    assert found["No rank stands out"].startswith("good")
    assert not [title for title in found if "held the others up" in title or "Hang" in title]


def test_a_single_rank_is_not_compared(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 1, 30, seed=1)
    assert not [title for title in findings(tmp_path / "run") if "rank" in title.lower() and "held" in title]


def test_sessions_tell_what_was_made_twice(run_dir: Path) -> None:
    first, second = sessions_of(load_ranks(read_run(run_dir)))
    assert first["step"] == 1
    assert second["again"] == first["lastStep"] - second["step"] + 1
    assert second["pause"] > 60


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "12.3 ms"),
        (0.9996, "1 s"),
        (1.25, "1.25 s"),
        (119.6, "2 min 00 s"),
        (303, "5 min 03 s"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
