"""Exported folders are what the public models' own code loads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rankwise.checkpoint import CheckpointManager
from videovae.cli import main
from videovae.ema import ExponentialAverage
from videovae.errors import ConfigError, WeightsError
from videovae.export import export
from videovae.models import load
from videovae.models.folder import CONFIG_NAME, WEIGHTS_NAME
from videovae.models.wfvae import WFVAEModel
from videovae.models.wfvae_config import WFVAEConfig
from videovae.presets import PRESETS

RECORDED = ("osp_on_wfvae-large-16chn", "osp_wfvae_4dim", "wf_on_osp_wfvae_4dim", "wf_wfvae-large-16chn")
SMALL = {"base_channels": 4, "encoder_energy_flow_hidden_size": 4, "decoder_energy_flow_hidden_size": 4}


def make_run(folder: Path, config: WFVAEConfig) -> tuple[WFVAEModel, dict[str, Tensor]]:
    """A run folder with one checkpoint; its raw model, and its average."""
    torch.manual_seed(3)
    model = WFVAEModel(config)
    average = ExponentialAverage(WFVAEModel(config), decay=0.5)
    state = {"vae": model, "ema": average, "config": {"model": config.to_dict()}}
    CheckpointManager(folder / "checkpoints").save(7, state)
    return model, average.state_dict()


@pytest.fixture
def small() -> WFVAEConfig:
    return replace(PRESETS["debug"]().model, **SMALL)  # type: ignore[arg-type]


def assert_holds(folder: Path, weights: dict[str, Tensor]) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    written = load_file(folder / WEIGHTS_NAME)
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in weights.items())


def test_averaged_or_raw_weights_are_written_as_two_files(small: WFVAEConfig, tmp_path: Path) -> None:
    model, average = make_run(tmp_path / "run", small)
    source = export(tmp_path / "run", tmp_path / "ema")
    assert source == export(tmp_path / "run" / "checkpoints" / "step-00000007", tmp_path / "raw", "raw")
    assert source.name == "step-00000007"
    assert_holds(tmp_path / "ema", average)
    assert_holds(tmp_path / "raw", model.state_dict())


@pytest.mark.parametrize("name", RECORDED)
def test_names_shapes_and_settings_are_those_of_the_published_models(
    name: str, shared_dir: Path, tmp_path: Path
) -> None:
    recorded = json.loads((shared_dir / "golden" / "keys" / f"{name}.json").read_text())
    published = WFVAEConfig.from_dict(recorded["config"])
    # Narrow, so that the test is small: names and kernels do not depend on the widths; those are compared below.
    make_run(tmp_path / "run", replace(published, **SMALL))  # type: ignore[arg-type]
    export(tmp_path / "run", tmp_path / "exported")
    written = load_file(tmp_path / "exported" / WEIGHTS_NAME)
    assert {name: list(tensor.shape[2:]) for name, tensor in written.items()} == {
        name: shape[2:] for name, shape in recorded["state_dict"].items()
    }
    with torch.device("meta"):
        whole = WFVAEModel(published).state_dict()
    assert {name: list(tensor.shape) for name, tensor in whole.items()} == recorded["state_dict"]

    settings = json.loads((tmp_path / "exported" / CONFIG_NAME).read_text())
    assert settings.keys() >= recorded["config"].keys()
    for key, value in recorded["config"].items():
        if key in ("scale", "shift"):  # published with four values for sixteen channels
            assert set(settings[key]) == set(value)
            assert len(settings[key]) == published.latent_dim
        elif key not in SMALL and key != "_diffusers_version":
            assert settings[key] == value


def test_settings_are_all_that_the_public_class_takes(small: WFVAEConfig, shared_dir: Path, tmp_path: Path) -> None:
    recorded = json.loads((shared_dir / "golden" / "wfvae_ln_z4_trilinear_attn.json").read_text())
    make_run(tmp_path / "run", small)
    export(tmp_path / "run", tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / CONFIG_NAME).read_text()).keys() == recorded["config"].keys()


def test_weights_say_that_they_are_torchs(small: WFVAEConfig, tmp_path: Path) -> None:
    """The public code refuses or warns of files without it."""
    make_run(tmp_path / "run", small)
    export(tmp_path / "run", tmp_path / "exported")
    with safe_open(tmp_path / "exported" / WEIGHTS_NAME, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_exported_model_gives_the_outputs_of_the_run(small: WFVAEConfig, tmp_path: Path) -> None:
    model, _ = make_run(tmp_path / "run", small)
    export(tmp_path / "run", tmp_path / "exported", "raw")
    x = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "exported")(x, False).recon, model.eval()(x, False).recon)


def test_what_cannot_be_exported_is_told(small: WFVAEConfig, tmp_path: Path) -> None:
    make_run(tmp_path / "run", small)
    export(tmp_path / "run", tmp_path / "exported")
    with pytest.raises(WeightsError, match="is an exported folder already"):
        export(tmp_path / "exported", tmp_path / "again")
    with pytest.raises(WeightsError, match="is not empty"):
        export(tmp_path / "run", tmp_path / "exported")
    with pytest.raises(WeightsError, match=r"is a file\. Import it first"):
        export(tmp_path / "exported" / WEIGHTS_NAME, tmp_path / "again")
    with pytest.raises(ConfigError, match="has no whole checkpoint"):
        export(tmp_path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_commands_say_what_they_wrote(
    small: WFVAEConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", small)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "exported"), "--weights", "raw"]) == 0
    assert "wrote the raw weights of " in capsys.readouterr().out
    assert main(["import", str(tmp_path / "exported"), str(tmp_path / "imported")]) == 0
    assert f"wrote the weights of {tmp_path / 'exported'} to {tmp_path / 'imported'}" in capsys.readouterr().out
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "imported" / name).read_bytes() == (tmp_path / "exported" / name).read_bytes()
    assert main(["import", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert (
        printed
        == f"error: {tmp_path / 'nowhere'} does not exist. Give a checkpoint, or a folder in the layout of diffusers.\n"
    )
