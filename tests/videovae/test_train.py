"""`train()` on real processes: the same numbers however often it is stopped, and equal on every rank."""

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
from rankwise.testing import on_ranks, run_on_ranks
from videovae.config import TrainConfig
from videovae.data.index import heldout_ranges
from videovae.data.synthetic import make_clips
from videovae.data.video import probe
from videovae.errors import ConfigError, DataError, DivergedError
from videovae.losses import is_discriminator_step
from videovae.optim import OptimizerConfig
from videovae.state import TrainState, build_state
from videovae.train import discriminator_step, generator_step, last_layer_gradients, train, write_config
from videovae.videos import open_videos

NETWORKS = ("vae", "discriminator", "ema")
ITEMS = (*NETWORKS, "vae_optimizer", "discriminator_optimizer")


def metrics(run_dir: Path) -> dict[int, dict[str, float]]:
    """Logged values by step; what depends on the clock is left out."""
    rows: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics" / "rank-00000.jsonl").read_text().splitlines():
        row = json.loads(line)
        values = {name: value for name, value in row.items() if name not in ("time", "clips_per_second", "step")}
        rows.setdefault(row["step"], {}).update(values)
    return rows


def tensors(tree: Any, path: str = "") -> dict[str, Tensor]:
    if isinstance(tree, Tensor):
        return {path: tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return {name: tensor for key, item in pairs for name, tensor in tensors(item, f"{path}/{key}").items()}


def assert_same_end(one: Path, other: Path, step: int) -> None:
    first, second = CheckpointManager(one / "checkpoints"), CheckpointManager(other / "checkpoints")
    for name in ITEMS:
        saved, resumed = tensors(first.read(name, step)), tensors(second.read(name, step))
        assert saved.keys() == resumed.keys()
        assert saved, name
        different = [key for key, tensor in saved.items() if not torch.equal(tensor, resumed[key])]
        assert not different, f"{name} differs in {len(different)} of {len(saved)} tensors, {different[0]} among them"


def check_exact_resume(tiny: TrainConfig, tmp_path: Path) -> None:
    """40 steps, and 20 steps that are stopped and resumed to 40: the same weights and losses, bit for bit."""
    once, twice = replace(tiny, run_dir=tmp_path / "once"), replace(tiny, run_dir=tmp_path / "twice")
    assert train(once) == 40
    assert train(replace(twice, num_steps=20)) == 20
    assert train(twice) == 40
    if rankwise.Identity.resolve(os.environ).is_main_process:
        assert_same_end(once.run_dir, twice.run_dir, 40)
        expected = metrics(once.run_dir)
        assert metrics(twice.run_dir) == expected
        assert {"nll", "adversarial", "adversarial_weight", "discriminator"} < expected[40].keys()
        assert expected[40]["nll"] != expected[20]["nll"]


def test_one_process_resumes_exactly(tiny: TrainConfig, tmp_path: Path) -> None:
    check_exact_resume(tiny, tmp_path)


@on_ranks(2)
def test_two_ranks_resume_exactly(tiny: TrainConfig, tmp_path: Path) -> None:
    check_exact_resume(tiny, tmp_path)


@on_ranks(3)
def test_three_ranks_resume_exactly(tiny: TrainConfig, tmp_path: Path) -> None:
    check_exact_resume(tiny, tmp_path)


@on_ranks(4)
def test_four_ranks_resume_exactly(tiny: TrainConfig, tmp_path: Path) -> None:
    check_exact_resume(tiny, tmp_path)


@on_ranks(2)
def test_resume_in_mid_epoch_with_loader_workers_and_bf16_is_exact(tiny: TrainConfig, tmp_path: Path) -> None:
    clips = replace(tiny.clips, num_workers=2, batch_size=2)
    config = replace(tiny, clips=clips, precision="bf16", num_steps=13, log_every=1, eval_every=5, save_every=100)
    once, twice = replace(config, run_dir=tmp_path / "once"), replace(config, run_dir=tmp_path / "twice")
    train(once)
    train(replace(twice, num_steps=7))
    train(twice)
    if dist.get_rank() == 0:
        assert_same_end(once.run_dir, twice.run_dir, 13)
        expected, resumed = metrics(once.run_dir), metrics(twice.run_dir)
        # The run that ended at 7 was evaluated there, the other was not.
        quality = ("heldout/psnr_db", "heldout/psnr_ema_db")
        assert {step: {k: v for k, v in row.items() if k not in quality} for step, row in resumed.items()} == {
            step: {k: v for k, v in row.items() if k not in quality} for step, row in expected.items()
        }


@on_ranks(2)
def test_a_stop_on_one_rank_saves_the_same_step_on_all(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    def stop_at_seven(x: Tensor, state: TrainState, config: TrainConfig) -> None:
        generator_step(x, state, config)
        if state.step == 6 and dist.get_rank() == 1:
            os.kill(os.getpid(), 15)
        reached.append(state.step)

    monkeypatch.setattr("videovae.train.generator_step", stop_at_seven)
    assert train(tiny) == 7
    assert CheckpointManager(tiny.run_dir / "checkpoints").steps() == [7]


def test_a_run_that_is_done_is_left_alone(tiny: TrainConfig) -> None:
    config = replace(tiny, num_steps=4, save_every=4)
    train(config)
    before = {path: path.stat().st_mtime_ns for path in config.run_dir.glob("checkpoints/**/*")}
    assert train(config) == 4
    assert {path: path.stat().st_mtime_ns for path in config.run_dir.glob("checkpoints/**/*")} == before


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


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"ema_decay": 0.5}, "ema_decay: 0.9 -> 0.5"),
        ({"model": {"base_channels": 8}}, "model.base_channels: 4 -> 8"),
        ({"loss": {"kl_weight": 1.0}}, "loss.kl_weight: 1e-06 -> 1.0"),
        ({"optimizer": {"learning_rate": 1.0}}, "optimizer.learning_rate: 0.001 -> 1.0"),
        ({"optimizer": {"schedule_steps": 99}}, "optimizer.schedule_steps: 50 -> 99"),
    ],
)
def test_resume_with_other_settings_is_refused_and_changes_nothing(
    changed: dict[str, Any], named: str, tiny: TrainConfig
) -> None:
    config = replace(tiny, num_steps=1)
    train(config)
    before = (config.run_dir / "config.json").read_bytes()
    fields = {
        name: replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in changed.items()
    }
    with pytest.raises(ConfigError, match=named):
        train(replace(config, **fields))
    assert (config.run_dir / "config.json").read_bytes() == before
    assert CheckpointManager(config.run_dir / "checkpoints").steps() == [1]


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
    assert_same_end(tiny.run_dir, branch.run_dir, 8)
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


