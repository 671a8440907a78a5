"""A step taken apart: the place of every tensor in the state and the name that it is stored under, and plain values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from rankwise.checkpoint import folder
from rankwise.checkpoint.manifest import VALUES, Manifest, TensorRecord, say
from rankwise.checkpoint.reader import read_records
from rankwise.checkpoint.tree import unflatten
from rankwise.ckpt.places import load_manifest
from rankwise.errors import CheckpointCorruptError, CheckpointNotFoundError

Place = tuple[str | int, ...]
"""Item, for an item of a single rank "rank-00003", then keys and indices."""


class TensorName(NamedTuple):
    """Stands where a tensor stands, with the name that it is stored under."""

    name: str


@dataclass(frozen=True)
class Step:
    """A step without its tensors.

    Attributes:
        items: by name, the item as it was saved, with a `TensorName` for each tensor; of items of single ranks, a list
            by rank.
        records: of tensors, by the name that they are stored under.
    """

    path: Path
    manifest: Manifest
    items: Mapping[str, Any]
    records: Mapping[str, TensorRecord]

    def tensors(self) -> dict[Place, str]:
        """By place, the name that a tensor is stored under; tied tensors have one name."""
        return {place: value.name for place, value in self._leaves() if isinstance(value, TensorName)}

    def values(self) -> dict[Place, object]:
        """Plain values by place; a list without tensors and mappings in it is one value."""
        return {place: value for place, value in self._leaves() if not isinstance(value, TensorName)}

    def _leaves(self) -> Iterator[tuple[Place, object]]:
        for name, item in self.items.items():
            if name in self.manifest.per_rank_items:
                for rank, own in enumerate(item):
                    yield from leaves(own, (name, Path(folder.rank_file(rank)).stem))
            else:
                yield from leaves(item, (name,))


def read_step(path: Path, item: str | None = None) -> Step:
    """A step, or one item of it.

    Raises:
        CheckpointNotFoundError: there is no such item.
        CheckpointCorruptError: a file that is read is missing or damaged.
    Ranks: local.
    """
    manifest = load_manifest(path)
    there = (*manifest.shared_items, *manifest.per_rank_items)
    if item is not None and item not in there:
        raise CheckpointNotFoundError(f"{path} has no item {item!r}. It holds {', '.join(there) or 'nothing'}.")
    records = read_records(path, manifest)
    stand_ins = cast(Mapping[str, torch.Tensor], {name: TensorName(name) for name in records})
    shared = _read_values(path, manifest, VALUES, stand_ins)
    own = []
    if manifest.per_rank_items:
        for rank in range(manifest.world_size):
            own.append(_read_values(path, manifest, folder.rank_file(rank), stand_ins))
    items = {}
    try:
        for name in there if item is None else (item,):
            items[name] = [each[name] for each in own] if name in manifest.per_rank_items else shared[name]
    except KeyError as error:
        raise CheckpointCorruptError(f"{path} lacks the item {error}, which its manifest names.") from error
    return Step(path, manifest, items, records)


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, object]]:
    """What is in nested mappings and lists, and where.

    Ranks: local.
    """
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, (*place, key))
    elif isinstance(value, list | tuple) and _is_split(value):
        for index, item in enumerate(value):
            yield from leaves(item, (*place, index))
    else:
        yield place, value


def show_place(place: Place) -> str:
    """A place as people write it: model.0.weight.

    Ranks: local.
    """
    return ".".join(map(str, place))


def _is_split(value: Any) -> bool:
    if isinstance(value, TensorName):
        return False
    return any(
        isinstance(item, TensorName | dict) or (isinstance(item, list | tuple) and _is_split(item)) for item in value
    )


def _read_values(path: Path, manifest: Manifest, name: str, stand_ins: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    content = folder.read_checked(path, manifest, name)
    try:
        values = json.loads(content)
        return {item: unflatten(values[item], stand_ins) for item in values}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointCorruptError(f"{path / name} cannot be read: {say(error)}.") from error
