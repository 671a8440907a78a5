"""What `torch.distributed.checkpoint` has written by itself, read without running anything that stands in it.

Its `.metadata` is a pickle, and loading a pickle runs what it names. Here it may name DCP's own records, types of
tensors, sizes and paths alone, and for each record it gets a class that only keeps what it is given. Tensors and
values are read by torch's own `weights_only` loader.

Source: torch 2.13, torch/distributed/checkpoint/metadata.py and filesystem.py.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rankwise.checkpoint.folder import open_regular
from rankwise.checkpoint.manifest import METADATA, say
from rankwise.checkpoint.tree import DTYPES
from rankwise.checkpoint.tree import Path as TreePath
from rankwise.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError

_DCP = "torch.distributed.checkpoint"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"  # until torch 2.2
_RECORDS = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_DCP}.metadata", name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata")),
    *((f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"), (f"{_DCP}.filesystem", "_StorageInfo")),
    *((_SHARDED, "TensorProperties"), (_SHARDED, "MEM_FORMAT_ENCODING")),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}

_ASKED = re.compile(r"GLOBAL (\S+) (?:was not|whose module)")
"""How torch's loader names what it does not load."""


class _Blob(NamedTuple):
    """Where something that `torch.save` wrote lies."""

    file: str
    start: int
    num_bytes: int


