"""AMD devices, through AMD SMI's Python interface (module `amdsmi`), which ROCm brings. Has run on no device yet.

Source: AMD SMI Python API reference.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from rankwise.device import device_uuid, pci_address
from rankwise.errors import DeviceError
from rankwise.monitor.accelerators.readings import GIB, Driver, Failure, Readings, Way

VIOLATIONS: Mapping[str, str] = {
    "active_prochot_thrm": "hardware_thermal",
    "active_ppt_pwr": "power",
    "active_socket_thrm": "thermal",
    "active_vr_thrm": "regulator_thermal",
    "active_hbm_thrm": "memory_thermal",
}
"""Field of amdsmi_get_violation_status -> our word for it."""

_NEVER = ("AMDSMI_STATUS_NOT_SUPPORTED", "AMDSMI_STATUS_NOT_YET_IMPLEMENTED", "AMDSMI_STATUS_NO_PERM")


def find_amd(device: torch.device) -> Driver:
    """The device that torch calls `device`, by its PCI address.

    Raises:
        Exception: the interface or the driver is missing or fails, or the driver does not know the device; DeviceError
            where the device is one part of a partitioned GPU, which torch does not tell apart.
    Ranks: local.
    """
    smi = importlib.import_module("amdsmi")
    smi.amdsmi_init()
    handle = _find(smi, device)
    name = _known(smi.amdsmi_get_gpu_asic_info(handle).get("market_name"))
    readings = Readings(_questions(smi, handle), lambda error: judge(smi, error))
    # amdsmi_shut_down would end it for torch too, which opens it once and for all.
    return Driver(name if isinstance(name, str) else None, device_uuid(device), readings, lambda: None)


def judge(smi: Any, error: Exception) -> Failure:
    """What an error of AMD SMI means for the question that met it.

    Ranks: local.
    """
    if isinstance(error, AttributeError | KeyError):  # another release of the interface
        return Failure.NEVER
    code = getattr(error, "err_code", None)
    names = [getattr(smi.amdsmi_wrapper, name, None) for name in _NEVER] if code is not None else []
    return Failure.NEVER if code in names else Failure.NOT_NOW


def _find(smi: Any, device: torch.device) -> Any:
    address = pci_address(device)
    if address is None:
        raise DeviceError(f"torch does not tell the PCI address of {device}")
    # The function is the number of the part where a GPU is partitioned; torch does not tell it.
    place = address.rpartition(".")[0]
    handles = [
        handle
        for handle in smi.amdsmi_get_processor_handles()
        if str(smi.amdsmi_get_gpu_device_bdf(handle)).lower().rpartition(".")[0] == place
    ]
    if len(handles) != 1:
        raise DeviceError(f"AMD SMI knows {len(handles)} devices at {place}, where {device} is one")
    return handles[0]


def _questions(smi: Any, handle: Any) -> list[list[Way]]:
    hotspot, edge = smi.AmdSmiTemperatureType.HOTSPOT, smi.AmdSmiTemperatureType.EDGE
    now, vram = smi.AmdSmiTemperatureMetric.CURRENT, smi.AmdSmiMemoryType.VRAM
    gfx, memory = smi.AmdSmiClkType.GFX, smi.AmdSmiClkType.MEM

    def clock() -> dict[str, Any]:
        told = smi.amdsmi_get_clock_info(handle, gfx)
        return {"clock_mhz": _known(told.get("clk")), "clock_max_mhz": _known(told.get("max_clk"))}

    def power() -> dict[str, Any]:
        told = smi.amdsmi_get_power_info(handle)
        # MI300 and later tell the first, what is older the second.
        drawn = [_known(told.get(name)) for name in ("current_socket_power", "average_socket_power")]
        watts = next((value for value in drawn if value is not None), None)
        return {"power_watts": watts, "power_limit_watts": _known(told.get("power_limit"))}

    def ecc() -> dict[str, Any]:
        told = smi.amdsmi_get_gpu_total_ecc_count(handle)
        return {"ecc_corrected": told.get("correctable_count"), "ecc_uncorrected": told.get("uncorrectable_count")}

    return [
        [lambda: {"utilisation_percent": _known(smi.amdsmi_get_gpu_activity(handle)["gfx_activity"])}],
        [lambda: {"memory_used_gib": smi.amdsmi_get_gpu_memory_usage(handle, vram) / GIB}],
        [lambda: {"memory_total_gib": smi.amdsmi_get_gpu_memory_total(handle, vram) / GIB}],
        [power],
        [
            lambda: {"temperature_celsius": float(smi.amdsmi_get_temp_metric(handle, hotspot, now))},
            lambda: {"temperature_celsius": float(smi.amdsmi_get_temp_metric(handle, edge, now))},
        ],
        [clock],
        [lambda: {"memory_clock_mhz": _known(smi.amdsmi_get_clock_info(handle, memory).get("clk"))}],
        [lambda: {"throttle_reasons": violation_words(smi.amdsmi_get_violation_status(handle))}],
        [ecc],
    ]


def violation_words(status: Mapping[str, Any]) -> list[str] | None:
    """What holds the clocks back, in words; None where the device tells of nothing.

    Ranks: local.
    """
    known = {word: status.get(field) for field, word in VIOLATIONS.items() if isinstance(status.get(field), bool | int)}
    return [word for word, is_active in known.items() if is_active] if known else None


def _known(value: Any) -> Any:
    """AMD SMI writes "N/A" for what it does not know."""
    if isinstance(value, bool) or value is None or value == "N/A":
        return None
    return float(value) if isinstance(value, int) else value
