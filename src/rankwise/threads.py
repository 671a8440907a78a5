"""How many cores one process of a node may use, and which."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.errors import LaunchError
from rankwise.identity import Identity
from rankwise.visible import are_own

if TYPE_CHECKING:
    import torch

_NO_BINDING = ("torchrun", "env", "single", "deepspeed", "horovod", "ray", "sagemaker", "kubernetes")
"""Launchers that leave the affinity of their processes alone. Slurm and those of MPI may give each its own cores."""

_ROOT = Path("/")
_binding: tuple[frozenset[int], frozenset[int]] | None = None
"""What `bind_cpus` found and what it left: without it a second call would cut the first one's part again."""


def threads_per_process(
    local_world_size: int,
    environ: Mapping[str, str] = os.environ,
    *,
    launcher: str | None = None,
    root: Path = _ROOT,
) -> int:
    """Threads for the computations of one process: OMP_NUM_THREADS where it is set, else `cores_per_process`.

    Args:
        local_world_size: number of processes on this node.
        launcher: as `Identity.launcher`; None finds it in `environ`.
        root: where proc and sys are mounted.
    Ranks: local.
    """
    chosen = re.match(r"\s*0*([1-9][0-9]{0,8})\s*(,|$)", environ.get("OMP_NUM_THREADS", ""))
    if chosen:  # "4,2" is 4 threads, and 2 in each of those
        return int(chosen[1])
    return cores_per_process(local_world_size, environ, launcher=launcher, root=root)


def loader_workers(
    local_world_size: int,
    maximum: int = 8,
    environ: Mapping[str, str] = os.environ,
    *,
    launcher: str | None = None,
    root: Path = _ROOT,
) -> int:
    """Data loader workers for one process: its cores but the one that trains, at least 1 and at most `maximum`.

    Args:
        local_world_size, launcher, root: as `threads_per_process`; OMP_NUM_THREADS does not count, since each worker
            computes with one thread.
    Ranks: local.
    """
    return max(1, min(maximum, cores_per_process(local_world_size, environ, launcher=launcher, root=root) - 1))


def cores_per_process(
    local_world_size: int,
    environ: Mapping[str, str] = os.environ,
    *,
    launcher: str | None = None,
    root: Path = _ROOT,
) -> int:
    """Logical cores that each process of this node may keep busy: its fair share of those that the job has here.

    The job's are those that its control group and Slurm allow and, where the launcher leaves the affinity of its
    processes alone, those of the affinity mask (as it was before `bind_cpus`); a control group's limit of CPU time is
    divided alike. So one of 8 processes never counts all cores, and one bound to 8 cores of its own counts 8.

    Args:
        local_world_size, launcher, root: as `threads_per_process`.
    Returns:
        At least 1.
    Ranks: local.
    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max, cpuset.cpus.effective) and
        Documentation/scheduler/sched-bwc.rst; Slurm, srun (SLURM_CPUS_ON_NODE).
    """
    num_of_job: float = _num_cores_of_job(environ, root)
    if not _may_bind(launcher, environ):
        num_of_job = min(num_of_job, len(_given_cores()))
    share = int(min(num_of_job, _cpu_quota(root)) / max(1, local_world_size))
    return max(1, min(share, len(usable_cores())))


def usable_cores() -> frozenset[int]:
    """The logical cores that this process may run on.

    Ranks: local.
    """
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _given_cores() -> frozenset[int]:
    """The cores that this process was started on."""
    usable = usable_cores()
    return _binding[0] if _binding is not None and usable == _binding[1] else usable


def bind_cpus(
    identity: Identity,
    device: torch.device | str,
    environ: Mapping[str, str] = os.environ,
    *,
    root: Path = _ROOT,
) -> frozenset[int] | None:
    """Keep this process, all its threads and what it starts on cores of its own, near its device.

    With an accelerator: those of the device's NUMA node, divided among the local ranks whose devices are on the same
    one, as far as this process sees their devices. On the CPU: an equal part of the usable cores, by local rank; a
    process that its launcher has bound to cores of its own stays there. Two threads of one physical core stay together.

    Args:
        device: where this process computes, as `select_device` gives it.
    Returns:
        The cores; None where nothing was changed, since the system does not tell, does not allow it, or has fewer cores
        than processes.
    Ranks: local.
    Source: Linux, Documentation/ABI/testing/sysfs-bus-pci (local_cpulist) and sysfs-devices-system-cpu.
    """
    global _binding
    given = _given_cores()
    try:
        if str(device).partition(":")[0] in ("cpu", "mps"):
            chosen = _cpu_share(identity, environ, root)
        else:
            chosen = _near_device(identity, device, environ, root)
        if chosen:
            _set_affinity(chosen, root)
            _binding = given, chosen
    except (OSError, ValueError, AttributeError, RuntimeError):  # no such file, a mask refused, no Linux, no device
        return None
    return chosen or None


def _cpu_share(identity: Identity, environ: Mapping[str, str], root: Path) -> frozenset[int]:
    usable = _given_cores()
    if _is_bound(identity, environ, root):
        return usable
    return _part(usable, identity.local_rank, identity.local_world_size, root)


