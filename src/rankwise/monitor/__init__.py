"""Where each rank's time goes: phases of a step, devices, stragglers, hangs.

`rankwise.Monitor(session)` is one rank's. Code that is not handed the object calls the functions here, which act on the
Monitor that is open and do nothing without one:

    from rankwise import monitor

    with monitor.phase("data"):
        batch = next(loader)
    monitor.step()

Importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rankwise.monitor.current import log, phase, step, watch
from rankwise.monitor.position import Position

if TYPE_CHECKING:
    from rankwise.monitor.monitor import Monitor

__all__ = ["Monitor", "Position", "log", "phase", "step", "watch"]


def __getattr__(name: str) -> Any:
    if name != "Monitor":
        raise AttributeError(f"module 'rankwise.monitor' has no attribute {name!r}")
    value = importlib.import_module("rankwise.monitor.monitor").Monitor
    globals()[name] = value
    return value
