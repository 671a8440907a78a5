"""The 3D PatchGAN discriminator: a small convolutional network that judges every patch of a clip."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from videovae.errors import ConfigError

MAX_WIDENING = 8
"""The deepest layers have at most this many times `base_channels`."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The size of the discriminator; the defaults are the published ones."""

    in_channels: int = 3
    """Channels of the video."""
    base_channels: int = 64
    """Channels after the first convolution; they double per layer, up to eightfold."""
    num_layers: int = 4
    """Convolutions that halve height and width. The first two halve the number of frames as well."""

    def __post_init__(self) -> None:
        for name in ("in_channels", "base_channels", "num_layers"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"discriminator {name}={getattr(self, name)}, but it must be at least 1. Give a positive number."
                )


class NLayerDiscriminator3D(nn.Module):
    """Logits of every patch of a clip: high where it looks real, low where it looks reconstructed.

    Parameter names and initial values are those of the class of this name in Open-Sora-Plan.

    Source: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", section
    3.2.2 (PatchGAN), with 3D kernels of size 3.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        base = config.base_channels
        layers: list[nn.Module] = [
            nn.Conv3d(config.in_channels, base, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        width = base
        for depth in range(1, config.num_layers + 1):
            stride = (2 if depth == 1 else 1, 2, 2) if depth < config.num_layers else (1, 1, 1)
            wider = base * min(2**depth, MAX_WIDENING)
            layers += [
                nn.Conv3d(width, wider, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm3d(wider),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            width = wider
        layers.append(nn.Conv3d(width, 1, 3, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialize)

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b 1 patches_t patches_h patches_w"]:
        """Logits per patch; in training mode they depend on the whole batch through its norms.

        Ranks: local; the batch norms take the statistics of this rank's clips alone.
        """
        logits: Tensor = self.main(x)
        return logits


def _initialize(module: nn.Module) -> None:
    """Draw the published initial values; the biases of convolutions keep those of PyTorch."""
    if isinstance(module, nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm3d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