def _near_device(
    identity: Identity, device: torch.device | str, environ: Mapping[str, str], root: Path
) -> frozenset[int]:
    import torch

    own = torch.device(device)
    near = _local_cores(own, root)
    usable = near & _given_cores()
    index = own.index or 0
    num_visible = torch.accelerator.device_count()
    each_sees_its_own = num_visible < identity.local_world_size or are_own(identity, num_visible, environ)
    if index != identity.local_rank or each_sees_its_own or _is_bound(identity, environ, root):
        return usable  # the others near this device are not known, or are kept apart already
    neighbours = [
        local_rank
        for local_rank in range(identity.local_world_size)
        if local_rank == index or _local_cores(torch.device(own.type, local_rank), root) == near
    ]
    return _part(usable, neighbours.index(index), len(neighbours), root) or usable


def _is_bound(identity: Identity, environ: Mapping[str, str], root: Path) -> bool:
    """True where the launcher has given this process a part of the job's cores."""
    return _may_bind(identity.launcher, environ) and len(_given_cores()) < _num_cores_of_job(environ, root)


def _local_cores(device: torch.device, root: Path) -> frozenset[int]:
    """The cores of the NUMA node that `device` is attached to; none where that is not known."""
    from rankwise.device import pci_address

    address = pci_address(device)
    if address is None:
        return frozenset()
    return _parse_cores((root / "sys/bus/pci/devices" / address / "local_cpulist").read_text())


def _part(cores: frozenset[int], place: int, num_parts: int, root: Path) -> frozenset[int]:
    """The `place`-th of `num_parts` equal parts; empty where there are fewer cores than parts.

    Siblings are mostly numbered far apart (0 and 32): cut by number alone, two processes would share physical cores.
    """
    groups: dict[int, list[int]] = {}
    for core in sorted(cores):
        groups.setdefault(min(_siblings(core, root)), []).append(core)
    units = list(groups.values())
    if len(units) < num_parts:
        units = [[core] for unit in units for core in unit]
    if len(units) < num_parts:
        return frozenset()
    start, stop = (len(units) * position // num_parts for position in (place, place + 1))
    return frozenset(core for unit in units[start:stop] for core in unit)


def _siblings(core: int, root: Path) -> frozenset[int]:
    path = root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
    try:
        return _parse_cores(path.read_text()) or frozenset({core})
    except (OSError, ValueError):
        return frozenset({core})


def _set_affinity(cores: frozenset[int], root: Path) -> None:
    """For every thread that there is: the call sets one thread, and only later ones inherit it."""
    os.sched_setaffinity(0, cores)
    try:
        threads = [int(entry.name) for entry in (root / "proc/self/task").iterdir()]
    except (OSError, ValueError):
        return
    for thread in threads:
        try:
            os.sched_setaffinity(thread, cores)
        except OSError:  # it has ended
            continue


def _may_bind(launcher: str | None, environ: Mapping[str, str]) -> bool:
    if launcher is None:
        try:
            launcher = Identity.resolve(environ).launcher
        except LaunchError:
            return False
    return launcher not in _NO_BINDING


def _num_cores_of_job(environ: Mapping[str, str], root: Path) -> int:
    """Logical cores that all processes of the job on this node have together, however each of them is bound."""
    counts = [os.cpu_count() or 1]
    for directory in _cgroup_directories("cpuset", root):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            cores = _read_cores(directory / name)
            if cores:
                counts.append(len(cores))
                break
    on_node = environ.get("SLURM_CPUS_ON_NODE", "")
    if re.fullmatch(r"0*[1-9][0-9]{0,8}", on_node):
        counts.append(int(on_node))
    return min(counts)


def _cpu_quota(root: Path) -> float:
    """How many CPUs' time the control groups of this process grant, the least of them; inf where there is no limit."""
    quotas = []
    for directory in _cgroup_directories("cpu", root):
        numbers = _read_words(directory / "cpu.max") or [
            *_read_words(directory / "cpu.cfs_quota_us"),
            *_read_words(directory / "cpu.cfs_period_us"),
        ]
        if len(numbers) == 2 and all(re.fullmatch(r"0*[1-9][0-9]{0,17}", number) for number in numbers):
            quotas.append(int(numbers[0]) / int(numbers[1]))  # "max" and -1 mean no limit
    return min(quotas, default=math.inf)


def _cgroup_directories(controller: str, root: Path) -> list[Path]:
    """The control group of this process and all above it, of version 2 and of `controller` in version 1.

    In a container the path may be the host's: where it does not exist, its mount point is still the container's own.
    """
    base = root / "sys/fs/cgroup"
    directories = []
    for line in _read_lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        mount = base / controllers if controllers else base
        if controllers and not mount.is_dir():
            mount = base / controller
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        directories += [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return directories


def _read_cores(path: Path) -> frozenset[int]:
    try:
        return _parse_cores(path.read_text())
    except (OSError, ValueError):
        return frozenset()


def _read_words(path: Path) -> list[str]:
    return " ".join(_read_lines(path)).split()


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, ValueError):
        return []


def _parse_cores(text: str) -> frozenset[int]:
    """ "0-3,8" as numbers."""
    cores: set[int] = set()
    for item in text.split(","):
        if item.strip():
            first, _, last = item.strip().partition("-")
            cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)
