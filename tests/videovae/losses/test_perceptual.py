"""LPIPS with random weights, against its formula written out with `F.conv2d`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from videovae.errors import ConfigError, WeightsError
from videovae.losses.perceptual import LPIPS, load_perceptual

Weights = dict[str, Tensor]

CONVOLUTIONS = {
    0: (3, 64), 2: (64, 64),
    5: (64, 128), 7: (128, 128),
    10: (128, 256), 12: (256, 256), 14: (256, 256),
    17: (256, 512), 19: (512, 512), 21: (512, 512),
    24: (512, 512), 26: (512, 512), 28: (512, 512),
}  # fmt: skip
COMPARED = [2, 7, 14, 21, 28]
SLICES = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}


@pytest.fixture(scope="module")
def backbone() -> Weights:
    generator = torch.Generator().manual_seed(1)
    weights: Weights = {}
    for index, (fan_in, width) in CONVOLUTIONS.items():
        weights[f"features.{index}.weight"] = (
            torch.randn(width, fan_in, 3, 3, generator=generator) * (2 / (9 * fan_in)) ** 0.5
        )
        weights[f"features.{index}.bias"] = 0.1 * torch.randn(width, generator=generator)
    return weights


@pytest.fixture(scope="module")
def heads() -> Weights:
    generator = torch.Generator().manual_seed(2)
    widths = [CONVOLUTIONS[index][1] for index in COMPARED]
    return {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator) for k, width in enumerate(widths)}


@pytest.fixture(scope="module")
def folder(backbone: Weights, heads: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(backbone | {"classifier.0.weight": torch.zeros(1)}, folder / "vgg16-397923af.pth")
    torch.save(heads, folder / "vgg.pth")
    return folder


@pytest.fixture(scope="module")
def lpips(folder: Path) -> LPIPS:
    return load_perceptual(folder)


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    recon, target = (torch.rand(2, 3, 32, 24, generator=generator) * 2 - 1 for _ in range(2))
    return recon, target


def features_by_hand(image: Tensor, weights: Weights) -> Iterator[Tensor]:
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    h = (image - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1)
    for index in CONVOLUTIONS:
        if index - 3 in COMPARED:
            h = F.max_pool2d(h, 2)
        weight, bias = weights[f"features.{index}.weight"], weights[f"features.{index}.bias"]
        h = F.relu(F.conv2d(h, weight, bias, padding=1))
        if index in COMPARED:
            yield h


def lpips_by_hand(recon: Tensor, target: Tensor, backbone: Weights, heads: Weights) -> Tensor:
    total = torch.zeros(len(recon), 1, 1, 1)
    pairs = zip(features_by_hand(recon, backbone), features_by_hand(target, backbone), strict=True)
    for (a, b), head in zip(pairs, heads.values(), strict=True):
        a, b = (f / (f.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
        total += F.conv2d((a - b) ** 2, head).mean((2, 3), keepdim=True)
    return total


def test_distance_follows_the_published_formula(
    lpips: LPIPS, images: tuple[Tensor, Tensor], backbone: Weights, heads: Weights
) -> None:
    distance = lpips(*images)
    assert distance.shape == (2, 1, 1, 1)
    torch.testing.assert_close(distance, lpips_by_hand(*images, backbone, heads), rtol=1e-4, atol=1e-6)


def test_distance_of_equal_images_is_zero_and_of_others_is_not(lpips: LPIPS, images: tuple[Tensor, Tensor]) -> None:
    recon, target = images
    assert lpips(recon, recon).abs().max().item() == 0.0
    assert lpips(recon, target).min().item() > 0.0


def test_gradient_reaches_the_image_and_no_weight(lpips: LPIPS, images: tuple[Tensor, Tensor]) -> None:
    recon, target = images
    recon.requires_grad_()
    lpips(recon, target).sum().backward()
    assert recon.grad is not None
    assert recon.grad.count_nonzero() > 0
    assert all(not p.requires_grad and p.grad is None for p in lpips.parameters())


def test_train_mode_changes_nothing(lpips: LPIPS, images: tuple[Tensor, Tensor]) -> None:
    expected = lpips(*images)
    try:
        assert torch.equal(lpips.train()(*images), expected)
    finally:
        lpips.eval()


def test_comparison_stays_float32_under_autocast(lpips: LPIPS, images: tuple[Tensor, Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        distance = lpips(*images)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, lpips(*images), rtol=0.05, atol=0.0)


def test_images_below_16_pixels_are_refused(lpips: LPIPS) -> None:
    image = torch.zeros(1, 3, 16, 8)
    with pytest.raises(ConfigError, match=r"images of 16x8 pixels.*at least 16 pixels"):
        lpips(image, image)


def test_one_file_with_the_names_of_the_lpips_package_loads(
    lpips: LPIPS, backbone: Weights, heads: Weights, tmp_path: Path
) -> None:
    combined = {f"lins.{k}.model.1.weight": head for k, head in enumerate(heads.values())}
    for number, indices in SLICES.items():
        for index in indices:
            for part in ("weight", "bias"):
                combined[f"net.slice{number}.{index}.{part}"] = backbone[f"features.{index}.{part}"]
    save_file(combined, tmp_path / "lpips.safetensors")
    loaded = load_perceptual(tmp_path / "lpips.safetensors").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in lpips.state_dict().items())


def test_state_dict_of_lpips_itself_loads(lpips: LPIPS, tmp_path: Path) -> None:
    torch.save(lpips.state_dict(), tmp_path / "own.pth")
    loaded = load_perceptual(tmp_path / "own.pth").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in lpips.state_dict().items())


def test_missing_heads_are_named_with_the_files_that_are_wanted(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"lacks 5 of the 31 weights.*heads\.0.*2 more.*vgg\.pth"):
        load_perceptual(folder / "vgg16-397923af.pth")


def test_missing_backbone_is_named_with_the_files_that_are_wanted(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"lacks 26 of the 31 weights.*features\.0\.weight.*torchvision"):
        load_perceptual(folder / "vgg.pth")


def test_heads_of_another_backbone_are_refused(folder: Path, heads: Weights, tmp_path: Path) -> None:
    (tmp_path / "vgg16.pth").symlink_to(folder / "vgg16-397923af.pth")
    torch.save(heads | {"lin1.model.1.weight": torch.zeros(1, 192, 1, 1)}, tmp_path / "alex.pth")
    with pytest.raises(WeightsError, match=r"heads\.1 \(1, 192, 1, 1\), not \(1, 128, 1, 1\)"):
        load_perceptual(tmp_path)


def test_two_files_that_disagree_are_refused(folder: Path, heads: Weights, tmp_path: Path) -> None:
    (tmp_path / "vgg16.pth").symlink_to(folder / "vgg16-397923af.pth")
    torch.save(heads, tmp_path / "a.pth")
    torch.save({name: head + 1 for name, head in heads.items()}, tmp_path / "b.pth")
    with pytest.raises(WeightsError, match=r"two different tensors for heads\.0.*b\.pth"):
        load_perceptual(tmp_path)


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
def test_an_unreadable_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(WeightsError, match=rf"{name} cannot be read as weights"):
        load_perceptual(tmp_path / name)


def test_a_pickled_object_is_not_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"features.0.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        load_perceptual(tmp_path / "bomb.pth")
    assert not (tmp_path / "executed").exists()


def test_a_file_without_names_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(WeightsError, match="holds a Tensor, not tensors by name"):
        load_perceptual(tmp_path / "tensor.pth")


def test_a_path_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds no \.pth"):
        load_perceptual(tmp_path)
    with pytest.raises(WeightsError, match="does not exist"):
        load_perceptual(tmp_path / "nothing")
