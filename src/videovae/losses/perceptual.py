"""LPIPS: the perceptual distance of two images, from the features of a frozen VGG16."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from videovae.errors import ConfigError, WeightsError

WANTED_FILES = (
    "a folder that holds torchvision's VGG16 (vgg16-397923af.pth, keys features.N.weight) and the linear "
    "heads of LPIPS (vgg.pth, keys linN.model.1.weight), or at one .pth or .safetensors file with all of them"
)
SUFFIXES = (".pth", ".pt", ".safetensors")
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of VGG16's convolutions; a max-pool stands between stages, and each stage's end is compared."""
MIN_SIZE = 2 ** (len(STAGES) - 1)


class LPIPS(nn.Module):
    """Frozen VGG16 and the five learned channel weights that compare its features.

    It has no layer with a training mode and no parameter with a gradient. It is never part of a checkpoint.

    Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
    equation 1, the variant "lin" on VGG.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage in STAGES:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList(torch.zeros(1, stage[-1], 1, 1) for stage in STAGES)
        # ImageNet's mean and deviation, for pixels in [-1, 1] instead of [0, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, recon: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 1 1"]:
        """Distance of each pair of images; 0 for equal ones.

        Under autocast the convolutions run in its type; the comparison stays in float32.

        Args:
            recon, target: pixels in [-1, 1].
        Raises:
            ConfigError: the images are smaller than 16 pixels on a side.
        """
        if min(recon.shape[-2:]) < MIN_SIZE:
            height, width = recon.shape[-2:]
            raise ConfigError(
                f"LPIPS got images of {height}x{width} pixels, and VGG16 halves them {len(STAGES) - 1} times."
                f" Use clips of at least {MIN_SIZE} pixels on a side, or perceptual_weight=0."
            )
        stages = zip(self._stages(recon), self._stages(target), self.heads, strict=True)
        distances = [
            (head * (_unit(a) - _unit(b)).square()).sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)
            for a, b, head in stages
        ]
        return torch.stack(distances).sum(dim=0)

    def _stages(self, image: Float[Tensor, "b 3 h w"]) -> Iterator[Tensor]:
        """What each stage of VGG16 ends with, before the pooling."""
        h = (image.float() - self.shift) / self.scale
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                yield h
            h = layer(h)
        yield h


def _unit(features: Tensor) -> Tensor:
    """The features of each pixel, scaled to length one."""
    features = features.float()
    length: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (length + 1e-10)


def load_perceptual(path: Path) -> LPIPS:
    """LPIPS with its weights, from one combined file or from a folder with VGG16's file and the heads' file.

    Args:
        path: `.pth`, `.pt` or `.safetensors`; of a folder, every such file is read. Keys may be those of
            torchvision (`features.N.weight`), of the lpips package (`net.sliceK.N.weight`,
            `linK.model.1.weight`, `lins.K.model.1.weight`), or a mixture; others are ignored.
    Raises:
        WeightsError: no file, an unreadable one, two that disagree, weights missing or of other shapes.
    Ranks: local; each rank reads the files itself.
    """
    weights: dict[str, Tensor] = {}
    for file in _weight_files(path):
        for key, tensor in _read(file).items():
            name = _own_name(key)
            if name is None or not isinstance(tensor, Tensor):
                continue
            if name in weights and not torch.equal(weights[name], tensor):
                raise WeightsError(
                    f"{path} holds two different tensors for {name} of LPIPS, one of them in {file.name}. "
                    "Keep only the files of one VGG16 and one set of heads."
                )
            weights[name] = tensor
    model = LPIPS()
    _check(weights, model, path)
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model


def _weight_files(path: Path) -> list[Path]:
    """The file itself, or those of the folder that may hold weights."""
    if path.is_file():
        return [path]
    files = sorted(file for file in path.glob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        seen = "holds no .pth, .pt or .safetensors file" if path.is_dir() else "does not exist"
        raise WeightsError(f"perceptual_weights={path} {seen}. Point it at {WANTED_FILES}.")
    return files


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of one file by name; nothing in it is executed."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file fails in any of a dozen ways
        reason = str(error).partition("\n")[0]
        raise WeightsError(
            f"{file} cannot be read as weights ({type(error).__name__}: {reason}). "
            f"Point perceptual_weights at {WANTED_FILES}."
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(
            f"{file} holds a {type(content).__name__}, not tensors by name. Point perceptual_weights at {WANTED_FILES}."
        )
    return content


def _own_name(key: str) -> str | None:
    """The name in `LPIPS` of a published weight, or None for one that it has no use for."""
    if match := re.fullmatch(r"(?:features|net\.slice\d)\.(\d+\.(?:weight|bias))", key):
        return f"features.{match[1]}"
    if match := re.fullmatch(r"(?:lin|lins\.|heads\.)(\d)(?:\.model\.[01]\.weight)?", key):
        return f"heads.{match[1]}"
    return None


def _check(weights: dict[str, Tensor], model: LPIPS, path: Path) -> None:
    """Raise where a weight of the model is missing or has another shape."""
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise WeightsError(
            f"{path} lacks {len(missing)} of the {len(wanted)} weights of LPIPS: {_few(missing)}. "
            f"Point perceptual_weights at {WANTED_FILES}."
        )
    wrong = [
        f"{name} {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if weights[name].shape != tensor.shape
    ]
    if wrong:
        raise WeightsError(f"{path} is not LPIPS on VGG16: {_few(wrong)}. Point perceptual_weights at {WANTED_FILES}.")


def _few(names: list[str]) -> str:
    """The first three, and how many more."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
