"""No orphans: a rank whose launcher was killed ends too, instead of training on with nobody to stop it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from rankwise.errors import LaunchError

LAUNCHER_PID = "RANKWISE_LAUNCHER_PID"
"""The variable by which a launcher gives its process id to the ranks."""

POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1
_following = threading.Lock()


def end_with_parent(environ: Mapping[str, str] = os.environ) -> bool:
    """From now on this process ends within a second of its launcher's death, even by SIGKILL.

    It follows its parent under torchrun, and the process named by RANKWISE_LAUNCHER_PID where that is set.
    The kernel sends the signal on Linux; a thread looks too, which covers launchers further up and other systems.

    Returns:
        False where no launcher is at work, as under `nohup python train.py`: then nothing is done.
    Raises:
        LaunchError: RANKWISE_LAUNCHER_PID is no process id.
    Ranks: local.
    """
    launcher_pid = _launcher_pid(environ)
    if launcher_pid is None and "TORCHELASTIC_RUN_ID" not in environ:
        return False
    if launcher_pid is not None and not is_running(launcher_pid):
        _end(f"the launcher (pid {launcher_pid}) is gone")
    follow_parent(launcher_pid)
    return True


def follow_parent(launcher_pid: int | None = None) -> None:
    """End this process with its parent, and with `launcher_pid` where given.

    Ranks: local.
    """
    parent = os.getppid()
    _ask_kernel_for_death_signal()
    # The parent may have died before the kernel was asked; then no signal comes, and somebody adopted us.
    if os.getppid() != parent or _is_adopted(parent):
        _end(f"the launcher is gone (parent is now pid {os.getppid()})")
    if not _following.acquire(blocking=False):
        return
    launcher_start = start_time(launcher_pid) if launcher_pid is not None else None

    def is_alone() -> bool:
        if os.getppid() != parent:
            return True
        return launcher_pid is not None and start_time(launcher_pid) != launcher_start

    threading.Thread(target=_watch, args=(is_alone,), name="rankwise-parent", daemon=True).start()


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


def is_running(pid: int) -> bool:
    """Whether a process of this id runs (a zombie does not).

    Ranks: local.
    """
    return start_time(pid) is not None


def _launcher_pid(environ: Mapping[str, str]) -> int | None:
    value = environ.get(LAUNCHER_PID)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and 0 < len(value) <= 9):
        raise LaunchError(f"{LAUNCHER_PID}={value[:40]!r} is no process id. Unset it.")
    return int(value)


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


def _end(reason: str) -> None:
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
