"""Which device this process computes on, and whether another process computes on the same."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch

from rankwise.errors import DeviceError
from rankwise.identity import Identity
from rankwise.visible import VISIBLE_VARIABLES, are_own, choose_index, is_sharing_asked, visible_by_type, visible_text

_MAY_SHARE = "or pass share_devices=True to rankwise.init if sharing is meant"


def select_device(
    identity: Identity,
    device_type: str | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    share: bool = False,
) -> torch.device:
    """The device of this process, made the current one before anything touches an accelerator.

    Args:
        device_type: "cpu", "cuda", "xpu", ...; None takes the accelerator of this machine, and the CPU where
            there is none.
        environ: says which devices this process may see; torch itself reads os.environ.
        share: where there are fewer devices than processes on this node, let several processes use one.
    Raises:
        DeviceError: there is no such accelerator, there are fewer of them than processes on this node, or this
            process's own cannot be used.
    Ranks: local.
    """
    if device_type == "cpu":
        return torch.device("cpu")
    found, num_devices = _find_accelerator(identity)
    if device_type is None and found is None:
        return torch.device("cpu")
    if found is None or (device_type is not None and device_type != found):
        hidden = visible_text(environ, device_type)
        raise DeviceError(
            f"device type {device_type!r} was asked for, but torch {torch.__version__} sees {found or 'no accelerator'}"
            f" here{f' with {hidden}' if hidden else ''}. "
            'Ask for "cpu", or install a torch that is built for this device.'
        )
    index = device_index(identity, num_devices, found, environ, share=share)
    try:
        torch.accelerator.set_device_index(index)
    except RuntimeError as error:
        raise DeviceError(
            f"rank {identity.rank} cannot use {found}:{index} on {identity.hostname}: "
            f"{_first_line(error)}. See which process holds it, or ask for another device."
        ) from error
    return torch.device(found, index)


def _find_accelerator(identity: Identity) -> tuple[str | None, int]:
    """The type of this machine's accelerator and how many of them are visible; (None, 0) where there is none.

    Counting makes no context: torch asks NVML, or else cudaGetDeviceCount. A context of some hundred MiB is made by
    cudaSetDevice, on the device that it names (from CUDA 12 on), and by whatever computes or allocates, on the current
    device, which is 0 until another is set. So: count, choose, set_device_index, and nothing else before.

    Source: CUDA runtime API, cudaSetDevice; torch.cuda.device_count.
    """
    try:
        found = torch.accelerator.current_accelerator(check_available=True)
        num_devices = torch.accelerator.device_count() if found else 0
    except RuntimeError as error:
        raise DeviceError(
            f"rank {identity.rank} cannot count the devices of {identity.hostname}: {_first_line(error)}. "
            'Correct the driver or the variables that hide devices, or ask for "cpu".'
        ) from error
    return (found.type, num_devices) if found and num_devices else (None, 0)


def device_index(
    identity: Identity,
    num_devices: int,
    device_type: str = "accelerator",
    environ: Mapping[str, str] = os.environ,
    *,
    share: bool = False,
) -> int:
    """Which of `num_devices` visible devices is this process's.

    Several visible devices are the node's, unless Slurm gave so many to each task. One is this process's own where it
    is alone on its node, or where its environment says which devices it may see (a launcher that hands out one each).
    Whether two processes were handed the same is for `find_shared_devices`, once all ranks are known.

    Args:
        device_type: "cuda", "mps", ...: whose variables count, and a word of the message.
        share: let several processes use one device rather than fail; also where Slurm was asked to (--ntasks-per-gpu).
    Raises:
        DeviceError: this process's local rank lies beyond them, or all processes of the node would share one.
    Ranks: local.
    """
    all_names = tuple(name for names in VISIBLE_VARIABLES.values() for name in names)
    names = all_names if device_type == "accelerator" else VISIBLE_VARIABLES.get(device_type, ())
    share = share or is_sharing_asked(environ)
    restricted = not environ.keys().isdisjoint(names) or are_own(identity, num_devices, environ)
    index = choose_index(identity, num_devices, environ)
    if num_devices == 1 and identity.local_world_size > 1 and not restricted and not share:
        reason = f": none of {', '.join(names)} is set" if names else ""
        remedy = ", set one of them to a device of its own for each process" if names else ""
        raise DeviceError(
            f"{identity.local_world_size} processes on {identity.hostname} would share its one {device_type} device"
            f"{reason}. {_start_at_most(1, identity)}{remedy}, {_MAY_SHARE}."
        )
    if index is not None:
        return index
    if share:
        return identity.local_rank % num_devices
    source = identity.sources.get("local_rank", "")
    seen = visible_text(environ) or "no variable hides any"
    raise DeviceError(
        f"{source if source.isupper() else 'LOCAL_RANK'}={identity.local_rank} is outside the {num_devices} visible "
        f"{device_type} devices ({identity.local_world_size} processes on {identity.hostname}, {seen}). "
        f"{_start_at_most(num_devices, identity)}, give each process devices of its own"
        f"{f' ({names[0]})' if names else ''}, {_MAY_SHARE}."
    )


def _start_at_most(num_processes: int, identity: Identity) -> str:
    if identity.launcher == "slurm":
        return f"Start at most {num_processes} with --ntasks-per-node={num_processes}"
    if identity.launcher in ("torchrun", "env", "single"):
        return f"Launch with --nproc-per-node={num_processes}{' at most' if num_processes > 1 else ''}"
    return f"Start at most {num_processes} on each node"


def device_uuid(device: torch.device, environ: Mapping[str, str] = os.environ) -> str | None:
    """The name that `device` has for every process of its host: "GPU-...", "MIG-..." or its PCI address.

    Returns:
        None for the CPU, and where torch cannot tell two devices apart.
    Ranks: local; ask after `select_device`, since torch may initialize the accelerator to answer.
    """
    properties = _properties(device)
    if properties is None:
        return None
    visible = visible_by_type(environ).get(device.type, ())
    index = device.index or 0
    if index < len(visible) and visible[index].startswith("MIG-"):
        return visible[index]
    if " MIG " in str(getattr(properties, "name", "")):
        return None  # the properties may be those of the whole GPU, which other slices share without harm
    uuid = _uuid_text(getattr(properties, "uuid", None))
    return f"GPU-{uuid}" if uuid else pci_address(device)


def pci_address(device: torch.device) -> str | None:
    """The address of `device` as sysfs writes it, such as "0000:3b:00.0"; None where torch does not know it.

    Ranks: local; ask after `select_device`.
    """
    properties: Any = _properties(device)
    try:
        return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    except (AttributeError, TypeError, ValueError):
        return None


class DeviceRow(NamedTuple):
    """One rank's device, as the ranks tell each other."""

    rank: int
    local_rank: int
    hostname: str
    device: str
    """As torch writes it, "cuda:0"."""
    uuid: str | None
    """What `device_uuid` gives; None counts as no device."""
    visible: str | None
    """What `rankwise.visible.visible_text` gives."""


