"""The training loss: its settings, its reconstruction terms, and the parts that `train()` adds to them.

The adversarial part is not composed here: its weight needs gradients averaged over the ranks, and no rank is
known on this floor. `train()` does, in view:

    loss = terms.nll + kl_weight * terms.kl + wavelet_weight * terms.wavelet + d_weight * adversarial
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args

from jaxtyping import Float
from torch import Tensor

from videovae.errors import ConfigError
from videovae.losses.adversarial import (
    DiscriminatorLossKind,
    adaptive_weight,
    discriminator_hinge_loss,
    discriminator_loss,
    discriminator_vanilla_loss,
    generator_adversarial_loss,
    is_discriminator_step,
)
from videovae.losses.perceptual import LPIPS, WANTED_FILES, load_perceptual
from videovae.losses.reconstruction import (
    PixelLossKind,
    kl_loss,
    nll,
    perceptual_distance,
    pixel_loss,
    wavelet_loss,
)
from videovae.models.posterior import DiagonalGaussian

__all__ = [
    "LPIPS",
    "DiscriminatorLossKind",
    "LossConfig",
    "PixelLossKind",
    "ReconstructionTerms",
    "adaptive_weight",
    "discriminator_hinge_loss",
    "discriminator_loss",
    "discriminator_vanilla_loss",
    "generator_adversarial_loss",
    "is_discriminator_step",
    "kl_loss",
    "load_perceptual",
    "nll",
    "perceptual_distance",
    "pixel_loss",
    "reconstruction_terms",
    "wavelet_loss",
]


@dataclass(frozen=True)
class LossConfig:
    """What is minimised; published defaults, but for the perceptual term, which needs a file of weights."""

    loss_type: PixelLossKind = "l1"
    """Error of a pixel: absolute or squared."""
    logvar: float = 0.0
    """Log variance of the pixels' noise; constant, as published."""
    kl_weight: float = 1e-6
    """Weight of the posterior's divergence from the standard normal."""
    wavelet_weight: float = 0.1
    """Weight of the difference between the encoder's and the decoder's wavelet coefficients."""
    perceptual_weight: float = 0.0
    """Weight of LPIPS (published: 1); above 0 it needs `perceptual_weights`."""
    perceptual_weights: Path | None = None
    """Weights of LPIPS: one combined file, or a folder that holds VGG16 and the linear heads."""
    disc_start: int = 5
    """First step with an adversarial loss; from here on odd steps train the discriminator."""
    disc_weight: float = 0.5
    """Length of the adversarial gradient at the decoder's last layer, in lengths of the reconstruction's."""
    disc_loss: DiscriminatorLossKind = "hinge"
    """The discriminator's own loss."""

    def __post_init__(self) -> None:
        if self.loss_type not in get_args(PixelLossKind):
            raise ConfigError(f"loss_type={self.loss_type!r} is unknown. Choose l1 or l2.")
        if self.disc_loss not in get_args(DiscriminatorLossKind):
            raise ConfigError(f"disc_loss={self.disc_loss!r} is unknown. Choose hinge or vanilla.")
        if not math.isfinite(self.logvar):
            raise ConfigError(f"logvar={self.logvar}, but it must be finite. Give a number such as 0.")
        for name in ("kl_weight", "wavelet_weight", "perceptual_weight", "disc_weight"):
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigError(f"{name}={weight}, but a weight is finite and at least 0. Give 0 to leave it out.")
        if self.disc_start < 0:
            raise ConfigError(f"disc_start={self.disc_start}, but a step is at least 0. Give 0 to start at once.")
        if self.perceptual_weight > 0 and self.perceptual_weights is None:
            raise ConfigError(
                f"perceptual_weight={self.perceptual_weight} needs the weights of LPIPS, and "
                f"perceptual_weights is not set. Point it at {WANTED_FILES}, or set perceptual_weight to 0."
            )
        if self.perceptual_weight == 0 and self.perceptual_weights is not None:
            raise ConfigError(
                f"perceptual_weights={self.perceptual_weights} would not be used: perceptual_weight is 0. "
                "Set perceptual_weight (published: 1), or leave the file out."
            )


class ReconstructionTerms(NamedTuple):
    """The terms that ask nothing of the discriminator, unweighted."""

    nll: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    wavelet: Float[Tensor, ""]


def reconstruction_terms(
    recon: Float[Tensor, "b c t h w"],
    x: Float[Tensor, "b c t h w"],
    posterior: DiagonalGaussian,
    coefficients: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    config: LossConfig,
    perceptual: LPIPS | None = None,
) -> ReconstructionTerms:
    """Error of the pixels, divergence of the posterior, and error of the wavelet coefficients, in float32.

    Args:
        coefficients: the encoder's and the decoder's, level by level; None (no wavelets) gives 0.
        perceptual: what `load_perceptual` gives; needed exactly when `config.perceptual_weight` is above 0.
    Ranks: local; the terms are means over this rank's clips.
    """
    assert (perceptual is not None) == (config.perceptual_weight > 0), "LPIPS is there exactly when it has weight"
    distances = None if perceptual is None else perceptual_distance(recon, x, perceptual)
    error = nll(
        pixel_loss(recon, x, config.loss_type),
        distances,
        perceptual_weight=config.perceptual_weight,
        logvar=config.logvar,
    )
    wavelet = error.new_zeros(()) if coefficients is None else wavelet_loss(*coefficients)
    return ReconstructionTerms(error, kl_loss(posterior), wavelet)
