"""`rankwise ckpt convert`: a step, or one item of it, as safetensors, as a file of torch.save, or as plain DCP."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import math
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from rankwise.checkpoint.manifest import as_bytes
from rankwise.checkpoint.plain_dcp import PlainCheckpoint, read_plain
from rankwise.checkpoint.reader import read_tensors
from rankwise.ckpt.output import say, show_bytes, tell
from rankwise.ckpt.places import find_place
from rankwise.ckpt.values import Step, TensorName, read_step, show_place
from rankwise.errors import CheckpointError, CheckpointNotFoundError
from rankwise.files import fsync_directory

_SAFETENSORS_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class Source:
    """What is converted.

    Attributes:
        path: where it lies.
        forms: type and shape of every tensor, by the name that it gets.
        read: one tensor by that name.
        tree: all of it, tensors and plain values.
        num_values: how many plain values there are.
    """

    path: Path
    forms: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    read: Callable[[str], torch.Tensor]
    tree: Callable[[], Any]
    num_values: int


def run(options: argparse.Namespace) -> int:
    """Write the converted file or directory; the exit status is 0.

    Raises:
        CheckpointCorruptError: what is read is damaged.
        CheckpointError, ValueError: it cannot be converted; nothing is left at the destination.
        OSError: the source cannot be read or the destination not be written.
    Ranks: local, in no job.
    """
    destination = Path(options.destination)
    if os.path.lexists(destination):
        raise ValueError(f"{str(destination)!r} is there already, and nothing is overwritten. Name another.")
    if not destination.parent.is_dir():
        raise ValueError(f"there is no folder {str(destination.parent)!r}. Make it first.")
    source = _plain(options.run, options.item) if options.source == "dcp" else _own(options)
    match options.to:
        case "safetensors":
            write_safetensors(source, destination)
        case "torch":
            with _new_file(destination) as file:
                torch.save(source.tree(), file)
        case "dcp":
            _write_dcp(source, destination, options.item or "state")
    say(f"{source.path} -> {destination}: {len(source.forms)} tensors, {show_bytes(_size(destination))}")
    if options.to == "safetensors" and source.num_values:
        tell(f"left out: {source.num_values} plain values, which safetensors does not hold (--to torch does)")
    return 0


def write_safetensors(source: Source, destination: Path) -> None:
    """Write the tensors one after the other, so that memory for the largest is enough. Tied ones are there twice.

    Raises:
        CheckpointError: there is no tensor, or one of a type that safetensors lacks.
    Ranks: local.
    Source: the format, https://github.com/huggingface/safetensors: the length of the header, the header as JSON, and
        the tensors, little-endian and without gaps.
    """
    if not source.forms:
        raise CheckpointError(f"{source.path} has no tensors to convert. --to torch holds plain values too.")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # The widest types first: every tensor is aligned then, as readers that map the file wish.
    names = sorted(source.forms, key=lambda name: (-source.forms[name][0].itemsize, name))
    position = 0
    for name in names:
        dtype, shape = source.forms[name]
        if dtype not in _SAFETENSORS_NAMES or name == "__metadata__":
            raise CheckpointError(f"safetensors does not hold {name!r}, of {dtype}. --to torch does.")
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with _new_file(destination) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = source.read(name)
            if tensor.numel():
                file.write(as_bytes(tensor.contiguous()))


def _own(options: argparse.Namespace) -> Source:
    place = find_place(options.run)
    step = read_step(place.newest() if options.step is None else place.step(options.step), options.item)
    tensors = step.tensors()
    # Of one item the names are those of its own state_dict.
    num_skipped = 0 if options.item is None or options.item in step.manifest.per_rank_items else 1
    names = _unique((show_place(found[num_skipped:] or found), name) for found, name in tensors.items())
    forms = {name: (step.records[stored].dtype, step.records[stored].shape) for name, stored in names.items()}

    def read(name: str) -> torch.Tensor:
        return read_tensors(step.path, step.records, [names[name]])[names[name]]

    def tree() -> Any:
        return _with_tensors(step, step.items if options.item is None else step.items[options.item])

    return Source(step.path, forms, read, tree, len(step.values()))


def _plain(run: str, item: str | None) -> Source:
    plain: PlainCheckpoint = read_plain(Path(run))
    chosen = {name: path for name, path in plain.paths.items() if item is None or path[0] == item}
    if not chosen:
        raise CheckpointNotFoundError(f"{run} has nothing named {item!r}. It holds {', '.join(plain.items())}.")
    num_skipped = 0 if item is None else 1
    pairs = ((show_place(path[num_skipped:] or path), name) for name, path in chosen.items() if name in plain.forms)
    names = _unique(pairs)
    forms = {name: plain.forms[stored] for name, stored in names.items()}
    num_values = len(chosen) - len(names)
    return Source(plain.path, forms, lambda name: plain.tensor(names[name]), lambda: plain.tree(item), num_values)


def _unique(pairs: Iterator[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, stored in pairs:
        if name in found:
            raise CheckpointError(f"two tensors would have the name {name!r}. --to torch keeps them apart.")
        found[name] = stored
    return found


def _with_tensors(step: Step, items: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}

    def fill(value: Any) -> Any:
        if isinstance(value, TensorName):
            if value.name not in tensors:  # tied tensors stay tied
                tensors.update(read_tensors(step.path, step.records, [value.name]))
            return tensors[value.name]
        if isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(fill(item) for item in value)
        return value

    return fill(items)


def _write_dcp(source: Source, destination: Path, name: str) -> None:
    tree = source.tree()
    destination.mkdir()  # fails where another was faster
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            save_dcp(tree if isinstance(tree, dict) else {name: tree}, checkpoint_id=destination, no_dist=True)
        fsync_directory(destination.parent)
    except BaseException:
        shutil.rmtree(destination, ignore_errors=True)
        raise


@contextlib.contextmanager
def _new_file(destination: Path) -> Iterator[BinaryIO]:
    """A file to write that appears whole under its name, which nothing else may have by then."""
    staged = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(staged, "xb") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(staged, destination)
        except OSError as error:
            # Some file systems have no links; there a name taken meanwhile is seen but for a moment.
            if error.errno == errno.EEXIST or os.path.lexists(destination):
                raise
            os.rename(staged, destination)
        fsync_directory(destination.parent)
    finally:
        staged.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in path.iterdir()) if path.is_dir() else path.stat().st_size
