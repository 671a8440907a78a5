"""`TrainConfig`: every setting of a training run, composed of the settings that each part keeps beside its own code."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from videovae.data.clips import ClipsConfig
from videovae.errors import ConfigError
from videovae.losses import LossConfig
from videovae.losses.perceptual import MIN_SIZE as LPIPS_MIN_SIZE
from videovae.models.discriminator import DiscriminatorConfig
from videovae.models.wfvae_config import WFVAEConfig
from videovae.optim import OptimizerConfig

# What a resumed run may change: how long, how often, where, and how the work is fed. All else decides the numbers.
FREE_ON_RESUME = frozenset(
    {
        "run_dir",
        "data",
        "num_steps",
        "log_every",
        "eval_every",
        "save_every",
        "keep_last",
        "async_save",
        "on_save_failure",
        "resume",
        "timeout_seconds",
        "trackers",
        "monitor.hang_timeout_seconds",
        "monitor.on_hang",
        "monitor.prometheus_port",
        "clips.num_workers",
        "clips.max_failed_fraction",
        "loss.perceptual_weights",
    }
)


MAX_TIMEOUT_SECONDS = 7 * 24 * 3600.0
VIDEO_CHANNELS = 3
NUM_PORTS = 2**16
TRACKERS = ("wandb", "mlflow")


@dataclass(frozen=True)
class MonitorConfig:
    """Who speaks up when a rank is stuck, and who may look on."""

    hang_timeout_seconds: float | None = None
    """Without a sign of progress a rank counts as stuck after so long; none learns it from the run's own steps."""
    on_hang: Literal["tell", "end"] = "tell"
    """What becomes of a run of which a rank is stuck: it says which, or it says so and ends."""
    prometheus_port: int | None = None
    """Serve what is measured on this port of the loopback address, plus the local rank; none serves nothing."""

    def __post_init__(self) -> None:
        if self.hang_timeout_seconds is not None and not self.hang_timeout_seconds > 0:
            raise ConfigError(
                f"monitor.hang_timeout_seconds is {self.hang_timeout_seconds}; give more than 0, or none."
            )
        if self.prometheus_port is not None and not 0 < self.prometheus_port < NUM_PORTS:
            raise ConfigError(f"monitor.prometheus_port is {self.prometheus_port}; give 1 to {NUM_PORTS - 1}, or none.")


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    run_dir: Path = Path("runs/videovae")
    """Folder for everything the run writes."""
    data: Path | None = None
    """Folder of training videos, searched recursively; none: clips of moving textures are made in the run folder."""
    num_steps: int = 100_000
    """Optimizer steps, generator and discriminator together."""
    accumulate: int = 1
    """Batches that every rank adds up for one optimizer step: as one batch of so many times the clips, in the memory of
    a single one. Only the discriminator's batch norms see them one by one."""
    seed: int = 0
    """Decides the first weights, the order of the data and the noise."""
    log_every: int = 10
    """Steps between two log lines."""
    eval_every: int = 1_000
    """Steps between two evaluations on held-out clips; one more comes before the first and after the last step."""
    save_every: int = 1_000
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: int | None = None
    """How many of the newest checkpoints to keep; none keeps all. Older ones go when a newer one is durable."""
    async_save: bool = True
    """Train on while a checkpoint is written, once it is copied to memory; at most one is under way."""
    on_save_failure: Literal["raise", "warn"] = "raise"
    """What becomes of a run whose checkpoint cannot be written: it ends, or it goes on and says so."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Where else the losses go, besides the run folder and TensorBoard: their own variables name server and account."""
    resume: str = "auto"
    """`auto`: go on from the newest checkpoint of the run folder, if any. `never`: refuse a run folder that has one.
    Else the path of a checkpoint or of a run folder to start from."""
    init_from: Path | None = None
    """Where a run that starts afresh takes the autoencoder's first weights from: an imported or exported folder, or the
    averaged weights of a run folder or checkpoint. None: random ones. The discriminator's are always random."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Type of the networks' arithmetic (autocast); weights, losses and averages stay float32. fp16 needs CUDA."""
    ema_decay: float = 0.999
    """Share of the old value that the averaged weights keep at each generator step."""
    timeout_seconds: float = 600.0
    """How long a rank waits for the others before it gives up."""
    model: WFVAEConfig = field(default_factory=WFVAEConfig)
    """The autoencoder."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The patch discriminator."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What the autoencoder is trained for."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Both optimizers and their schedule."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """What is told of slow and stuck ranks, and to whom."""
    clips: ClipsConfig = field(default_factory=lambda: ClipsConfig(num_frames=25, height=256, width=256))
    """How clips are cut from the videos."""

    def __post_init__(self) -> None:
        for name in ("log_every", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but it counts steps: give 1 or more.")
        if self.accumulate < 1:
            raise ConfigError(f"accumulate is {self.accumulate}, but it counts batches: give 1 or more.")
        if self.num_steps < 0:
            raise ConfigError(f"num_steps is {self.num_steps}, but it counts steps: give 0 or more.")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay is {self.ema_decay}, but it is a share: give at least 0 and less than 1.")
        unknown = sorted(set(self.trackers) - set(TRACKERS))
        if unknown:
            raise ConfigError(f"trackers names {', '.join(unknown)}; give some of {', '.join(TRACKERS)}, or none.")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; give 0 or more.")
        if not 0 < self.timeout_seconds <= MAX_TIMEOUT_SECONDS:
            raise ConfigError(
                f"timeout_seconds is {self.timeout_seconds}; give more than 0, and {MAX_TIMEOUT_SECONDS} at most."
            )
        self._check_parts()

    def _check_parts(self) -> None:
        """What each part cannot see alone."""
        factor, num_frames = self.model.temporal_factor, self.clips.num_frames
        if num_frames % factor != 1:
            below = num_frames - (num_frames - 1) % factor
            raise ConfigError(
                f"clips.num_frames is {num_frames}, and the model takes one frame and then groups of {factor}: "
                f"give {below} or {below + factor}."
            )
        if self.discriminator.in_channels != VIDEO_CHANNELS:
            raise ConfigError(
                f"discriminator.in_channels is {self.discriminator.in_channels}, and videos have {VIDEO_CHANNELS}."
            )
        side = min(self.clips.height, self.clips.width)
        if self.loss.perceptual_weight > 0 and side < LPIPS_MIN_SIZE:
            raise ConfigError(
                f"clips are {side} pixels on a side, and the perceptual term needs {LPIPS_MIN_SIZE}. Give larger ones, "
                "or loss.perceptual_weight 0."
            )

    def to_dict(self) -> dict[str, Any]:
        """The same as a tree that JSON can hold; paths become strings."""
        tree = _plain(dataclasses.asdict(self))
        assert isinstance(tree, dict)
        return tree


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings that a resumed run must not change but does, as `name: saved -> now`."""
    old, new = _flat(saved), _flat(now)
    return [
        f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in sorted(old.keys() | new.keys())
        if name not in FREE_ON_RESUME and old.get(name) != new.get(name)
    ]


def fixed_settings(config: TrainConfig) -> dict[str, Any]:
    """What a resumed run must not change, by its dotted name.

    Ranks: local.
    """
    return {name: value for name, value in _flat(config.to_dict()).items() if name not in FREE_ON_RESUME}


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case Path():
            return str(value)
    return value


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
