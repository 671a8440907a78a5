"""Ascend devices, through DCMI, the C library of Huawei's driver on which npu-smi stands. Has run on no device yet.

DCMI has no official Python binding; what is needed of it is declared here. The other way would be to start npu-smi
every second and to read its tables, which differ between versions.

Source: DCMI API reference (Ascend 910B) and dcmi_interface_api.h.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch

from rankwise.errors import DeviceError
from rankwise.monitor.accelerators.readings import Driver, Failure, Readings, Way
from rankwise.visible import visible_by_type

_LIBRARIES = ("libdcmi.so", "/usr/local/dcmi/libdcmi.so")
_NEVER = (-8002, -8255)
"""DCMI_ERR_CODE_OPER_NOT_PERMITTED and DCMI_ERR_CODE_NOT_SUPPORT."""

_WHOLE_CHIP, _AI_CORE = 13, 2
"""Whose utilisation; releases before the one that knows the whole chip know the cores."""
_FREQUENCY_HBM, _FREQUENCY_AI_CORE, _FREQUENCY_AI_CORE_MAX = 6, 7, 9
_DEVICE_HBM = 2
_MIB_PER_GIB = 1024


class _HbmInfo(ctypes.Structure):
    _fields_ = (
        ("memory_size", ctypes.c_ulonglong),
        ("freq", ctypes.c_uint),
        ("memory_usage", ctypes.c_ulonglong),
        ("temp", ctypes.c_int),
        ("bandwith_util_rate", ctypes.c_uint),
    )


class _EccInfo(ctypes.Structure):
    _fields_ = (
        ("enable_flag", ctypes.c_int),
        ("single_bit_error_cnt", ctypes.c_uint),
        ("double_bit_error_cnt", ctypes.c_uint),
        ("total_single_bit_error_cnt", ctypes.c_uint),
        ("total_double_bit_error_cnt", ctypes.c_uint),
        ("single_bit_isolated_pages_cnt", ctypes.c_uint),
        ("double_bit_isolated_pages_cnt", ctypes.c_uint),
    )


class _PcieInfo(ctypes.Structure):
    _fields_ = (
        ("venderid", ctypes.c_uint),
        ("subvenderid", ctypes.c_uint),
        ("deviceid", ctypes.c_uint),
        ("subdeviceid", ctypes.c_uint),
        ("domain", ctypes.c_int),
        ("bdf_busid", ctypes.c_uint),
        ("bdf_deviceid", ctypes.c_uint),
        ("bdf_funcid", ctypes.c_uint),
        ("reserve", ctypes.c_ubyte * 32),
    )


class _ChipInfo(ctypes.Structure):
    _fields_ = (
        ("chip_type", ctypes.c_char * 32),
        ("chip_name", ctypes.c_char * 32),
        ("chip_ver", ctypes.c_char * 32),
        ("aicore_cnt", ctypes.c_uint),
    )


class DcmiError(Exception):
    """A call of DCMI failed with this number."""

    def __init__(self, function: str, number: int) -> None:
        super().__init__(f"{function} failed with {number}")
        self.number = number


def find_ascend(device: torch.device) -> Driver:
    """The device that torch calls `device`, by its logical number among those that ASCEND_RT_VISIBLE_DEVICES leaves.

    Ascend's runtime tells torch no UUID; the logical number is what it and the driver have in common.

    Raises:
        Exception: the library or the driver is missing or fails, or it does not know the device.
    Ranks: local.
    """
    dcmi = Dcmi(_load(), _logical_number(device))
    return Driver(dcmi.name(), dcmi.address(), Readings(_questions(dcmi), judge), lambda: None)


def judge(error: Exception) -> Failure:
    """What an error of DCMI means for the question that met it.

    Ranks: local.
    """
    if isinstance(error, AttributeError):  # the library is older than this file
        return Failure.NEVER
    return Failure.NEVER if isinstance(error, DcmiError) and error.number in _NEVER else Failure.NOT_NOW


class Dcmi:
    """The calls of DCMI that are needed, for one chip.

    Raises:
        DcmiError: the driver does not answer, or knows no chip of that logical number.
    """

    def __init__(self, library: Any, logical_number: int) -> None:
        self._library = library
        card, chip = ctypes.c_int(), ctypes.c_int()
        self._call("dcmi_init")
        self._call(
            "dcmi_get_card_id_device_id_from_logicid",
            ctypes.byref(card),
            ctypes.byref(chip),
            ctypes.c_uint(logical_number),
        )
        self._chip = (ctypes.c_int(card.value), ctypes.c_int(chip.value))

    def number(self, function: str, kind: int | None = None, *, is_signed: bool = False) -> int:
        """What a function tells that gives one number, of one kind where it knows several."""
        result: Any = ctypes.c_int() if is_signed else ctypes.c_uint()
        chosen = () if kind is None else (ctypes.c_int(kind),)
        self._call(function, *self._chip, *chosen, ctypes.byref(result))
        return int(result.value)

    def memory(self) -> dict[str, Any]:
        """On-chip memory, as readings."""
        info = _HbmInfo()
        self._call("dcmi_get_device_hbm_info", *self._chip, ctypes.byref(info))
        return {
            "memory_used_gib": info.memory_usage / _MIB_PER_GIB,
            "memory_total_gib": info.memory_size / _MIB_PER_GIB,
        }

    def ecc(self) -> dict[str, Any]:
        """Errors of the on-chip memory since the driver started, as readings."""
        info = _EccInfo()
        self._call("dcmi_get_device_ecc_info", *self._chip, ctypes.c_int(_DEVICE_HBM), ctypes.byref(info))
        if not info.enable_flag:
            return {}
        return {"ecc_corrected": info.single_bit_error_cnt, "ecc_uncorrected": info.double_bit_error_cnt}

    def name(self) -> str | None:
        """The product, None where the driver does not tell."""
        info = _ChipInfo()
        try:
            self._call("dcmi_get_device_chip_info", *self._chip, ctypes.byref(info))
        except (DcmiError, AttributeError):
            return None
        words = [part.decode(errors="replace").strip() for part in (info.chip_type, info.chip_name)]
        return " ".join(word for word in words if word) or None

    def address(self) -> str | None:
        """The PCI address, None where the driver does not tell."""
        info = _PcieInfo()
        try:
            self._call("dcmi_get_device_pcie_info_v2", *self._chip, ctypes.byref(info))
        except (DcmiError, AttributeError):
            return None
        return f"{info.domain:04x}:{info.bdf_busid:02x}:{info.bdf_deviceid:02x}.{info.bdf_funcid:x}"

    def _call(self, name: str, *arguments: Any) -> None:
        number = getattr(self._library, name)(*arguments)
        if number != 0:
            raise DcmiError(name, number)


def _questions(dcmi: Dcmi) -> list[list[Way]]:
    def utilisation(kind: int) -> Way:
        return lambda: {"utilisation_percent": float(dcmi.number("dcmi_get_device_utilization_rate", kind))}

    def frequency(name: str, kind: int) -> list[Way]:
        return [lambda: {name: float(dcmi.number("dcmi_get_device_frequency", kind))}]

    return [
        [utilisation(_WHOLE_CHIP), utilisation(_AI_CORE)],
        [dcmi.memory],
        # In tenths of a watt.
        [lambda: {"power_watts": dcmi.number("dcmi_get_device_power_info", is_signed=True) / 10}],
        [lambda: {"temperature_celsius": float(dcmi.number("dcmi_get_device_temperature", is_signed=True))}],
        frequency("clock_mhz", _FREQUENCY_AI_CORE),
        frequency("clock_max_mhz", _FREQUENCY_AI_CORE_MAX),
        frequency("memory_clock_mhz", _FREQUENCY_HBM),
        [dcmi.ecc],
    ]


def _load() -> Any:
    words = ""
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            words = words or str(error)
    raise DeviceError(words)


def _logical_number(device: torch.device) -> int:
    index = device.index or 0
    visible = visible_by_type(os.environ).get("npu")
    if visible is None:
        return index
    if index >= len(visible):
        raise DeviceError(f"{device} is not among ASCEND_RT_VISIBLE_DEVICES={','.join(visible)}")
    return int(visible[index])
