"""The store through which the ranks find each other before there is any process group."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import psutil
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from rankwise.errors import LaunchError, RankwiseError, StoppedError
from rankwise.files import write_atomic
from rankwise.identity import Identity
from rankwise.parent import start_time
from rankwise.rendezvous import MeetingPoint, find_meeting_point

T = TypeVar("T")

_LAUNCHERS = ("hydra", "mpirun", "mpiexec", "orted", "prte", "orterun", "pmi_proxy", "palsd", "jsrun", "jskd")
_PORT_SECONDS = 20.0
_ANSWER_SECONDS = 5.0
_store: Store | None = None
_met_at: str | None = None


def find_store(identity: Identity, timeout: timedelta, is_stopped: Callable[[], bool]) -> Store:
    """The store of this job; one for all sessions of this process, hosted by the main process or the elastic agent.

    A second store on the same port would race with the first one's end. Whoever reaches its port can write to it: what
    is read from it is JSON, or carries a secret that the ranks do not share through it.

    Raises:
        LaunchError: nobody says where the ranks meet.
        RankwiseError: the main process was not found there in time.
        StoppedError: this process was asked to stop first.
    Ranks: every rank must call.
    """
    global _store
    if _store is None:
        # In a thread, because connecting waits where no signal handler runs; it ends by its own timeout.
        found = in_thread(lambda: _meet(identity, timeout), "rankwise-rendezvous")
        if not wait_until(found.done, math.inf, is_stopped):
            raise StoppedError(f"rank {identity.rank} was asked to stop before it found the other ranks.")
        _store = found.result()
    return _store


def in_thread(call: Callable[[], T], name: str) -> Future[T]:
    """What `call` will return, or raise, from a thread that does not keep the process alive.

    Ranks: local.
    """
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(call())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return found


def wait_until(
    is_done: Callable[[], bool], timeout_seconds: float, is_stopped: Callable[[], bool], grace_seconds: float = 5.0
) -> bool:
    """Whether `is_done` came true in time; signal handlers run meanwhile, as they would not in the store's own wait.

    A stop request leaves `grace_seconds`: ranks that start only a moment later all stop together in good order.

    Ranks: local.
    """
    start = time.monotonic()
    deadline, stopping = start + timeout_seconds, False
    while not is_done():
        now = time.monotonic()
        if is_stopped() and not stopping:
            stopping, deadline = True, min(deadline, now + grace_seconds)
        if now >= deadline:
            return False
        time.sleep(min(0.5, max(0.01, (now - start) / 8)))
    return True


def _meet(identity: Identity, timeout: timedelta) -> Store:
    point = find_meeting_point(identity, os.environ)
    if point.address is None:
        raise LaunchError(f"{identity.launcher} gives no address to meet at. Set MASTER_ADDR and MASTER_PORT.")
    if point.port is None:
        try:
            return _meet_through_a_file(identity, point, timeout)
        except OSError as error:
            raise RankwiseError(
                f"rank {identity.rank} cannot tell the others its port in a file: {error}. Set MASTER_ADDR and "
                "MASTER_PORT, or TMPDIR to a folder that this process can write."
            ) from error
    if identity.launcher == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The agent hosts the store, and ranks that it starts again must not find what the last ones left there.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"/worker/attempt_{attempt}", _connect(identity, point.address, point.port, timeout))
    global _met_at
    _met_at = address = _resolvable(point.address)
    meet = _host if identity.is_main_process else _connect
    return meet(identity, address, point.port, timeout)


def _resolvable(address: str) -> str:
    """The address itself, or what Slurm knows for a node whose name the name service does not."""
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError):
        if "SLURM_JOB_ID" in os.environ:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                command = ["scontrol", "show", "node", "--oneliner", address]
                told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
                if (found := re.search(r"\bNodeAddr=(\S+)", told)) is not None:
                    return found[1]
    return address


def _host(identity: Identity, address: str, port: int, timeout: timedelta) -> Store:
    try:
        return _open(address, port, timeout, is_host=True)
    except (dist.DistError, RuntimeError, OSError) as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            # If another process that claims rank 0 holds the port, the roll call names both.
            with contextlib.suppress(RankwiseError):
                return _connect(identity, address, port, min(timeout, timedelta(seconds=_PORT_SECONDS)))
            reason = "another program holds this port"
        else:
            reason = str(error).splitlines()[0]
        raise RankwiseError(
            f"rank 0 cannot open a store at {address}:{port}: {reason}. Set MASTER_ADDR to an address of the node of "
            "rank 0, and MASTER_PORT to a port that is free there."
        ) from error


def _connect(identity: Identity, address: str, port: int, timeout: timedelta) -> Store:
    try:
        return _open(address, port, timeout, is_host=False)
    except (dist.DistError, RuntimeError, TimeoutError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        where = f"rank {identity.rank} of {identity.world_size} found no rank 0 at {address}:{port}"
        raise RankwiseError(
            f"{where} within {timeout.total_seconds():g} s: {reason}. See the output of rank 0; the address must be "
            "its node's, the port free there and open between the nodes (MASTER_ADDR, MASTER_PORT)."
        ) from error


def _open(address: str, port: int, timeout: timedelta, *, is_host: bool) -> Store:
    """torch's store; its own timeout does not end the wait for a program that takes connections and says nothing."""
    if not is_host:
        _wait_for_listener(address, port, timeout.total_seconds())
    opened = in_thread(
        lambda: (
            _listen(address, port, timeout)
            if is_host
            else TCPStore(address, port, None, False, timeout, wait_for_workers=False)
        ),
        "rankwise-rendezvous",
    )
    try:
        return opened.result(timeout.total_seconds() + _ANSWER_SECONDS)
    except TimeoutError:
        raise TimeoutError("what listens there does not answer as a store does") from None


