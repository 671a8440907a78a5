"""Nested values as JSON and tensors, there and back without loss and without pickle.

Plain JSON stays as it is. What JSON lacks becomes an object with one key: {"$tuple": [...]}, {"$dict": [[k, v]]}
for keys that are no strings, {"$float": "inf"}, and {"$tensor": NAME} for a tensor that is stored under that name.

Names are those of `torch.distributed.checkpoint`: the keys on the way to a value, joined by dots. It knows values of
two kinds, tensors and leaves: what is neither a mapping nor a list that holds tensors or mappings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rankwise.errors import CheckpointCorruptError, CheckpointError

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    )
}
"""What a checkpoint holds, by the name that stands in it."""

Path = tuple[str | int, ...]


@dataclass
class Tree:
    """A nested value taken apart.

    Attributes:
        encoded: JSON.
        tensors: by name; on the device where they are, with the memory that they share. Tied ones stand once.
        aliases: further names of tied tensors, with the name under which they stand in `tensors`.
        leaves: plain values by name, as `torch.distributed.checkpoint` would name them.
        paths: the way to every tensor and leaf.
    """

    encoded: Any
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    leaves: dict[str, object] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)


def flatten(value: object, *path: str) -> Tree:
    """Take a nested value apart.

    Args:
        path: where it stands: the item's name first.
    Raises:
        CheckpointError: the tree holds something that cannot be stored; says what and where.
    Ranks: local.
    """
    flattener = _Flattener()
    flattener.tree.encoded = flattener.encode(value, path, is_leaf=False)
    return flattener.tree


def unflatten(encoded: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value that `flatten` was given; a tensor that was there twice is there twice again.

    Raises:
        CheckpointCorruptError: the JSON names a tensor that is not among `tensors`.
    Ranks: local.
    """
    if isinstance(encoded, list):
        return [unflatten(item, tensors) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    match next(iter(encoded.items()), None):
        case ("$tuple", items):
            return tuple(unflatten(item, tensors) for item in items)
        case ("$dict", pairs):
            return {unflatten(key, tensors): unflatten(item, tensors) for key, item in pairs}
        case ("$float", text):
            return float(text)
        case ("$tensor", key):
            if key not in tensors:
                raise CheckpointCorruptError(f"the tensor {key!r} is missing")
            return tensors[key]
    return {key: unflatten(item, tensors) for key, item in encoded.items()}


def find_tensors(encoded: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """The way to every tensor of an encoded value, with the keys that it had, and its name.

    Ranks: local.
    """
    if isinstance(encoded, list):
        for index, item in enumerate(encoded):
            yield from find_tensors(item, (*path, index))
    elif isinstance(encoded, dict):
        match next(iter(encoded.items()), None):
            case ("$tensor", name):
                yield path, name
            case ("$tuple", items):
                yield from find_tensors(items, path)
            case ("$dict", pairs):
                for key, item in pairs:
                    yield from find_tensors(item, (*path, unflatten(key, {})))
            case _:
                for key, item in encoded.items():
                    yield from find_tensors(item, (*path, key))


class _Flattener:
    def __init__(self) -> None:
        self.tree = Tree(None)
        self._seen: dict[tuple[object, ...], str] = {}

    def encode(self, value: object, path: Path, is_leaf: bool) -> Any:
        """JSON of `value`; `is_leaf` where it is part of a leaf, which has a name as a whole."""
        # Exact types: a subclass (numpy.float64 is a float, torch.Size a tuple) would come back as another type.
        kind = type(value)
        if isinstance(value, torch.Tensor):
            return {"$tensor": self._add(value, path)}
        if isinstance(value, Mapping):
            return self._encode_mapping(value, path, is_leaf)
        if not is_leaf and (kind not in (list, tuple) or not _is_split(value)):
            is_leaf = True
            self.tree.leaves[self._name(path)] = value
        if value is None or kind in (bool, int, str):
            return value
        if isinstance(value, float) and kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, list | tuple) and kind in (list, tuple):
            items = [self.encode(item, (*path, index), is_leaf) for index, item in enumerate(value)]
            return items if kind is list else {"$tuple": items}
        raise CheckpointError(
            f"{_where(path)} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint does not hold. "
            "Store tensors, numbers, strings, lists, tuples and dicts of them (`.item()` makes a plain number)."
        )

    def _encode_mapping(self, value: Mapping[Any, object], path: Path, is_leaf: bool) -> Any:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(item, (*path, key), is_leaf) for key, item in value.items()}
        pairs = []
        for key, item in value.items():
            place = (*path, str(key))
            if isinstance(key, torch.Tensor):
                raise CheckpointError(f"{_where(place)} has a tensor for a key, which cannot be restored.")
            pairs.append([self.encode(key, place, is_leaf=True), self.encode(item, place, is_leaf)])
        return {"$dict": pairs}

    def _add(self, tensor: torch.Tensor, path: Path) -> str:
        is_sharded = isinstance(tensor, DTensor)
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.layout is not torch.strided or local.is_meta or local.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{_where(path)} is a {tensor.dtype} tensor of layout {tensor.layout} on {tensor.device}, "
                "which a checkpoint does not hold. Store a dense tensor of a common type."
            )
        if not is_sharded and type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise CheckpointError(
                f"{_where(path)} is a {type(tensor).__qualname__}; only plain tensors and DTensors can be stored."
            )
        # By the storage, because empty shards have no address: they are tied where the shards of other ranks are.
        place = (local.untyped_storage()._cdata, local.storage_offset(), local.is_conj(), local.is_neg())
        same = (*place, is_sharded, tensor.dtype, tensor.shape, local.stride(), tensor.device)
        name = self._name(path)
        if (local.numel() > 0 or is_sharded) and same in self._seen:
            self.tree.aliases[name] = self._seen[same]
            return self._seen[same]
        self.tree.tensors[name] = tensor.detach()
        self._seen[same] = name
        return name

    def _name(self, path: Path) -> str:
        name = ".".join(map(str, path))
        while name in self.tree.paths:
            name += "_"
        self.tree.paths[name] = path
        return name


def _is_split(value: Any) -> bool:
    """Whether the parts of a list or tuple have names of their own."""
    return any(
        isinstance(item, torch.Tensor | Mapping) or (type(item) in (list, tuple) and _is_split(item)) for item in value
    )


def _where(path: Path) -> str:
    return "state" + "".join(f"[{key!r}]" for key in path)
