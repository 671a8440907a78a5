import math

import pytest
import torch
from torch import Tensor

from videovae.losses.perceptual import LPIPS
from videovae.losses.reconstruction import kl_loss, nll, perceptual_distance, pixel_loss, wavelet_loss
from videovae.models.posterior import DiagonalGaussian


def clips(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_pixel_loss_is_the_absolute_or_squared_error() -> None:
    recon, x = torch.full((1, 1, 1, 1, 2), 3.0), torch.tensor([[[[[1.0, 6.0]]]]])
    assert pixel_loss(recon, x, "l1").flatten().tolist() == [2.0, 3.0]
    assert pixel_loss(recon, x, "l2").flatten().tolist() == [4.0, 9.0]


def test_pixel_loss_is_computed_in_float32() -> None:
    recon, x = torch.full((1, 1, 1, 1, 1), 300.0).half(), torch.zeros(1, 1, 1, 1, 1).half()
    assert pixel_loss(recon, x, "l2").item() == 90_000.0  # infinite in float16


def test_nll_sums_over_a_frame_and_averages_over_frames() -> None:
    assert nll(torch.ones(2, 3, 5, 4, 6)).item() == 3 * 4 * 6


def test_nll_equals_the_sum_over_pixels_as_published() -> None:
    b, c, t, h, w = 2, 3, 5, 4, 6
    recon, x = clips(b, c, t, h, w)
    errors, distances, logvar, weight = (recon - x).abs(), torch.rand(b, t), -0.7, 0.3
    total = 0.0
    for clip in range(b):
        for frame in range(t):
            per_pixel = errors[clip, :, frame] + weight * distances[clip, frame]
            total += (per_pixel / math.exp(logvar) + logvar).sum().item()
    result = nll(errors, distances, perceptual_weight=weight, logvar=logvar)
    assert result.item() == pytest.approx(total / (b * t), rel=1e-5)


def test_perceptual_distance_compares_each_frame_with_its_own() -> None:
    class FirstPixel(LPIPS):
        def forward(self, recon: Tensor, target: Tensor) -> Tensor:
            return (recon - target)[:, :1, :1, :1]

    recon, x = clips(2, 3, 4, 2, 2)
    distances = perceptual_distance(recon, x, FirstPixel())
    torch.testing.assert_close(distances, (recon - x)[:, 0, :, 0, 0])


def test_kl_of_the_standard_normal_is_zero() -> None:
    assert kl_loss(DiagonalGaussian(torch.zeros(2, 8, 3, 4, 4))).item() == 0.0


def test_kl_is_summed_over_the_latent_and_averaged_over_clips() -> None:
    mean, logvar = clips(2, 4, 3, 4, 4)
    expected = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum().item() / 2
    assert kl_loss(DiagonalGaussian(torch.cat([mean, logvar], dim=1))).item() == pytest.approx(expected)


def test_kl_under_autocast_is_that_of_float32() -> None:
    parameters = torch.cat(clips(2, 4, 3, 4, 4), dim=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = kl_loss(DiagonalGaussian(parameters))
    assert result.item() == kl_loss(DiagonalGaussian(parameters.float())).item()


def test_wavelet_loss_sums_levels_and_coefficients_and_averages_over_clips() -> None:
    encoded = [torch.ones(2, 3, 1, 2, 2), torch.ones(2, 4, 1, 1, 1)]
    decoded = [torch.zeros(2, 3, 1, 2, 2), torch.full((2, 4, 1, 1, 1), 3.0)]
    assert wavelet_loss(encoded, decoded).item() == 3 * 4 + 4 * 2


def test_wavelet_loss_refuses_a_level_without_partner() -> None:
    level = torch.zeros(1, 3, 1, 2, 2)
    with pytest.raises(ValueError, match="zip"):
        wavelet_loss([level, level], [level])
