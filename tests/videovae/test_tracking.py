"""Metrics are whole lines, or a warning and no line."""

import io
import json
import os
import subprocess
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from videovae.tracking import ProgressLine, Tracker, append_line


def rows(run_dir: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (run_dir / "metrics" / "rank-00000.jsonl").read_text().splitlines()]


def test_values_are_kept_by_step_and_what_is_no_number_is_null(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0)
    tracker.log(3, {"nll": 1.5, "broken": float("nan"), "endless": float("inf")})
    tracker.close()
    (row,) = rows(tmp_path)
    assert (row["step"], row["nll"], row["broken"], row["endless"]) == (3, 1.5, None, None)


def test_half_a_line_of_a_killed_run_is_ended_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "rank-00000.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1}\n{"ste'.replace("\\\n", "\n"))
    tracker = Tracker(tmp_path, 1)
    tracker.log(2, {"nll": 1.0})
    tracker.close()
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 2


def test_metrics_that_cannot_be_written_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "rank-00000.jsonl").mkdir()
    tracker = Tracker(tmp_path, 1)
    tracker.log(1, {"nll": 1.0})
    tracker.log(2, {"nll": 1.0})
    tracker.close()
    assert len([record for record in caplog.records if "no longer complete" in record.getMessage()]) == 1


def test_lines_that_can_be_written_again_are_and_tensorboard_goes_on(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0)
    tracker.log(1, {"nll": 1.0})
    path = tmp_path / "metrics" / "rank-00000.jsonl"
    path.rename(tmp_path / "kept")
    path.mkdir()
    tracker.log(2, {"nll": 1.0})
    path.rmdir()
    (tmp_path / "kept").rename(path)
    tracker.log(3, {"nll": 1.0})
    tracker.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 3]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("nll")] == [1, 2, 3]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_leaves_whole_lines_and_no_exception(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        tracker = Tracker(tmp_path, 0)
        for step in range(2000):
            tracker.log(step, {"nll": 1.0, "kl": 2.0})
        tracker.close()
        kept = rows(tmp_path)
        assert 10 < len(kept) < 2000
        assert [row["step"] for row in kept] == list(range(len(kept)))
        assert "no longer complete" in caplog.text
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_append_line_adds_one_line(tmp_path: Path) -> None:
    for word in ("one", "two"):
        append_line(tmp_path / "lines", word)
    assert (tmp_path / "lines").read_text() == "one\ntwo\n"


def test_progress_outside_a_terminal_is_a_log_line_with_step_losses_speed_and_eta(
    caplog: pytest.LogCaptureFixture,
) -> None:
    progress = ProgressLine(100, 0, Console(file=io.StringIO(), force_terminal=False))
    with caplog.at_level("INFO"):
        speed = progress.advance(1, 4)
        progress.show(1, {"nll": 12.5}, 2.0, 4)
    progress.close()
    assert speed > 0
    assert "step 1/100  nll 12.5  2.00 clips/s  ETA 3:18" in caplog.text


def test_progress_in_a_narrow_terminal_shows_step_and_time_left() -> None:
    screen = io.StringIO()
    progress = ProgressLine(100, 0, Console(file=screen, force_terminal=True, width=80))
    progress.advance(10, 4)
    progress.show(10, {"nll": 2515.0, "wavelet": 9436.0, "adversarial": 0.3903, "discriminator": 0.6}, 2.0, 4)
    progress.close()
    (last, *_) = [line for line in reversed(screen.getvalue().splitlines()) if "clips/s" in line]
    assert "10/100" in last
    assert "nll 2515" in last
