"""`train()` on real processes: the same numbers however often it is stopped, and equal on every rank."""

import functools
import itertools
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

import rankwise
from rankwise.checkpoint import CheckpointManager
from rankwise.testing import assert_exact_resume, on_ranks, run_on_ranks
from videovae.config import TrainConfig
from videovae.data.synthetic import make_clips
from videovae.data.video import probe
from videovae.errors import ConfigError, DataError, DivergedError
from videovae.optim import OptimizerConfig
from videovae.state import TrainState
from videovae.steps import generator_step
from videovae.tracking import ProgressLine
from videovae.train import train, write_config

QUALITY = ("heldout/psnr_db", "heldout/psnr_ema_db")
"""Measured at the end of every run, and so at every stop."""


def metrics(run_dir: Path) -> dict[int, dict[str, float]]:
    """Logged values by step; what depends on the clock is left out."""
    rows: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics" / "rank-00000.jsonl").read_text().splitlines():
        row = json.loads(line)
        values = {name: value for name, value in row.items() if name not in ("time", "clips_per_second", "step")}
        rows.setdefault(row["step"], {}).update(values)
    return rows


def check_exact_resume(config: TrainConfig, folder: Path, **stops: list[int]) -> None:
    """The same checkpoint, bit for bit, without a stop, with stops and after crashes; and the same logged losses."""

    def train_in(run_dir: Path, num_steps: int) -> None:
        assert train(replace(config, run_dir=run_dir, num_steps=num_steps)) == num_steps

    last = config.num_steps
    assert_exact_resume(train_in, folder, num_steps=last, ignore=["config.run_dir"], **stops)
    if rankwise.Identity.resolve(os.environ).is_main_process:
        for run_dir in folder.iterdir():
            checkpoints = CheckpointManager(run_dir / "checkpoints")
            for step in set(checkpoints.steps()) & set(itertools.chain(*stops.values())):
                assert checkpoints.read("loader", step)["position"] % 12, "it was to be stopped amid an epoch"
        runs = {path.name: metrics(path) for path in folder.iterdir()}
        expected = {name: value for name, value in runs.pop("straight")[last].items() if name not in QUALITY}
        assert {"nll", "adversarial", "adversarial_weight", "discriminator"} < expected.keys()
        for name, rows in runs.items():
            assert {each: rows[last][each] for each in expected} == expected, name


