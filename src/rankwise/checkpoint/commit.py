"""A step's directory: how it is staged, checked, and made to appear in one rename.

step-00000010/
    manifest.json               format, versions, world size; size and crc32 of every file
    vae.json, vae.safetensors   an item: its plain values, and its tensors where it has any
    rank-00000/rng.json ...     items that every rank stores for itself
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch

from rankwise.checkpoint.tree import flatten, unflatten
from rankwise.errors import CheckpointCorruptError, CheckpointError
from rankwise.files import fsync_directory, fsync_file, make_directory, write_atomic

T = TypeVar("T")

FORMAT = 1
MANIFEST = "manifest.json"
STAGING_PREFIX = ".staging-"
BROKEN_PREFIX = ".broken-"
_STEP_NAME = re.compile(r"step-([0-9]{8,})")
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of one file, by which a change of it is found."""

    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """What a step's directory holds."""

    step: int
    world_size: int
    shared_items: tuple[str, ...]
    per_rank_items: tuple[str, ...]
    files: dict[str, FileRecord]
    """By path within the step's directory."""


def step_name(step: int) -> str:
    """The name of a step's directory.

    Ranks: local.
    """
    return f"step-{step:08d}"


def find_steps(directory: Path) -> list[int]:
    """The steps that were committed in `directory`, ascending.

    Ranks: local; while a save runs, ranks may see different ones.
    """
    if not directory.is_dir():
        return []
    names = (_STEP_NAME.fullmatch(entry.name) for entry in directory.iterdir())
    steps = (int(name[1]) for name in names if name)
    return sorted(step for step in steps if (directory / step_name(step) / MANIFEST).is_file())


def rank_folder(rank: int) -> str:
    """The folder of the items of one rank, within a step's directory.

    Ranks: local.
    """
    return f"rank-{rank:05d}"


def make_staging(directory: Path, step: int) -> Path:
    """A fresh directory to fill; what killed saves left behind is removed first.

    Ranks: main process only.
    """
    make_directory(directory)
    for leftover in directory.glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    staging = directory / f"{STAGING_PREFIX}{step_name(step)}-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    return staging


def move_aside(directory: Path, step: int) -> Path:
    """Rename a broken step so that a whole one can take its place; nothing is deleted.

    Ranks: main process only.
    """
    aside = directory / f"{BROKEN_PREFIX}{step_name(step)}-{uuid.uuid4().hex[:8]}"
    os.rename(directory / step_name(step), aside)
    return aside


def write_item(folder: Path, name: str, value: object) -> dict[str, FileRecord]:
    """Write the files of one item durably; their names are durable once `folder` is synced.

    Returns:
        A record per file, by file name.
    Raises:
        CheckpointError: the value holds what cannot be stored.
        OSError: the disk refused.
    Ranks: local; a shared item on the main process, an item of single ranks on each.
    """
    encoded, tensors = flatten(value, name)
    contents = {f"{name}.json": json.dumps(encoded, allow_nan=False).encode()}
    if tensors:
        contents[f"{name}.safetensors"] = safetensors.torch.save(tensors)
    for file, content in contents.items():
        (folder / file).write_bytes(content)
        fsync_file(folder / file)
    return {file: FileRecord(len(content), zlib.crc32(content)) for file, content in contents.items()}


def read_item(step_directory: Path, manifest: Manifest, name: str, folder: str = "") -> Any:
    """Read one item, and nothing else; its files are checked before they are believed.

    Raises:
        CheckpointCorruptError: a file of it is missing or not what was written.
    Ranks: local.
    """
    relative = f"{folder}/{name}" if folder else name
    content = {
        suffix: _read_checked(step_directory, relative + suffix, manifest.files[relative + suffix])
        for suffix in (".json", ".safetensors")
        if relative + suffix in manifest.files
    }
    if ".json" not in content:
        raise CheckpointCorruptError(
            f"{step_directory / MANIFEST} lists the item {name!r}, but not its file {relative}.json. "
            "Load another step (step=NUMBER), or move this one away."
        )
    try:
        encoded = json.loads(content[".json"])
        stored = content.get(".safetensors")
        tensors: Mapping[str, torch.Tensor] = safetensors.torch.load(stored) if stored is not None else {}
        return unflatten(encoded, tensors)
    except (KeyError, ValueError, safetensors.SafetensorError, CheckpointCorruptError) as error:
        raise CheckpointCorruptError(f"{step_directory / relative}.json cannot be read: {_say(error)}.") from error


