"""What the system tells of this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil

from rankwise.monitor.accelerators.readings import GIB

_MIB = 2**20


class ProcessSensor:
    """The readings of this process; those of data loader workers, which are processes of their own, are not in them.

    Args:
        process: None takes this one.
        clock: seconds, for the rates.
        cpu_clock: seconds of processor time that the process has used; a call of the system's, where psutil reads and
            parses a file.
    """

    def __init__(
        self,
        process: psutil.Process | None = None,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._process = process or psutil.Process()
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._last_cpu: tuple[float, float] | None = None
        self._last: tuple[float, int, int] | None = None
        self._ways: list[Callable[[], dict[str, Any]]] = [self._cpu, self._memory, self._threads, self._storage]
        self.read()  # rates are since the last time: this is the first

    def read(self) -> dict[str, Any]:
        """What it tells now, by the names of `rankwise.telemetry.PROCESS_READINGS`; rates are since the last call.

        What the system does not allow is absent. Never raises.

        Ranks: local.
        """
        told: dict[str, Any] = {}
        for way in list(self._ways):
            try:
                told |= way()
            except (psutil.AccessDenied, AttributeError, NotImplementedError):
                self._ways.remove(way)  # rights and systems do not change
            except (psutil.Error, OSError, ValueError):
                continue
        return told

    def _cpu(self) -> dict[str, Any]:
        last, self._last_cpu = self._last_cpu, (self._clock(), self._cpu_clock())
        if last is None or self._last_cpu[0] <= last[0]:
            return {}
        return {"cpu_percent": 100 * (self._last_cpu[1] - last[1]) / (self._last_cpu[0] - last[0])}

    def _memory(self) -> dict[str, Any]:
        return {"rss_gib": self._process.memory_info().rss / GIB}

    def _threads(self) -> dict[str, Any]:
        return {"num_threads": self._process.num_threads()}

    def _storage(self) -> dict[str, Any]:
        counters = self._process.io_counters()
        last, self._last = self._last, (self._clock(), counters.read_bytes, counters.write_bytes)
        if last is None or self._last[0] <= last[0]:
            return {}
        seconds = self._last[0] - last[0]
        return {
            "read_mib_per_second": (self._last[1] - last[1]) / _MIB / seconds,
            "write_mib_per_second": (self._last[2] - last[2]) / _MIB / seconds,
        }
