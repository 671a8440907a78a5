"""Convolutions over time that never look ahead, for a whole clip or for one that passes through in chunks.

Tensors keep the published axes `b c t h w`, but travel with the channels innermost in memory
(`torch.channels_last_3d`). Layer norm, attention and the per-frame layers then work on plain views of the
clip, and trilinear upsampling is several times faster. Another layout gives the same numbers, only later.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# On a CPU, torch 2.13 gives a float32 clip alone, with channels x frames x height up to this, to its native 3D
# convolution, and what is larger, or any batch of two, to oneDNN's (`ConvParams::use_mkldnn`). With oneDNN
# alone, a training step on 17 x 64 x 64 takes a third of the time (one thread of a Xeon).
NATIVE_UP_TO = 20480


class Carry:
    """What each chunk of a clip leaves for the next one, layer by layer.

    One object serves one pass of one clip and is dropped with it. Modules hold nothing between calls, so an
    exception half-way leaves nothing behind, and a model that is never chunked pays nothing.
    """

    def __init__(self) -> None:
        self.is_first = True
        self.is_last = False
        self._frames: dict[nn.Module, Tensor] = {}

    def give(self, layer: nn.Module, frames: Float[Tensor, "b c t h w"]) -> None:
        """Keep `frames` for the same layer's next chunk; copied, so that the chunk itself can be freed."""
        self._frames[layer] = frames.clone()

    def take(self, layer: nn.Module) -> Float[Tensor, "b c t h w"] | None:
        """What the layer kept from the chunk before, or None."""
        return self._frames.pop(layer, None)


def in_chunks(
    network: Callable[[Tensor, Carry], Tensor], x: Float[Tensor, "b c t h w"], sizes: Sequence[int]
) -> Float[Tensor, "b d s y x"]:
    """`network` of the whole clip, computed on consecutive chunks of `sizes` frames."""
    carry = Carry()
    outputs = []
    for index, chunk in enumerate(torch.split(x, list(sizes), dim=2)):
        carry.is_first = index == 0
        carry.is_last = index == len(sizes) - 1
        outputs.append(network(chunk, carry))
    return torch.cat(outputs, dim=2)


def with_past(
    x: Float[Tensor, "b c t h w"], layer: nn.Module, carry: Carry | None, *, kernel: int, stride: int
) -> Float[Tensor, "b c s h w"]:
    """The frames that a causal convolution of `layer` reads: those before `x`, then `x`.

    Before a clip's first frame stand copies of it. Later chunks find what the chunk before left: the frames
    from where the next window begins.
    """
    if carry is None or carry.is_first:
        # Whole slices, not an expanded one: `cat` then keeps the memory layout. Replication padding would be
        # one call, but its gradient is not deterministic on CUDA.
        x = torch.cat([x[:, :, :1]] * (kernel - 1) + [x], dim=2)
    elif (past := carry.take(layer)) is not None:
        x = torch.cat([past, x], dim=2)
    if carry is not None and not carry.is_last:
        num_windows = (x.shape[2] - kernel) // stride + 1
        carry.give(layer, x[:, :, num_windows * stride :])
    return x


def keep_pace(
    x: Float[Tensor, "b c t h w"], num_frames: int, layer: nn.Module, carry: Carry | None
) -> Float[Tensor, "b c s h w"]:
    """The next `num_frames` of a path ahead of the one that it joins; the others wait for the next chunk."""
    if carry is None:
        return x
    if (waiting := carry.take(layer)) is not None:
        x = torch.cat([waiting, x], dim=2)
    if not carry.is_last:
        carry.give(layer, x[:, :, num_frames:])
    return x[:, :, :num_frames]


class CausalConv3d(nn.Module):
    """A 3D convolution that reads no later frame; copies of the first frame stand before the clip."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride, (0, padding, padding))

    def forward(self, x: Float[Tensor, "b c t h w"], carry: Carry | None = None) -> Float[Tensor, "b d s y x"]:
        conv = self.conv
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        if kernel == stride == 1:
            # A matrix product over the channels, of a view. As a convolution its weight gradient would have
            # other strides than the weight, which DDP copies in every step and warns of.
            return F.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias).movedim(-1, 1)
        x = with_past(x, self, carry, kernel=kernel, stride=stride)
        if stride == 1 and x.shape[0] == 1 and x.shape[1:4].numel() <= NATIVE_UP_TO and x.device.type == "cpu":
            return _in_two_halves(conv, x)
        y: Tensor = conv(x)
        return y


class Conv2d(nn.Conv2d):
    """A 2D convolution of every frame by itself."""

    def forward(self, x: Float[Tensor, "b c t h w"], carry: Carry | None = None) -> Float[Tensor, "b d t y x"]:
        return as_video(super().forward(as_images(x)), x.shape[0])


class CausalSequential(nn.Sequential):
    """Layers one after the other, each given the chunk's `carry`."""

    def forward(self, x: Float[Tensor, "b c t h w"], carry: Carry | None = None) -> Float[Tensor, "b d s y x"]:
        for layer in self:
            x = layer(x, carry)
        return x


def _in_two_halves(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """`conv` of one clip, as a batch of two halves; both compute the middle one of an odd number of frames."""
    num_past = conv.kernel_size[0] - 1
    num_frames = x.shape[2] - num_past
    half = (num_frames + 1) // 2
    y = conv(torch.cat([x[:, :, : half + num_past], x[:, :, num_frames - half :]]))
    return torch.cat([y[:1], y[1:, :, 2 * half - num_frames :]], dim=2)


def as_images(x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b*t c h w"]:
    """Every frame as an image of a larger batch; a view where the channels lie innermost."""
    return x.movedim(1, 2).flatten(0, 1)


def as_video(x: Float[Tensor, "bt c h w"], batch: int) -> Float[Tensor, "b c t h w"]:
    """The clips that `as_images` took apart."""
    return torch.unflatten(x, 0, (batch, -1)).movedim(2, 1)