def commit(staging: Path, manifest: Manifest) -> None:
    """Make the staged directory the step's, in one rename.

    Raises:
        CheckpointError: the step is there and whole, but a crash of the machine may undo the rename.
        OSError: the disk refused before the rename; there is no such step.
    Ranks: main process only, after all ranks have written and synced their files.
    """
    body = {
        "format": FORMAT,
        "versions": _versions(),
        "step": manifest.step,
        "world_size": manifest.world_size,
        "shared_items": list(manifest.shared_items),
        "per_rank_items": list(manifest.per_rank_items),
        "files": {name: {"bytes": record.num_bytes, "crc32": record.crc32} for name, record in manifest.files.items()},
    }
    write_atomic(staging / MANIFEST, json.dumps({**body, "crc32": _body_crc32(body)}, indent=1) + "\n")
    step_directory = staging.parent / step_name(manifest.step)
    os.rename(staging, step_directory)
    try:
        fsync_directory(staging.parent)
    except OSError as error:
        # Taking back what is whole could only lose it: the disk that refuses here may refuse that too.
        raise CheckpointError(
            f"{step_directory} is there and whole, but the disk did not confirm its name ({error}): a crash of the "
            "machine may undo it. Look after the disk, then save the step again to have it confirmed."
        ) from error


def read_manifest(step_directory: Path) -> Manifest:
    """What the directory of a step must hold.

    Raises:
        CheckpointCorruptError: the manifest is missing, damaged, or of a later format.
    Ranks: local.
    """
    path = step_directory / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        crc32 = body.pop("crc32")
        if body["format"] == FORMAT and crc32 != _body_crc32(body):
            raise CheckpointCorruptError(f"{path} was changed after it was written.")
        if body["format"] != FORMAT:
            raise CheckpointCorruptError(
                f"{path} has format {body['format']}, this rankwise reads {FORMAT}. Read it with a newer one."
            )
        return Manifest(
            step=body["step"],
            world_size=body["world_size"],
            shared_items=tuple(body["shared_items"]),
            per_rank_items=tuple(body["per_rank_items"]),
            files={name: FileRecord(record["bytes"], record["crc32"]) for name, record in body["files"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorruptError(f"{path} cannot be read: {_say(error)}.") from error


def verify(step_directory: Path) -> None:
    """Read every file of a step and compare it with the manifest.

    Raises:
        CheckpointCorruptError: names the first file that is not what was written.
    Ranks: local.
    """
    manifest = read_manifest(step_directory)
    for relative, expected in manifest.files.items():
        path = step_directory / relative
        _require(path, _try(path, file_record), expected)


def file_record(path: Path) -> FileRecord:
    """Size and checksum of a file on disk.

    Ranks: local.
    """
    num_bytes = crc32 = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            num_bytes += len(chunk)
            crc32 = zlib.crc32(chunk, crc32)
    return FileRecord(num_bytes, crc32)


def _read_checked(step_directory: Path, relative: str, expected: FileRecord) -> bytes:
    path = step_directory / relative
    content = _try(path, Path.read_bytes)
    _require(path, FileRecord(len(content), zlib.crc32(content)), expected)
    return content


def _try(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except OSError as error:
        raise CheckpointCorruptError(f"{path} cannot be read: {_say(error)}.") from error


def _require(path: Path, found: FileRecord, expected: FileRecord) -> None:
    if found.num_bytes != expected.num_bytes:
        raise CheckpointCorruptError(
            f"{path} is damaged: {found.num_bytes} bytes long, {expected.num_bytes} were written. "
            "Load another step (step=NUMBER), or move this one away."
        )
    if found != expected:
        raise CheckpointCorruptError(
            f"{path} is damaged: its checksum is {found.crc32:08x}, {expected.crc32:08x} was written. "
            "Load another step (step=NUMBER), or move this one away."
        )


def _say(error: Exception) -> str:
    """What went wrong, to stand at the end of a sentence."""
    match error:
        case OSError(strerror=str(reason)):
            return reason
        case KeyError():
            return f"it lacks {error}"
        case CheckpointCorruptError():
            return str(error)
    return f"{type(error).__name__}: {error}"


def _body_crc32(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _versions() -> dict[str, str]:
    from rankwise import __version__

    return {"rankwise": __version__, "torch": str(torch.__version__)}
