"""One optimizer step of each network, over one batch or several that count as one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rankwise import monitor
from videovae.config import TrainConfig
from videovae.losses import (
    ReconstructionTerms,
    adaptive_weight,
    discriminator_loss,
    generator_adversarial_loss,
    reconstruction_terms,
)
from videovae.optim import learning_rate, set_learning_rate
from videovae.state import TrainState, autocast


def generator_step(batches: Sequence[Float[Tensor, "b c t h w"]], state: TrainState, config: TrainConfig) -> None:
    """One step of the autoencoder, towards the clips and, from `disc_start` on, against the discriminator.

    Args:
        batches: count as one batch of all their clips; each needs the memory of one.
    Ranks: every rank must call; gradients are averaged.
    """
    # The discriminator only judges here: bare, so that DDP reduces nothing for it, and frozen, so that no gradient
    # of its weights is computed.
    state.discriminator.requires_grad_(False)
    rate = learning_rate(state.step, config.optimizer, config.optimizer.learning_rate)
    _begin(state.vae_optimizer, rate)
    is_adversarial = state.step >= config.loss.disc_start
    weight = weigh_beforehand(batches, state, config) if is_adversarial and len(batches) > 1 else None
    means: dict[str, Tensor] = {}
    for x, reduced in _last_reduced(batches, state.parallel_vae):
        with reduced:
            with monitor.phase("forward"):
                terms, adversarial = generator_losses(state.parallel_vae, x, state, config)
                loss = terms.nll + config.loss.kl_weight * terms.kl + config.loss.wavelet_weight * terms.wavelet
            parts = {"nll": terms.nll, "kl": terms.kl, "wavelet": terms.wavelet}
            with monitor.phase("backward"):
                if adversarial is not None:
                    if weight is None:
                        weight = weigh([last_layer_gradients(terms.nll, adversarial, state)], config)
                    loss = loss + weight * adversarial
                    parts["adversarial"] = adversarial
                _add_share(means, parts | {"generator": loss}, len(batches))
                state.vae_scaler.scale(loss / len(batches)).backward()  # type: ignore[no-untyped-call]
    state.losses |= means if weight is None else means | {"adversarial_weight": weight}
    _finish(state.vae, state.vae_optimizer, state.vae_scaler, config.optimizer.max_grad_norm)
    with monitor.phase("optimizer"):
        state.ema.update(state.vae)
    state.discriminator.requires_grad_(True)


def generator_losses(
    vae: nn.Module, x: Float[Tensor, "b c t h w"], state: TrainState, config: TrainConfig
) -> tuple[ReconstructionTerms, Float[Tensor, ""] | None]:
    """What the autoencoder is trained for, unweighted; the adversarial loss from `disc_start` on.

    Args:
        vae: the autoencoder, bare or in DDP.
    Ranks: every rank must call where `vae` is in DDP.
    """
    with autocast(x.device, config.precision):
        output = vae(x)
        adversarial = None
        if state.step >= config.loss.disc_start:
            adversarial = generator_adversarial_loss(state.discriminator(output.recon))
    coefficients = (output.encoder_coefficients, output.decoder_coefficients)
    terms = reconstruction_terms(output.recon, x, output.posterior, coefficients, config.loss, state.perceptual)
    return terms, adversarial


@monitor.phase("forward")
def weigh_beforehand(
    batches: Sequence[Float[Tensor, "b c t h w"]], state: TrainState, config: TrainConfig
) -> Float[Tensor, ""]:
    """The adversarial weight of several batches that count as one.

    It scales every backward pass, and needs the gradients of all batches at the last layer. So they are found before,
    by forward passes that leave no trace; with all other layers frozen these take hardly any memory.

    Ranks: every rank must call.
    """
    trained = [parameter for parameter in state.vae.parameters() if parameter.requires_grad]
    gradients = []
    with state.undone():
        state.vae.requires_grad_(False)
        state.vae.last_layer.requires_grad_(True)
        for x in batches:
            terms, adversarial = generator_losses(state.vae, x, state, config)
            assert adversarial is not None, "asked for from disc_start on"
            gradients.append(last_layer_gradients(terms.nll, adversarial, state))
        for parameter in trained:
            parameter.requires_grad_(True)
    return weigh(gradients, config)


def last_layer_gradients(
    nll: Float[Tensor, ""], adversarial: Float[Tensor, ""], state: TrainState
) -> Float[Tensor, "2 ..."]:
    """Gradients of both losses with respect to the decoder's last weight.

    Ranks: local.
    """
    layer = state.vae.last_layer
    scale = state.vae_scaler.get_scale()  # 1 unless in float16, where small gradients would vanish
    pair = [torch.autograd.grad(loss * scale, layer, retain_graph=True)[0] / scale for loss in (nll, adversarial)]
    return torch.stack(pair)


def weigh(gradients: Sequence[Float[Tensor, "2 ..."]], config: TrainConfig) -> Float[Tensor, ""]:
    """The adversarial weight, from what `last_layer_gradients` gives for each batch of this rank.

    `autograd.grad` does not pass through DDP's reduction, so without the one here every rank would weigh the
    adversarial loss by its own clips.

    Ranks: every rank must call.
    """
    pair = torch.stack(list(gradients)).mean(0)
    if dist.is_initialized():
        with monitor.phase("communication"):
            dist.all_reduce(pair)
        pair /= dist.get_world_size()
    return adaptive_weight(pair[0], pair[1], config.loss.disc_weight)


def discriminator_step(batches: Sequence[Float[Tensor, "b c t h w"]], state: TrainState, config: TrainConfig) -> None:
    """One step of the discriminator, on the clips and their reconstructions.

    Args:
        batches: count as one batch of all their clips, but for the batch norms, which see one at a time.
    Ranks: every rank must call; gradients are averaged.
    """
    rate = learning_rate(state.step, config.optimizer, config.optimizer.discriminator_peak)
    _begin(state.discriminator_optimizer, rate)
    means: dict[str, Tensor] = {}
    for x, reduced in _last_reduced(batches, state.parallel_discriminator):
        with monitor.phase("forward"), torch.no_grad(), autocast(x.device, config.precision):
            recon = state.vae(x).recon
        with reduced:
            with monitor.phase("forward"):
                with autocast(x.device, config.precision):
                    logits_real, logits_fake = state.parallel_discriminator(x, recon)
                loss = discriminator_loss(logits_real, logits_fake, config.loss.disc_loss)
            _add_share(means, {"discriminator": loss}, len(batches))
            with monitor.phase("backward"):
                state.discriminator_scaler.scale(loss / len(batches)).backward()  # type: ignore[no-untyped-call]
    state.losses |= means
    _finish(
        state.discriminator,
        state.discriminator_optimizer,
        state.discriminator_scaler,
        config.optimizer.discriminator_max_grad_norm,
    )


def _last_reduced(
    batches: Sequence[Tensor], module: nn.Module
) -> Iterator[tuple[Tensor, AbstractContextManager[None]]]:
    """Each batch, and what its forward and backward pass belong into: DDP averages the gradients in the last alone."""
    for number, x in enumerate(batches, 1):
        if isinstance(module, DistributedDataParallel) and number < len(batches):
            yield x, module.no_sync()
        else:
            yield x, nullcontext()


def _add_share(means: dict[str, Tensor], values: Mapping[str, Tensor], num_batches: int) -> None:
    for name, value in values.items():
        share = value.detach() / num_batches
        means[name] = means[name] + share if name in means else share


def _begin(optimizer: torch.optim.Optimizer, rate: float) -> None:
    set_learning_rate(optimizer, rate)
    optimizer.zero_grad()


@monitor.phase("optimizer")
def _finish(
    module: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_grad_norm: float | None
) -> None:
    """One optimizer step along the gradients that the backward passes have added up."""
    if max_grad_norm is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
