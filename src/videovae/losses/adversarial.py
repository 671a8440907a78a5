"""The game between generator and discriminator: both sides' losses and the weight that balances them."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

DiscriminatorLossKind = Literal["hinge", "vanilla"]


def discriminator_hinge_loss(
    logits_real: Float[Tensor, "*patches"], logits_fake: Float[Tensor, "*patches"]
) -> Float[Tensor, ""]:
    """How far real patches stay below 1 and reconstructed ones above -1, on average.

    Source: Lim and Ye 2017, "Geometric GAN".
    """
    return 0.5 * (F.relu(1 - logits_real.float()).mean() + F.relu(1 + logits_fake.float()).mean())


def discriminator_vanilla_loss(
    logits_real: Float[Tensor, "*patches"], logits_fake: Float[Tensor, "*patches"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of telling real patches from reconstructed ones.

    Source: Goodfellow et al. 2014, "Generative Adversarial Networks", equation 1.
    """
    return 0.5 * (F.softplus(-logits_real.float()).mean() + F.softplus(logits_fake.float()).mean())


def discriminator_loss(
    logits_real: Float[Tensor, "*patches"],
    logits_fake: Float[Tensor, "*patches"],
    kind: DiscriminatorLossKind,
) -> Float[Tensor, ""]:
    """The discriminator's loss of the kind that the config names."""
    if kind == "hinge":
        return discriminator_hinge_loss(logits_real, logits_fake)
    return discriminator_vanilla_loss(logits_real, logits_fake)


def generator_adversarial_loss(logits_fake: Float[Tensor, "*patches"]) -> Float[Tensor, ""]:
    """Low where the discriminator takes the reconstruction for real."""
    return -logits_fake.float().mean()


def adaptive_weight(
    nll_grad: Float[Tensor, "*parameter"], adversarial_grad: Float[Tensor, "*parameter"], weight: float
) -> Float[Tensor, ""]:
    """The factor that makes the adversarial gradient `weight` times as long as that of the reconstruction.

    Args:
        nll_grad, adversarial_grad: gradients of the two losses with respect to the decoder's last weight.
    Ranks: local. Every rank must pass gradients already averaged over the ranks: `torch.autograd.grad` does
        not go through DDP, and ranks that weigh by their own clips optimise different losses.
    Source: Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis", equation 7, with
        1e-4 for its delta and the ratio held in [0, 1e4], as published in its code.
    """
    nll_norm = torch.linalg.vector_norm(nll_grad.detach().float())
    adversarial_norm = torch.linalg.vector_norm(adversarial_grad.detach().float())
    ratio: Tensor = nll_norm / (adversarial_norm + 1e-4)
    return weight * ratio.clamp(0.0, 1e4)


def is_discriminator_step(step: int, disc_start: int) -> bool:
    """True when this step trains the discriminator, as every odd one from `disc_start` on does."""
    return step >= disc_start and step % 2 == 1
