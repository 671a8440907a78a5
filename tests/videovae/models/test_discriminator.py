import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from videovae.errors import ConfigError
from videovae.models.discriminator import DiscriminatorConfig, NLayerDiscriminator3D

GOLDEN_CASES = ["disc3d_ndf8_l3", "disc3d_ndf8_l4"]


def golden_discriminator(shared_dir: Path, case: str) -> tuple[NLayerDiscriminator3D, dict[str, Tensor]]:
    args = json.loads((shared_dir / "golden" / f"{case}.json").read_text())["args"]
    tensors = load_file(shared_dir / "golden" / f"{case}.safetensors")
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    model = NLayerDiscriminator3D(
        DiscriminatorConfig(in_channels=args["input_nc"], base_channels=args["ndf"], num_layers=args["n_layers"])
    )
    model.load_state_dict(under("weights/", tensors))
    return model, tensors


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_training_logits_and_running_statistics_agree_with_reference(shared_dir: Path, case: str) -> None:
    model, tensors = golden_discriminator(shared_dir, case)
    logits = model.train()(tensors["input"])
    torch.testing.assert_close(logits, tensors["logits_train"], rtol=1e-5, atol=1e-5)
    state = model.state_dict()
    for name, expected in under("after_one_train_forward/", tensors).items():
        torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_evaluation_logits_agree_with_reference(shared_dir: Path, case: str) -> None:
    model, tensors = golden_discriminator(shared_dir, case)
    model.load_state_dict(under("weights/", tensors) | under("after_one_train_forward/", tensors))
    logits = model.eval()(tensors["input"])
    torch.testing.assert_close(logits, tensors["logits_eval_after"], rtol=1e-5, atol=1e-5)


def test_default_has_the_published_names_and_shapes(shared_dir: Path) -> None:
    published = json.loads((shared_dir / "golden" / "keys" / "disc3d_default_ndf64_l4.json").read_text())
    with torch.device("meta"):
        ours = NLayerDiscriminator3D(DiscriminatorConfig()).state_dict()
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == published


def test_initial_values_have_the_published_distribution() -> None:
    torch.manual_seed(0)
    model = NLayerDiscriminator3D(DiscriminatorConfig(base_channels=16))
    convolution, norm = model.main[5], model.main[9]
    assert isinstance(convolution, nn.Conv3d)
    assert isinstance(norm, nn.BatchNorm3d)
    assert convolution.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert norm.weight.mean().item() == pytest.approx(1.0, abs=0.01)
    assert norm.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert norm.bias.count_nonzero() == 0


def test_first_two_layers_halve_time_and_all_but_the_last_halve_space() -> None:
    model = NLayerDiscriminator3D(DiscriminatorConfig(base_channels=2, num_layers=3))
    assert model(torch.zeros(1, 3, 17, 64, 48)).shape == (1, 1, 5, 8, 6)


@pytest.mark.parametrize("field", ["in_channels", "base_channels", "num_layers"])
def test_config_refuses_a_size_below_one(field: str) -> None:
    with pytest.raises(ConfigError, match=f"discriminator {field}=0, but it must be at least 1"):
        DiscriminatorConfig(**{field: 0})
