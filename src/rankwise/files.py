"""Files that are either there and whole, or not there."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Replace the file at `path` in one step: readers, and crashes, see the old or the new one.

    Args:
        content: text is written as UTF-8.
    Raises:
        OSError: the file could not be written and what was at `path` is untouched; or only the last sync, that of the
            directory, failed: then the new file is there, and a crash of the machine may bring back the old one.
    Ranks: local; one process per path.
    """
    target = Path(path)
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(staged, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, target)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise
    fsync_directory(target.parent)


def make_directory(path: str | os.PathLike[str]) -> None:
    """Make a directory that a crash does not undo, with the parents it lacks; one that is there is fine.

    Raises:
        OSError: it could not be made; parents made until then stay.
    Ranks: local; several processes may make the same one.
    """
    directory = Path(path)
    if directory.is_dir():
        return
    make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    fsync_directory(directory.parent)


def fsync_file(path: str | os.PathLike[str]) -> None:
    """Make the content of a written file durable.

    Ranks: local.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Make the names in a directory durable: without it a crash may undo a rename.

    Ranks: local.
    """
    fsync_file(path)
