"""How good a reconstruction is, in the field's measures."""

import torch
from jaxtyping import Float
from torch import Tensor


def psnr(
    recon: Float[Tensor, "b c t h w"], target: Float[Tensor, "b c t h w"], *, data_range: float
) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each clip, in dB; higher is better.

    Args:
        recon, target: pixels, same range.
        data_range: largest minus smallest possible pixel value.
    Returns:
        One value per clip; inf where recon equals target.
    Raises:
        ValueError: shapes differ or data_range is not positive.
    Ranks: local, no communication.
    Source: 10 log10(data_range^2 / MSE), with one MSE over all frames of a clip. Means of the values of
        single frames, which Open-Sora-Plan reports, are never lower and can be much higher.
    """
    if recon.shape != target.shape:
        raise ValueError(
            f"recon is {tuple(recon.shape)} and target is {tuple(target.shape)}. Give clips of equal shapes."
        )
    if not data_range > 0:
        raise ValueError(
            f"data_range={data_range}, but it must be positive. Give 2 for pixels in [-1, 1], 1 for [0, 1]."
        )
    mse = (recon.float() - target.float()).square().mean(dim=(1, 2, 3, 4))
    return 10 * torch.log10(data_range**2 / mse)
