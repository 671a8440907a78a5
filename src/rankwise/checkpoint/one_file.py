"""One file from the main process, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

import torch

from rankwise import collectives
from rankwise.errors import CheckpointError
from rankwise.files import fsync_directory, make_directory


def save_on_main(obj: object, path: str | os.PathLike[str]) -> None:
    """`torch.save` on the main process alone, for all ranks: on return the file is whole and durable, or all raise.

    What was at `path` stays until the new file takes its place.

    Raises:
        CheckpointError: the main process could not write it; says why. What was at `path` is untouched, unless
            the message says that the disk refused only to confirm the new one.
    Ranks: every rank must call; what the others pass is ignored.
    """
    collectives.on_main_process(_save, obj, path)


def _save(obj: object, name: str | os.PathLike[str]) -> None:
    path = Path(name)
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        make_directory(path.parent)
        with open(staged, "xb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        if not isinstance(error, Exception):
            raise
        # torch.save closes its archive after a failure, which fails too, and hides why.
        first: BaseException | None = error
        while first is not None and not isinstance(first, OSError):
            first = first.__context__
        cause = first or f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} was not saved on the main process: {cause}") from error
    try:
        fsync_directory(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path} is new and whole, but the disk refused to confirm its name on the main process, so that a crash "
            f"of the machine may bring back the old one: {error}"
        ) from error
