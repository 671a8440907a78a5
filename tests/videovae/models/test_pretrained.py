import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from videovae.errors import WeightsError
from videovae.models import WFVAEConfig, WFVAEModel, load, save_pretrained
from videovae.models.folder import CONFIG_NAME, WEIGHTS_NAME

TINY = WFVAEConfig(
    latent_dim=2,
    base_channels=4,
    encoder_num_resblocks=1,
    encoder_energy_flow_hidden_size=4,
    decoder_num_resblocks=1,
    decoder_energy_flow_hidden_size=4,
    norm_type="layernorm",
    scale=(0.5, 2.0),
)


@pytest.fixture
def saved(tmp_path):
    """A folder with a tiny model."""
    save_pretrained(WFVAEModel(TINY), tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG_NAME).read_text()) | changes
    (folder / CONFIG_NAME).write_text(json.dumps(config))


def edit_weights(folder, change):
    weights = load_file(folder / WEIGHTS_NAME)
    change(weights)
    save_file(weights, folder / WEIGHTS_NAME)


def test_loaded_model_is_the_saved_one(tmp_path):
    model = WFVAEModel(TINY)
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in loaded.parameters()] == [True] * len(list(model.parameters()))
    assert not loaded.training


def test_config_has_the_published_form(saved):
    config = json.loads((saved / CONFIG_NAME).read_text())
    assert config.pop("_class_name") == "WFVAEModel"
    assert config.pop("_diffusers_version") == "0.30.3"
    assert config == TINY.to_dict()
    assert config["scale"] == [0.5, 2.0]


def test_loading_draws_no_random_numbers(saved):
    before = torch.get_rng_state()
    load(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_weights_load_as_float32(saved):
    edit_weights(saved, lambda weights: weights.update({k: v.half() for k, v in weights.items()}))
    assert {parameter.dtype for parameter in load(saved).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "holds a 'AutoencoderKL'; known models are"),
        ({"_class_name": None}, "holds a None; known models are"),
        ({"width": 3}, r"unknown settings \['width'\]"),
        ({"norm_type": "batchnorm"}, "norm_type='batchnorm' is unknown"),
        ({"latent_dim": "2"}, "latent_dim='2' must be int"),
        (
            {"base_channels": 8},
            r"of another shape: encoder.down1.0.weight \(4, 24, 3, 3\) instead of \(8, 24",
        ),
        ({"encoder_num_resblocks": 2}, "missing: encoder"),
        ({"use_attention": False}, "unknown: "),
        (
            {"encoder_num_resblocks": 10**9},
            r"encoder_num_resblocks is 1000000000, but the weights have only \d+ tensors",
        ),
        ({"base_channels": 10**12}, r"base_channels is 10+, but the weights have only \d+ values in the largest"),
        ({"latent_dim": 10**30}, "latent_dim is 10+, but the weights have"),
    ],
)
def test_folder_that_contradicts_itself_is_refused(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(WeightsError, match=message):
        load(saved)


def test_missing_weight_is_named(saved):
    edit_weights(saved, lambda weights: weights.pop("decoder.conv_out.bias"))
    with pytest.raises(WeightsError, match=r"1 missing: decoder.conv_out.bias\."):
        load(saved)


def test_extra_weight_is_named(saved):
    edit_weights(saved, lambda weights: weights.update(extra=torch.zeros(1)))
    with pytest.raises(WeightsError, match=r"1 unknown: extra\."):
        load(saved)


def test_saving_over_a_model_is_refused(saved):
    with pytest.raises(WeightsError, match="is not empty"):
        save_pretrained(WFVAEModel(TINY), saved)
