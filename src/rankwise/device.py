"""Which device this process computes on."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from rankwise.errors import DeviceError
from rankwise.identity import Identity

_VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")


def select_device(
    identity: Identity, device_type: str | None = None, environ: Mapping[str, str] = os.environ
) -> torch.device:
    """The device of this process, made the current one before anything touches an accelerator.

    Args:
        device_type: "cpu", "cuda", "xpu", ...; None takes the accelerator of this machine, and the CPU where
            there is none.
    Raises:
        DeviceError: there is no such accelerator, there are fewer of them than processes on this node, or this
            process's own cannot be used.
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
    index = device_index(identity, torch.accelerator.device_count(), found.type, environ)
    try:
        torch.accelerator.set_device_index(index)
    except RuntimeError as error:
        raise DeviceError(
            f"rank {identity.rank} cannot use {found.type}:{index} on {identity.hostname}: "
            f"{str(error).splitlines()[0]}. See which process holds it, or ask for another device."
        ) from error
    return torch.device(found.type, index)


def device_index(
    identity: Identity,
    num_devices: int,
    device_type: str = "accelerator",
    environ: Mapping[str, str] = os.environ,
) -> int:
    """Which of `num_devices` visible devices is this process's.

    Several visible devices are the node's. One is this process's own where it is alone on its node, or where its
    environment says which devices it may see (a launcher that hands out one each).

    Raises:
        DeviceError: this process's local rank lies beyond them, or all processes of the node would share one.
    Ranks: local.
    """
    if num_devices == 1:
        if identity.local_world_size > 1 and environ.keys().isdisjoint(_VISIBLE_DEVICES):
            raise DeviceError(
                f"{identity.local_world_size} processes on {identity.hostname} would share its one {device_type} "
                f"device: none of {', '.join(_VISIBLE_DEVICES)} is set. Launch with --nproc-per-node=1, or set one "
                "of them to a device of its own for each process."
            )
        return 0
    if identity.local_rank < num_devices:
        return identity.local_rank
    raise DeviceError(
        f"LOCAL_RANK={identity.local_rank} is outside the {num_devices} visible {device_type} devices "
        f"({identity.local_world_size} processes on {identity.hostname}). Launch with "
        f"--nproc-per-node={num_devices} at most, or give each process a device of its own."
    )
