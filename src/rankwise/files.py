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
        OSError: the file could not be written; what was at `path` is untouched.
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


def fsync_file(path: str | os.PathLike[str]) -> None:
    """Make the content of a written file durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Make the names in a directory durable: without it a crash may undo a rename."""
    fsync_file(path)
