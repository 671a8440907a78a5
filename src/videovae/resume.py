"""Which checkpoint a run goes on from, and whether it may."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import rankwise
from rankwise.checkpoint import CheckpointManager
from videovae.config import TrainConfig, differences
from videovae.data.index import HeldoutRange
from videovae.errors import ConfigError
from videovae.state import TrainState

logger = rankwise.get_logger(__name__)


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run goes on from."""

    directory: Path
    """Folder of checkpoints."""
    step: int
    is_own: bool
    """Whether it is the run's own, or the run branches off another one."""
    heldout: list[HeldoutRange]
    """What was never trained on, and must not be from here on."""


def choose_checkpoint(config: TrainConfig, *, verified: bool = True) -> Origin | None:
    """The checkpoint that `config.resume` asks for; None where the run starts afresh.

    Args:
        verified: compare all of it with its checksums, and pass over a newest one that is damaged.
    Raises:
        ConfigError: there is none, it was made with other settings than those of this run, or starting from it would
            mix two runs in one folder.
        CheckpointError: it is damaged.
    Ranks: local; reads the file system.
    """
    found = _find(config, verified)
    if found is None:
        return None
    directory, step = found
    checkpoints = CheckpointManager(directory)
    changed = differences(checkpoints.read("config", step), config.to_dict())
    if changed:
        raise ConfigError(
            f"step {step} in {directory} was made with other settings: {'; '.join(changed)}. "
            "Give the same ones; a run with other settings starts afresh, in another --run-dir, without --resume PATH."
        )
    heldout = [(str(name), int(start), int(stop)) for name, start, stop in checkpoints.read("heldout", step)]
    return Origin(directory, step, directory == _own(config), heldout)


def restore(origin: Origin, state: TrainState, config: TrainConfig, own: CheckpointManager) -> None:
    """Bring the state to where the checkpoint left it.

    Args:
        own: of this run's own checkpoints.
    Raises:
        CheckpointError: it is damaged, or made by another number of ranks.
    Ranks: every rank must call.
    """
    checkpoints = own if origin.is_own else CheckpointManager(origin.directory)
    checkpoints.load(state.items(config), origin.step)
    state.step = origin.step
    state.origin = checkpoints.read("origin", origin.step) if origin.is_own else _name(origin.directory, origin.step)
    logger.info(f"going on from {checkpoints.path(origin.step)}", ranks="main")
    if state.loader.videos_changed:
        logger.warning(
            "the videos are not those of the checkpoint: from here on other clips are drawn than in a run that was "
            "never stopped",
            ranks="main",
        )


def find_checkpoint(path: Path, *, verified: bool = True) -> tuple[Path, int]:
    """Folder and step of the checkpoint that a path names: itself, or the newest one of a run folder.

    Raises:
        ConfigError: there is none.
    Ranks: local; reads the file system.
    """
    path = Path(os.path.abspath(path))
    match = re.fullmatch(r"step-(\d+)", path.name)
    if match and int(match[1]) in CheckpointManager(path.parent).steps():
        return path.parent, int(match[1])
    for directory in (path / "checkpoints", path):
        newest = CheckpointManager(directory).latest(verified=verified) if directory.is_dir() else None
        if newest is not None:
            return directory, newest
    seen = "has no whole checkpoint" if path.is_dir() else "does not exist"
    raise ConfigError(f"{path} {seen}. Give a run folder, or one of its checkpoints/step-... folders.")


def _name(directory: Path, step: int) -> str:
    return str(CheckpointManager(directory.resolve()).path(step))


def _own(config: TrainConfig) -> Path:
    return config.run_dir / "checkpoints"


def _find(config: TrainConfig, verified: bool) -> tuple[Path, int] | None:
    own = _own(config)
    newest = CheckpointManager(own).latest(verified=verified and config.resume != "never")
    if config.resume == "never":
        if newest is not None:
            raise ConfigError(
                f"{config.run_dir} already holds a checkpoint of step {newest}, and resume is `never`. "
                "Give another --run-dir, or --resume auto to go on."
            )
        return None
    if config.resume == "auto":
        return None if newest is None else (own, newest)

    directory, step = find_checkpoint(Path(config.resume), verified=verified)
    if newest is None:
        return directory, step
    if directory.resolve() == own.resolve():
        if step == newest:
            return own, step
    else:
        # Started from there before, and come further since? A run folder is the same origin though it may have grown.
        origin = CheckpointManager(own).read("origin", newest)
        is_run = not re.fullmatch(r"step-\d+", Path(config.resume).name)
        if origin == _name(directory, step) or (is_run and Path(origin).parent == directory.resolve()):
            return own, newest
    raise ConfigError(
        f"{config.run_dir} already holds a checkpoint of step {newest}; starting there from step {step} of {directory} "
        "would mix two runs. Give another --run-dir."
    )
