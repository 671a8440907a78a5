"""The optimizers' settings, how one is built, and the learning rate of each step."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from torch.optim import AdamW, Optimizer

from videovae.errors import ConfigError

Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for both networks; the defaults are the published ones."""

    learning_rate: float = 1e-5
    """The VAE's learning rate, after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square, for both networks."""
    weight_decay: float = 1e-4
    """The VAE's weight decay."""
    max_grad_norm: float | None = None
    """Longest gradient of the VAE; longer ones are scaled down to it. None lets all pass, as published."""
    discriminator_learning_rate: float | None = None
    """The discriminator's learning rate, after warm-up; None means the VAE's."""
    discriminator_weight_decay: float = 0.01
    """The discriminator's weight decay."""
    discriminator_max_grad_norm: float | None = 1.0
    """Longest gradient of the discriminator; None lets all pass."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises linearly from 0."""
    schedule: Schedule = "constant"
    """What follows the warm-up."""
    schedule_steps: int | None = None
    """Step, counted from the start of training, at which the cosine has reached its end. It is no function of
    `num_steps`, so that a run can be prolonged without changing the steps it has made."""
    final_fraction: float = 0.1
    """Where the cosine ends, as a fraction of the learning rate."""

    def __post_init__(self) -> None:
        for name in (
            "learning_rate",
            "discriminator_learning_rate",
            "max_grad_norm",
            "discriminator_max_grad_norm",
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}={value}, but it must be finite and positive. Give a number such as 1e-5.")
        for name in ("weight_decay", "discriminator_weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}={value}, but it must be finite and at least 0. Give 0 for no decay.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={self.betas}, but both must lie in [0, 1). Give values such as 0.9 and 0.999.")
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"final_fraction={self.final_fraction} is outside [0, 1]. Give a fraction such as 0.1.")
        self._check_schedule()

    def _check_schedule(self) -> None:
        if self.schedule not in get_args(Schedule):
            raise ConfigError(f"schedule={self.schedule!r} is unknown. Choose constant or cosine.")
        if self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps={self.warmup_steps}, but it must be at least 0. Give 0 for no warm-up.")
        if self.schedule == "constant" and self.schedule_steps is not None:
            raise ConfigError(
                f"schedule_steps={self.schedule_steps} would not be used by a constant schedule. "
                "Choose schedule=cosine, or leave schedule_steps out."
            )
        if self.schedule == "cosine" and (self.schedule_steps is None or self.schedule_steps <= self.warmup_steps):
            raise ConfigError(
                f"schedule_steps={self.schedule_steps}, but a cosine after {self.warmup_steps} warm-up steps "
                "needs more than those. Give the step at which it ends, such as num_steps."
            )

    @property
    def discriminator_peak(self) -> float:
        """The discriminator's learning rate after warm-up."""
        if self.discriminator_learning_rate is None:
            return self.learning_rate
        return self.discriminator_learning_rate


def build_optimizer(
    module: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> AdamW:
    """AdamW over every parameter of the module that is trainable at this moment.

    Ranks: local.
    Raises:
        ConfigError: all parameters are frozen.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError(f"{type(module).__name__} has no trainable parameter. Unfreeze some before this.")
    return AdamW(trainable, lr=learning_rate, betas=betas, weight_decay=weight_decay)


def learning_rate(step: int, config: OptimizerConfig, base: float) -> float:
    """The learning rate with which step number `step` (the first is 0) is made.

    A function of the step alone: there is no state to save, and a resumed run goes on where it stopped.

    Args:
        base: the rate after warm-up: `config.learning_rate` or `config.discriminator_peak`.
    Source: Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", equation 5,
        without restarts; the warm-up is linear and its last step has the full rate.
    """
    if step < config.warmup_steps:
        return base * (step + 1) / config.warmup_steps
    if config.schedule_steps is None:
        return base
    progress = min(1.0, (step - config.warmup_steps) / (config.schedule_steps - config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return base * (config.final_fraction + (1 - config.final_fraction) * cosine)


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Make the optimizer's next steps with this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value
