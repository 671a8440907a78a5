"""Haar wavelets as fixed convolutions: a clip split into half-size sub-bands, and put together again.

A 3D transform gives eight sub-bands (halving time, height and width), a 2D transform four (each frame by
itself). Along the channels the sub-bands are the outer index, the channels of the input the inner. The
kernels are buffers under the published names: no `requires_grad_` makes them trainable, no optimizer or
gradient reduction meets them.

Source: Li et al. 2024, "WF-VAE: Enhancing Video VAE by Wavelet-Driven Energy Flow", section 3.1.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from videovae.models.causal_conv import Carry, with_past

# Along which axes a sub-band is a difference (along the others: a sum), in the published order and names.
BANDS_3D = {"h": "", "g": "w", "hh": "h", "gh": "hw", "h_v": "t", "g_v": "tw", "hh_v": "th", "gh_v": "thw"}
BANDS_2D = {"aa": "", "ad": "h", "da": "w", "dd": "hw"}
# 1/sqrt(8), rounded as in the published weights.
SCALE_3D = 0.3536
SCALE_2D = 0.5


def haar_kernel(axes: str, differences: str, scale: float) -> Float[Tensor, "1 1 ..."]:
    """Signs of one sub-band over 2 values of each of `axes`, times `scale`."""
    signs = [torch.tensor([1.0, -1.0 if axis in differences else 1.0]) for axis in axes]
    return math.prod(torch.meshgrid(*signs, indexing="ij"), start=torch.tensor(scale))[None, None]


class _Buffer(nn.Module):
    """One frozen tensor under the name `weight`, where the published model has a convolution."""

    weight: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", value)


class _Haar(nn.Module):
    """What the four transforms share: the kernels of all sub-bands, as one convolution weight."""

    bands: Mapping[str, str]
    axes: str
    scale: float

    def __init__(self) -> None:
        super().__init__()
        for name, differences in self.bands.items():
            self._register(name, haar_kernel(self.axes, differences, self.scale))

    def _register(self, name: str, kernel: Tensor) -> None:
        self.register_buffer(name, kernel)

    def _kernel(self, name: str) -> Tensor:
        return self.get_buffer(name)

    def _weight(self, channels: int) -> Float[Tensor, "bands channels kt 2 2"]:
        """Kernels that take input channel j to channel j of every sub-band: one call does all sub-bands."""
        kernels = torch.cat([self._kernel(name) for name in self.bands])
        if kernels.ndim == 4:
            kernels = kernels[:, :, None]
        same_channel = torch.eye(channels, dtype=kernels.dtype, device=kernels.device)
        return torch.kron(kernels, same_channel[:, :, None, None, None])


class HaarWaveletTransform3D(_Haar):
    """Eight sub-bands of a clip; causal, so 1 + 2k frames become 1 + k."""

    bands, axes, scale = BANDS_3D, "thw", SCALE_3D

    def _register(self, name: str, kernel: Tensor) -> None:
        holder = nn.Module()
        holder.add_module("conv", _Buffer(kernel))
        self.add_module(f"{name}_conv", holder)

    def _kernel(self, name: str) -> Tensor:
        return self.get_buffer(f"{name}_conv.conv.weight")

    def forward(self, x: Float[Tensor, "b c t h w"], carry: Carry | None = None) -> Float[Tensor, "b 8*c s h//2 w//2"]:
        x = with_past(x, self, carry, kernel=2, stride=2)
        return F.conv3d(x, self._weight(x.shape[1]), stride=2)


class InverseHaarWaveletTransform3D(_Haar):
    """The clip that eight sub-bands came from; 1 + k frames become 1 + 2k."""

    bands, axes, scale = BANDS_3D, "thw", SCALE_3D

    def forward(
        self, coeffs: Float[Tensor, "b bands t h w"], carry: Carry | None = None
    ) -> Float[Tensor, "b bands//8 s 2*h 2*w"]:
        x = F.conv_transpose3d(coeffs, self._weight(coeffs.shape[1] // 8), stride=2)
        # The causal transform put a copy of the first frame before the clip.
        return x[:, :, 1:] if carry is None or carry.is_first else x


class HaarWaveletTransform2D(_Haar):
    """Four sub-bands of every frame."""

    bands, axes, scale = BANDS_2D, "hw", SCALE_2D

    def forward(self, x: Float[Tensor, "b c t h w"], carry: Carry | None = None) -> Float[Tensor, "b 4*c t h//2 w//2"]:
        return F.conv3d(x, self._weight(x.shape[1]), stride=(1, 2, 2))


class InverseHaarWaveletTransform2D(_Haar):
    """The frames that four sub-bands came from."""

    bands, axes, scale = BANDS_2D, "hw", SCALE_2D

    def forward(
        self, coeffs: Float[Tensor, "b bands t h w"], carry: Carry | None = None
    ) -> Float[Tensor, "b bands//4 t 2*h 2*w"]:
        return F.conv_transpose3d(coeffs, self._weight(coeffs.shape[1] // 4), stride=(1, 2, 2))
