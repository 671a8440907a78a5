"""Which device this process computes on."""

from __future__ import annotations

import torch

from rankwise.errors import DeviceError
from rankwise.identity import Identity


def select_device(identity: Identity, device_type: str | None = None) -> torch.device:
    """The device of this process, made the current one before anything touches an accelerator.

    Args:
        device_type: "cpu", "cuda", "xpu", ...; None takes the accelerator of this machine, and the CPU where
            there is none.
    Raises:
        DeviceError: there is no such accelerator, or there are fewer of them than processes on this node.
    Ranks: local.
    """
    if device_type == "cpu":
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    if device_type is None and found is None:
        return torch.device("cpu")
    if found is None or (device_type is not None and device_type != found.type):
        seen = found.type if found else "no accelerator"
        raise DeviceError(
            f"device type {device_type!r} was asked for, but torch {torch.__version__} sees {seen} here. "
            'Ask for "cpu", or install a torch that is built for this device.'
        )
    device = torch.device(found.type, device_index(identity, torch.accelerator.device_count(), found.type))
    torch.accelerator.set_device_index(device.index)
    return device


def device_index(identity: Identity, num_devices: int, device_type: str = "accelerator") -> int:
    """Which of `num_devices` visible devices is this process's.

    One visible device is this process's own (a launcher that hands out one each), several are the node's.

    Raises:
        DeviceError: this process's local rank lies beyond them.
    Ranks: local.
    """
    if num_devices == 1:
        return 0
    if identity.local_rank < num_devices:
        return identity.local_rank
    raise DeviceError(
        f"LOCAL_RANK={identity.local_rank} is outside the {num_devices} visible {device_type} devices "
        f"({identity.local_world_size} processes on {identity.hostname}). Launch with "
        f"--nproc-per-node={num_devices} at most, or give each process a device of its own."
    )
