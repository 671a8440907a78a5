"""Ranks, devices, logs and checkpoints for PyTorch on many processes.

Importing this package costs milliseconds: torch is imported with the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.checkpoint import CheckpointManager, PerRank, save_on_main
    from rankwise.collectives import (
        agree,
        barrier,
        broadcast_object,
        gather_objects,
        gather_rows,
        local_main_process_first,
        main_process_first,
        on_local_main_process,
        on_main_process,
        raise_together,
        reduce_mean,
    )
    from rankwise.device import device_uuid, select_device
    from rankwise.errors import (
        CheckpointCorruptError,
        CheckpointError,
        CheckpointLeaseError,
        CheckpointMismatchError,
        CheckpointNotFoundError,
        DeviceError,
        LaunchError,
        MissingRanksError,
        RankFailedError,
        RankFailure,
        RankwiseError,
        StoppedError,
    )
    from rankwise.files import fsync_directory, write_atomic
    from rankwise.identity import Identity
    from rankwise.logs import console, get_logger
    from rankwise.monitor import Monitor
    from rankwise.parent import end_with_parent
    from rankwise.seed import RngState, same_on_every_rank, seed_all
    from rankwise.session import Session, init
    from rankwise.threads import bind_cpus, loader_workers, threads_per_process

    __version__: str

_HOMES = {
    "CheckpointCorruptError": "errors",
    "CheckpointError": "errors",
    "CheckpointLeaseError": "errors",
    "CheckpointManager": "checkpoint",
    "CheckpointMismatchError": "errors",
    "CheckpointNotFoundError": "errors",
    "DeviceError": "errors",
    "Identity": "identity",
    "LaunchError": "errors",
    "MissingRanksError": "errors",
    "Monitor": "monitor",
    "PerRank": "checkpoint",
    "RankFailedError": "errors",
    "RankFailure": "errors",
    "RankwiseError": "errors",
    "RngState": "seed",
    "Session": "session",
    "StoppedError": "errors",
    "agree": "collectives",
    "barrier": "collectives",
    "bind_cpus": "threads",
    "broadcast_object": "collectives",
    "console": "logs",
    "device_uuid": "device",
    "end_with_parent": "parent",
    "fsync_directory": "files",
    "gather_objects": "collectives",
    "gather_rows": "collectives",
    "get_logger": "logs",
    "init": "session",
    "loader_workers": "threads",
    "local_main_process_first": "collectives",
    "main_process_first": "collectives",
    "on_local_main_process": "collectives",
    "on_main_process": "collectives",
    "raise_together": "collectives",
    "reduce_mean": "collectives",
    "same_on_every_rank": "seed",
    "save_on_main": "checkpoint",
    "seed_all": "seed",
    "select_device": "device",
    "threads_per_process": "threads",
    "write_atomic": "files",
}

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointLeaseError",
    "CheckpointManager",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "DeviceError",
    "Identity",
    "LaunchError",
    "MissingRanksError",
    "Monitor",
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
    "bind_cpus",
    "broadcast_object",
    "console",
    "device_uuid",
    "end_with_parent",
    "fsync_directory",
    "gather_objects",
    "gather_rows",
    "get_logger",
    "init",
    "loader_workers",
    "local_main_process_first",
    "main_process_first",
    "on_local_main_process",
    "on_main_process",
    "raise_together",
    "reduce_mean",
    "same_on_every_rank",
    "save_on_main",
    "seed_all",
    "select_device",
    "threads_per_process",
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
