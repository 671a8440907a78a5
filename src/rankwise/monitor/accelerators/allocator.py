"""What torch's caching allocator holds of a device."""

from __future__ import annotations

from typing import Any

import torch

from rankwise.monitor.accelerators.readings import GIB


class Allocator:
    """The numbers of the allocator of this process; asking makes no context on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peak_bytes = 0

    def read(self) -> dict[str, Any]:
        """`memory_allocated_gib`, `memory_reserved_gib` and `memory_peak_gib`; nothing where torch has not begun there.

        The peak outlives the program's own `reset_peak_memory_stats`, but for what came and went between two reads.

        Ranks: local.
        """
        try:
            module = torch.get_device_module(self._device)
            if not module.is_initialized():
                return {}
            # The flat `memory_stats` is made of this, in Python, at several times the price.
            stats = module.memory_stats_as_nested_dict(self._device)
            allocated, reserved = stats["allocated_bytes"]["all"], stats["reserved_bytes"]["all"]
            self._peak_bytes = max(self._peak_bytes, allocated["peak"])
            return {
                "memory_allocated_gib": allocated["current"] / GIB,
                "memory_reserved_gib": reserved["current"] / GIB,
                "memory_peak_gib": self._peak_bytes / GIB,
            }
        except Exception:  # another backend's allocator may keep other numbers, or none
            return {}