def test_one_process_resumes_exactly_with_scaled_float16(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a CPU it is refused for being slow, and is as exact as anywhere.
    monkeypatch.setattr("videovae.train.check_precision", lambda precision, device: None)
    # The usual scale is so large that in these few steps there would be none which is not skipped.
    monkeypatch.setattr("torch.amp.GradScaler", functools.partial(torch.amp.GradScaler, init_scale=1024.0))
    config = replace(everything(tiny, num_workers=1), precision="fp16")
    check_exact_resume(config, tmp_path / "runs", crashes=[5])
    straight = CheckpointManager(tmp_path / "runs" / "straight" / "checkpoints")
    assert straight.read("vae_scaler")["scale"] < 1024.0
    assert straight.read("vae_optimizer")["state"][0]["step"] > 1


@on_ranks(2, timeout_seconds=100.0)
def test_two_ranks_resume_exactly_after_a_crash(tiny: TrainConfig, tmp_path: Path) -> None:
    check_exact_resume(replace(everything(tiny, num_workers=1), precision="bf16"), tmp_path / "runs", crashes=[5])


@pytest.mark.slow
@on_ranks(3, timeout_seconds=100.0)
def test_three_ranks_resume_exactly_after_a_stop(tiny: TrainConfig, tmp_path: Path) -> None:
    check_exact_resume(everything(tiny), tmp_path / "runs", stops=[7])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@on_ranks(4, timeout_seconds=500.0)
def test_four_ranks_resume_exactly(tiny: TrainConfig, tmp_path: Path, precision: Any) -> None:
    config = replace(everything(tiny, num_workers=2), precision=precision, num_steps=17)
    config = replace(config, clips=replace(config.clips, batch_size=2))
    check_exact_resume(config, tmp_path / "runs", stops=[7, 11], crashes=[5, 10])


def everything(tiny: TrainConfig, *, num_workers: int = 0) -> TrainConfig:
    """All that a step may carry; epochs of 12 clips, and training goes on while step 5 is written."""
    clips = replace(tiny.clips, num_workers=num_workers, clips_per_video=3)
    config = replace(tiny, clips=clips, accumulate=2, num_steps=9, log_every=3, eval_every=8, save_every=5)
    assert config.async_save
    return config


@on_ranks(2)
def test_a_stop_on_one_rank_saves_the_same_step_on_all(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    def stop_at_seven(batches: list[Tensor], state: TrainState, config: TrainConfig) -> None:
        generator_step(batches, state, config)
        if state.step == 6 and dist.get_rank() == 1:
            os.kill(os.getpid(), 15)
        reached.append(state.step)

    monkeypatch.setattr("videovae.train.generator_step", stop_at_seven)
    assert train(tiny) == 7
    assert CheckpointManager(tiny.run_dir / "checkpoints").steps() == [7]


def test_a_run_that_is_done_is_left_alone(tiny: TrainConfig) -> None:
    config = replace(tiny, num_steps=4, save_every=4)
    train(config)
    before = {path: path.stat().st_mtime_ns for path in config.run_dir.glob("checkpoints/step-*/**/*")}
    assert train(config) == 4
    assert {path: path.stat().st_mtime_ns for path in config.run_dir.glob("checkpoints/step-*/**/*")} == before


def test_run_directory_holds_what_its_contract_says(tiny: TrainConfig) -> None:
    config = replace(tiny, num_steps=10, save_every=5, eval_every=5)
    train(config)
    run_dir = config.run_dir
    assert json.loads((run_dir / "config.json").read_text()) == config.to_dict()
    assert json.loads((run_dir / "run.json").read_text())["format"] == 1
    assert CheckpointManager(run_dir / "checkpoints").steps() == [5, 10]
    rows = metrics(run_dir)
    assert sorted(rows) == [0, 5, 10]
    assert set(rows[0]) == {"heldout/psnr_db", "heldout/psnr_ema_db"}
    video, sheet = run_dir / "samples" / "step-00000010.mp4", run_dir / "samples" / "step-00000010.png"
    assert (probe(video).width, probe(video).height, probe(video).num_frames) == (32, 16, 5)
    with Image.open(sheet) as picture:
        assert picture.size == (5 * 16, 2 * 16)
    assert list((run_dir / "tensorboard").iterdir())
    assert (run_dir / "logs" / "rank-00000.jsonl").read_text().count("\n") > 3


def test_samples_at_the_end_have_a_phase_of_their_own_that_no_step_has_taught_to_be_short(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = []

    def note(*args: Any) -> tuple[Path, Path]:
        monitor = rankwise.monitor.current.get_open()
        assert monitor is not None
        phases.append(monitor.position().phase)
        return tiny.run_dir, tiny.run_dir

    monkeypatch.setattr("videovae.train.save_samples", note)
    train(replace(tiny, num_steps=2))
    assert phases == ["samples"]


def test_a_run_that_diverges_ends_before_it_saves(tiny: TrainConfig) -> None:
    config = replace(tiny, log_every=1, optimizer=OptimizerConfig(learning_rate=1e30))
    with pytest.raises(DivergedError, match=r"at step \d+ .*(nan|inf)"):
        train(config)
    assert CheckpointManager(config.run_dir / "checkpoints").steps() == []


def test_a_run_without_checkpoint_does_not_mix_with_the_next_in_its_folder(tiny: TrainConfig) -> None:
    metrics_dir = tiny.run_dir / "metrics"
    metrics_dir.mkdir(parents=True)
    (metrics_dir / "rank-00000.jsonl").write_text('{"step": 7, "time": 0}\n')
    train(replace(tiny, num_steps=1))
    assert 7 not in metrics(tiny.run_dir)
    assert '"step": 7' in (metrics_dir / "rank-00000.jsonl.1").read_text()


def test_tensorboard_holds_every_step_after_a_resume(tiny: TrainConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(tiny, log_every=1, eval_every=2, save_every=2)
    train(replace(config, num_steps=4))
    train(replace(config, num_steps=6))
    events = EventAccumulator(str(config.run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("nll")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("heldout/psnr_db")] == [0, 2, 4, 6]


def test_what_is_held_out_stays_held_out_when_videos_are_added(tiny: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "growing"
    make_clips(folder, num_clips=4, num_frames=12, height=32, width=40)
    config = replace(tiny, data=folder, num_steps=2, save_every=2)
    train(config)
    checkpoints = CheckpointManager(config.run_dir / "checkpoints")
    for number in range(8):
        (folder / f"more-{number}.mp4").write_bytes((folder / "clip-00000.mp4").read_bytes())
    train(replace(config, num_steps=4))
    assert checkpoints.read("heldout", 4) == checkpoints.read("heldout", 2)
    assert len(checkpoints.read("heldout", 4)) == 1
    # Not even a video that was away for a while is forgotten.
    away = folder / checkpoints.read("heldout", 4)[0][0]
    away.rename(tmp_path / away.name)
    train(replace(config, num_steps=6))
    assert checkpoints.read("heldout", 6) == checkpoints.read("heldout", 2)


@on_ranks(2)
def test_a_video_that_breaks_later_is_named_once_in_the_whole_job(
    tiny: TrainConfig, tmp_path: Path, clips_dir: Path
) -> None:
    folder = tmp_path / "mixed"
    if dist.get_rank() == 0:
        folder.mkdir()
        for path in sorted(clips_dir.glob("*.mp4")):
            (folder / path.name).write_bytes(path.read_bytes())
    dist.barrier()

    def break_a_video(config: TrainConfig) -> None:
        write_config(config)
        heldout = {name for name, _, _ in CheckpointManager(config.run_dir / "checkpoints").read("heldout")}
        victim = next(path for path in sorted(folder.glob("*.mp4")) if path.name not in heldout)
        victim.write_bytes(victim.read_bytes()[:600])

    config = replace(tiny, data=folder, num_steps=1)
    train(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("videovae.train.write_config", break_a_video)
        train(replace(config, num_steps=16, log_every=2))
    if dist.get_rank() == 0:
        logs = [path.read_text() for path in (tiny.run_dir / "logs").glob("*.jsonl")]
        assert len(logs) == 2
        assert sum(log.count('"skipped clip-') for log in logs) == 1
        rows = [json.loads(line) for line in (tiny.run_dir / "metrics" / "rank-00000.jsonl").read_text().splitlines()]
        assert [row["skipped_videos"] for row in rows if row["step"] == 16 and "nll" in row] == [1]
        assert [row["skipped_videos"] for row in rows if row["step"] == 1 and "nll" in row] == [0]


def test_without_held_out_clips_there_is_no_evaluation_and_no_sample(tiny: TrainConfig) -> None:
    config = replace(tiny, num_steps=2, clips=replace(tiny.clips, num_heldout_clips=0))
    assert train(config) == 2
    assert list(metrics(config.run_dir)) == [2]
    assert "heldout/psnr_db" not in metrics(config.run_dir)[2]
    assert not (config.run_dir / "samples").exists()


def test_training_makes_held_out_reconstructions_better(tiny: TrainConfig) -> None:
    train(replace(tiny, num_steps=60, eval_every=60, save_every=60))
    rows = metrics(tiny.run_dir)
    assert rows[60]["heldout/psnr_db"] > rows[0]["heldout/psnr_db"] + 1


def test_resume_with_other_settings_is_refused_and_changes_nothing(tiny: TrainConfig) -> None:
    config = replace(tiny, num_steps=1)
    train(config)
    before = (config.run_dir / "config.json").read_bytes()
    for changed, named in (
        (replace(config, seed=1), "seed: 0 -> 1"),
        (replace(config, ema_decay=0.5), "ema_decay: 0.9 -> 0.5"),
        (replace(config, accumulate=2), "accumulate: 1 -> 2"),
        (replace(config, model=replace(config.model, base_channels=8)), "model.base_channels: 4 -> 8"),
        (replace(config, loss=replace(config.loss, kl_weight=1.0)), "loss.kl_weight: 1e-06 -> 1.0"),
        (
            replace(config, optimizer=replace(config.optimizer, learning_rate=1.0)),
            "optimizer.learning_rate: 0.001 -> 1.0",
        ),
        (
            replace(config, optimizer=replace(config.optimizer, schedule_steps=99)),
            "optimizer.schedule_steps: 50 -> 99",
        ),
    ):
        with pytest.raises(ConfigError, match=named):
            train(changed)
        assert (config.run_dir / "config.json").read_bytes() == before
        assert CheckpointManager(tiny.run_dir / "checkpoints").steps() == [1]


def test_a_step_of_no_batches_is_refused(tiny: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="accumulate is 0, but it counts batches: give 1 or more"):
        replace(tiny, accumulate=0)


def test_speed_counts_the_clips_of_all_batches_of_a_step(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(ProgressLine, "advance", lambda self, step, num_clips: counted.append(num_clips) or 1.0)
    train(replace(tiny, num_steps=2, accumulate=3, clips=replace(tiny.clips, batch_size=2)))
    assert counted == [6, 6]


def test_lengths_intervals_paths_and_workers_may_change(tiny: TrainConfig, tmp_path: Path) -> None:
    train(replace(tiny, num_steps=2))
    (tmp_path / "moved").symlink_to(tiny.data or Path())
    other = replace(tiny, num_steps=3, log_every=1, eval_every=3, save_every=1, data=tmp_path / "moved")
    assert train(replace(other, clips=replace(tiny.clips, num_workers=1))) == 3


def test_resume_from_another_run_goes_on_in_a_new_folder(tiny: TrainConfig, tmp_path: Path) -> None:
    train(replace(tiny, num_steps=8, save_every=4))
    source = tiny.run_dir / "checkpoints" / "step-00000004"
    branch = replace(tiny, num_steps=8, save_every=4, run_dir=tmp_path / "branch", resume=str(source))
    assert train(branch) == 8
    ends = [CheckpointManager(path / "checkpoints").read("ema", 8) for path in (tiny.run_dir, branch.run_dir)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert CheckpointManager(branch.run_dir / "checkpoints").steps() == [8]
    # Started again with the same words, by a scheduler say, it goes on from its own checkpoint.
    assert train(replace(branch, num_steps=10)) == 10
    with pytest.raises(ConfigError, match="would mix two runs"):
        train(replace(tiny, num_steps=12, resume=str(branch.run_dir)))
    with pytest.raises(ConfigError, match="would mix two runs"):
        train(replace(branch, num_steps=12, resume=str(tiny.run_dir / "checkpoints" / "step-00000008")))


def test_never_resuming_refuses_a_run_that_has_a_checkpoint(tiny: TrainConfig) -> None:
    train(replace(tiny, num_steps=1))
    with pytest.raises(ConfigError, match="already holds a checkpoint of step 1"):
        train(replace(tiny, resume="never"))


@pytest.mark.parametrize("resume", ["nowhere", "."])
def test_resume_from_where_nothing_is_says_so(resume: str, tiny: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist|has no whole checkpoint"):
        train(replace(tiny, resume=str(tmp_path / resume)))


def test_float16_without_cuda_is_refused(tiny: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="fp16, which needs CUDA"):
        train(replace(tiny, precision="fp16"))


@on_ranks(2)
def test_every_rank_hears_that_there_is_no_video(tiny: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist") as caught:
        train(replace(tiny, data=tmp_path / "nowhere"))
    assert caught.value.on_every_rank


def one_step(config: TrainConfig) -> None:
    train(replace(config, num_steps=1))


def test_another_number_of_ranks_is_refused_and_changes_nothing(tiny: TrainConfig) -> None:
    run_on_ranks(one_step, 2, args=[tiny])
    with pytest.raises(rankwise.CheckpointMismatchError, match=r"2 ranks?.* 1"):
        train(tiny)
    assert CheckpointManager(tiny.run_dir / "checkpoints").steps() == [1]


def test_unusable_videos_are_skipped_and_named_once(
    tiny: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in sorted((tiny.data or Path()).glob("*.mp4")):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.mp4").write_bytes(b"not a video at all")
    with caplog.at_level(logging.WARNING):
        train(replace(tiny, data=folder, num_steps=12, save_every=12, eval_every=12))
    named = [record for record in caplog.records if "broken.mp4" in record.getMessage()]
    assert len(named) == 1
    assert "skipped 1 of 6 videos" in named[0].getMessage()
    with pytest.raises(DataError, match="1 of 6 videos cannot be used"):
        train(
            replace(tiny, data=folder, run_dir=tmp_path / "other", clips=replace(tiny.clips, max_failed_fraction=0.1))
        )


def test_haar_kernels_never_train(tiny: TrainConfig) -> None:
    train(replace(tiny, num_steps=8, save_every=8))
    weights = CheckpointManager(tiny.run_dir / "checkpoints").read("vae", 8)
    kernels = [tensor for name, tensor in weights.items() if "wavelet_transform" in name]
    assert len(kernels) > 20
    assert all(tensor.abs().unique().numel() == 1 for tensor in kernels)
