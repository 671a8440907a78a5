"""The distribution of latents that an encoder gives for a clip."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


@dataclass(frozen=True, eq=False)
class DiagonalGaussian:
    """A normal distribution per latent value, all independent.

    A dataclass, because DDP looks for output tensors in the fields of dataclasses, not in other objects.
    """

    parameters: Float[Tensor, "b moments t h w"]
    """What the encoder computes: the means, then the logarithms of the variances, along the channels."""

    @property
    def mean(self) -> Float[Tensor, "b c t h w"]:
        """The centre."""
        return self.parameters.chunk(2, dim=1)[0]

    @property
    def logvar(self) -> Float[Tensor, "b c t h w"]:
        """Logarithm of the variance, clamped to [-30, 20]."""
        return self.parameters.chunk(2, dim=1)[1].clamp(LOGVAR_MIN, LOGVAR_MAX)

    @property
    def std(self) -> Float[Tensor, "b c t h w"]:
        """Standard deviation."""
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Float[Tensor, "b c t h w"]:
        """Variance."""
        return torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "b c t h w"]:
        """One draw, through which gradients reach mean and variance.

        Args:
            generator: where the noise comes from; the default generator of the latents' device if None.
        """
        mean = self.mean
        device = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype)
        return mean + self.std * noise.to(mean.device)

    def mode(self) -> Float[Tensor, "b c t h w"]:
        """The most likely latents: the mean."""
        return self.mean

    def kl(self) -> Float[Tensor, "b w"]:
        """Divergence from the standard normal distribution.

        Returns:
            One value per clip and *column* of latents: the published sum runs over channels, time and height
            only, and its weight in the published loss assumes so.
        Source: Kingma and Welling 2014, appendix B.
        """
        return 0.5 * torch.sum(self.mean**2 + self.var - 1.0 - self.logvar, dim=(1, 2, 3))
