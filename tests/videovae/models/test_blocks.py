import pytest
import torch
import torch.nn.functional as F

from videovae.errors import ConfigError
from videovae.models import blocks
from videovae.models.causal_conv import in_chunks


def published_resize(x: torch.Tensor, t_interpolation: str) -> torch.Tensor:
    """First frame doubled in space alone; the others first in time, then in space."""
    first, rest = x[:, :, :1], x[:, :, 1:]
    first = F.interpolate(first, scale_factor=(1, 2, 2), mode="trilinear")
    if rest.shape[2] == 0:
        return first
    rest = F.interpolate(rest, scale_factor=(2, 1, 1), mode=t_interpolation)
    return torch.cat([first, F.interpolate(rest, scale_factor=(1, 2, 2), mode="trilinear")], 2)


@pytest.mark.parametrize("t_interpolation", ["nearest", "trilinear"])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 6])
def test_upsampling_doubles_all_frames_but_the_first(t_interpolation, num_frames):
    layer = blocks.Spatial2xTime2x3DUpsample(2, t_interpolation)
    x = torch.randn(2, 2, num_frames, 3, 4)
    torch.testing.assert_close(layer(x), layer.conv(published_resize(x, t_interpolation)))


@pytest.mark.parametrize("t_interpolation", ["nearest", "trilinear"])
@pytest.mark.parametrize("sizes", [[7], [1, 6], [1, 1, 5], [3, 2, 2], [4, 3], [6, 1]])
def test_upsampling_in_chunks_equals_the_whole(t_interpolation, sizes):
    layer = blocks.Spatial2xTime2x3DUpsample(2, t_interpolation)
    x = torch.randn(2, 2, 7, 3, 4)
    torch.testing.assert_close(in_chunks(layer, x, sizes), layer(x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (blocks.Downsample(2), (1, 2, 5, 4, 3)),
        (blocks.Upsample(2), (1, 2, 5, 16, 12)),
        (blocks.Spatial2xTime2x3DDownsample(2), (1, 2, 3, 4, 3)),
        (blocks.Spatial2xTime2x3DUpsample(2, "nearest"), (1, 2, 9, 16, 12)),
        (blocks.ResnetBlock3D(2, 7, norm_type="layernorm", dropout=0.0), (1, 7, 5, 8, 6)),
        (blocks.ResnetBlock2D(2, norm_type="layernorm", dropout=0.0), (1, 2, 5, 8, 6)),
        (blocks.AttnBlock3DFix(2, norm_type="layernorm"), (1, 2, 5, 8, 6)),
    ],
)
def test_block_gives_the_resolution_that_its_name_says(layer, shape):
    assert layer(torch.randn(1, 2, 5, 8, 6)).shape == shape


def test_attention_stays_within_a_frame():
    layer = blocks.AttnBlock3DFix(4, norm_type="layernorm")
    x = torch.randn(1, 4, 3, 2, 2)
    other = x.clone()
    other[:, :, 1, 0, 0] += 1.0
    changed = (layer(other) != layer(x)).flatten(3).any(3).any(1)
    assert changed.tolist() == [[False, True, False]]


def test_attention_is_softmax_of_scaled_products():
    layer = blocks.AttnBlock3DFix(4, norm_type="layernorm")
    x = torch.randn(1, 4, 1, 2, 3)
    q, k, v = (part(layer.norm(x)).flatten(2)[0] for part in (layer.q, layer.k, layer.v))
    attended = v @ torch.softmax(q.T @ k / 2.0, dim=1).T
    torch.testing.assert_close(layer(x), x + layer.proj_out(attended.view(1, 4, 1, 2, 3)))


def test_layer_norm_has_no_mean_over_channels():
    y = blocks.build_norm(8, "layernorm")(5.0 + torch.randn(2, 8, 3, 4, 4))
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 3, 4, 4), atol=1e-5, rtol=0.0)


def test_unknown_norm_is_named():
    with pytest.raises(ConfigError, match="norm_type='batchnorm' is unknown"):
        blocks.build_norm(8, "batchnorm")
