"""What stands in a step's directory, as its `manifest.json` and `tensors.json` say.

Torch is imported where tensors are touched, and not before: `rankwise ckpt ls` is to be quick.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from rankwise.errors import CheckpointCorruptError

if TYPE_CHECKING:
    import torch

FORMAT = 2
MANIFEST = "manifest.json"
TENSORS = "tensors.json"
VALUES = "values.json"
METADATA = ".metadata"


class FileRecord(NamedTuple):
    """Size and XXH3 checksum (128 bits, hexadecimal) of one file, by which a change of it is found."""

    num_bytes: int
    xxh3: str


class Chunk(NamedTuple):
    """A box of a tensor, and where its bytes lie: contiguous, little-endian, in the file `file` from `start` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    num_bytes: int
    xxh3: str


@dataclass(frozen=True)
class TensorRecord:
    """A whole tensor and the boxes that make it up."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """What a step's directory holds.

    Attributes:
        epoch: of the lease under which it was committed; of two jobs, the later one has the higher.
        files: by path within the step's directory; all but the manifest itself.
        config_digest: of what the manager was given as `config`; empty without.
        saved: when the commit was made, UTC.
    """

    step: int
    epoch: int
    nonce: str
    world_size: int
    shared_items: tuple[str, ...]
    per_rank_items: tuple[str, ...]
    files: Mapping[str, FileRecord]
    config_digest: str = ""
    saved: str = ""
    versions: Mapping[str, str] | None = None


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU.

    Ranks: local.
    """
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def checksum(content: bytes | memoryview) -> str:
    """XXH3 of 128 bits, hexadecimal.

    Ranks: local.
    """
    return xxhash.xxh3_128_hexdigest(content)


def encode_manifest(manifest: Manifest) -> bytes:
    """The content of `manifest.json`, with a checksum of itself.

    Ranks: local.
    """
    import torch

    from rankwise import __version__

    body = asdict(manifest)
    body["files"] = {name: {"bytes": record.num_bytes, "xxh3": record.xxh3} for name, record in manifest.files.items()}
    body["saved"] = datetime.now(UTC).isoformat(timespec="seconds")
    body["versions"] = {"rankwise": __version__, "torch": str(torch.__version__)}
    body = {"format": FORMAT, **body}
    return (json.dumps({**body, "xxh3": _body_checksum(body)}, indent=1) + "\n").encode()


def read_manifest(step_directory: Path) -> Manifest:
    """What the directory of a step must hold.

    Raises:
        CheckpointCorruptError: the manifest is missing, damaged, or of another format.
    Ranks: local.
    """
    path = step_directory / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        if body["format"] != FORMAT:
            raise CheckpointCorruptError(
                f"{path} has format {body['format']}, this rankwise reads {FORMAT}. Read it with the rankwise that "
                "wrote it."
            )
        if body.pop("xxh3") != _body_checksum(body):
            raise CheckpointCorruptError(f"{path} is damaged: it was changed after it was written.")
        del body["format"]
        files = {name: _file_record(name, record) for name, record in body.pop("files").items()}
        shared, own = tuple(map(_text, body.pop("shared_items"))), tuple(map(_text, body.pop("per_rank_items")))
        for name in ("step", "epoch", "world_size"):
            _count(body[name])
        name = f"step-{body['step']:08d}"
        if step_directory.name.startswith("step-") and step_directory.name != name:
            raise CheckpointCorruptError(f"{path} is that of another step. Name its folder {name}, or move it away.")
        return Manifest(files=files, shared_items=shared, per_rank_items=own, **body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path} cannot be read: {say(error)}.") from error


def encode_tensors(records: Mapping[str, TensorRecord]) -> bytes:
    """The content of `tensors.json`.

    Ranks: local.
    """
    body = {
        name: {
            "dtype": str(record.dtype).removeprefix("torch."),
            "shape": record.shape,
            "chunks": [chunk._asdict() for chunk in record.chunks],
        }
        for name, record in records.items()
    }
    return json.dumps(body).encode()


def decode_tensors(content: bytes, files: Mapping[str, FileRecord]) -> dict[str, TensorRecord]:
    """What `encode_tensors` was given.

    A checksum does not tell who wrote a file. So nothing is believed that could lead out of the folder, or to more
    memory than the files are long.

    Args:
        files: those that may be named.
    Raises:
        KeyError, TypeError, ValueError, AttributeError, RecursionError: it is something else.
    Ranks: local.
    """
    from rankwise.checkpoint.tree import DTYPES

    records = {}
    places: list[tuple[str, int, int]] = []
    for name, body in json.loads(content).items():
        dtype, shape = DTYPES[body["dtype"]], tuple(map(_count, body["shape"]))
        chunks = tuple(_chunk(chunk, dtype, shape, files) for chunk in body["chunks"])
        if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
            raise ValueError(f"the parts of the tensor {name!r} do not make up its shape {shape}")
        places += [(chunk.file, chunk.start, chunk.start + chunk.num_bytes) for chunk in chunks]
        records[name] = TensorRecord(dtype, shape, chunks)
    places.sort()
    for (file, _, end), (next_file, start, _) in itertools.pairwise(places):
        if file == next_file and start < end:
            raise ValueError(f"two tensors lie in the same bytes of {file}")
    return records


def _chunk(body: Any, dtype: torch.dtype, shape: tuple[int, ...], files: Mapping[str, FileRecord]) -> Chunk:
    chunk = Chunk(
        tuple(map(_count, body["offsets"])),
        tuple(map(_count, body["sizes"])),
        _text(body["file"]),
        _count(body["start"]),
        _count(body["num_bytes"]),
        _text(body["xxh3"]),
    )
    places = zip(chunk.offsets, chunk.sizes, shape, strict=True)
    if not all(offset + size <= length for offset, size, length in places):
        raise ValueError(f"a part of {chunk.sizes} at {chunk.offsets} lies outside of the shape {shape}")
    if chunk.num_bytes != math.prod(chunk.sizes) * dtype.itemsize or not chunk.num_bytes:
        raise ValueError(f"a part of {chunk.sizes} and {dtype} cannot have {chunk.num_bytes} bytes")
    if chunk.file not in files or chunk.start + chunk.num_bytes > files[chunk.file].num_bytes:
        raise ValueError(f"{chunk.file!r} has no bytes {chunk.start} to {chunk.start + chunk.num_bytes}")
    return chunk


def _file_record(name: str, body: Any) -> FileRecord:
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is no name of a file in this directory")
    return FileRecord(_count(body["bytes"]), _text(body["xxh3"]))


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} stands where a count is needed")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{value!r} stands where a text is needed")
    return value


def say(error: Exception) -> str:
    """What went wrong, to stand at the end of a sentence.

    Ranks: local.
    """
    match error:
        case OSError(strerror=str(reason)):
            return reason
        case KeyError():
            return f"it lacks {error}"
        case CheckpointCorruptError():
            return str(error)
    return f"{type(error).__name__}: {error}"


def _body_checksum(body: Mapping[str, Any]) -> str:
    return checksum(json.dumps(body, sort_keys=True).encode())
