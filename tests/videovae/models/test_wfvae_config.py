import dataclasses

import pytest

from videovae.errors import ConfigError
from videovae.models.wfvae_config import SPACE_AND_TIME, WFVAEConfig

EIGHTFOLD = dict(
    zip(
        ("l1_dowmsample_block", "l1_downsample_wavelet", "l1_upsample_block", "l1_upsample_wavelet"),
        SPACE_AND_TIME,
        strict=True,
    )
)


def test_defaults_are_the_published_ones():
    config = WFVAEConfig()
    assert (config.latent_dim, config.base_channels, config.norm_type) == (8, 128, "groupnorm")
    assert config.scale == (0.18215,) * 8
    assert config.shift == (0.0,) * 8


def test_scale_follows_latent_dim():
    assert WFVAEConfig(latent_dim=4).scale == (0.18215,) * 4
    assert dataclasses.replace(WFVAEConfig(latent_dim=4), latent_dim=16).scale == (0.18215,) * 16


def test_equal_values_of_another_number_are_spread():
    published = {"latent_dim": 16, "scale": [0.18215] * 4, "shift": [0, 0, 0, 0]}
    assert WFVAEConfig.from_dict(published).scale == (0.18215,) * 16


def test_time_is_halved_two_or_three_times():
    assert WFVAEConfig().temporal_factor == 4
    assert WFVAEConfig(**EIGHTFOLD).temporal_factor == 8
    assert WFVAEConfig().spatial_factor == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_dim": 0}, "latent_dim=0 must be at least 1"),
        ({"decoder_num_resblocks": 0}, "decoder_num_resblocks=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be in"),
        ({"norm_type": "batchnorm"}, "norm_type='batchnorm' is unknown. Choose one of"),
        ({"t_interpolation": "cubic"}, "t_interpolation='cubic' is unknown"),
        ({"attention_type": "AttnBlock3D"}, "attention_type='AttnBlock3D' is unknown"),
        ({"base_channels": 48}, "base_channels=48 is not divisible into the 32 groups"),
        ({"decoder_energy_flow_hidden_size": 16}, "decoder_energy_flow_hidden_size=16 is not divisible"),
        ({"scale": (1.0, 2.0)}, "scale has 2 values for latent_dim=8"),
        ({"shift": ()}, "shift has 0 values for latent_dim=8"),
        ({"l1_dowmsample_block": "Pool"}, "l1_dowmsample_block.* are Pool, .* do not fit together"),
        ({"l1_upsample_block": "Spatial2xTime2x3DUpsample"}, "do not fit together"),
        ({"l2_dowmsample_block": "Downsample"}, "l2_dowmsample_block.* do not fit together"),
    ],
)
def test_contradiction_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        WFVAEConfig(**settings)


def test_layer_norm_takes_any_number_of_channels():
    assert WFVAEConfig(base_channels=12, norm_type="layernorm").base_channels == 12


def test_dict_round_trip_is_the_same_config():
    config = WFVAEConfig(latent_dim=2, scale=(0.5, 2.0), norm_type="layernorm", **EIGHTFOLD)
    assert WFVAEConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["scale"] == [0.5, 2.0]


def test_bookkeeping_is_ignored_and_unknown_settings_are_not():
    assert WFVAEConfig.from_dict({"_class_name": "X", "_diffusers_version": "0"}) == WFVAEConfig()
    with pytest.raises(ConfigError, match=r"unknown settings \['l1_downsample_block'\]"):
        WFVAEConfig.from_dict({"l1_downsample_block": "Downsample"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_dim": "8"}, "latent_dim='8' must be int"),
        ({"latent_dim": 8.0}, "latent_dim=8.0 must be int"),
        ({"use_attention": 1}, "use_attention=1 must be bool"),
        ({"scale": 0.2}, "scale=0.2 must be a list of numbers"),
        ({"dropout": None}, "dropout=None must be a number"),
    ],
)
def test_value_of_another_type_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        WFVAEConfig.from_dict(settings)
