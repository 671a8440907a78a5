"""Everything that a training run carries from step to step, and that a checkpoint therefore holds."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rankwise
from rankwise.checkpoint import PerRank
from videovae.config import TrainConfig
from videovae.data.clips import ClipDataset
from videovae.data.index import HeldoutRange, VideoEntry
from videovae.data.loader import ClipLoader, build_loader
from videovae.ema import ExponentialAverage
from videovae.errors import ConfigError, WeightsError
from videovae.losses.perceptual import LPIPS, load_perceptual
from videovae.models.discriminator import NLayerDiscriminator3D
from videovae.models.wfvae import WFVAEModel
from videovae.optim import build_optimizer


class JudgeBoth(nn.Module):
    """The discriminator on a clip and on its reconstruction, in one call.

    DDP copies the buffers of rank 0 at each call of its module, and a second call before the backward pass would change
    the batch norm statistics that the first one still needs.
    """

    def __init__(self, discriminator: NLayerDiscriminator3D) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, x: Tensor, recon: Tensor) -> tuple[Tensor, Tensor]:
        # One batch of both would mix their batch statistics.
        return self.discriminator(x), self.discriminator(recon)


class RecentLosses(dict[str, Tensor]):
    """The newest value of each loss on this rank; the networks take turns, and a log line shows both."""

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.clear()
        self.update(state)


@dataclass
class TrainState:
    """Networks, optimizers, data position and random streams of a run on this rank.

    `vae` and `discriminator` are the bare networks; the `parallel_` ones reduce gradients in their backward pass
    (the same objects where there is one process). `heldout` is what is never trained on, `origin` the
    checkpoint that the run branched off, if any.
    """

    vae: WFVAEModel
    discriminator: NLayerDiscriminator3D
    parallel_vae: nn.Module
    parallel_discriminator: nn.Module
    perceptual: LPIPS | None
    ema: ExponentialAverage
    vae_optimizer: torch.optim.Optimizer
    discriminator_optimizer: torch.optim.Optimizer
    vae_scaler: torch.amp.GradScaler
    discriminator_scaler: torch.amp.GradScaler
    loader: ClipLoader
    rng: rankwise.RngState
    heldout: list[HeldoutRange]
    origin: str = ""
    losses: RecentLosses = field(default_factory=RecentLosses)
    step: int = 0

    def items(self, config: TrainConfig) -> dict[str, Any]:
        """What `CheckpointManager.save` and `load` take. The schedule is a function of the step: nothing to keep."""
        return {
            "vae": self.vae,
            "discriminator": self.discriminator,
            "ema": self.ema,
            "vae_optimizer": self.vae_optimizer,
            "discriminator_optimizer": self.discriminator_optimizer,
            "vae_scaler": self.vae_scaler,
            "discriminator_scaler": self.discriminator_scaler,
            "loader": self.loader,
            "rng": PerRank(self.rng),
            "losses": PerRank(self.losses),
            "config": config.to_dict(),
            "heldout": [list(part) for part in self.heldout],
            "origin": self.origin,
        }

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Forward passes in here leave no trace: neither in random streams, nor in the statistics of batch norms.

        Ranks: local.
        """
        rng = self.rng.state_dict()
        statistics = [buffer.clone() for buffer in self.discriminator.buffers()]
        yield
        for buffer, value in zip(self.discriminator.buffers(), statistics, strict=True):
            buffer.copy_(value)
        self.rng.load_state_dict(rng)


def build_state(
    config: TrainConfig, session: rankwise.Session, videos: Sequence[VideoEntry], heldout: list[HeldoutRange]
) -> TrainState:
    """Networks with the same first weights on every rank, on this rank's device, and this rank's share of the data.

    Raises:
        RankFailedError: the perceptual weights cannot be read.
    Ranks: every rank must call.
    """
    identity, device = session.identity, session.device
    with rankwise.same_on_every_rank(config.seed):
        vae = WFVAEModel(config.model).to(device)
        discriminator = NLayerDiscriminator3D(config.discriminator).to(device)
    perceptual = _load_perceptual(config, device)
    settings = config.optimizer
    scaled = config.precision == "fp16"
    num_workers = config.clips.num_workers
    if num_workers is None:
        num_workers = rankwise.loader_workers(identity.local_world_size, launcher=identity.launcher)
    state = TrainState(
        vae=vae,
        discriminator=discriminator,
        parallel_vae=_data_parallel(vae, session),
        parallel_discriminator=_data_parallel(JudgeBoth(discriminator), session),
        perceptual=perceptual,
        ema=ExponentialAverage(vae, config.ema_decay),
        vae_optimizer=build_optimizer(
            vae,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
        ),
        discriminator_optimizer=build_optimizer(
            discriminator,
            learning_rate=settings.discriminator_peak,
            weight_decay=settings.discriminator_weight_decay,
            betas=settings.betas,
        ),
        vae_scaler=torch.amp.GradScaler(device.type, enabled=scaled),
        discriminator_scaler=torch.amp.GradScaler(device.type, enabled=scaled),
        loader=build_loader(
            ClipDataset(videos, config.clips, config.seed),
            rank=identity.rank,
            world_size=identity.world_size,
            batch_size=config.clips.batch_size,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
        ),
        rng=rankwise.RngState(device),
        heldout=heldout,
    )
    _settle_buckets(state, device)
    return state


def _load_perceptual(config: TrainConfig, device: torch.device) -> LPIPS | None:
    """LPIPS where it has weight; a file that one rank cannot read fails all of them."""
    perceptual, error = None, None
    if config.loss.perceptual_weight > 0 and config.loss.perceptual_weights is not None:
        try:
            perceptual = load_perceptual(config.loss.perceptual_weights).to(device)
        except WeightsError as raised:
            error = raised
    rankwise.raise_together(error)
    return perceptual


def _data_parallel(module: nn.Module, session: rankwise.Session) -> nn.Module:
    if session.identity.world_size == 1:
        return module
    on_accelerator = session.device.type != "cpu"
    return DistributedDataParallel(module, device_ids=[session.device] if on_accelerator else None)


def _settle_buckets(state: TrainState, device: torch.device) -> None:
    """Let DDP choose its gradient buckets now, by passes that are thrown away.

    After the first backward pass DDP lays the buckets anew, in the order in which gradients came, and that changes the
    order in which the sums of an all-reduce are formed. A fresh run and a resumed one would pass through that change at
    different steps and differ in the last bits; so both settle it before any state is restored.
    """
    if state.parallel_vae is state.vae:
        return
    with state.undone():
        x = torch.rand(1, 3, state.vae.config.temporal_factor + 1, 16, 16, device=device)
        for _ in range(2):  # the new layout takes effect in the second forward pass
            output = state.parallel_vae(x)
            (output.recon.mean() + output.posterior.parameters.mean()).backward()
            sum(logits.mean() for logits in state.parallel_discriminator(x, x)).backward()
    state.vae.zero_grad()
    state.discriminator.zero_grad()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which the networks run in the config's precision."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse float16 where it would train a hundred times slower or not at all.

    Raises:
        ConfigError: float16 on anything but CUDA.
    """
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"precision is fp16, which needs CUDA, and this run computes on {device.type}. Give bf16 or fp32."
        )
