"""The folder of checkpoints: names, and how a step's directory is staged, appears, is moved aside and goes.

step-00000010/            appears by one rename, when all of it is written, synced and read back
    manifest.json         format, epoch, versions, world size; size and checksum of every other file
    tensors.json          where the bytes of every tensor lie
    values.json           what is no tensor, of the items that all ranks share
    rank-00003.json       the same, of the items that rank 3 keeps for itself
    __3_0.distcp          tensors that rank 3 wrote
    .metadata             for torch.distributed.checkpoint; we never read it
.staging-*  .trash-*      a save, a removal, that is under way or was killed
.broken-*   .stale-*      steps that were in the way of a save: damaged ones, and those of a job that had lost its lease
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import TypeVar

import xxhash

from rankwise.checkpoint.manifest import MANIFEST, FileRecord, Manifest, encode_manifest, read_manifest, say
from rankwise.errors import CheckpointCorruptError, CheckpointError
from rankwise.files import fsync_directory, fsync_file, make_directory, write_atomic

T = TypeVar("T")

STAGING, TRASH, BROKEN, STALE = ".staging-", ".trash-", ".broken-", ".stale-"
VISIBLE_SECONDS = 30.0
"""How long a name that another host made may take to be seen here."""

_in_use: set[str] = set()
"""Stagings of this process: one manager must not take those of another for leftovers."""
_STEP_NAME = re.compile(r"step-([0-9]{8,})")
_CHUNK_BYTES = 1 << 23
_ADVICE = "Load another step (step=NUMBER), or move this one away."


def step_name(step: int) -> str:
    """The name of a step's directory.

    Ranks: local.
    """
    return f"step-{step:08d}"


def rank_file(rank: int) -> str:
    """The file of the plain values that one rank keeps for itself.

    Ranks: local.
    """
    return f"rank-{rank:05d}.json"


def shard_file(rank: int) -> str:
    """The file of the tensors that one rank writes, named as `torch.distributed.checkpoint` does.

    Ranks: local.
    """
    return f"__{rank}_0.distcp"


def find_steps(directory: Path) -> list[int]:
    """The committed steps, the newest last: by epoch, then by number; damaged ones stand by their number.

    Ranks: local; while a save runs, ranks may see different ones.
    """
    steps = [step for step in _find_numbers(directory) if (directory / step_name(step) / MANIFEST).is_file()]
    epochs: dict[int, int] = {}
    for step in steps:
        with contextlib.suppress(CheckpointCorruptError):
            epochs[step] = read_manifest(directory / step_name(step)).epoch
    highest = max(epochs.values(), default=0)
    return sorted(steps, key=lambda step: (epochs.get(step, highest), step))


def find_steps_without_manifest(directory: Path) -> list[int]:
    """The steps, by number, whose manifest is gone.

    Ranks: local; while a save runs, ranks may see different ones.
    """
    paths = {step: directory / step_name(step) for step in _find_numbers(directory)}
    # The folder is asked last: a removal that has just renamed it has not lost anything.
    return [step for step, path in paths.items() if not (path / MANIFEST).is_file() and path.is_dir()]


def looks_whole(step_directory: Path) -> bool:
    """Whether every file of a step is there in its full length; what is in it is not read.

    Ranks: local.
    """
    try:
        files = read_manifest(step_directory).files
        return all((step_directory / name).stat().st_size == record.num_bytes for name, record in files.items())
    except (CheckpointCorruptError, OSError):
        return False


def highest_epoch(directory: Path) -> int:
    """Of the committed steps; 0 where there is none.

    Ranks: local.
    """
    epochs = [0]
    for step in find_steps(directory):
        with contextlib.suppress(CheckpointCorruptError):
            epochs.append(read_manifest(directory / step_name(step)).epoch)
    return max(epochs)


def make_staging(directory: Path, step: int) -> Path:
    """A fresh directory to fill, whose name nobody can guess; what killed saves and removals left is removed first.

    Ranks: main process only, and only under the lease.
    """
    make_directory(directory)
    for prefix in (STAGING, TRASH):
        for leftover in directory.glob(f"{prefix}*"):
            if leftover.name not in _in_use:
                shutil.rmtree(leftover, ignore_errors=True)
    staging = directory / f"{STAGING}{step_name(step)}-{uuid.uuid4().hex}"
    staging.mkdir()
    _in_use.add(staging.name)
    return staging


def remove_staging(staging: Path) -> None:
    """Remove what `make_staging` made, where it was not committed.

    Ranks: main process only.
    """
    shutil.rmtree(staging, ignore_errors=True)
    _in_use.discard(staging.name)


def wait_until_visible(path: Path) -> bool:
    """Whether `path`, which another process has made, comes to be seen here; it does at once on a local disk.

    Ranks: local.
    """
    begin = time.monotonic()
    while not path.exists():
        if time.monotonic() - begin > VISIBLE_SECONDS:
            return False
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # network file systems look anew
        time.sleep(0.05)
    return True


def move_aside(directory: Path, step: int, prefix: str) -> Path:
    """Rename a step that is in the way, so that a whole one can take its place; nothing is deleted.

    Ranks: main process only.
    """
    aside = directory / f"{prefix}{step_name(step)}-{uuid.uuid4().hex[:8]}"
    os.rename(directory / step_name(step), aside)
    return aside


def remove_steps(directory: Path, steps: Iterable[int]) -> None:
    """Delete steps: each loses its name first, so that none is ever seen in part.

    Ranks: main process only.
    """
    for step in steps:
        trash = move_aside(directory, step, TRASH)
        fsync_directory(directory)
        shutil.rmtree(trash, ignore_errors=True)


def write_file(path: Path, content: bytes) -> FileRecord:
    """Write a file durably; its name is durable once its directory is synced.

    Ranks: local.
    """
    path.write_bytes(content)
    fsync_file(path)
    return FileRecord(len(content), xxhash.xxh3_128_hexdigest(content))


def commit(staging: Path, manifest: Manifest, check_lease: Callable[[], None]) -> Path:
    """Make the staged directory the step's, in one rename.

    Args:
        check_lease: raises if another job has taken over; asked as late as possible.
    Raises:
        CheckpointLeaseError: from `check_lease`; there is no such step.
        CheckpointError: the step is there and whole, but a crash of the machine may undo the rename.
        OSError: the disk refused before the rename; there is no such step.
    Ranks: main process only, after all ranks have written and synced their files.
    """
    for name, record in manifest.files.items():
        if (staging / name).stat().st_size != record.num_bytes:
            raise CheckpointError(f"{staging / name} was changed by another process while the step was saved.")
    write_atomic(staging / MANIFEST, encode_manifest(manifest))
    step_directory = staging.parent / step_name(manifest.step)
    check_lease()
    os.rename(staging, step_directory)
    try:
        fsync_directory(staging.parent)
    except OSError as error:
        # Taking back what is whole could only lose it: the disk that refuses here may refuse that too.
        raise CheckpointError(
            f"{step_directory} is there and whole, but the disk did not confirm its name ({error}): a crash of the "
            "machine may undo it. Look after the disk, then save the step again to have it confirmed."
        ) from error
    return step_directory


def verify(step_directory: Path, rank: int = 0, world_size: int = 1) -> Manifest:
    """Read the files of a step and compare them with the manifest.

    Args:
        rank, world_size: of several ranks that share the work, each reads its part.
    Raises:
        CheckpointCorruptError: names the first file that is not what was written.
    Ranks: local.
    """
    manifest = read_manifest(step_directory)
    for name in share_of_files(manifest, rank, world_size):
        require_same(step_directory / name, _try(step_directory / name, file_record), manifest.files[name])
    return manifest


def share_of_files(manifest: Manifest, rank: int, world_size: int) -> Iterator[str]:
    """One rank's part of the files of a step, where all ranks together have about the same number of bytes each.

    Ranks: local.
    """
    loads = [0] * world_size
    for name, record in sorted(manifest.files.items(), key=lambda item: -item[1].num_bytes):
        reader = loads.index(min(loads))
        loads[reader] += record.num_bytes + 1
        if reader == rank:
            yield name


def file_record(path: Path) -> FileRecord:
    """Size and checksum of a file on disk.

    Ranks: local.
    """
    num_bytes, digest = 0, xxhash.xxh3_128()
    with open(open_regular(path), "rb", buffering=0) as file:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while count := file.readinto(buffer):
            num_bytes += count
            digest.update(buffer[:count])
    return FileRecord(num_bytes, digest.hexdigest())


def read_checked(step_directory: Path, manifest: Manifest, name: str) -> bytes:
    """The content of one file, after it was compared with the manifest.

    Raises:
        CheckpointCorruptError: it is missing or not what was written.
    Ranks: local.
    """
    path = step_directory / name
    if name not in manifest.files:
        raise CheckpointCorruptError(f"{step_directory / MANIFEST} does not list {name}. {_ADVICE}")
    expected = manifest.files[name]
    with open(_try(path, open_regular), "rb", buffering=0) as file:
        # What is too long is not read to its end.
        content = _try(path, lambda _: _read(file, expected.num_bytes + 1))
    require_same(path, FileRecord(len(content), xxhash.xxh3_128_hexdigest(content)), expected)
    return content


def open_regular(path: Path) -> int:
    """A descriptor to read a file by; a pipe or device in its place would never end, or hang.

    Raises:
        OSError: there is no regular file.
    Ranks: local.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor


