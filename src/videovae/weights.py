"""Where a run takes its first weights from."""

from dataclasses import fields
from pathlib import Path

import rankwise
from rankwise.checkpoint import CheckpointManager
from rankwise.errors import RankwiseError
from videovae.errors import ConfigError, WeightsError
from videovae.models.folder import read_config
from videovae.models.wfvae_config import WFVAEConfig
from videovae.reconstruct import is_exported, load_model
from videovae.resume import find_checkpoint
from videovae.state import TrainState

logger = rankwise.get_logger(__name__)

FREE_AT_START = frozenset({"dropout"})
"""Settings in which a run may differ from the model that it starts from."""


def start_from(path: Path, state: TrainState) -> None:
    """Give the autoencoder, and its average, the weights of a model folder, run folder or checkpoint.

    Raises:
        ConfigError, WeightsError, CheckpointError: there are none, they are damaged, or of another model; from one
            rank's own disk it reaches the others as RankFailedError.
    Ranks: every rank must call.
    """
    error: RankwiseError | None = None
    try:
        model, source = load_model(path)
        _check_same(path, model.config, state.vae.config)
        state.vae.load_state_dict(model.state_dict())
        state.ema.load_state_dict(model.state_dict())
    except RankwiseError as raised:
        error = raised
    rankwise.raise_together(error)
    logger.info(f"starting from the weights of {source}", ranks="main")


def check_start(path: Path, wanted: WFVAEConfig) -> None:
    """Refuse what can be seen to be no start for a run, without reading weights.

    Raises:
        ConfigError, WeightsError: there are no weights at `path`, or those of another model.
    Ranks: local; reads the file system.
    """
    if path.is_file() or not path.exists():
        load_model(path)  # says so
    if is_exported(path):
        settings = read_config(path)
    else:
        directory, step = find_checkpoint(path, verified=False)  # the ranks look at all of it
        settings = CheckpointManager(directory).read("config", step)["model"]
    try:
        found = WFVAEConfig.from_dict(settings)
    except ConfigError as error:
        raise WeightsError(f"{path}: {error}") from error
    _check_same(path, found, wanted)


def _check_same(path: Path, found: WFVAEConfig, wanted: WFVAEConfig) -> None:
    changed = [
        f"model.{name}: {getattr(found, name)} -> {getattr(wanted, name)}"
        for name in (each.name for each in fields(WFVAEConfig))
        if name not in FREE_AT_START and getattr(found, name) != getattr(wanted, name)
    ]
    if changed:
        raise ConfigError(
            f"init_from is {path}, a model with other settings than this run: {'; '.join(changed)}. Choose the preset, "
            "or give the --model options, that it was made with."
        )
