import pytest
import torch
import torch.nn.functional as F

from videovae.models.causal_conv import (
    NATIVE_UP_TO,
    Carry,
    CausalConv3d,
    CausalSequential,
    Conv2d,
    as_images,
    as_video,
    in_chunks,
    keep_pace,
)


def plain_causal(layer: CausalConv3d, x: torch.Tensor) -> torch.Tensor:
    """The definition: the first frame repeated before the clip, then an ordinary convolution."""
    conv = layer.conv
    past = x[:, :, :1].repeat(1, 1, conv.kernel_size[0] - 1, 1, 1)
    return F.conv3d(torch.cat([past, x], 2), conv.weight, conv.bias, conv.stride, conv.padding)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("num_frames", [1, 2, 5, 8])
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1)])
def test_convolution_repeats_the_first_frame_before_the_clip(batch, num_frames, kernel, padding):
    layer = CausalConv3d(4, 6, kernel, padding=padding)
    x = torch.randn(batch, 4, num_frames, 6, 8)
    torch.testing.assert_close(layer(x), plain_causal(layer, x))


def test_clip_above_the_native_limit_gives_the_same_as_halves():
    layer = CausalConv3d(2, 2, 3, padding=1)
    x = torch.randn(1, 2, 5, 2048, 4)
    assert x[:, :, :3].shape.numel() // 4 < NATIVE_UP_TO <= x.shape.numel() // 4
    torch.testing.assert_close(layer(x)[:, :, :3], layer(x[:, :, :3]))


def test_small_clips_alone_are_convolved_as_a_batch_of_two():
    layer = CausalConv3d(2, 2, 3, padding=1)
    seen = []
    layer.conv.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:3]))
    layer(torch.randn(1, 2, 5, 4, 4))
    layer(torch.randn(2, 2, 5, 4, 4))
    assert seen == [(2, 2, 5), (2, 2, 7)]


def test_gradients_of_small_clips_are_those_of_the_definition():
    layer = CausalConv3d(3, 3, 3, padding=1)
    x = torch.randn(1, 3, 5, 4, 4, requires_grad=True)
    inputs = (x, *layer.parameters())
    weights = torch.randn(1, 3, 5, 4, 4)
    gradients = torch.autograd.grad((layer(x) * weights).sum(), inputs)
    expected = torch.autograd.grad((plain_causal(layer, x) * weights).sum(), inputs)
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sizes", [[9], [1, 8], [3, 2, 4], [5, 2, 2]])
def test_chunks_equal_the_whole(stride, sizes):
    layers = CausalSequential(CausalConv3d(4, 4, 3, padding=1), CausalConv3d(4, 4, 3, stride=stride, padding=1))
    x = torch.randn(2, 4, 9, 6, 6)
    torch.testing.assert_close(in_chunks(layers, x, sizes), layers(x))


def test_convolution_reads_no_later_frame():
    layer = CausalConv3d(2, 2, 3, padding=1)
    x = torch.randn(1, 2, 6, 4, 4)
    later = x.clone()
    later[:, :, 3:] += 1.0
    torch.testing.assert_close(layer(later)[:, :, :3], layer(x)[:, :, :3])
    assert not torch.allclose(layer(later)[:, :, 3], layer(x)[:, :, 3])


def test_conv2d_treats_every_frame_as_an_image():
    layer = Conv2d(3, 5, 3, padding=1)
    x = torch.randn(2, 3, 4, 6, 6)
    expected = torch.stack([F.conv2d(x[:, :, k], layer.weight, layer.bias, padding=1) for k in range(4)], 2)
    torch.testing.assert_close(layer(x), expected)


def test_images_and_back_is_the_same_clip():
    x = torch.randn(2, 3, 4, 5, 6)
    assert torch.equal(as_images(x)[5], x[1, :, 1])
    assert torch.equal(as_video(as_images(x), 2), x)


def test_images_share_memory_with_a_clip_whose_channels_are_innermost():
    x = torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    assert as_images(x).data_ptr() == x.data_ptr()


def test_faster_path_waits_for_the_slower():
    layer = torch.nn.Identity()
    carry = Carry()
    clip = torch.arange(6.0).view(1, 1, 6, 1, 1)
    first = keep_pace(clip[:, :, :4], 3, layer, carry)
    carry.is_first, carry.is_last = False, True
    second = keep_pace(clip[:, :, 4:], 3, layer, carry)
    assert first.flatten().tolist() == [0.0, 1.0, 2.0]
    assert second.flatten().tolist() == [3.0, 4.0, 5.0]


def test_carried_frames_do_not_keep_the_chunk_alive():
    carry, layer, chunk = Carry(), torch.nn.Identity(), torch.randn(1, 2, 8, 4, 4)
    carry.give(layer, chunk[:, :, -1:])
    kept = carry.take(layer)
    assert torch.equal(kept, chunk[:, :, -1:])
    assert kept.untyped_storage().nbytes() < chunk.untyped_storage().nbytes()
    assert carry.take(layer) is None
