"""`CheckpointManager`: a training state on disk, all of it or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torch.distributed as dist

from rankwise import collectives, logs
from rankwise.checkpoint import commit
from rankwise.checkpoint.state import PerRank, capture, check_fits, check_names, require_same, restore
from rankwise.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    RankFailure,
)
from rankwise.files import fsync_directory

P = ParamSpec("P")
T = TypeVar("T")

_logger = logs.get_logger(__name__)


class CheckpointManager:
    """Saves and loads training states in one directory, a step at a time.

    Args:
        directory: shared by all ranks; made by the first save.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    def steps(self) -> list[int]:
        """The steps that can be loaded, ascending.

        Ranks: local.
        """
        return commit.find_steps(self.directory)

    def latest(self) -> int | None:
        """The newest step that can be loaded, None when there is none.

        Ranks: local; while a save runs, ranks may see different ones.
        """
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        """Where a step lies, or would lie.

        Ranks: local.
        """
        return self.directory / commit.step_name(step)

    def save(self, step: int, state: Mapping[str, object]) -> None:
        """Store `state` as `step`: on return it is whole and durable, or every rank raises and nothing changed.

        A step that is there whole already stays as it is; a broken one is moved aside.

        Args:
            state: by name, anything with `state_dict` and `load_state_dict`, tensors, plain values and nested
                dicts, lists and tuples of these. The main process stores an item for all ranks; every rank
                stores its own of what is wrapped in `PerRank`.
        Raises:
            CheckpointError: a rank could not write its part; names rank and cause.
        Ranks: every rank must call, with the same step and names. `state_dict` of an item that is not `PerRank`
            is called on the main process alone.
        """
        staging = _on_main(self._begin, step, state)
        if staging is None:
            return
        files: dict[str, commit.FileRecord] = {}
        error: Exception | None = None
        try:
            files = _write_share(staging, state)
        except Exception as raised:
            error = raised
        rows = collectives.gather_objects((files, _describe(error)))
        failures = [failure for _, failure in rows if failure is not None]
        if failures:
            _on_main(_discard, staging)
            raise _together(CheckpointError(_tell(f"step {step} was not saved", failures))) from error
        manifest = commit.Manifest(
            step=step,
            world_size=len(rows),
            shared_items=tuple(name for name, item in state.items() if not isinstance(item, PerRank)),
            per_rank_items=tuple(name for name, item in state.items() if isinstance(item, PerRank)),
            files={name: record for row, _ in rows for name, record in row.items()},
        )
        _on_main(_commit, staging, manifest)

    def load(self, state: Mapping[str, object], step: int | Literal["latest"] = "latest") -> int | None:
        """Bring the saved state back into the objects and tensors of `state`.

        Plain values in `state` are only compared by name: get them with `read`.

        Returns:
            The step that was loaded; None when "latest" was asked for and there is none.
        Raises:
            CheckpointNotFoundError: there is no such step.
            CheckpointCorruptError: a file is missing or damaged; `state` is untouched.
            CheckpointMismatchError: saved with other items, keys, shapes or number of ranks.
        Ranks: every rank must call; if it fails on one, it fails on all.
        """
        chosen = _on_main(self._choose, step)
        if chosen is None:
            return None
        error: Exception | None = None
        try:
            self._load_share(chosen, state)
        except Exception as raised:
            error = raised
        rows = collectives.gather_objects((type(error) if error else None, _describe(error)))
        failures = [(kind, failure) for kind, failure in rows if kind is not None and failure is not None]
        if failures:
            kind = failures[0][0] if issubclass(failures[0][0], CheckpointError) else CheckpointError
            message = _tell(f"step {chosen} was not loaded", [failure for _, failure in failures])
            raise _together(kind(message)) from error
        return chosen

    def read(self, name: str, step: int | Literal["latest"] = "latest", *, rank: int | None = None) -> Any:
        """One item as plain tree of tensors (on the CPU) and values, without touching the others.

        Args:
            rank: whose item, for what was saved as `PerRank`.
        Raises:
            CheckpointNotFoundError: there is no such step or item.
            CheckpointCorruptError: a file of it is missing or damaged.
        Ranks: local.
        """
        chosen = self._choose(step)
        if chosen is None:
            raise CheckpointNotFoundError(f"there is no checkpoint in {self.directory}.")
        manifest = commit.read_manifest(self.path(chosen))
        if name in manifest.shared_items and rank is None:
            return commit.read_item(self.path(chosen), manifest, name)
        if name in manifest.per_rank_items and rank is not None and 0 <= rank < manifest.world_size:
            return commit.read_item(self.path(chosen), manifest, name, commit.rank_folder(rank))
        raise CheckpointNotFoundError(
            f"{self.path(chosen)} has no item {name!r}{'' if rank is None else f' of rank {rank}'}. "
            f"It holds {', '.join(manifest.shared_items) or 'nothing shared'}; for each of its "
            f"{manifest.world_size} ranks {', '.join(manifest.per_rank_items) or 'nothing'}."
        )

    def _choose(self, step: int | Literal["latest"]) -> int | None:
        if step == "latest":
            return self.latest()
        if step not in self.steps():
            there = ", ".join(str(found) for found in self.steps()[-8:]) or "none"
            raise CheckpointNotFoundError(f"there is no step {step} in {self.directory}. There is: {there}.")
        return step

    def _begin(self, step: int, state: Mapping[str, object]) -> Path | None:
        check_names(state)
        if type(step) is not int or step < 0:
            raise CheckpointError(f"a step is a whole number from 0 on, not {step!r}.")
        if self.path(step).exists():
            try:
                commit.verify(self.path(step))
                return None
            except CheckpointError as error:
                aside = commit.move_aside(self.directory, step)
                _logger.warning("step %d was broken (%s) and now lies in %s", step, error, aside)
        return commit.make_staging(self.directory, step)

    def _load_share(self, step: int, state: Mapping[str, object]) -> None:
        directory = self.path(step)
        manifest = commit.read_manifest(directory)
        rank, world_size = _rank_and_world_size()
        mine = [name for name, item in state.items() if isinstance(item, PerRank)]
        shared = [name for name in state if name not in mine]
        require_same("items", shared, manifest.shared_items, str(directory))
        require_same("items of each rank", mine, manifest.per_rank_items, str(directory))
        if mine and manifest.world_size != world_size:
            raise CheckpointMismatchError(
                f"{directory} was saved by {manifest.world_size} ranks and is loaded by {world_size}, and "
                f"{', '.join(mine)} belong to single ranks. Resume with {manifest.world_size} ranks."
            )
        saved: dict[str, Any] = {}
        for name, item in state.items():
            folder = commit.rank_folder(rank) if isinstance(item, PerRank) else ""
            saved[name] = commit.read_item(directory, manifest, name, folder)
            check_fits(_target(item), saved[name], f"item {name!r} of {directory}")
        # Everything was read and compared before anything is changed.
        for name, item in state.items():
            restore(_target(item), saved.pop(name), f"item {name!r} of {directory}")


