"""Tensors back from a step: by their place in the files, whole or only the part that this rank needs; no pickle."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from rankwise.checkpoint.folder import open_regular, read_checked
from rankwise.checkpoint.manifest import TENSORS, Chunk, Manifest, TensorRecord, as_bytes, checksum, decode_tensors, say
from rankwise.errors import CheckpointCorruptError


def read_records(step_directory: Path, manifest: Manifest) -> dict[str, TensorRecord]:
    """What tensors a step holds, by name.

    Raises:
        CheckpointCorruptError: the file that says so is damaged.
    Ranks: local.
    """
    content = read_checked(step_directory, manifest, TENSORS)
    try:
        return decode_tensors(content, manifest.files)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointCorruptError(f"{step_directory / TENSORS} cannot be read: {say(error)}.") from error


def read_tensors(
    step_directory: Path,
    records: Mapping[str, TensorRecord],
    names: Iterable[str],
    templates: Mapping[str, DTensor] | None = None,
    bring: Callable[[str], None] = lambda name: None,
) -> dict[str, torch.Tensor]:
    """Tensors by name, on the CPU; those with a template of their shape are distributed as it is, on its device, and
    only this rank's part of them is read.

    Every byte that is used is compared with its checksum.

    Args:
        bring: called with the name of a file before that is opened.
    Raises:
        CheckpointCorruptError: a file is missing or damaged, or a tensor is not there in full.
    Ranks: local; with templates, a rank per place of their mesh.
    """
    with _Files(step_directory, bring) as files:
        found: dict[str, torch.Tensor] = {}
        for name in names:
            if name not in records:
                raise CheckpointCorruptError(f"{step_directory / TENSORS} lacks the tensor {name!r}.")
            template = (templates or {}).get(name)
            if template is None or tuple(template.shape) != records[name].shape:
                shape = records[name].shape
                found[name] = _read_box(files, name, records[name], (0,) * len(shape), shape)
            else:
                found[name] = _read_distributed(files, name, records[name], template)
        return found


def _read_distributed(files: _Files, name: str, record: TensorRecord, template: DTensor) -> torch.Tensor:
    local = template.to_local()
    boxes = template.__create_chunk_list__()  # type: ignore[no-untyped-call]
    if boxes and local.numel():
        (box,) = boxes
        part = _read_box(files, name, record, tuple(box.offsets), tuple(box.sizes))
    else:
        part = torch.empty(local.shape, dtype=record.dtype)
    return DTensor.from_local(
        part.to(local.device),
        template.device_mesh,
        template.placements,
        run_check=False,
        shape=template.shape,
        stride=template.stride(),
    )


def _read_box(
    files: _Files, name: str, record: TensorRecord, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> torch.Tensor:
    """A box of a tensor, put together from the chunks that overlap it."""
    target = torch.empty(sizes, dtype=record.dtype)
    if not target.numel():
        return target
    for chunk in record.chunks:
        if (chunk.offsets, chunk.sizes) == (offsets, sizes):
            files.read(chunk, target)
            return target
    saved = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in record.chunks]
    wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    whole = TensorStorageMetadata(TensorProperties(dtype=record.dtype), torch.Size(record.shape), saved)
    num_filled = 0
    for item in create_read_items_for_chunk_list(name, whole, [wanted]):
        assert item.storage_index.index is not None, "DCP gives the index of the chunk"
        chunk = record.chunks[item.storage_index.index]
        content = files.read(chunk, torch.empty(chunk.sizes, dtype=record.dtype))
        part = _narrow(content, item.storage_offsets, item.lengths)
        _narrow(target, item.dest_offsets, item.lengths).copy_(part)
        num_filled += part.numel()
    if num_filled != target.numel():
        raise CheckpointCorruptError(
            f"{files.step_directory / TENSORS} has {num_filled} of the {target.numel()} values of {name!r}."
        )
    return target


def _narrow(tensor: torch.Tensor, offsets: Iterable[int], lengths: Iterable[int]) -> torch.Tensor:
    for axis, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(axis, offset, length)
    return tensor


class _Files:
    """The files of a step, each opened once."""

    def __init__(self, step_directory: Path, bring: Callable[[str], None]) -> None:
        self.step_directory = step_directory
        self._bring = bring
        self._open = contextlib.ExitStack()
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, chunk: Chunk, target: torch.Tensor) -> torch.Tensor:
        """Fill `target`, which is contiguous, with the bytes of a chunk."""
        path = self.step_directory / chunk.file
        content = as_bytes(target)
        try:
            if chunk.file not in self._descriptors:
                self._bring(chunk.file)
                descriptor = open_regular(path)
                self._open.callback(os.close, descriptor)
                self._descriptors[chunk.file] = descriptor
            num_read = 0
            while count := os.preadv(self._descriptors[chunk.file], [content[num_read:]], chunk.start + num_read):
                num_read += count
        except OSError as error:
            raise CheckpointCorruptError(f"{path} cannot be read: {say(error)}.") from error
        if num_read != len(content) or checksum(content) != chunk.xxh3:
            raise CheckpointCorruptError(
                f"{path} is damaged: {len(content)} bytes from {chunk.start} on are not what was written. "
                "Load another step (step=NUMBER), or move this one away."
            )
        return target
