"""One load: which step, whether it is whole, what of it this rank needs, and back into the objects of the state."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch.distributed.tensor import DTensor

from rankwise import collectives
from rankwise.checkpoint import folder
from rankwise.checkpoint.local import Committed, OpenStep
from rankwise.checkpoint.manifest import TENSORS, VALUES, say
from rankwise.checkpoint.places import Folder
from rankwise.checkpoint.reader import read_records, read_tensors
from rankwise.checkpoint.state import PerRank, check_fits, require_same, restore, sharded_targets
from rankwise.checkpoint.together import KINDS, kind_name, rank_and_world_size, tell, together
from rankwise.checkpoint.tree import find_tensors, unflatten
from rankwise.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
)


def verify_together(place: Folder, found: Committed) -> None:
    """Compare every file of a step with its checksum, spread over the ranks.

    Raises:
        CheckpointCorruptError: a file is missing or damaged; on every rank.
        CheckpointError: a rank does not see the step that the main process has found.
    Ranks: every rank must call.
    """
    with voting(f"step {found.step} was not loaded"):
        if not place.wait_until_visible(found.step):
            raise CheckpointError(
                f"{place.describe(found)} is not seen here after {folder.VISIBLE_SECONDS:g} s, though the main process "
                "sees it. Checkpoints need one folder that all hosts share."
            )
        place.verify(found, *rank_and_world_size(), is_cache_enough=True)


def load_together(place: Folder, found: Committed, state: Mapping[str, object]) -> None:
    """Bring a step that was verified back into `state`.

    Raises:
        CheckpointError: as `CheckpointManager.load`.
    Ranks: every rank must call.
    """
    # Every rank has read and compared all of its items before any rank changes anything.
    with voting(f"step {found.step} was not loaded"):
        step = place.open(found)
        saved = _read_state(step, state)
    with voting(f"step {found.step} was loaded in part at most, so this state must not be used"):
        for name, item in state.items():
            restore(_target(item), saved.pop(name), _where(name, step))


def read_item(step: OpenStep, name: str, rank: int | None) -> Any:
    """One item of a step as plain tree of tensors (on the CPU) and values; the bytes used are checked.

    Raises:
        CheckpointNotFoundError: there is no such item.
        CheckpointCorruptError: a file of it is missing or damaged.
    Ranks: local.
    """
    manifest = step.manifest
    if name in manifest.shared_items and rank is None:
        return _read_tree(step, name, VALUES)
    if name in manifest.per_rank_items and rank is not None and 0 <= rank < manifest.world_size:
        return _read_tree(step, name, folder.rank_file(rank))
    advice = "Say whose it is by rank=. " if rank is None and name in manifest.per_rank_items else ""
    raise CheckpointNotFoundError(
        f"{step.where} has no item {name!r}{'' if rank is None else f' of rank {rank}'}. {advice}"
        f"It holds {', '.join(manifest.shared_items) or 'nothing shared'}; for each of its "
        f"{manifest.world_size} ranks {', '.join(manifest.per_rank_items) or 'nothing'}."
    )


def _read_state(step: OpenStep, state: Mapping[str, object]) -> dict[str, Any]:
    """What is saved for this rank, by name, after it was found to fit into `state`."""
    manifest = step.manifest
    mine = [name for name, item in state.items() if isinstance(item, PerRank)]
    require_same("items", [name for name in state if name not in mine], manifest.shared_items, step.where)
    require_same("items of each rank", mine, manifest.per_rank_items, step.where)
    saved: dict[str, Any] = {}
    for name, item in state.items():
        if isinstance(item, PerRank):
            saved[name] = _read_own(step, name, item)
        else:
            saved[name] = _read_tree(step, name, VALUES, item)
        check_fits(_target(item), saved[name], _where(name, step))
    return saved


def _read_own(step: OpenStep, name: str, item: PerRank) -> Any:
    rank, world_size = rank_and_world_size()
    manifest = step.manifest
    if manifest.world_size == world_size:
        return _read_tree(step, name, folder.rank_file(rank))
    if item.redistribute is None:
        raise CheckpointMismatchError(
            f"{step.where} was saved by {manifest.world_size} ranks and is loaded by {world_size}, and {name} belongs "
            f"to single ranks. Resume with {manifest.world_size} ranks, or say in PerRank(..., redistribute=...) how "
            "to share it out anew."
        )
    all_saved = [_read_tree(step, name, folder.rank_file(old)) for old in range(manifest.world_size)]
    return item.redistribute(all_saved, rank, world_size)


def _read_tree(step: OpenStep, name: str, file: str, target: object = None) -> Any:
    step.bring(file)
    content = folder.read_checked(step.path, step.manifest, file)
    step.bring(TENSORS)
    try:
        encoded = json.loads(content)[name]
        places = dict(find_tensors(encoded))
        templates = _templates(places, sharded_targets(target))
        tensors = read_tensors(
            step.path, read_records(step.path, step.manifest), dict.fromkeys(places.values()), templates, step.bring
        )
        return unflatten(encoded, tensors)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointCorruptError(f"{step.where}/{file} cannot be read: {say(error)}.") from error


def _templates(places: Mapping[tuple[Any, ...], str], targets: Mapping[tuple[Any, ...], DTensor]) -> dict[str, DTensor]:
    """By a tensor's name, the DTensor whose distribution it gets: that at its place, or the parameter it belongs to."""
    found = {}
    for place, name in places.items():
        target = targets.get(place)
        if target is None and place and "state" in place:
            target = targets.get(place[:-1])
        if target is not None:
            found[name] = target
    return found


def _target(item: object) -> object:
    return item.item if isinstance(item, PerRank) else item


def _where(name: str, step: OpenStep) -> str:
    return f"item {name!r} of {step.where}"


@contextlib.contextmanager
def voting(what: str) -> Iterator[None]:
    """Where the block fails on any rank, an error that begins with `what` on every rank.

    Ranks: every rank must enter; each waits at the end for the others.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    rows = collectives.gather_objects(None if error is None else (kind_name(error), collectives.describe(error)))
    failures = [row for row in rows if row is not None]
    if failures:
        kind = KINDS[failures[0][0]]
        raise together(kind(tell(what, [failure for _, failure in failures], len(rows)))) from error
