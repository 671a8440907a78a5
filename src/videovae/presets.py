"""Whole configurations as functions: start from one, override single fields on the command line."""

from collections.abc import Callable

from videovae.config import TrainConfig
from videovae.data.clips import ClipsConfig
from videovae.losses import LossConfig
from videovae.models.discriminator import DiscriminatorConfig
from videovae.models.wfvae_config import WFVAEConfig
from videovae.optim import OptimizerConfig


def debug() -> TrainConfig:
    """A small WF-VAE that learns something within minutes on two CPU cores."""
    return TrainConfig(
        num_steps=240,
        log_every=5,
        eval_every=60,
        save_every=60,
        precision="fp32",
        ema_decay=0.95,
        model=WFVAEConfig(
            latent_dim=8,
            base_channels=16,
            encoder_num_resblocks=1,
            encoder_energy_flow_hidden_size=16,
            decoder_num_resblocks=1,
            decoder_energy_flow_hidden_size=16,
            norm_type="layernorm",
            t_interpolation="trilinear",
        ),
        discriminator=DiscriminatorConfig(base_channels=16, num_layers=3),
        # Published weights are made for weeks of training; these teach the coarse bands, and with them the brightness
        # and the large shapes, within the first hundred steps.
        loss=LossConfig(disc_start=8, disc_weight=0.1, wavelet_weight=1.0),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, betas=(0.9, 0.95), max_grad_norm=1e4, warmup_steps=10, discriminator_learning_rate=5e-4
        ),
        clips=ClipsConfig(num_frames=9, height=48, width=48, batch_size=4, num_workers=1),
    )


def wfvae_s() -> TrainConfig:
    """WF-VAE-S as published: 147 M parameters, 4 latent channels, 25 frames of 256 x 256.

    Without the perceptual term, which needs its weights: published is `loss.perceptual_weight` 1.
    """
    return TrainConfig(model=_published(latent_dim=4, base_channels=128))


def wfvae_l_16ch() -> TrainConfig:
    """WF-VAE-L as published with 16 latent channels: 317 M parameters, 25 frames of 256 x 256.

    Without the perceptual term, which needs its weights: published is `loss.perceptual_weight` 1.
    """
    return TrainConfig(model=_published(latent_dim=16, base_channels=192))


def _published(*, latent_dim: int, base_channels: int) -> WFVAEConfig:
    return WFVAEConfig(
        latent_dim=latent_dim,
        base_channels=base_channels,
        encoder_energy_flow_hidden_size=128,
        decoder_energy_flow_hidden_size=128,
        norm_type="layernorm",
        t_interpolation="trilinear",
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "debug": debug,
    "wfvae-s": wfvae_s,
    "wfvae-l-16ch": wfvae_l_16ch,
}
