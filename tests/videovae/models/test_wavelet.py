import pytest
import torch

from videovae.models.causal_conv import in_chunks
from videovae.models.wavelet import (
    HaarWaveletTransform2D,
    HaarWaveletTransform3D,
    InverseHaarWaveletTransform2D,
    InverseHaarWaveletTransform3D,
)

TRANSFORMS = [HaarWaveletTransform2D, HaarWaveletTransform3D]
PAIRS = [
    (HaarWaveletTransform2D, InverseHaarWaveletTransform2D),
    (HaarWaveletTransform3D, InverseHaarWaveletTransform3D),
]


@pytest.mark.parametrize(("forward", "inverse"), PAIRS)
def test_inverse_gives_the_clip_back(forward, inverse):
    x = torch.randn(2, 3, 9, 4, 6)
    # 0.3536 is 1/sqrt(8) to four digits.
    torch.testing.assert_close(inverse()(forward()(x)), x, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_constant_clip_has_only_a_low_band(transform):
    coeffs = transform()(torch.ones(1, 3, 5, 4, 4))
    assert coeffs[:, :3].min() > 0.0
    torch.testing.assert_close(coeffs[:, 3:], torch.zeros_like(coeffs[:, 3:]))


@pytest.mark.parametrize(
    ("axis", "band_2d", "band_3d"), [("t", None, 4), ("h", 1, 2), ("w", 2, 1)], ids=lambda value: str(value)
)
def test_change_along_one_axis_shows_in_the_published_band(axis, band_2d, band_3d):
    signs = torch.tensor([-1.0, 1.0] * 2)
    shape = {"t": (1, 1, 4, 1, 1), "h": (1, 1, 1, 4, 1), "w": (1, 1, 1, 1, 4)}[axis]
    clip = signs.view(shape).expand(1, 1, 4, 4, 4)
    clip = torch.cat([clip[:, :, 1:], clip[:, :, :1]], 2) if axis == "t" else clip
    # Odd frame counts: the transform repeats the first frame before the clip.
    bands = HaarWaveletTransform3D()(clip[:, :, :3])[:, :, 1:]
    assert (bands.abs().amax((0, 2, 3, 4)) > 1e-6).nonzero().flatten().tolist() == [band_3d]
    if band_2d is not None:
        bands = HaarWaveletTransform2D()(clip)
        assert (bands.abs().amax((0, 2, 3, 4)) > 1e-6).nonzero().flatten().tolist() == [band_2d]


def test_bands_come_before_channels():
    x = torch.randn(1, 3, 5, 4, 4)
    joined = HaarWaveletTransform3D()(x)
    single = HaarWaveletTransform3D()(x[:, 1:2])
    torch.testing.assert_close(joined[:, 1::3], single)


@pytest.mark.parametrize(("forward", "inverse"), PAIRS)
def test_chunks_equal_the_whole(forward, inverse):
    x = torch.randn(1, 3, 9, 4, 4)
    coeffs = forward()(x)
    torch.testing.assert_close(in_chunks(forward(), x, [3, 2, 4]), coeffs)
    torch.testing.assert_close(in_chunks(inverse(), coeffs, [2, coeffs.shape[2] - 2]), inverse()(coeffs))


@pytest.mark.parametrize("layer", [layer for pair in PAIRS for layer in pair])
def test_kernels_stay_frozen_whatever_is_asked(layer):
    module = layer().requires_grad_(True)
    assert list(module.parameters()) == []
    assert module.state_dict()
    assert not any(kernel.requires_grad for kernel in module.buffers())


def test_state_has_the_published_names_and_shapes():
    forward, inverse = HaarWaveletTransform3D().state_dict(), InverseHaarWaveletTransform3D().state_dict()
    assert list(inverse) == ["h", "g", "hh", "gh", "h_v", "g_v", "hh_v", "gh_v"]
    assert list(forward) == [f"{name}_conv.conv.weight" for name in inverse]
    assert {tuple(kernel.shape) for kernel in (*forward.values(), *inverse.values())} == {(1, 1, 2, 2, 2)}
    for layer in PAIRS[0]:
        state = layer().state_dict()
        assert list(state) == ["aa", "ad", "da", "dd"]
        assert {tuple(kernel.shape) for kernel in state.values()} == {(1, 1, 2, 2)}


def test_loaded_kernels_are_used():
    layer = HaarWaveletTransform2D()
    layer.load_state_dict({name: 2.0 * kernel for name, kernel in layer.state_dict().items()})
    x = torch.randn(1, 1, 1, 2, 2)
    torch.testing.assert_close(layer(x), 2.0 * HaarWaveletTransform2D()(x))