def _listen(address: str, port: int, timeout: timedelta) -> TCPStore:
    """Host the store; where its address is loopback, for this machine alone: torch itself would listen everywhere."""
    if address not in ("127.0.0.1", "localhost"):
        return TCPStore(address, port, None, True, timeout, wait_for_workers=False)
    with socket.create_server(("127.0.0.1", port), backlog=1024) as listener:
        port = listener.getsockname()[1]
        descriptor = listener.detach()
    return TCPStore("127.0.0.1", port, None, True, timeout, wait_for_workers=False, master_listen_fd=descriptor)


def _wait_for_listener(address: str, port: int, timeout_seconds: float) -> None:
    """Until somebody listens there; torch's own retries overrun their timeout and print C++ stacks."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            remaining = max(0.1, deadline - time.monotonic())
            socket.create_connection((address, port), timeout=min(5.0, remaining)).close()
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= deadline:
                raise TimeoutError(str(error)) from None
        time.sleep(0.1)


def _meet_through_a_file(identity: Identity, point: MeetingPoint, timeout: timedelta) -> Store:
    """All processes are on one node and nobody gave a port: rank 0 takes a free one and tells it in a file.

    The folder is this user's alone, and the file names the job by what its processes share: a token of the launcher,
    or the launcher's own process, which all of them descend from.
    """
    folder = _own_folder()
    name = "".join(c if c.isalnum() else "-" for c in point.token or _launcher_process())
    path = folder / f"{name}.json"
    if identity.is_main_process:
        with _locked(folder):  # two that claim rank 0 must not both host a store: the roll call could not name them
            for other in folder.glob("*.json"):
                if _told_port(other) is None:  # of a job that was killed
                    other.unlink(missing_ok=True)
            if _told_port(path) is None:
                store = _listen(point.address or "127.0.0.1", 0, timeout)
                here = {"port": store.port, "pid": os.getpid(), "started": start_time(os.getpid())}
                write_atomic(path, json.dumps(here))
                _forget_at_exit(path)
                return store
    deadline = time.monotonic() + timeout.total_seconds()
    while (port := _told_port(path)) is None:
        if time.monotonic() > deadline:
            raise RankwiseError(
                f"rank {identity.rank} of {identity.world_size} did not hear from rank 0 on {identity.hostname} within "
                f"{timeout.total_seconds():g} s. See the output of rank 0, or set MASTER_ADDR and MASTER_PORT."
            )
        time.sleep(0.02)
    return _connect(identity, point.address or "127.0.0.1", port, timeout)


def _own_folder() -> Path:
    folder = Path(tempfile.gettempdir(), f"rankwise-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise LaunchError(f"{folder} is not this user's alone. Remove it, or set MASTER_ADDR and MASTER_PORT.")
    return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems lock no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _told_port(path: Path) -> int | None:
    """The port in the file, None where there is none or its process is one of an earlier job that died."""
    try:
        told = json.loads(path.read_text())
        return int(told["port"]) if start_time(int(told["pid"])) == told["started"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _launcher_process() -> str:
    """The process that started all processes of the job on this node, as far as names tell; else the parent."""
    parents = psutil.Process().parents()
    for process in parents:
        with contextlib.suppress(psutil.Error):
            if any(word in process.name() for word in _LAUNCHERS):
                return f"{process.pid}-{start_time(process.pid)}"
    return f"{os.getppid()}-{start_time(os.getppid())}"


def _forget_at_exit(path: Path) -> None:
    import atexit

    pid = os.getpid()

    def forget() -> None:
        if os.getpid() == pid:
            with contextlib.suppress(OSError):
                path.unlink()

    atexit.register(forget)


def find_interface() -> str | None:
    """The network interface through which this node reaches that of rank 0, if the host's own name leads nowhere.

    Where the name is unknown, or stands for loopback, as on many a cloud image, gloo would listen on loopback.

    Returns:
        None where the name has an address that others can reach, or no interface is found.
    Ranks: local.
    """
    with contextlib.suppress(OSError):
        found = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
        if any(not str(address).startswith(("127.", "::1", "fe80")) for address in found):
            return None
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((_met_at or "192.0.2.1", 9))  # sends nothing: it only asks which way packets would go
        own = probe.getsockname()[0]
        if own.startswith("127."):  # rank 0 itself, by its name
            return None
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address == own for address in addresses):
                return name
    return None


def container() -> str:
    """What tells this container from every other on its machine; the pods of one host may share its network.

    Ranks: local.
    """
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid").strip("pid:[]")
    return ""


def machine() -> str:
    """What tells this machine, or container, from every other: processes with the same one share loopback.

    Ranks: local.
    """
    boot_id, network = "", ""
    with contextlib.suppress(OSError):
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        network = os.readlink("/proc/self/ns/net").strip("net:[]")
    return f"{socket.gethostname()}:{boot_id}:{network}"
