"""Ranks, devices, logs and checkpoints for PyTorch on many processes.

Importing this package costs milliseconds: torch is imported with the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.checkpoint import CheckpointManager, PerRank
    from rankwise.collectives import (
        agree,
        barrier,
        broadcast_object,
        gather_objects,
        main_process_first,
        on_main_process,
        raise_together,
        reduce_mean,
    )
    from rankwise.device import select_device
    from rankwise.errors import (
        CheckpointCorruptError,
        CheckpointError,
        CheckpointMismatchError,
        CheckpointNotFoundError,
        DeviceError,
        LaunchError,
        RankFailedError,
        RankFailure,
        RankwiseError,
        StoppedError,
    )
    from rankwise.files import fsync_directory, write_atomic
    from rankwise.identity import Identity
    from rankwise.logs import console, get_logger
    from rankwise.parent import end_with_parent
    from rankwise.seed import RngState, same_on_every_rank, seed_all
    from rankwise.session import Session, init

    __version__: str

_HOMES = {
    "CheckpointCorruptError": "errors",
    "CheckpointError": "errors",
    "CheckpointManager": "checkpoint",
    "CheckpointMismatchError": "errors",
    "CheckpointNotFoundError": "errors",
    "DeviceError": "errors",
    "Identity": "identity",
    "LaunchError": "errors",
    "PerRank": "checkpoint",
    "RankFailedError": "errors",
    "RankFailure": "errors",
    "RankwiseError": "errors",
    "RngState": "seed",
    "Session": "session",
    "StoppedError": "errors",
    "agree": "collectives",
    "barrier": "collectives",
    "broadcast_object": "collectives",
    "console": "logs",
    "end_with_parent": "parent",
    "fsync_directory": "files",
    "gather_objects": "collectives",
    "get_logger": "logs",
    "init": "session",
    "main_process_first": "collectives",
    "on_main_process": "collectives",
    "raise_together": "collectives",
    "reduce_mean": "collectives",
    "same_on_every_rank": "seed",
    "seed_all": "seed",
    "select_device": "device",
    "write_atomic": "files",
}

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointManager",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "DeviceError",
    "Identity",
    "LaunchError",
    "PerRank",
    "RankFailedError",
    "RankFailure",
    "RankwiseError",
    "RngState",
    "Session",
    "StoppedError",
    "__version__",
    "agree",
    "barrier",
    "broadcast_object",
    "console",
    "end_with_parent",
    "fsync_directory",
    "gather_objects",
    "get_logger",
    "init",
    "main_process_first",
    "on_main_process",
    "raise_together",
    "reduce_mean",
    "same_on_every_rank",
    "seed_all",
    "select_device",
    "write_atomic",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("rankwise")
    if name not in _HOMES:
        raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"rankwise.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
