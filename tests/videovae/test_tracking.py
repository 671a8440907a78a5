"""What is measured is kept as whole lines and shown; what cannot be written is a warning."""

import io
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rankwise.monitor import trackers
from videovae.config import TrainConfig
from videovae.errors import ConfigError
from videovae.tracking import ProgressLine, Tracker, build_trackers


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
    path.write_text('{"step": 1}\n{"ste')
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
        # A shorter line may still fit where a longer one did not.
        steps = [row["step"] for row in kept]
        assert steps == sorted({*steps})
        assert "no longer complete" in caplog.text
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_fresh_run_hides_in_tensorboard_what_an_earlier_one_left(tmp_path: Path) -> None:
    for first_step, steps in ((0, (10, 20)), (0, (10,)), (10, (20,))):
        with Tracker(tmp_path, first_step) as tracker:
            for step in steps:
                tracker.log(step, {"nll": float(first_step)})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("nll")] == [(10, 0.0), (20, 10.0)]


def test_a_clip_is_shown_as_one_row_of_frames(tmp_path: Path) -> None:
    frames = torch.zeros(3, 4, 5, 3, dtype=torch.uint8)
    with Tracker(tmp_path, 0) as tracker:
        tracker.clip(7, "heldout", frames)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (picture,) = events.Images("heldout")
    assert (picture.step, picture.height, picture.width) == (7, 4, 15)


class Kept(trackers.Tracker):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[int, str, tuple[int, ...]]] = []
        self.failed: bool | None = None

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        self.rows.append((step, dict(values)))

    def image(self, step: int, name: str, pixels: NDArray[np.uint8], seconds: float) -> None:
        self.pictures.append((step, name, pixels.shape))

    def close(self, *, failed: bool) -> None:
        self.failed = failed


def test_others_get_all_and_hear_whether_the_run_failed(tmp_path: Path) -> None:
    kept = Kept()
    with Tracker(tmp_path, 0, [kept]) as tracker:
        tracker.log(1, {"nll": 1.0})
        tracker.clip(1, "heldout", torch.zeros(3, 4, 5, 3, dtype=torch.uint8))
    assert (kept.rows, kept.pictures, kept.failed) == ([(1, {"nll": 1.0})], [(1, "heldout", (4, 15, 3))], False)
    broken = Kept()
    with pytest.raises(ValueError, match="diverged"), Tracker(tmp_path, 1, [broken]):
        raise ValueError("diverged")
    assert broken.failed is True


def test_trackers_of_the_settings_are_built_and_connect_to_nothing(tmp_path: Path) -> None:
    config = TrainConfig(trackers=("wandb", "mlflow"), run_dir=tmp_path / "run")
    assert [tracker.name for tracker in build_trackers(config)] == ["W&B", "MLflow"]
    assert build_trackers(TrainConfig()) == []
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(ConfigError, match="trackers names tensorbord; give some of wandb, mlflow, or none"):
        TrainConfig(trackers=("tensorbord",))


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
