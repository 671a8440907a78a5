"""Checkpoints that appear only when whole: `CheckpointManager`, `PerRank` and `save_on_main`.

As in `rankwise` itself, torch is imported with the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.checkpoint.manager import CheckpointManager
    from rankwise.checkpoint.one_file import save_on_main
    from rankwise.checkpoint.state import PerRank

_HOMES = {
    "CheckpointManager": "manager",
    "PerRank": "state",
    "save_on_main": "one_file",
}

__all__ = ["CheckpointManager", "PerRank", "save_on_main"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rankwise.checkpoint' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"rankwise.checkpoint.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
