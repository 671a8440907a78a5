"""What one rank knows about itself: gathered once, judged by the main process."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rankwise import __version__
from rankwise.device import device_uuid, select_device
from rankwise.errors import RankwiseError
from rankwise.identity import Identity
from rankwise.threads import threads_per_process
from rankwise.visible import VISIBLE_VARIABLES

T = TypeVar("T")

_VARIABLES = {
    "OMP_NUM_THREADS",
    "CUDA_LAUNCH_BLOCKING",
    "MASTER_ADDR",
    "MASTER_PORT",
    *(name for names in VISIBLE_VARIABLES.values() for name in names),
}
_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_")
_PROBE_ELEMENTS = 1024
_answers: list[Future[Any]] = []


@dataclass(frozen=True)
class Space:
    """Room in one file system."""

    path: str = ""
    total_bytes: int = 0
    free_bytes: int = 0
    error: str | None = None
    """Why nothing is known, None where something is."""


@dataclass(frozen=True)
class DeviceFacts:
    """The device that a script would get on this rank."""

    device: str = "cpu"
    name: str = ""
    uuid: str | None = None
    total_bytes: int = 0
    free_bytes: int = 0
    error: str | None = None
    """Why there is no device, or why it does not compute; None where it does."""


@dataclass(frozen=True)
class RankFacts:
    """All that the checks ask of one rank. Every field has a default: a rank may run another version of this."""

    rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    local_world_size: int = 1
    num_nodes: int = 1
    host: str = "localhost"
    launcher: str = "single"
    sources: Mapping[str, str] = field(default_factory=dict)
    wait_seconds: float = 0.0
    """From this rank's arrival until all ranks were there."""
    versions: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    interfaces: tuple[str, ...] = ()
    num_cores: int = 1
    num_threads: int = 1
    """What torch computes with on the CPU."""
    fair_threads: int = 1
    """This process's share of the cores."""
    device: DeviceFacts = DeviceFacts()
    shared_memory: Space | None = None
    directory: Space = Space()
    temporary: Space = Space()
    max_open_files: int | None = None
    """None: no limit."""
    max_locked_bytes: int | None = None
    """None: no limit."""
    has_infiniband: bool = False


