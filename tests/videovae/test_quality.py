import inspect
import math

import pytest
import torch

from videovae.quality import psnr


def test_psnr_of_a_known_error() -> None:
    target = torch.zeros(2, 3, 4, 5, 6)
    recon = torch.stack([torch.full((3, 4, 5, 6), 0.2), torch.full((3, 4, 5, 6), 0.02)])
    assert psnr(recon, target, data_range=2.0).tolist() == pytest.approx([20.0, 40.0], abs=1e-4)


def test_psnr_of_equal_clips_is_infinite() -> None:
    clip = torch.rand(1, 3, 2, 4, 4)
    assert psnr(clip, clip, data_range=1.0).tolist() == [math.inf]


def test_psnr_pools_the_error_of_all_frames_of_a_clip() -> None:
    target = torch.zeros(1, 1, 2, 1, 1)
    recon = torch.tensor([0.0, 0.2]).view(1, 1, 2, 1, 1)
    assert psnr(recon, target, data_range=1.0).item() == pytest.approx(10 * math.log10(1 / 0.02))


def test_psnr_does_not_depend_on_the_scale_of_the_pixels() -> None:
    recon, target = torch.rand(2, 3, 2, 4, 4), torch.rand(2, 3, 2, 4, 4)
    torch.testing.assert_close(psnr(recon * 2 - 1, target * 2 - 1, data_range=2.0), psnr(recon, target, data_range=1.0))


def test_psnr_refuses_clips_of_different_shapes() -> None:
    unchecked = inspect.unwrap(psnr)  # shape checks of the test run would refuse them first
    with pytest.raises(ValueError, match=r"recon is \(1, 3, 2, 4, 4\) and target is \(1, 3, 1, 4, 4\)"):
        unchecked(torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 3, 1, 4, 4), data_range=1.0)


@pytest.mark.parametrize("data_range", [0.0, -1.0, math.nan])
def test_psnr_refuses_a_range_that_is_not_positive(data_range: float) -> None:
    clip = torch.zeros(1, 3, 1, 4, 4)
    with pytest.raises(ValueError, match=f"data_range={data_range}, but it must be positive"):
        psnr(clip, clip, data_range=data_range)
