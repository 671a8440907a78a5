"""A rank's shard as `torch.distributed.checkpoint` lays it out: what `torch.save` writes, one tensor after the other.

So plain DCP reads it. We remember where the bytes of each tensor lie in it, and read those alone.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, cast

import numpy as np
import torch
import xxhash
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from rankwise.checkpoint.folder import file_record
from rankwise.checkpoint.manifest import Chunk, FileRecord, TensorRecord, as_bytes, checksum
from rankwise.checkpoint.plan import Piece
from rankwise.checkpoint.tree import Path as TreePath
from rankwise.errors import CheckpointError

Blob = tuple[str, int, int]
"""File, offset and length of what `torch.save` wrote."""


@dataclass
class Shard:
    """What one rank has written.

    Attributes:
        chunks: with the name of the whole tensor.
        tensor_blobs: of each chunk, by name and offsets.
        leaf_blobs: of plain values, by name.
        paths: the way to each tensor and leaf.
    """

    file: FileRecord
    chunks: list[tuple[str, Chunk]] = field(default_factory=list)
    tensor_blobs: dict[tuple[str, tuple[int, ...]], Blob] = field(default_factory=dict)
    leaf_blobs: dict[str, Blob] = field(default_factory=dict)
    paths: dict[str, TreePath] = field(default_factory=dict)


def write_shard(path: Path, pieces: Sequence[Piece], leaves: Mapping[str, object]) -> Shard:
    """Write the pieces and leaves into one file, sync it, and read it back from the disk.

    Args:
        pieces: contiguous on the CPU, each with a storage of its own.
    Raises:
        CheckpointError: what came back from the disk is not what was written.
        OSError: the disk refused.
    Ranks: local; one process per path.
    """
    shard = Shard(FileRecord(0, ""))
    with open(path, "xb", buffering=0) as file:
        stream = _Stream(file)
        try:
            _write(shard, stream, path.name, pieces, leaves)
        except Exception:
            if stream.failure is not None:
                # torch.save closes its archive after a failure, which fails too, and would hide why.
                raise stream.failure from None
            raise
        os.fsync(file.fileno())
        with contextlib.suppress(OSError, AttributeError):
            # Out of the page cache, so that reading back asks the disk; a file system that cannot is not asked.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    shard.file = FileRecord(stream.position, stream.digest.hexdigest())
    if file_record(path) != shard.file:
        raise CheckpointError(f"{path} does not come back from the disk as it was written. Look after the disk.")
    return shard


def _write(
    shard: Shard, stream: _Stream, file_name: str, pieces: Sequence[Piece], leaves: Mapping[str, object]
) -> None:
    for name, value in leaves.items():
        start = stream.position
        torch.save(value, cast(IO[bytes], stream))
        shard.leaf_blobs[name] = (file_name, start, stream.position - start)
    for piece in pieces:
        start = stream.position
        data_start = stream.save(piece.data)
        content = as_bytes(piece.data)
        sizes = tuple(piece.data.shape)
        chunk = Chunk(piece.offsets, sizes, file_name, data_start, piece.num_bytes, checksum(content))
        shard.chunks.append((piece.name, chunk))
        shard.tensor_blobs[piece.name, piece.offsets] = (file_name, start, stream.position - start)


def encode_metadata(
    shards: Sequence[Shard], tensors: Mapping[str, TensorRecord], aliases: Mapping[str, str], nonce: str
) -> bytes:
    """The content of `.metadata`, by which `torch.distributed.checkpoint` finds its way; a pickle, as it asks for.

    Args:
        aliases: further names of tensors.

    Ranks: local.
    """
    state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, record in tensors.items():
        boxes = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in record.chunks]
        state[name] = TensorStorageMetadata(TensorProperties(dtype=record.dtype), torch.Size(record.shape), boxes)
    for shard in shards:
        for (name, offsets), blob in shard.tensor_blobs.items():
            storage[MetadataIndex(name, offsets)] = _StorageInfo(*blob)
        for name, blob in shard.leaf_blobs.items():
            state[name] = BytesStorageMetadata()
            storage[MetadataIndex(name)] = _StorageInfo(*blob)
    for alias, name in aliases.items():
        state[alias] = state[name]
        for chunk in tensors[name].chunks:
            storage[MetadataIndex(alias, chunk.offsets)] = storage[MetadataIndex(name, chunk.offsets)]
    paths = {name: path for shard in shards for name, path in shard.paths.items() if name in state}
    metadata = Metadata(
        state_dict_metadata=state,
        planner_data=paths,
        storage_data=storage,
        storage_meta=StorageMeta(save_id=nonce),
        version=CURRENT_DCP_VERSION,
    )
    return pickle.dumps(metadata)


class _Stream(io.RawIOBase):
    """A file that counts, sums up what passes, and notices where the bytes of a tensor come by."""

    def __init__(self, file: BinaryIO) -> None:
        self.position = 0
        self.digest = xxhash.xxh3_128()
        self.failure: OSError | None = None
        self._file = file
        self._address: int | None = None
        self._found: int | None = None

    def save(self, tensor: torch.Tensor) -> int:
        """Write a tensor as `torch.save` does.

        Returns:
            Where its bytes begin in the file.
        """
        self._address, self._found = tensor.data_ptr(), None
        torch.save(tensor, cast(IO[bytes], self))
        self._address = None
        if self._found is None:
            raise CheckpointError(f"torch {torch.__version__} writes tensors in a way unknown to this rankwise.")
        return self._found

    def writable(self) -> bool:
        return True

    def write(self, content: memoryview | bytes) -> int:  # type: ignore[override]
        view = memoryview(content).cast("B")
        if self._address is not None and len(view) and np.frombuffer(view, np.uint8).ctypes.data == self._address:
            self._found = self.position
        self.digest.update(view)
        written = 0
        try:
            while written < len(view):
                written += self._file.write(view[written:])
        except OSError as error:
            self.failure = error
            raise
        self.position += len(view)
        return len(view)