def collect_facts(
    identity: Identity,
    directory: Path,
    variables: Mapping[str, str],
    *,
    wait_seconds: float,
    num_threads: int,
    timeout_seconds: float,
) -> RankFacts:
    """What this rank knows about itself, within `timeout_seconds` even where a disk or a driver does not answer.

    Args:
        directory: the one that the ranks share.
        variables: see `find_variables`.
        wait_seconds: see `RankFacts`.
        num_threads: what torch computed with before anybody changed it.
    Ranks: local.
    """
    deadline = time.monotonic() + timeout_seconds
    device = start_probe(lambda: probe_device(identity))
    unasked = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    places = ("/dev/shm", str(directory), tempfile.gettempdir())
    answers = [start_probe(functools.partial(probe_space, place)) for place in places]
    shared_memory, room, temporary = (
        _space(answer, place, deadline) for answer, place in zip(answers, places, strict=True)
    )
    return RankFacts(
        rank=identity.rank,
        local_rank=identity.local_rank,
        node_rank=identity.node_rank,
        local_world_size=identity.local_world_size,
        num_nodes=identity.num_nodes,
        host=identity.hostname,
        launcher=identity.launcher,
        sources=dict(identity.sources),
        wait_seconds=wait_seconds,
        versions=find_versions(),
        variables=variables,
        interfaces=find_interfaces(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        num_threads=num_threads,
        fair_threads=threads_per_process(identity.local_world_size, unasked, launcher=identity.launcher),
        shared_memory=shared_memory if Path("/dev/shm").is_dir() else None,
        directory=room,
        temporary=temporary,
        max_open_files=_soft_limit(resource.RLIMIT_NOFILE),
        max_locked_bytes=_soft_limit(resource.RLIMIT_MEMLOCK),
        has_infiniband=any(Path("/sys/class/infiniband").glob("*")),
        device=_device(device, deadline),
    )


def probe_device(identity: Identity, select: Callable[[Identity], torch.device] = select_device) -> DeviceFacts:
    """The device of this rank, after a small sum on it; what is wrong with it where that fails.

    Ranks: local.
    """
    device = None
    try:
        device = select(identity)
        if device.type == "cpu":
            return DeviceFacts()
        if int(torch.ones(_PROBE_ELEMENTS, device=device).sum().item()) != _PROBE_ELEMENTS:
            return DeviceFacts(str(device), error=f"{device} adds {_PROBE_ELEMENTS} ones wrongly. Have it replaced.")
        free_bytes, total_bytes = torch.accelerator.get_memory_info(device.index)
        name = torch.get_device_module(device).get_device_name(device)
        return DeviceFacts(str(device), name, device_uuid(device), total_bytes, free_bytes)
    except RankwiseError as error:
        return DeviceFacts(str(device or "none"), error=str(error))
    except Exception as error:  # whatever a driver comes up with is what this command is here to tell
        return DeviceFacts(str(device or "none"), error=f"{type(error).__name__}: {first_line(error)}")


def probe_space(path: str) -> Space:
    """How much room there is in the folder `path`.

    Ranks: local.
    """
    try:
        found = os.statvfs(path)
    except FileNotFoundError:
        return Space(path, error="there is no such folder")
    except OSError as error:
        return Space(path, error=error.strerror or str(error))
    return Space(path, found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)


def find_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that decide how ranks compute and talk; none that may hold a secret.

    Ranks: local.
    """
    return {name: value for name, value in environ.items() if name in _VARIABLES or name.startswith(_PREFIXES)}


def find_interfaces() -> tuple[str, ...]:
    """The names of this host's network interfaces.

    Ranks: local.
    """
    return tuple(name for _, name in socket.if_nameindex())


def find_versions() -> dict[str, str]:
    """Versions that ranks of one job have to share, by name; what is not here is left out.

    Ranks: local.
    """
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "rankwise": __version__}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    if torch.version.hip:
        versions["hip"] = torch.version.hip
    if dist.is_nccl_available():
        with contextlib.suppress(Exception):
            versions["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
    if (driver := find_driver()) is not None:
        versions["driver"] = driver
    return versions


def find_driver(root: Path = Path("/")) -> str | None:
    """The version of this node's NVIDIA or AMD kernel driver, None where there is none.

    Ranks: local.
    """
    with contextlib.suppress(OSError):
        # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri ...", or "... Open Kernel Module for ..."
        text = (root / "proc/driver/nvidia/version").read_text(errors="replace")
        if found := re.search(r"\b\d+\.\d+(\.\d+)?\b", text):
            return found[0]
    with contextlib.suppress(OSError):
        return (root / "sys/module/amdgpu/version").read_text(errors="replace").strip() or None
    return None


def first_line(error: BaseException) -> str:
    """What an error says, without the stack that torch's carry.

    Ranks: local.
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def start_probe(function: Callable[[], T]) -> Future[T]:
    """Start `function` in a thread of its own, which is left behind if a file system or a driver holds it.

    Ranks: local.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(function())
        except BaseException as error:
            answer.set_exception(error)

    _answers.append(answer)
    threading.Thread(target=run, name="rankwise-doctor-probe", daemon=True).start()
    return answer


def within(timeout_seconds: float, function: Callable[[], T]) -> T:
    """What `function` returns, unless a file server, a driver or another rank holds it for too long.

    Raises:
        TimeoutError: it did.
    Ranks: local.
    """
    try:
        return start_probe(function).result(timeout_seconds)
    except TimeoutError as error:
        raise TimeoutError(f"no answer within {timeout_seconds:g} s") from error


def is_any_probe_left() -> bool:
    """Whether something is still held: the end of the interpreter could wait for it.

    Ranks: local.
    """
    return not all(answer.done() for answer in _answers)


def _space(answer: Future[Space], path: str, deadline: float) -> Space:
    try:
        return answer.result(max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return Space(path, error="it does not answer")


def _device(answer: Future[DeviceFacts], deadline: float) -> DeviceFacts:
    try:
        return answer.result(max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return DeviceFacts("none", error="the driver does not answer. See dmesg of the node, and restart it.")


def _soft_limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft
