"""Runs that start from weights that are there already."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rankwise import Identity
from rankwise.checkpoint import CheckpointManager
from rankwise.errors import RankFailedError
from rankwise.testing import on_ranks
from videovae.cli import main
from videovae.config import TrainConfig
from videovae.errors import ConfigError, WeightsError
from videovae.models import load
from videovae.models.folder import CONFIG_NAME, WEIGHTS_NAME
from videovae.models.wfvae import WFVAEModel
from videovae.models.wfvae_config import WFVAEConfig
from videovae.train import train
from videovae.weights import check_start


@pytest.fixture
def start(tiny: TrainConfig, tmp_path: Path) -> TrainConfig:
    """A run from an imported folder."""
    torch.manual_seed(17)
    write_model(tiny.model, tmp_path / "imported")
    return replace(tiny, init_from=tmp_path / "imported", num_steps=0)


def write_model(config: WFVAEConfig, folder: Path) -> None:
    if not folder.exists():
        WFVAEModel(config).save_pretrained(folder)


def saved(config: TrainConfig, name: str, step: int) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = CheckpointManager(config.run_dir / "checkpoints").read(name, step)
    return weights


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def start_weights(config: TrainConfig) -> dict[str, Tensor]:
    assert config.init_from is not None
    return load(config.init_from).state_dict()


def check_start_of_run(config: TrainConfig) -> None:
    train(config)
    assert same(saved(config, "vae", 0), start_weights(config))
    assert same(saved(config, "ema", 0), start_weights(config))


def test_a_run_starts_from_imported_weights_and_averages_from_there(start: TrainConfig) -> None:
    check_start_of_run(start)


@on_ranks(2)
def test_two_ranks_start_from_imported_weights(tiny: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / f"own-disk-{Identity.resolve(os.environ).rank}"
    torch.manual_seed(17)  # each rank reads a copy of its own
    write_model(tiny.model, folder)
    check_start_of_run(replace(tiny, init_from=folder, num_steps=0))


@on_ranks(2)
def test_weights_that_are_missing_on_one_rank_fail_all(tiny: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / f"own-disk-{Identity.resolve(os.environ).rank}"
    if folder.name.endswith("0"):
        write_model(tiny.model, folder)
    with pytest.raises(RankFailedError, match=r"own-disk-1 does not exist"):
        train(replace(tiny, init_from=folder, num_steps=0))


def test_a_run_starts_from_the_averaged_weights_of_another_run(tiny: TrainConfig, tmp_path: Path) -> None:
    first = replace(tiny, num_steps=3)
    train(first)
    second = replace(first, run_dir=tmp_path / "second", init_from=first.run_dir, num_steps=0, seed=5)
    train(second)
    assert same(saved(second, "vae", 0), saved(first, "ema", 3))
    assert not same(saved(second, "vae", 0), saved(first, "vae", 3))


def test_fine_tuning_resumes_exactly(start: TrainConfig, tmp_path: Path) -> None:
    whole = replace(start, num_steps=8, run_dir=tmp_path / "whole")
    train(whole)
    train(replace(start, num_steps=4))
    assert start.init_from is not None
    for file in start.init_from.iterdir():  # it is not read again
        file.unlink()
    train(replace(start, num_steps=8))
    for name in ("vae", "ema", "discriminator"):
        assert same(saved(whole, name, 8), saved(start, name, 8))


def test_another_start_of_a_run_that_began_is_refused(start: TrainConfig, tmp_path: Path) -> None:
    train(start)
    with pytest.raises(ConfigError, match=r"was made with other settings: init_from: .* -> None"):
        train(replace(start, init_from=None))


def test_a_model_with_other_settings_is_refused(start: TrainConfig) -> None:
    other = replace(start, model=replace(start.model, t_interpolation="nearest", dropout=0.1))
    message = r"a model with other settings than this run: model\.t_interpolation: trilinear -> nearest\. Choose"
    with pytest.raises(ConfigError, match=message):
        check_start(other.init_from, other.model)  # type: ignore[arg-type]
    with pytest.raises(RankFailedError, match=message):
        train(other)


def test_dropout_may_differ(start: TrainConfig) -> None:
    check_start_of_run(replace(start, model=replace(start.model, dropout=0.1)))


def test_damaged_weights_are_told(start: TrainConfig) -> None:
    assert start.init_from is not None
    path = start.init_from / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RankFailedError, match=f"{WEIGHTS_NAME} is cut off or no safetensors file"):
        train(start)


def empty(folder: Path) -> None:
    folder.mkdir()


def checkpoint_file(path: Path) -> None:
    torch.save({}, path)


def config_of_another(folder: Path) -> None:
    folder.mkdir()
    (folder / WEIGHTS_NAME).touch()
    (folder / CONFIG_NAME).write_text('{"_class_name": "WFVAEModel", "width": 3}')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "start does not exist"),
        (empty, "start has no whole checkpoint"),
        (checkpoint_file, "start is a file. Import it first, with `videovae import"),
        (config_of_another, "unknown settings ['width']"),
    ],
)
def test_what_is_no_start_is_one_line_and_status_two(
    make: Any, message: str, tmp_path: Path, clips_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "start")
    given = ["--data", str(clips_dir), "--run-dir", str(tmp_path / "run"), "--init-from", str(tmp_path / "start")]
    assert main(["train", *given]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1


def test_a_run_folder_of_another_model_is_refused_before_a_rank_starts(
    tiny: TrainConfig, tmp_path: Path, clips_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(tiny, num_steps=0))
    given = ["--data", str(clips_dir), "--run-dir", str(tmp_path / "new"), "--init-from", str(tiny.run_dir)]
    assert main(["train", "--nproc", "2", *given]) == 2
    assert "model.base_channels: 4 -> 16" in capsys.readouterr().err


def test_check_start_says_nothing_of_a_good_one(start: TrainConfig) -> None:
    assert start.init_from is not None
    check_start(start.init_from, start.model)
    with pytest.raises(WeightsError, match="does not exist"):
        check_start(start.init_from / "nowhere", start.model)
