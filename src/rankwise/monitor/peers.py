"""What the system tells of a process of this host that cannot speak for itself: stopped, killed, or its GIL held.

Source: proc(5) of the Linux man-pages, for the files and for the letters of the states.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil

from rankwise.parent import start_time

_STATES = {
    "R": "which runs, and lets no other thread of it run Python",
    "S": "asleep in a call that lets no other thread of it run Python",
    "D": "in an uninterruptible wait of the kernel (storage, network file system or driver)",
    "T": "stopped by a signal",
    "t": "held by a debugger",
    "Z": "dead, and not yet waited for by its parent",
    "X": "dead",
    "I": "idle in the kernel",
}
_MAX_THREADS = 64


def look_at_process(pid: int, started: int | None) -> dict[str, Any]:
    """What the system tells of a process; only `state` is always there.

    Args:
        started: as `rankwise.parent.start_time` gave it to the process itself: an id may have a new owner.
    Returns:
        `state`: a letter of proc(5), or `gone`; `tracer`: the process id of a debugger, or 0; `wchan`: the function of
        the kernel that the main thread sleeps in; `syscall`; `kernel_stack`; `num_threads`; `threads`; `children`.
        What may not be read is absent.
    Ranks: local, on the host of the process.
    """
    if not sys.platform.startswith("linux"):
        return _look_with_psutil(pid)
    folder = Path(f"/proc/{pid}")
    status = _read_status(folder / "status")
    if "State" not in status:
        return {"state": "gone"}
    state = status["State"][:1]
    if state not in "ZX" and started is not None and start_time(pid) != started:
        return {"state": "gone"}
    told: dict[str, Any] = {"state": state, "tracer": int(status.get("TracerPid", "0") or 0)}
    for name, file in (("wchan", "wchan"), ("syscall", "syscall"), ("kernel_stack", "stack")):
        text = _read(folder / file)
        if text and text != "0":
            told[name] = text
    threads = sorted(folder.glob("task/*"), key=lambda path: int(path.name))
    told["num_threads"] = len(threads)
    told["threads"] = [_thread_line(path) for path in threads[:_MAX_THREADS]]
    told["children"] = [_child_line(int(child)) for path in threads for child in _read(path / "children").split()]
    return told


def state_in_words(state: str) -> str:
    """What a state of `look_at_process` means for a rank that does not answer.

    Ranks: local.
    """
    return "its process is gone" if state == "gone" else _STATES.get(state, f"in state {state}")


def facts_as_text(facts: dict[str, Any]) -> str:
    """What `look_at_process` gave, for a file that a person reads.

    Ranks: local.
    """
    lines = [f"state: {facts['state']} ({state_in_words(facts['state'])})"]
    names = {"tracer": "held by debugger, pid", "wchan": "sleeps in kernel function", "syscall": "system call"}
    lines += [f"{words}: {facts[name]}" for name, words in names.items() if facts.get(name)]
    if "kernel_stack" in facts:
        lines += ["kernel stack:", *(f"  {line}" for line in facts["kernel_stack"].splitlines())]
    if "threads" in facts:
        lines += [f"{facts['num_threads']} threads:", *(f"  {line}" for line in facts["threads"])]
    if facts.get("children"):
        lines += ["children:", *(f"  {child}" for child in facts["children"])]
    return "\n".join(lines) + "\n"


def kill_process(pid: int, started: int | None) -> bool:
    """SIGKILL the process of this host that has this id and this start time; False where it is not there any more.

    Ranks: local, on the host of the process.
    """
    if started is None or start_time(pid) != started:
        return False
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def is_traced() -> bool:
    """Whether a debugger, or anything that uses ptrace, holds this process.

    Ranks: local.
    """
    return _read_status(Path("/proc/self/status")).get("TracerPid", "0") != "0"


def _look_with_psutil(pid: int) -> dict[str, Any]:
    letters = {
        psutil.STATUS_RUNNING: "R",
        psutil.STATUS_STOPPED: "T",
        psutil.STATUS_ZOMBIE: "Z",
        psutil.STATUS_DISK_SLEEP: "D",
    }
    try:
        process = psutil.Process(pid)
        return {"state": letters.get(process.status(), "S"), "num_threads": process.num_threads()}
    except psutil.Error:
        return {"state": "gone"}


def _thread_line(folder: Path) -> str:
    status = _read_status(folder / "status")
    sleeps = _read(folder / "wchan")
    return f"{folder.name} {status.get('Name', '?')}: {status.get('State', '?')}" + (
        f", in {sleeps}" if sleeps and sleeps != "0" else ""
    )


def _child_line(pid: int) -> str:
    status = _read_status(Path(f"/proc/{pid}/status"))
    return f"{pid} {status.get('Name', '?')}: {status.get('State', '?')}"


def _read_status(path: Path) -> dict[str, str]:
    pairs = (line.partition(":") for line in _read(path).splitlines())
    return {name: value.strip() for name, _, value in pairs}


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