class _Part(NamedTuple):
    """A box of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    blob: _Blob


@dataclass(frozen=True)
class PlainCheckpoint:
    """A directory of DCP.

    Attributes:
        forms: type and shape of every tensor, by name.
        paths: by the name of a tensor or value, the keys and indices on the way to it.
    """

    path: Path
    forms: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    paths: Mapping[str, TreePath]
    _parts: Mapping[str, tuple[_Part, ...]]
    _values: Mapping[str, _Blob]

    def items(self) -> list[str]:
        """The names on the top level."""
        return list(dict.fromkeys(str(path[0]) for path in self.paths.values()))

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor whole, on the CPU.

        Raises:
            CheckpointCorruptError: it is not there in full.
        Ranks: local.
        """
        dtype, shape = self.forms[name]
        target = torch.empty(shape, dtype=dtype)
        for part in self._parts[name]:
            found = self._load(part.blob)
            if not isinstance(found, torch.Tensor) or (found.dtype, tuple(found.shape)) != (dtype, part.sizes):
                raise CheckpointCorruptError(f"{self.path / part.blob.file} holds something else than {name!r}.")
            box = target
            for axis, (offset, size) in enumerate(zip(part.offsets, part.sizes, strict=True)):
                box = box.narrow(axis, offset, size)
            box.copy_(found.detach())
        return target

    def tree(self, item: str | None = None) -> Any:
        """All of it as nested dicts and lists; keys of dicts are text, as DCP keeps them.

        Args:
            item: this one of the top level alone.
        Raises:
            CheckpointError: a value is of a class that is not loaded.
            CheckpointCorruptError: something of it is damaged.
        Ranks: local.
        """
        root: dict[str | int, Any] = {}
        for name, path in self.paths.items():
            if item is None or path[0] == item:
                node = root
                for key in path[:-1]:
                    node = node.setdefault(key, _Node())
                    if type(node) is not _Node:
                        raise CheckpointCorruptError(f"{self.path / METADATA} puts {name!r} into another value.")
                node[path[-1]] = self.tensor(name) if name in self.forms else self._load(self._values[name])
        found = {key: _listed(value) for key, value in root.items()}
        return found if item is None else found[item]

    def _load(self, blob: _Blob) -> Any:
        path = self.path / blob.file
        try:
            with open(open_regular(path), "rb") as file:
                file.seek(blob.start)
                content = io.BytesIO(file.read(blob.num_bytes))
            return torch.load(content, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            asked = _ASKED.search(str(error))
            if asked is None:
                raise CheckpointCorruptError(f"{path} cannot be read from {blob.start} on.") from error
            raise CheckpointError(_refusal(path, asked[1])) from error
        except Exception as error:  # the bytes decide what fails in there
            raise CheckpointCorruptError(f"{path} cannot be read from {blob.start} on: {say(error)}.") from error


def read_plain(directory: Path) -> PlainCheckpoint:
    """A directory that `torch.distributed.checkpoint.save` has written.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointError: it holds what is not loaded, or in a way that is not known.
        CheckpointCorruptError: it is damaged.
    Ranks: local.
    """
    path = directory / METADATA
    if not path.exists():
        raise CheckpointNotFoundError(
            f"{directory} has no {METADATA}, so torch.distributed.checkpoint did not write it."
        )
    try:
        with open(open_regular(path), "rb") as file:
            metadata = _Unpickler(file, path).load()
        return _interpret(directory, metadata)
    except CheckpointError:
        raise
    except Exception as error:  # the bytes decide what fails in there
        raise CheckpointCorruptError(f"{path} cannot be read: {say(error)}.") from error


def _refusal(path: Path, name: str) -> str:
    return (
        f"{path} asks for {name}, which tensors and plain values do not need: it may run code, so it is refused, and "
        "nothing of it was run. If you trust it, load it with DCP and save it anew without that."
    )


class _Record:
    """What a pickle says of an object, and no more."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        # TensorProperties gives a tuple, which is not needed; frozen records a dict.
        self.args = state if isinstance(state, tuple) else self.args
        self.fields = state if isinstance(state, dict) else {}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        super().__init__(file)
        self._path = path
        # New for every file: what a pickle may do to a class ends with it.
        self._kinds = {key: type(key[1], (_Record,), {"__new__": _make}) for key in _RECORDS}
        self._layout: Callable[[Any], Any] = lambda name: name

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("torch.serialization", "_get_layout"):
            return self._layout
        if (module, name) in self._kinds:
            return self._kinds[module, name]
        raise CheckpointError(_refusal(self._path, f"{module}.{name}"))


def _make(kind: type[_Record], *args: Any) -> _Record:
    # Objects are often made without a call of __init__.
    record = object.__new__(kind)
    _Record.__init__(record, *args)
    return record


class _Node(dict[str | int, Any]):
    """A dict or list that is being put together."""


def _interpret(directory: Path, metadata: Any) -> PlainCheckpoint:
    """What the records say, after it was found to be possible. A failure of any kind means that it is damaged."""
    blobs: dict[tuple[str, tuple[int, ...] | None], _Blob] = {}
    for index, info in _fields(metadata, "Metadata")["storage_data"].items():
        key = _fields(index, "MetadataIndex")
        offset = key.get("offset")
        place = None if offset is None else _counts(offset)
        blobs[_text(key["fqn"]), place] = _blob(directory, _fields(info, "_StorageInfo"))
    forms, parts, values = {}, {}, {}
    for name, kind in _fields(metadata, "Metadata")["state_dict_metadata"].items():
        if type(kind).__name__ == "TensorStorageMetadata":
            forms[_text(name)], parts[name] = _tensor(name, _fields(kind, "TensorStorageMetadata"), blobs)
        else:
            _fields(kind, "BytesStorageMetadata")
            values[_text(name)] = blobs[name, None]
    named = _fields(metadata, "Metadata").get("planner_data") or {}
    paths = {name: tuple(map(_key, named.get(name) or (name,))) for name in (*forms, *values)}
    return PlainCheckpoint(directory, forms, paths, parts, values)


def _tensor(
    name: str, fields: Mapping[str, Any], blobs: Mapping[tuple[str, tuple[int, ...] | None], _Blob]
) -> tuple[tuple[torch.dtype, tuple[int, ...]], tuple[_Part, ...]]:
    properties = _properties(fields["properties"])
    shape = _counts(fields["size"])
    parts = []
    for record in fields["chunks"]:
        chunk = _fields(record, "ChunkStorageMetadata")
        offsets, sizes = _counts(chunk["offsets"]), _counts(chunk["sizes"])
        if math.prod(sizes):
            parts.append(_Part(offsets, sizes, blobs[name, offsets]))
    num_values = sum(math.prod(part.sizes) for part in parts)
    # Nothing is believed that would lead to more memory than the files are long.
    if num_values != math.prod(shape) or any(
        math.prod(part.sizes) * properties.itemsize > part.blob.num_bytes for part in parts
    ):
        raise ValueError(f"the parts of the tensor {name!r} do not make up its shape {shape}")
    return (properties, shape), tuple(parts)


def _properties(record: Any) -> torch.dtype:
    found = record.args[0] if record.args else record.fields["dtype"]
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{found!r} stands where the type of a tensor is needed")
    return found


def _blob(directory: Path, fields: Mapping[str, Any]) -> _Blob:
    if fields.get("transform_descriptors"):
        raise CheckpointError(
            f"{directory} is compressed, or otherwise transformed. Load it with DCP and save it plain."
        )
    name = _text(fields["relative_path"])
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is no name of a file in this directory")
    start, num_bytes = _counts((fields["offset"], fields["length"]))
    if start + num_bytes > (directory / name).stat().st_size:
        raise ValueError(f"{name} is too short")
    return _Blob(name, start, num_bytes)


def _fields(record: Any, kind: str) -> dict[str, Any]:
    if not isinstance(record, _Record) or type(record).__name__ != kind:
        raise ValueError(f"a {type(record).__name__} stands where a {kind} is needed")
    return record.fields


def _counts(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(each) is int and each >= 0 for each in value):
        raise ValueError(f"{value!r} stands where counts are needed")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{value!r} stands where a name is needed")
    return value


def _key(value: Any) -> str | int:
    if type(value) is not str and type(value) is not int:
        raise ValueError(f"{value!r} stands where a key is needed")
    return value


def _listed(value: Any) -> Any:
    """Nodes as the dicts and lists that they were."""
    if type(value) is not _Node:
        return value
    filled = {key: _listed(item) for key, item in value.items()}
    # Keys of dicts are text to DCP: a number is an index.
    return [filled[index] for index in range(len(filled))] if set(filled) == {*range(len(filled))} else filled
