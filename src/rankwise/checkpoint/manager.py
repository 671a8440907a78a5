"""`CheckpointManager`: a training state on disk, all of it or nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torch.distributed as dist

from rankwise import collectives, logs
from rankwise.checkpoint import commit
from rankwise.checkpoint.state import PerRank, capture, check_fits, check_names, require_same, restore
from rankwise.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    RankFailure,
)
from rankwise.files import fsync_directory

P = ParamSpec("P")
T = TypeVar("T")

_logger = logs.get_logger(__name__)

_KINDS: dict[str, type[CheckpointError]] = {
    kind.__name__: kind
    for kind in (CheckpointNotFoundError, CheckpointCorruptError, CheckpointMismatchError, CheckpointError)
}


@dataclass
class _Share:
    """What one rank tells the others of its part in a save. Only plain values: all of it must pickle."""

    step: str = ""
    items: dict[str, bool] = field(default_factory=dict)
    """By name, whether the item is `PerRank`."""
    files: dict[str, commit.FileRecord] = field(default_factory=dict)
    failure: RankFailure | None = None


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
        """Store `state` as `step`: on return it is whole and durable, or every rank raises.

        Other steps are never touched. A step that is there whole already stays as it is, with a warning; a broken one
        is moved aside.

        Args:
            state: by name, anything with `state_dict` and `load_state_dict`, tensors, plain values and nested
                dicts, lists and tuples of these. The main process stores an item for all ranks; every rank
                stores its own of what is wrapped in `PerRank`.
        Raises:
            CheckpointError: a rank could not write its part, or ranks save different things; names rank and cause.
                There is no such step then, but for one case: where the disk refused only to confirm the name of the
                finished step, it is there, and the message says so.
        Ranks: every rank must call, with the same step and names. `state_dict` of an item that is not `PerRank`
            is called on the main process alone.
        """
        what = f"step {step} was not saved"
        staging = _on_main(what, self._begin, step, state)
        share = _Share()
        error: Exception | None = None
        try:
            check_names(state)
            share.step = repr(step)
            share.items = {name: isinstance(item, PerRank) for name, item in state.items()}
            if staging is not None:
                share.files = _write_share(staging, state)
        except Exception as raised:
            error = raised
            share.failure = collectives.describe(raised)
        shares = collectives.gather_objects(share)
        failures = [share.failure for share in shares if share.failure is not None]
        reason = _tell(what, failures) if failures else _disagreement(what, shares)
        if reason:
            _on_main(what, _discard, staging)
            raise _together(CheckpointError(reason)) from error
        if staging is None:
            return
        manifest = commit.Manifest(
            step=step,
            world_size=len(shares),
            shared_items=tuple(name for name, per_rank in share.items.items() if not per_rank),
            per_rank_items=tuple(name for name, per_rank in share.items.items() if per_rank),
            files={name: record for share in shares for name, record in share.files.items()},
        )
        _on_main(what, _commit, staging, manifest)

    def load(self, state: Mapping[str, object], step: int | Literal["latest"] = "latest") -> int | None:
        """Bring the saved state back into the objects and tensors of `state`.

        Plain values in `state` are only compared by name: get them with `read`.

        Returns:
            The step that was loaded; None when "latest" was asked for and there is none.
        Raises:
            CheckpointNotFoundError: there is no such step.
            CheckpointCorruptError: a file is missing or damaged; `state` is untouched.
            CheckpointMismatchError: saved with other items, keys, shapes, types or number of ranks; `state` is
                untouched on all ranks, unless it was an object's own `load_state_dict` that refused: the message
                then tells that `state` is partly loaded.
        Ranks: every rank must call; if it fails on one, it fails on all.
        """
        chosen = _on_main("no step was loaded", self._choose, step)
        if chosen is None:
            return None
        # Every rank has read and compared all of its items before any rank changes anything.
        with _voting(f"step {chosen} was not loaded"):
            saved = self._read_share(chosen, state)
        with _voting(f"step {chosen} was loaded in part at most, so this state must not be used"):
            for name, item in state.items():
                restore(_target(item), saved.pop(name), self._where(name, chosen))
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
        """Where to write the step; None where it is there and whole."""
        check_names(state)
        if type(step) is not int or step < 0:
            raise CheckpointError(f"a step is a whole number from 0 on, not {step!r}.")
        if self.path(step).exists():
            try:
                commit.verify(self.path(step))
            except CheckpointError as error:
                aside = commit.move_aside(self.directory, step)
                _logger.warning("step %d was broken (%s) and now lies in %s", step, error, aside)
            else:
                fsync_directory(self.directory)  # the save that made it may have failed at just this
                _logger.warning("%s is there and whole, so step %d was not saved again", self.path(step), step)
                return None
        return commit.make_staging(self.directory, step)

    def _where(self, name: str, step: int) -> str:
        return f"item {name!r} of {self.path(step)}"

    def _read_share(self, step: int, state: Mapping[str, object]) -> dict[str, Any]:
        """What is saved for this rank, by name, after it was found to fit into `state`."""
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
            check_fits(_target(item), saved[name], self._where(name, step))
        return saved


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
    return files  # the names in `staging` become durable with the manifest's


def _commit(staging: Path, manifest: commit.Manifest) -> None:
    try:
        commit.commit(staging, manifest)
    except BaseException:
        _discard(staging)
        raise


def _discard(staging: Path | None) -> None:
    if staging is not None:
        shutil.rmtree(staging, ignore_errors=True)


def _disagreement(what: str, shares: list[_Share]) -> str:
    """A message that names the first rank that saves something else than rank 0; empty where all save the same."""
    first = shares[0]
    for rank, share in enumerate(shares):
        if share.step != first.step:
            return (
                f"{what}: rank {rank} saves step {share.step}, rank 0 step {first.step}. "
                "Save the same step on every rank."
            )
        if share.items != first.items:
            pairs = sorted(share.items.items() ^ first.items.items())
            names = ", ".join(dict.fromkeys(name for name, _ in pairs))
            return (
                f"{what}: rank {rank} and rank 0 save different items ({names}). "
                "Save the same names on every rank, each in `PerRank` on all of them or on none."
            )
    return ""


def _target(item: object) -> object:
    return item.item if isinstance(item, PerRank) else item


def _rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _on_main(what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`on_main_process`; what the disk refuses is a `CheckpointError` on every rank, which begins with `what`."""

    def attempt() -> T:
        try:
            return function(*args, **kwargs)
        except OSError as error:
            raise CheckpointError(f"{what}, because the disk refused on the main process: {error}") from error

    return collectives.on_main_process(attempt)


@contextlib.contextmanager
def _voting(what: str) -> Iterator[None]:
    """Where the block fails on any rank, an error that begins with `what` on every rank.

    Ranks: every rank must enter; each waits at the end for the others.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    # By name: a class that a library or a user made may not pickle, and the other ranks would wait for ever.
    rows = collectives.gather_objects(None if error is None else (_kind_name(error), collectives.describe(error)))
    failures = [row for row in rows if row is not None]
    if failures:
        kind = _KINDS[failures[0][0]]
        raise _together(kind(_tell(what, [failure for _, failure in failures]))) from error


def _kind_name(error: Exception) -> str:
    return next((kind.__name__ for kind in type(error).__mro__ if kind in _KINDS.values()), CheckpointError.__name__)


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
