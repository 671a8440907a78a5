"""Which checkpoint a run goes on from, and whether it may."""

import re
from pathlib import Path

import rankwise
from rankwise.checkpoint import CheckpointManager
from videovae.config import TrainConfig, differences
from videovae.errors import ConfigError
from videovae.state import TrainState

logger = rankwise.get_logger(__name__)


def resume(config: TrainConfig, state: TrainState, checkpoints: CheckpointManager) -> int | None:
    """Load the checkpoint that `config.resume` asks for into the state.

    Returns:
        The step of this run's own checkpoint that was loaded; None where there was none to load, or it belongs to
        another run folder.
    Raises:
        ConfigError: the checkpoint was made with other settings than those of this run, or starting from it would
            mix two runs in one folder.
        CheckpointError: the checkpoint is missing, damaged, or made by another number of ranks.
    Ranks: every rank must call.
    """
    chosen = rankwise.on_main_process(choose_checkpoint, config, checkpoints)
    if chosen is None:
        return None
    directory, step = chosen
    own = directory == checkpoints.directory
    source = checkpoints if own else CheckpointManager(directory)
    source.load(state.items(config), step)
    state.step = step
    logger.info(f"going on from {source.path(step)}", ranks="main")
    return step if own else None


def find_checkpoint(path: Path) -> tuple[Path, int]:
    """Folder and step of the checkpoint that a path names: itself, or the newest one of a run folder.

    Raises:
        ConfigError: there is none.
    Ranks: local; reads the file system.
    """
    if match := re.fullmatch(r"step-(\d+)", path.name):
        directory, step = path.parent, int(match[1])
        if step in CheckpointManager(directory).steps():
            return directory, step
        raise ConfigError(
            f"{path} is no whole checkpoint: it has no manifest.json. Name another step, or the run folder."
        )
    for directory in (path / "checkpoints", path):
        newest = CheckpointManager(directory).latest() if directory.is_dir() else None
        if newest is not None:
            return directory, newest
    seen = "has no whole checkpoint" if path.is_dir() else "does not exist"
    raise ConfigError(f"{path} {seen}. Give a run folder, or one of its checkpoints/step-... folders.")


def choose_checkpoint(config: TrainConfig, checkpoints: CheckpointManager) -> tuple[Path, int] | None:
    """Folder and step of the checkpoint that `config.resume` asks for; None where the run starts afresh.

    Raises:
        ConfigError, CheckpointError: as `resume`.
    Ranks: local; reads the file system.
    """
    newest = checkpoints.latest()
    if config.resume == "never":
        if newest is not None:
            raise ConfigError(
                f"{config.run_dir} already holds a checkpoint of step {newest}, and resume is `never`. "
                "Give another --run-dir, or --resume auto to go on."
            )
        return None
    if config.resume == "auto":
        if newest is None:
            return None
        directory, step = checkpoints.directory, newest
    else:
        directory, step = find_checkpoint(Path(config.resume))
        if directory.resolve() == checkpoints.directory.resolve():
            directory = checkpoints.directory
        if newest is not None and (directory != checkpoints.directory or newest > step):
            raise ConfigError(
                f"{config.run_dir} already holds a checkpoint of step {newest}; starting there from step {step} of "
                f"{directory} would mix two runs. Give another --run-dir."
            )
    changed = differences(CheckpointManager(directory).read("config", step), config.to_dict())
    if changed:
        raise ConfigError(
            f"step {step} in {directory} was made with other settings: {'; '.join(changed)}. "
            "Give the same ones, or another --run-dir for a new run."
        )
    return directory, step
