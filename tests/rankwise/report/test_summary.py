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
from rankwise.telemetry import End, Start, Tick, monitor_path, to_json


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


def test_a_run_without_a_monitor_is_told_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"ranks": [{"rank": 0, "host": "node-a"}], "world_size": 1}))
    assert "rankwise.Monitor" in findings(tmp_path)["No step was measured"]


def test_warnings_say_how_often_and_where(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "rank-00003.jsonl"
    path.parent.mkdir()
    record = {"time": "2026-01-02T03:04:05+00:00", "level": "WARNING", "logger": "mine", "rank": 3, "message": "so hot"}
    path.write_text(json.dumps(record) + "\n")
    assert findings(tmp_path)["1 warning of 1 kind"] == "note: The first, on rank 3: so hot"
    path.write_text(2 * (json.dumps(record) + "\n"))
    assert findings(tmp_path)["2 warnings of 1 kind"] == "note: Most often, 2 times, on rank 3: so hot"


def write_ticks(folder: Path, rank: int, devices: list[dict[str, object]], *, ends: bool = True) -> None:
    path = monitor_path(folder, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    ticks = [Tick(2.0 + i, i, None, 0.0, device=device) for i, device in enumerate(devices)]
    last = [End(9.0, len(devices))] if ends else []
    lines = [Start(1.0, rank, rank, 0, 2, "node-a", 7, f"cuda:{rank}"), *ticks, *last]
    path.write_text("".join(to_json(line) + "\n" for line in lines))


def test_full_load_is_no_trouble_and_every_sample_with_a_reason_counts(tmp_path: Path) -> None:
    write_ticks(tmp_path, 0, [{"throttle_reasons": ["power"]}] * 5 + [{"throttle_reasons": ["sync_boost"]}])
    reasons = [["power"], ["power", "thermal"], ["power_brake"], []]
    write_ticks(tmp_path, 1, [{"throttle_reasons": each} for each in reasons])
    found = findings(tmp_path)
    assert "The device of rank 0 was held back" not in found
    text = found["The device of rank 1 was held back"]
    assert text.endswith("said so in 2 of 4 samples: thermal, power_brake.")


def test_a_session_that_failed_did_not_end_in_good_order(tmp_path: Path) -> None:
    write_ticks(tmp_path, 0, [{}])
    write_ticks(tmp_path, 1, [{}], ends=False)
    info = {"ranks": [{"rank": 0}, {"rank": 1}]}

    def state() -> str:
        return dict(build_content(load_ranks(read_run(tmp_path)), None).facts)["state"]

    (tmp_path / "run.json").write_text(json.dumps(info))
    assert state().startswith("no end was told")
    (tmp_path / "run.json").write_text(json.dumps(info | {"ended": "2026-01-01T00:00:00+00:00"}))
    assert state() == "ended, but not in good order (ranks 1)"
    write_ticks(tmp_path, 1, [{}])
    assert state() == "ended in good order"


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