def require_same(path: Path | str, found: FileRecord, expected: FileRecord) -> None:
    """Raise `CheckpointCorruptError` unless a file is what was written.

    Ranks: local.
    """
    if found.num_bytes != expected.num_bytes:
        raise CheckpointCorruptError(
            f"{path} is damaged: {found.num_bytes} bytes long, {expected.num_bytes} were written. {_ADVICE}"
        )
    if found.xxh3 != expected.xxh3:
        raise CheckpointCorruptError(
            f"{path} is damaged: its checksum is {found.xxh3}, {expected.xxh3} was written. {_ADVICE}"
        )


def _find_numbers(directory: Path) -> list[int]:
    """Those that stand in names of steps, ascending."""
    if not directory.is_dir():
        return []
    names = (_STEP_NAME.fullmatch(entry.name) for entry in directory.iterdir())
    # Not every such name is a step's: a nine-digit one that begins with 0 would be found under another.
    return sorted(int(name[1]) for name in names if name and name[0] == step_name(int(name[1])))


def _read(file: FileIO, num_bytes: int) -> bytes:
    parts: list[bytes] = []
    while num_bytes and (part := file.read(min(num_bytes, _CHUNK_BYTES))):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _try(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except OSError as error:
        raise CheckpointCorruptError(f"{path} cannot be read: {say(error)}.") from error
