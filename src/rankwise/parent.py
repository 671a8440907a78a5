"""No orphans: a rank whose launcher was killed ends too, instead of training on with nobody to stop it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from rankwise.errors import LaunchError

LAUNCHER = "RANKWISE_LAUNCHER"
"""The variable by which a launcher makes itself known to the ranks: its `launcher_token`."""

POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1
_following = threading.Lock()


def end_with_parent(environ: Mapping[str, str] = os.environ) -> bool:
    """From now on this process ends within a second of its launcher's death, even by SIGKILL.

    It follows its parent under torchrun, and the process named by RANKWISE_LAUNCHER where that is set and names
    one of this host. The kernel sends a signal on Linux; a thread looks too, which covers launchers further up and
    other systems.

    What it does not do: the kernel follows the thread that created this process, so a launcher whose creating
    thread ends takes the rank along though it lives on. And a process that the kernel kills cannot kill its own
    children: those of a rank (data loaders, decoders) outlive it unless they watch their parent, as torch's data
    loader workers do.

    Returns:
        False where no launcher is at work, as under `nohup python train.py`: then nothing is done.
    Raises:
        LaunchError: RANKWISE_LAUNCHER is no `launcher_token`.
    Ranks: local.
    """
    launcher = _find_launcher(environ)
    if launcher is None and "TORCHELASTIC_RUN_ID" not in environ:
        return False
    follow_parent(launcher)
    return True


def launcher_token() -> str:
    """What a launcher puts into RANKWISE_LAUNCHER: HOST:BOOT_ID:PID_NAMESPACE:PID:START_TIME of this process.

    A process id alone would name somebody else on another host, in another container or after a reboot.

    Ranks: local; by the launcher.
    """
    pid = os.getpid()
    return f"{_place()}:{pid}:{start_time(pid)}"


def follow_parent(launcher: tuple[int, int] | None = None) -> None:
    """End this process with its parent, and with the `launcher` (process id and start time) where given.

    Ranks: local.
    """
    if launcher is not None and start_time(launcher[0]) != launcher[1]:
        _end(f"the launcher (pid {launcher[0]}) is gone")
    parent = os.getppid()
    _ask_kernel_for_death_signal()
    # The parent may have died before the kernel was asked; then no signal comes, and somebody adopted us.
    if os.getppid() != parent or _is_adopted(parent):
        _end(f"the launcher is gone (parent is now pid {os.getppid()})")
    if not _following.acquire(blocking=False):
        return

    def is_alone() -> bool:
        if os.getppid() != parent:
            return True
        return launcher is not None and start_time(launcher[0]) != launcher[1]

    threading.Thread(target=_watch, args=(is_alone,), name="rankwise-parent", daemon=True).start()


def is_alive(process: str) -> bool | None:
    """Whether a process lives, as its `launcher_token` names it; None where it cannot be seen from here.

    Raises:
        ValueError: it names no process.
    Ranks: local.
    """
    place, pid, started = process.rsplit(":", 2)
    own_place = launcher_token().rsplit(":", 2)[0]
    _, boot_id, namespace = own_place.rsplit(":", 2)
    if place != own_place or not boot_id or not namespace:
        return None
    found = start_time(int(pid))
    if found is not None:
        return found == int(started)
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return None  # it is there, but /proc hides other users' processes
    # There to be signalled: a zombie, unless /proc hides it for another reason.
    return False if Path(f"/proc/{pid}/stat").exists() else None


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when it has ended.

    Together with the process id it names one process for good: ids are used again.

    Ranks: local.
    """
    if not sys.platform.startswith("linux"):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return 0
    try:
        # The command name stands in parentheses and may itself hold spaces and parentheses.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(fields[18])


def _find_launcher(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """Process id and start time of the launcher; None where there is none, or none that can be seen from here."""
    value = environ.get(LAUNCHER)
    if value is None:
        return None
    place, *numbers = value.rsplit(":", 2)
    if len(numbers) != 2 or not all(number.isascii() and number.isdigit() for number in numbers):
        raise LaunchError(
            f"{LAUNCHER}={value[:40]!r} names no launcher (HOST:BOOT_ID:PID_NAMESPACE:PID:START_TIME). Unset it."
        )
    return (int(numbers[0]), int(numbers[1])) if place == _place() else None


def _place() -> str:
    """Where process ids mean what they mean here: this host, since it started, in this namespace."""
    boot_id, namespace = "", ""
    with contextlib.suppress(OSError):
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    return f"{socket.gethostname()}:{boot_id}:{namespace}"


def _ask_kernel_for_death_signal() -> None:
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _is_adopted(parent: int) -> bool:
    """Whether the parent is an init process that took us over, rather than a launcher that is process 1."""
    if parent != 1:
        return False
    try:
        command = Path("/proc/1/cmdline").read_bytes().lower()
    except OSError:
        return True
    return not any(word in command for word in (b"python", b"torchrun", b"rankwise", b"videovae"))


def _watch(is_alone: Callable[[], bool]) -> None:
    pause = threading.Event()
    while not pause.wait(POLL_SECONDS):
        if is_alone():
            _end("the launcher is gone")


def _end(reason: str) -> NoReturn:
    """End at once: no handler of the training script may keep an orphan alive."""
    with contextlib.suppress(OSError):
        os.write(2, f"rankwise: {reason}; this rank (pid {os.getpid()}) ends\n".encode())
    for child in _children():
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)
    os._exit(1)


def _children() -> list[int]:
    found: list[int] = []
    for listing in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in listing.read_text().split()]
    return found
