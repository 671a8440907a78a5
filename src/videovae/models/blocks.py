"""The layers between the wavelets of a WF-VAE: residual blocks, attention, and changes of resolution.

Every layer takes `(x, carry)`; see `causal_conv.Carry`. Parameter names are the published ones.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from videovae.errors import ConfigError
from videovae.models.causal_conv import Carry, CausalConv3d, as_images, as_video

NUM_GROUPS = 32
NORM_EPS = 1e-6


class LayerNorm(nn.Module):
    """Layer norm over the channels of every pixel of an image or a video, so that frames stay independent."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)

    def forward(self, x: Float[Tensor, "b c *thw"]) -> Float[Tensor, "b c *thw"]:
        y: Tensor = self.norm(x.movedim(1, -1))
        return y.movedim(-1, 1)


def build_norm(channels: int, norm_type: str) -> nn.Module:
    """The normalization that `norm_type` names; the statistics of "groupnorm" span all frames given to it."""
    if norm_type == "layernorm":
        return LayerNorm(channels)
    if norm_type == "groupnorm":
        return nn.GroupNorm(NUM_GROUPS, channels, eps=NORM_EPS)
    raise ConfigError(f"norm_type={norm_type!r} is unknown. Choose 'layernorm' or 'groupnorm'.")


class ResnetBlock2D(nn.Module):
    """Two convolutions of every frame, added to their input; the number of channels stays."""

    def __init__(self, channels: int, *, norm_type: str, dropout: float) -> None:
        super().__init__()
        self.norm1 = build_norm(channels, norm_type)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = build_norm(channels, norm_type)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c t h w"], carry: Carry | None = None) -> Float[Tensor, "b c t h w"]:
        h = as_images(x)
        h = self.conv1(F.silu(self.norm1(h)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        y: Tensor = as_video(h, x.shape[0]) + x
        return y


class ResnetBlock3D(nn.Module):
    """Two causal convolutions, added to their input, which a 1x1x1 one fits to a new number of channels."""

    def __init__(self, in_channels: int, out_channels: int, *, norm_type: str, dropout: float) -> None:
        super().__init__()
        self.norm1 = build_norm(in_channels, norm_type)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, padding=1)
        self.norm2 = build_norm(out_channels, norm_type)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Float[Tensor, "b c t h w"], carry: Carry | None = None) -> Float[Tensor, "b d t h w"]:
        h = self.conv1(F.silu(self.norm1(x)), carry)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))), carry)
        y: Tensor = h + (x if self.nin_shortcut is None else self.nin_shortcut(x))
        return y


class AttnBlock3DFix(nn.Module):
    """Self-attention among the pixels of each frame, added to its input; one head."""

    def __init__(self, channels: int, *, norm_type: str) -> None:
        super().__init__()
        self.norm = build_norm(channels, norm_type)
        self.q = CausalConv3d(channels, channels, 1)
        self.k = CausalConv3d(channels, channels, 1)
        self.v = CausalConv3d(channels, channels, 1)
        self.proj_out = CausalConv3d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c t h w"], carry: Carry | None = None) -> Float[Tensor, "b c t h w"]:
        b, _, t, h, _ = x.shape
        normed = self.norm(x)
        q, k, v = (rearrange(layer(normed), "b c t h w -> (b t) 1 (h w) c") for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = rearrange(attended, "(b t) 1 (h w) c -> b c t h w", b=b, t=t, h=h)
        y: Tensor = self.proj_out(attended) + x
        return y


class Downsample(nn.Module):
    """Half the height and width of every frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c t h w"], carry: Carry | None = None) -> Float[Tensor, "b c t h//2 w//2"]:
        return as_video(self.conv(F.pad(as_images(x), (0, 1, 0, 1))), x.shape[0])


class Upsample(nn.Module):
    """Twice the height and width of every frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c t h w"], carry: Carry | None = None) -> Float[Tensor, "b c t 2*h 2*w"]:
        return as_video(self.conv(F.interpolate(as_images(x), scale_factor=2.0)), x.shape[0])


class Spatial2xTime2x3DDownsample(nn.Module):
    """Half the height and width, and 1 + 2k frames become 1 + k."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c t h w"], carry: Carry | None = None) -> Float[Tensor, "b c s h//2 w//2"]:
        y: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)), carry)
        return y


class Spatial2xTime2x3DUpsample(nn.Module):
    """Twice the height and width, and 1 + k frames become 1 + 2k: the first frame of a clip is not doubled.

    In chunks, "trilinear" gives one frame fewer at first and catches up with the last chunk, because the
    second copy of a frame is a mixture with the frame that follows.
    """

    def __init__(self, channels: int, t_interpolation: str) -> None:
        super().__init__()
        self.t_interpolation = t_interpolation
        self.conv = CausalConv3d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c t h w"], carry: Carry | None = None) -> Float[Tensor, "b c s 2*h 2*w"]:
        y: Tensor = self.conv(self._resize(x, carry), carry)
        return y

    def _resize(self, x: Tensor, carry: Carry | None) -> Tensor:
        if carry is not None and not carry.is_first:
            return self._resize_later(x, carry)
        first = F.interpolate(x[:, :, :1], scale_factor=(1, 2, 2), mode="trilinear")
        if x.shape[2] == 1:
            return first
        return torch.cat([first, self._resize_later(x[:, :, 1:], carry)], dim=2)

    def _resize_later(self, x: Tensor, carry: Carry | None) -> Tensor:
        """All frames but a clip's first, doubled in time too."""
        if self.t_interpolation == "nearest":
            x = F.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear")
            return F.interpolate(x, scale_factor=(2, 1, 1), mode="nearest")
        if carry is None:
            return F.interpolate(x, scale_factor=(2, 2, 2), mode="trilinear")
        if (before := carry.take(self)) is not None:
            x = torch.cat([before, x], dim=2)
        if not carry.is_last:
            carry.give(self, x[:, :, -1:])
        # Both ends were mixed with themselves for want of a neighbour: right at the ends of the clip only.
        begin = 0 if before is None else 1
        end = None if carry.is_last else -1
        return F.interpolate(x, scale_factor=(2, 2, 2), mode="trilinear")[:, :, begin:end]
