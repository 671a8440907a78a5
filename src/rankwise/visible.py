"""Which accelerators the environment lets this process see, and which of them is its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankwise.identity import Identity

VISIBLE_VARIABLES: Mapping[str, tuple[str, ...]] = {
    "cuda": ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
    "xpu": ("ZE_AFFINITY_MASK",),
    "npu": ("ASCEND_RT_VISIBLE_DEVICES",),
}
"""torch's device type -> the variables that restrict what a process sees of it; a ROCm device is "cuda" in torch."""

_MAX_DIGITS = 9
_TASKS_ARE_PROCESSES = ("slurm", "env")


def visible_devices(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """The devices that the environment lets this process see: their numbers on the node, or UUIDs.

    Where variables of several vendors are set, those of the first vendor that leave a device count: one node holds
    devices of one vendor, and Slurm may set the variables of all.

    Returns:
        None where no variable restricts what is seen; an empty tuple where nothing is.
    Ranks: local.
    """
    lists = visible_by_type(environ)
    if not lists:
        return None
    return next((devices for devices in lists.values() if devices), ())


def visible_by_type(environ: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """torch's device type -> what may be seen of it, for the types that a variable restricts.

    Ranks: local.
    Source: CUDA C++ Programming Guide, CUDA environment variables; ROCm, GPU isolation techniques; Level Zero core
        programming guide, affinity mask; CANN environment variables. Of malformed lists: what torch makes of them.
    """
    lists = {"cuda": _cuda_devices(environ), "xpu": _level_zero_devices(environ), "npu": _ascend_devices(environ)}
    return {device_type: devices for device_type, devices in lists.items() if devices is not None}


def visible_text(environ: Mapping[str, str], device_type: str | None = None) -> str | None:
    """The restricting variables as they are set, "NAME=value NAME=value"; None where none is.

    Args:
        device_type: only the variables of this type; None takes all.
    Ranks: local.
    """
    names = [name for kind, names in VISIBLE_VARIABLES.items() if device_type in (None, kind) for name in names]
    return " ".join(f"{name}={environ[name]}" for name in names if name in environ) or None


def predict_device(identity: Identity, environ: Mapping[str, str]) -> str | None:
    """What `rankwise.device.select_device` would choose, as far as the environment alone can say.

    Whether the devices exist, and whether torch can use them, is not asked.

    Returns:
        "cpu" where every device is hidden, otherwise a device such as "cuda:3"; None where nothing restricts what is
        seen, where two vendors' devices are visible, or where this process's device would lie outside.
    Ranks: local.
    """
    lists = visible_by_type(environ)
    if not lists:
        return None
    seen = [(device_type, devices) for device_type, devices in lists.items() if devices]
    if not seen:
        return "cpu"
    if len(seen) > 1:
        return None
    device_type, devices = seen[0]
    index = choose_index(identity, len(devices), environ)
    if index != 0 and devices[0].startswith("MIG-"):
        return None  # how many MIG slices of a list one process may use differs between drivers
    return None if index is None else f"{device_type}:{index}"


def choose_index(identity: Identity, num_devices: int, environ: Mapping[str, str]) -> int | None:
    """Which of `num_devices` visible devices is this process's: 0 where all of them are its own, else its local rank.

    Returns:
        None where the local rank lies beyond them.
    Ranks: local.
    """
    if num_devices == 1 or are_own(identity, num_devices, environ):
        return 0
    return identity.local_rank if identity.local_rank < num_devices else None


def are_own(identity: Identity, num_devices: int, environ: Mapping[str, str]) -> bool:
    """True where Slurm gives each task its own devices, and the `num_devices` that this task sees are those.

    With --gpu-bind=none a task sees its whole node in spite of --gpus-per-task: then the numbers differ. Processes that
    another launcher started inside a task share what the task sees.

    Ranks: local.
    """
    if identity.launcher not in _TASKS_ARE_PROCESSES:
        return False
    if environ.get("SLURM_LOCALID", str(identity.local_rank)) != str(identity.local_rank):
        return False
    return num_devices == _gpus_per_task(environ)


def is_sharing_asked(environ: Mapping[str, str]) -> bool:
    """True where Slurm was told to place several tasks on one device (--ntasks-per-gpu).

    Ranks: local.
    """
    count = environ.get("SLURM_NTASKS_PER_GPU", "")
    return re.fullmatch(r"[0-9]+", count) is not None and count.lstrip("0") not in ("", "1")


def _gpus_per_task(environ: Mapping[str, str]) -> int | None:
    """From --gpus-per-task ("2", "a100:2", "a100:2,v100:1") or --tres-per-task ("cpu=4,gres/gpu:a100=2")."""
    if environ.get("SLURM_GPUS_PER_TASK"):
        items = environ["SLURM_GPUS_PER_TASK"].split(",")
    else:
        items = [item for item in environ.get("SLURM_TRES_PER_TASK", "").split(",") if "gres" in item and "gpu" in item]
    counts = [re.search(rf"(?:^|[:=])([0-9]{{1,{_MAX_DIGITS}}})$", item) for item in items]
    return sum(int(count[1]) if count else 1 for count in counts) if counts else None


def _cuda_devices(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    cuda, hip, rocr = (_index_list(environ.get(name)) for name in VISIBLE_VARIABLES["cuda"])
    if hip is not None and rocr is not None:
        return _within(rocr, hip)
    # ROCR next to CUDA is what Slurm sets on nodes of either vendor, with one meaning: not one list inside the other.
    return next((devices for devices in (hip, cuda, rocr) if devices is not None), None)


def _within(outer: tuple[str, ...], inner: tuple[str, ...]) -> tuple[str, ...]:
    """HIP numbers the devices that ROCR leaves; the first number beyond them ends the list."""
    if inner and not inner[0].isdecimal():
        return inner
    chosen: list[str] = []
    for number in inner:
        if len(number) > _MAX_DIGITS or int(number) >= len(outer):
            break
        chosen.append(outer[int(number)])
    return tuple(chosen)


def _index_list(value: str | None) -> tuple[str, ...] | None:
    """A list of numbers or of UUIDs as CUDA reads it: up to the first that is neither, and none if one comes twice."""
    if value is None:
        return None
    prefix = next((prefix for prefix in ("GPU-", "MIG-") if value.startswith(prefix)), None)
    devices: list[str] = []
    for element in value.split(","):
        device = _leading_number(element) if prefix is None else element if element.startswith(prefix) else None
        if device in devices:
            return ()
        if device is None:  # "-1", "" and Slurm's "NoDevFiles" come here too
            break
        devices.append(device)
    return tuple(devices)


def _leading_number(element: str) -> str | None:
    """CUDA reads as many digits as there are, so that "1gpu" is 1."""
    found = re.match(r"\+?0*([0-9]+)", element.strip())
    return found[1] if found else None


def _level_zero_devices(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    """Entries are "device" or "device.tile"; unlike elsewhere, an empty list restricts nothing."""
    mask = environ.get("ZE_AFFINITY_MASK", "").strip()
    if not mask or mask == "default":
        return None
    entries = [entry.strip() for entry in mask.split(",")]
    entries = [entry for entry in entries if re.fullmatch(r"[0-9]+(\.[0-9]+)*", entry)]
    if environ.get("ZE_FLAT_DEVICE_HIERARCHY", "").strip().upper() == "COMPOSITE":
        # Two tiles of one card are then one device with two parts.
        cards = [entry.partition(".")[0] for entry in entries]
        entries = [card if cards.count(card) > 1 else entry for card, entry in zip(cards, entries, strict=True)]
    return tuple(dict.fromkeys(entries))


def _ascend_devices(environ: Mapping[str, str]) -> tuple[str, ...] | None:
    return _index_list(environ.get("ASCEND_RT_VISIBLE_DEVICES"))
