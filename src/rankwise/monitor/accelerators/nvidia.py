"""NVIDIA devices, through NVML by its official binding, nvidia-ml-py (module `pynvml`).

Source: NVML API reference; the values of enumerations are those of nvml.h.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rankwise.device import device_uuid, pci_address
from rankwise.errors import DeviceError
from rankwise.monitor.accelerators.readings import GIB, Driver, Failure, Readings, Way

REASONS: Mapping[int, str] = {
    0x001: "idle",
    0x002: "application_clocks",
    0x004: "power",
    0x008: "hardware",
    0x010: "sync_boost",
    0x020: "thermal",
    0x040: "hardware_thermal",
    0x080: "power_brake",
    0x100: "display_clocks",
    0x200: "board_limit",
    0x400: "reliability",
}
"""Bit of nvmlClocksEventReasons (nvmlClocksThrottleReasons before R535) -> our word for it.

`power` and `thermal` are the driver lowering the clocks to keep its limits. `hardware`, `hardware_thermal` and
`power_brake` are the board halving them or worse; `hardware` stands beside the other two, or alone for an excess of
current.
"""

_IDLE = 0x001
_NEVER = (
    "NVML_ERROR_INVALID_ARGUMENT",  # such as a slice where only a whole GPU will do
    "NVML_ERROR_NOT_SUPPORTED",
    "NVML_ERROR_NO_PERMISSION",
    "NVML_ERROR_FUNCTION_NOT_FOUND",  # the driver is older than the binding
    "NVML_ERROR_VGPU_ECC_NOT_SUPPORTED",
    "NVML_ERROR_ARGUMENT_VERSION_MISMATCH",
    "NVML_ERROR_DEPRECATED",
)
_LOST = ("NVML_ERROR_GPU_IS_LOST", "NVML_ERROR_RESET_REQUIRED")
_WHOLE_GPU = 0xFFFFFFFF
_MAX_EVENTS = 64
"""At most so many errors in one reading: a device that floods us must not hold the sampler."""


@dataclass(frozen=True)
class _Found:
    """NVML's handles of a device."""

    gpu: Any
    """The GPU, or that which the slice is a part of."""
    mig: Any | None = None
    """The slice, where the device is one and it is known which."""
    is_slice: bool = False


def find_nvidia(device: torch.device) -> Driver:
    """The device that torch calls `device`, by its UUID, or by its PCI address where torch knows no UUID.

    Raises:
        Exception: the binding or the driver is missing or fails, or the driver does not know the device.
    Ranks: local.
    """
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    try:
        found = _find(nvml, device)
        own = found.gpu if found.mig is None else found.mig
        name: str | None = _text(nvml.nvmlDeviceGetName(own))
        uuid: str | None = _text(nvml.nvmlDeviceGetUUID(own))
        if found.is_slice and found.mig is None:
            name, uuid = None, None  # those of the whole GPU would be another device's
        errors = _open_errors(nvml, found)
    except BaseException:
        nvml.nvmlShutdown()
        raise

    def close() -> None:
        if errors is not None:
            with contextlib.suppress(nvml.NVMLError):  # the device may be gone
                nvml.nvmlEventSetFree(errors.events)
        nvml.nvmlShutdown()  # NVML counts: others in this process, such as torch, keep theirs

    # Its errors first: of a device that is lost, the driver may still have one to tell.
    questions = ([[errors.read]] if errors is not None else []) + _questions(nvml, found)
    return Driver(name, uuid, Readings(questions, lambda error: judge(nvml, error)), close)


def judge(nvml: Any, error: Exception) -> Failure:
    """What an error of NVML means for the question that met it.

    Ranks: local.
    """
    if isinstance(error, AttributeError):  # the binding is older than this file
        return Failure.NEVER
    value = getattr(error, "value", None)
    if value is None:
        return Failure.NOT_NOW
    if any(value == getattr(nvml, name, None) for name in _NEVER):
        return Failure.NEVER
    return Failure.LOST if any(value == getattr(nvml, name, None) for name in _LOST) else Failure.NOT_NOW


def throttle_words(reasons: int) -> list[str]:
    """What holds the clocks back, in words; a bit that NVML has added since is told as its number. Idle is not one.

    Ranks: local.
    """
    bits = [1 << place for place in range(reasons.bit_length()) if reasons >> place & 1]
    return [REASONS.get(bit, hex(bit)) for bit in bits if bit != _IDLE]


def _find(nvml: Any, device: torch.device) -> _Found:
    known = device_uuid(device)
    if known is not None and known.startswith(("GPU-", "MIG-")):
        handle = _by_uuid(nvml, known)
        if handle is not None:
            return _with_parent(nvml, handle)
    properties = torch.get_device_module(device).get_device_properties(device)
    name = str(getattr(properties, "name", ""))
    if " MIG " in name:
        handle = _by_uuid(nvml, f"MIG-{getattr(properties, 'uuid', '')}")
        if handle is not None:
            return _with_parent(nvml, handle)
    address = pci_address(device)
    if address is None:
        raise DeviceError(f"torch tells neither the UUID nor the PCI address of {device}")
    gpu = nvml.nvmlDeviceGetHandleByPciBusId(address)
    if " MIG " not in name:
        return _Found(gpu)
    # One slice of this size on the GPU is ours; among several, nothing says which.
    alike = [mig for mig in _slices(nvml, gpu) if _text(nvml.nvmlDeviceGetName(mig)) == name]
    return _Found(gpu, alike[0] if len(alike) == 1 else None, is_slice=True)


