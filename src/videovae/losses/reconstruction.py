"""How far a reconstruction is from its clip: pixels, perception, posterior, wavelet coefficients.

Everything here is a pure function computed in float32, under autocast as well: the sums run over millions of
pixels, and bfloat16 keeps three digits.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from videovae.losses.perceptual import LPIPS
from videovae.models.posterior import DiagonalGaussian

PixelLossKind = Literal["l1", "l2"]


def pixel_loss(
    recon: Float[Tensor, "b c t h w"], x: Float[Tensor, "b c t h w"], kind: PixelLossKind
) -> Float[Tensor, "b c t h w"]:
    """Absolute ("l1") or squared ("l2") error of every pixel."""
    error = recon.float() - x.float()
    return error.abs() if kind == "l1" else error.square()


def perceptual_distance(
    recon: Float[Tensor, "b 3 t h w"], x: Float[Tensor, "b 3 t h w"], perceptual: LPIPS
) -> Float[Tensor, "b t"]:
    """LPIPS of every frame by itself."""
    distances: Tensor = perceptual(
        rearrange(recon, "b c t h w -> (b t) c h w"), rearrange(x, "b c t h w -> (b t) c h w")
    )
    return rearrange(distances, "(b t) 1 1 1 -> b t", b=len(x))


def nll(
    pixel_errors: Float[Tensor, "b c t h w"],
    distances: Float[Tensor, "b t"] | None = None,
    *,
    perceptual_weight: float = 0.0,
    logvar: float = 0.0,
) -> Float[Tensor, ""]:
    """Negative log likelihood of one frame, up to a constant: summed over its pixels, averaged over frames.

    Args:
        pixel_errors: what `pixel_loss` gives.
        distances: perceptual distance of each frame; it counts once for every pixel of that frame.
        logvar: log variance of the pixels' noise.
    Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", appendix G,
        with the normalisation of Open-Sora-Plan: the sum over pixels is over one frame, not over a clip.
    """
    b, c, t, h, w = pixel_errors.shape
    num_values = c * h * w
    error = pixel_errors.float().sum() / (b * t)
    if distances is not None:
        error = error + perceptual_weight * num_values * distances.float().mean()
    return error * math.exp(-logvar) + logvar * num_values


def kl_loss(posterior: DiagonalGaussian) -> Float[Tensor, ""]:
    """Divergence of the posterior from the standard normal: summed over a latent, averaged over clips.

    Source: Kingma and Welling 2014, "Auto-Encoding Variational Bayes", appendix B.
    """
    exact = DiagonalGaussian(posterior.parameters.float())
    return exact.kl().sum() / len(posterior.parameters)


def wavelet_loss(
    encoder_coefficients: Sequence[Float[Tensor, "b _ _ _ _"]],
    decoder_coefficients: Sequence[Float[Tensor, "b _ _ _ _"]],
) -> Float[Tensor, ""]:
    """Absolute difference of the coefficients, level by level: summed over a clip, averaged over clips.

    Args:
        encoder_coefficients, decoder_coefficients: one tensor per wavelet level, in the same order.
    Source: Li et al. 2024, "WF-VAE: Enhancing Video VAE by Wavelet-Driven Energy Flow for Latent Video
        Diffusion Model", the loss called WL.
    """
    levels = [
        (encoded.float() - decoded.float()).abs().sum() / len(encoded)
        for encoded, decoded in zip(encoder_coefficients, decoder_coefficients, strict=True)
    ]
    return torch.stack(levels).sum()