def _write_share(staging: Path, state: Mapping[str, object]) -> dict[str, commit.FileRecord]:
    """Write what this rank has to store; a record per file, by path within the step's directory."""
    rank, _ = _rank_and_world_size()
    files: dict[str, commit.FileRecord] = {}
    own = {name: item.item for name, item in state.items() if isinstance(item, PerRank)}
    if own:
        folder = staging / commit.rank_folder(rank)
        folder.mkdir()
        for name, item in own.items():
            for file, record in commit.write_item(folder, name, capture(item)).items():
                files[f"{folder.name}/{file}"] = record
        fsync_directory(folder)
    if rank == 0:
        for name, item in state.items():
            if name not in own:
                files |= commit.write_item(staging, name, capture(item))
        fsync_directory(staging)
    return files


def _commit(staging: Path, manifest: commit.Manifest) -> None:
    try:
        commit.commit(staging, manifest)
    except BaseException:
        _discard(staging)
        raise


def _discard(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)


def _target(item: object) -> object:
    return item.item if isinstance(item, PerRank) else item


def _rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _on_main(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`on_main_process`, where what the disk refuses is a `CheckpointError` on every rank."""

    def attempt() -> T:
        try:
            return function(*args, **kwargs)
        except OSError as error:
            raise CheckpointError(f"the main process could not write a checkpoint: {error}") from error

    return collectives.on_main_process(attempt)


def _describe(error: Exception | None) -> RankFailure | None:
    return None if error is None else collectives.describe(error)


def _together(error: CheckpointError) -> CheckpointError:
    error.on_every_rank = True
    return error


def _tell(what: str, failures: list[RankFailure]) -> str:
    first = failures[0]
    # A failure without traceback is one of ours, whose message says enough.
    cause = f"{first.error_type}: {first.message}" if first.traceback else first.message
    is_everywhere = len(failures) == _rank_and_world_size()[1]
    if is_everywhere and all(failure.message == first.message for failure in failures):
        return f"{what}: {cause}"
    return f"{what}, because of rank {first.rank} ({first.host}): {cause}"