def _by_uuid(nvml: Any, uuid: str) -> Any | None:
    """None where the driver knows no such device; a slice may be named by the beginning of its UUID."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError as error:
        if error.value not in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_INVALID_ARGUMENT):
            raise
    if not uuid.startswith("MIG-") or uuid == "MIG-":
        return None
    gpus = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    slices = [mig for gpu in gpus for mig in _slices(nvml, gpu)]
    begin_so = [mig for mig in slices if _text(nvml.nvmlDeviceGetUUID(mig)).startswith(uuid)]
    return begin_so[0] if len(begin_so) == 1 else None


def _with_parent(nvml: Any, handle: Any) -> _Found:
    if not _text(nvml.nvmlDeviceGetUUID(handle)).startswith("MIG-"):
        return _Found(handle)
    return _Found(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle), handle, is_slice=True)


def _slices(nvml: Any, gpu: Any) -> Iterator[Any]:
    try:
        num_places = nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)
    except nvml.NVMLError:
        return
    for place in range(num_places):
        try:
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, place)
        except nvml.NVMLError:  # no slice there
            continue


def _questions(nvml: Any, found: _Found) -> list[list[Way]]:
    """What to ask. Of a slice NVML tells only the memory; the rest is the GPU's, and utilisation is nobody's."""
    gpu, questions = found.gpu, _shared_questions(nvml, found.gpu)
    if not found.is_slice:
        questions.append([lambda: {"utilisation_percent": float(nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)}])
    holder = found.mig if found.is_slice else gpu
    if holder is not None:
        # The second version keeps apart what the driver itself reserves, as nvidia-smi does.
        questions.append(
            [
                lambda: _memory(nvml.nvmlDeviceGetMemoryInfo(holder, version=nvml.nvmlMemory_v2)),
                lambda: _memory(nvml.nvmlDeviceGetMemoryInfo(holder)),
            ]
        )
    return questions


def _shared_questions(nvml: Any, gpu: Any) -> list[list[Way]]:
    sm, memory, chip = nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM, nvml.NVML_TEMPERATURE_GPU
    since_driver = nvml.NVML_VOLATILE_ECC
    corrected, uncorrected = nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    return [
        [lambda: {"power_watts": nvml.nvmlDeviceGetPowerUsage(gpu) / 1000}],
        [
            lambda: {"power_limit_watts": nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000},
            lambda: {"power_limit_watts": nvml.nvmlDeviceGetPowerManagementLimit(gpu) / 1000},
        ],
        [
            lambda: {"temperature_celsius": float(nvml.nvmlDeviceGetTemperatureV(gpu, chip))},
            lambda: {"temperature_celsius": float(nvml.nvmlDeviceGetTemperature(gpu, chip))},
        ],
        [lambda: {"clock_mhz": float(nvml.nvmlDeviceGetClockInfo(gpu, sm))}],
        [lambda: {"clock_max_mhz": float(nvml.nvmlDeviceGetMaxClockInfo(gpu, sm))}],
        [lambda: {"memory_clock_mhz": float(nvml.nvmlDeviceGetClockInfo(gpu, memory))}],
        [
            lambda: {"throttle_reasons": throttle_words(nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu))},
            lambda: {"throttle_reasons": throttle_words(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu))},
        ],
        [lambda: {"ecc_corrected": nvml.nvmlDeviceGetTotalEccErrors(gpu, corrected, since_driver)}],
        [lambda: {"ecc_uncorrected": nvml.nvmlDeviceGetTotalEccErrors(gpu, uncorrected, since_driver)}],
    ]


def _memory(info: Any) -> dict[str, Any]:
    return {"memory_used_gib": info.used / GIB, "memory_total_gib": info.total / GIB}


class _Errors:
    """The driver's errors (XID) of a device, as they come."""

    def __init__(self, nvml: Any, events: Any, instance: int | None) -> None:
        self._nvml = nvml
        self.events = events
        self._instance = instance

    def read(self) -> dict[str, Any]:
        """Those since the last call; an error of another slice of the same GPU is not ours."""
        numbers: list[int] = []
        for _ in range(_MAX_EVENTS):
            try:
                event = self._nvml.nvmlEventSetWait_v2(self.events, 0)
            except self._nvml.NVMLError as error:
                if error.value != self._nvml.NVML_ERROR_TIMEOUT and not numbers:
                    raise
                break
            if self._instance is None or event.gpuInstanceId in (self._instance, _WHOLE_GPU):
                numbers.append(int(event.eventData))
        return {"xid_errors": numbers}


def _open_errors(nvml: Any, found: _Found) -> _Errors | None:
    """None where this system or our rights do not allow to listen."""
    events = None
    try:
        instance = None if found.mig is None else nvml.nvmlDeviceGetGpuInstanceId(found.mig)
        events = nvml.nvmlEventSetCreate()
        nvml.nvmlDeviceRegisterEvents(found.gpu, nvml.nvmlEventTypeXidCriticalError, events)
    except (nvml.NVMLError, AttributeError):
        if events is not None:
            nvml.nvmlEventSetFree(events)
        return None
    return _Errors(nvml, events, instance)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