def started(config: TrainConfig, session: rankwise.Session) -> TrainState:
    opened = open_videos(config, session)
    assert opened is not None
    return build_state(config, session, opened[0], heldout_ranges(opened[1]))


@on_ranks(2)
def test_ranks_keep_equal_weights_and_see_different_clips(tiny: TrainConfig) -> None:
    with rankwise.init() as session:
        rankwise.seed_all(0, session.identity)
        state = started(tiny, session)
        noise = rankwise.gather_objects(torch.rand(3).tolist())
        assert noise[0] != noise[1]
        batches = []
        for state.step in range(8):
            x = next(state.loader).video / 127.5 - 1
            batches.append(x)
            step = discriminator_step if is_discriminator_step(state.step, 4) else generator_step
            step(x, state, tiny)
        weights = torch.cat(
            [p.detach().flatten() for net in (state.vae, state.discriminator) for p in net.parameters()]
        )
        everybody = rankwise.gather_objects((weights, torch.stack(batches)))
        assert torch.equal(everybody[0][0], everybody[1][0])
        assert not torch.equal(everybody[0][1], everybody[1][1])


@on_ranks(2)
def test_gradients_of_two_ranks_equal_those_of_one_joined_batch(tiny: TrainConfig) -> None:
    with rankwise.init() as session:
        state = started(tiny, session)
        x = torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
        mine = x[session.identity.rank : session.identity.rank + 1]
        output = state.parallel_vae(mine, sample_posterior=False)
        (output.recon - mine).square().mean().backward()
        reduced = {name: p.grad.clone() for name, p in state.vae.named_parameters() if p.grad is not None}
        state.vae.zero_grad()
        (state.vae(x, sample_posterior=False).recon - x).square().mean().backward()
        joined = {name: p.grad for name, p in state.vae.named_parameters() if p.grad is not None}
        assert reduced.keys() == joined.keys()
        assert len(reduced) > 50
        # Single values may be rounding of what cancels out, so differences are held against the whole gradient.
        whole = torch.stack([gradient.norm() for gradient in joined.values()]).norm()
        for name, gradient in joined.items():
            assert (reduced[name] - gradient).norm() <= 1e-5 * whole, name


@on_ranks(2)
def test_adaptive_weight_comes_from_the_mean_gradient_of_all_ranks(tiny: TrainConfig) -> None:
    with rankwise.init() as session:
        state = started(tiny, session)
        x = torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
        mine = x[session.identity.rank : session.identity.rank + 1]
        recon = state.vae(mine, sample_posterior=False).recon
        losses = ((recon - mine).abs().sum(), recon.square().mean())
        local = [torch.autograd.grad(loss, state.vae.last_layer, retain_graph=True)[0] for loss in losses]
        reduced = last_layer_gradients(losses[0], losses[1], state)
        for index, gradient in enumerate(reduced):
            everybody = torch.stack(rankwise.gather_objects(local[index]))
            assert not torch.allclose(everybody[0], everybody[1])
            torch.testing.assert_close(gradient, everybody.mean(0))


def test_generator_step_leaves_the_discriminator_alone_and_the_other_way_round(tiny: TrainConfig) -> None:
    with rankwise.init() as session:
        state = started(tiny, session)
        state.step = 6
        x = torch.rand(1, 3, 5, 16, 16) * 2 - 1
        before = [p.detach().clone() for p in state.discriminator.parameters()]
        generator_step(x, state, tiny)
        assert all(p.grad is None for p in state.discriminator.parameters())
        assert all(torch.equal(old, new) for old, new in zip(before, state.discriminator.parameters(), strict=True))
        weights, average = [[t.clone() for t in d.values()] for d in (state.vae.state_dict(), state.ema.state_dict())]
        discriminator_step(x, state, tiny)
        assert all(torch.equal(a, b) for a, b in zip(weights, state.vae.state_dict().values(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(average, state.ema.state_dict().values(), strict=True))
        assert not all(torch.equal(old, new) for old, new in zip(before, state.discriminator.parameters(), strict=True))


def test_haar_kernels_never_train(tiny: TrainConfig) -> None:
    train(replace(tiny, num_steps=8, save_every=8))
    weights = CheckpointManager(tiny.run_dir / "checkpoints").read("vae", 8)
    kernels = [tensor for name, tensor in weights.items() if "wavelet_transform" in name]
    assert len(kernels) > 20
    assert all(tensor.abs().unique().numel() == 1 for tensor in kernels)
