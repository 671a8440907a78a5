"""What the device of this rank and its process tell of themselves, once a second, whoever made the device.

A number that cannot be had is absent. Nothing here raises after the device has been found, and the drivers' libraries
release the interpreter's lock while they work; a call that hangs in one stops the thread that asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rankwise import logs
from rankwise.device import device_uuid
from rankwise.monitor.accelerators.allocator import Allocator
from rankwise.monitor.accelerators.amd import find_amd
from rankwise.monitor.accelerators.ascend import find_ascend
from rankwise.monitor.accelerators.nvidia import find_nvidia
from rankwise.monitor.accelerators.process import ProcessSensor
from rankwise.monitor.accelerators.readings import Driver
from rankwise.telemetry import ALARMING_REASONS

__all__ = ["ALARMING_REASONS", "ProcessSensor", "Sensor", "find_sensor"]

_logger = logs.get_logger(__name__)


class Sensor:
    """The readings of one device; made by `find_sensor`."""

    def __init__(self, device: torch.device, driver: Driver | None, allocator: Allocator | None) -> None:
        self._device = device
        self._driver = driver
        self._allocator = allocator
        self._noted: dict[str, Any] = {}
        self._is_lost = False
        self._name = driver.name if driver and driver.name else _torch_name(device)
        self._uuid = driver.uuid if driver and driver.uuid else _torch_uuid(device)

    def identify(self) -> dict[str, str | None]:
        """`device_name` and `device_uuid`, each None where nobody knows it.

        Ranks: local.
        """
        return {"device_name": self._name, "device_uuid": self._uuid}

    def read(self, *, allocator: bool = True) -> dict[str, Any]:
        """What the device tells now, by the names of `rankwise.telemetry.DEVICE_READINGS`; never raises.

        A device that its driver has lost is told once, as a warning.

        Args:
            allocator: ask torch's allocator too. Without it its numbers are those that `note_allocator` has taken since
                the last call, if it has.
        Ranks: local.
        """
        told: dict[str, Any] = {}
        if self._driver is not None:
            told |= self._driver.readings.read()
            self._tell_lost(self._driver)
        noted, self._noted = self._noted, {}
        if allocator and self._allocator is not None:
            noted = self._allocator.read()
        return told | noted

    def note_allocator(self) -> None:
        """Take the numbers of torch's allocator for the next `read(allocator=False)`; never raises.

        To be called by the thread that allocates. torch answers with the interpreter's lock held, and waits for the
        allocator's: a thread of our own that asks while another is stuck in cudaMalloc or cudaFree, as behind a
        collective that hangs, would stop every thread of the process, those that watch for hangs too.

        Ranks: local.
        """
        allocator = self._allocator
        if allocator is not None:
            self._noted = allocator.read()

    def close(self) -> None:
        """Let go of the driver; a second call does nothing.

        Ranks: local.
        """
        driver, self._driver, self._allocator = self._driver, None, None
        if driver is not None:
            try:
                driver.close()
            except Exception as error:  # a driver that is gone has nothing left to close
                _logger.debug("closing the driver of %s: %s", self._device, error)

    def _tell_lost(self, driver: Driver) -> None:
        if driver.readings.lost is not None and not self._is_lost:
            self._is_lost = True
            _logger.warning(
                "%s (%s, %s) is lost to its driver: %s. Look for its errors in the kernel log of this host, "
                "and keep jobs off the host until it has been reset or restarted.",
                self._device,
                self._name or "unknown device",
                self._uuid or "no UUID",
                driver.readings.lost,
            )


def find_sensor(device: torch.device) -> Sensor:
    """The sensor of the device that this rank is bound to, which is found by UUID or PCI address, not by number.

    Where the vendor's library is missing or fails, a warning says so and only torch's own numbers are read. The CPU
    and devices of other vendors tell nothing but what torch's allocator knows.

    Ranks: local; call after `select_device`, in the thread that computes.
    """
    if device.type in ("cpu", "mps", "meta"):
        return Sensor(device, None, None)
    driver = None
    finder, remedy = _finder(device)
    if finder is not None:
        try:
            driver = finder(device)
        except Exception as error:  # whatever a driver comes up with, the training goes on without it
            words = str(error).rstrip(".") or type(error).__name__
            _logger.warning("no readings of %s from its driver: %s. %s", device, words, remedy)
    return Sensor(device, driver, Allocator(device))


def _finder(device: torch.device) -> tuple[Callable[[torch.device], Driver] | None, str]:
    """Who asks this device's driver, and what to do where that fails."""
    if device.type == "cuda" and torch.version.hip:
        return find_amd, "Install the amdsmi of this host's ROCm (/opt/rocm/share/amd_smi)."
    if device.type == "cuda":
        return find_nvidia, "Install nvidia-ml-py, or see whether nvidia-smi works on this host."
    if device.type == "npu":
        return find_ascend, "See whether npu-smi works on this host, and put libdcmi.so on LD_LIBRARY_PATH."
    return None, ""


def _torch_name(device: torch.device) -> str | None:
    if device.type in ("cpu", "mps", "meta"):
        return None
    try:
        return str(torch.get_device_module(device).get_device_name(device))
    except Exception:  # a name is not worth an error
        return None


def _torch_uuid(device: torch.device) -> str | None:
    try:
        return device_uuid(device)
    except Exception:  # a name is not worth an error
        return None