def find_shared_devices(
    rows: Sequence[tuple[int, int, str, str, str | None, str | None]],
) -> str | None:
    """What is wrong where two ranks compute on one device: which ranks, which device, and the likely cause.

    Args:
        rows: a `DeviceRow` of every rank.
    Returns:
        None where no device is used twice.
    Ranks: local; every rank that is given the same rows gets the same text.
    """
    users: dict[tuple[str, str], list[DeviceRow]] = {}
    for row in sorted((DeviceRow(*row) for row in rows), key=lambda row: row.rank):
        if row.uuid is not None:
            users.setdefault((row.hostname, row.uuid), []).append(row)
    pairs = [pair for ranks in users.values() for pair in combinations(ranks, 2) if _is_shared(*pair)]
    if not pairs:
        return None
    first, second = next((pair for pair in pairs if pair[0].local_rank != pair[1].local_rank), pairs[0])
    num_others = len({row.rank for pair in pairs for row in pair}) - 2
    return (
        f"rank {first.rank} (local rank {first.local_rank}, {first.device}) and rank {second.rank} (local rank "
        f"{second.local_rank}, {second.device}) compute on one device of {first.hostname}, {first.uuid}"
        f"{f' ({num_others} more ranks share devices)' if num_others else ''}. {_sharing_cause(first, second)} "
        "If sharing is meant, pass share_devices=True to rankwise.init."
    )


def _is_shared(first: DeviceRow, second: DeviceRow) -> bool:
    # Two numbers in one list are two devices, even where the parts of a partitioned accelerator report one UUID.
    return first.device == second.device or first.visible != second.visible


def _sharing_cause(first: DeviceRow, second: DeviceRow) -> str:
    """The likely cause and what to do about it."""
    for row in (first, second):
        if row.local_rank != row.rank == _index(row.device):
            return (
                f"Rank {row.rank} took the device with the number of its global rank: "
                f"choose by local rank, here {row.device.partition(':')[0]}:{row.local_rank}."
            )
    if first.visible != second.visible:
        return (
            f"The devices that they see overlap ({first.visible or 'all of the node'}; "
            f"{second.visible or 'all of the node'}): give each process devices of its own."
        )
    if first.local_rank == second.local_rank:
        return (
            f"Both are local rank {first.local_rank}: two launchers on this host each count their processes from 0 "
            f"and see the same devices ({first.visible or 'all of the node'}). Start all processes of the host with "
            "one launcher, or give each launcher devices of its own (CUDA_VISIBLE_DEVICES=0,1 and "
            "CUDA_VISIBLE_DEVICES=2,3)."
        )
    if first.visible is not None and "MIG-" in first.visible and "," in first.visible:
        return (
            f"Both see {first.visible}, and a process uses the first MIG slice of its list alone: "
            "set CUDA_VISIBLE_DEVICES to another slice for each process."
        )
    if first.visible is not None and "," not in first.visible:
        return (
            f"Both were started with {first.visible} and so see one device: set it to another device for each "
            "process, or let every process see all of them."
        )
    return "Neither used its local rank: choose the device by local rank, as rankwise.select_device does."


def _index(device: str) -> int:
    number = device.partition(":")[2]
    return int(number) if number.isdecimal() else 0


def _properties(device: torch.device) -> Any | None:
    if device.type in ("cpu", "mps", "meta"):
        return None
    try:
        return torch.get_device_module(device).get_device_properties(device.index or 0)
    except (AttributeError, AssertionError, RuntimeError):
        return None


def _uuid_text(uuid: object) -> str | None:
    """Lower-case text of a UUID that torch gives as text or as bytes; None where it is missing or all zeros."""
    if isinstance(uuid, (bytes, bytearray, list, tuple)):
        uuid = bytes(uuid).hex()
    text = str(uuid).lower() if uuid is not None else ""
    return text if text.strip("0-") else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
