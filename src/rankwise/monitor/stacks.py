"""Where the threads of this process are: for a line on the console, and for a file that a person reads after a hang."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch

import rankwise

_NOT_THE_USERS = tuple(
    f"{Path(file or '').parent}{os.sep}" for file in (os.__file__, torch.__file__, rankwise.__file__)
)
_SITE_PACKAGES = f"{os.sep}site-packages{os.sep}"

_WAITS = {
    "torch/distributed/distributed_c10d.py": None,
    "torch/nn/parallel/distributed.py": None,
    "torch/distributed/utils.py": None,
    "torch/distributed/_functional_collectives.py": None,
    "torch/autograd/graph.py": ("_engine_run_backward",),
    "torch/cuda/__init__.py": ("synchronize",),
    "torch/cuda/streams.py": ("synchronize", "wait_event", "wait_stream"),
    "torch/accelerator/__init__.py": ("synchronize",),
    "rankwise/waiting.py": None,
    "rankwise/store.py": None,
}
"""Files, and functions in them, whose innermost call waits for other ranks or for the device: DDP waits in backward."""

_STDLIB = f"{os.path.dirname(os.__file__)}{os.sep}"
_PROMPTS = tuple(f"{_STDLIB}{name}.py" for name in ("pdb", "bdb", "code"))
_DEBUGGERS = ("/pydevd", "/debugpy/", "/IPython/terminal/")


@dataclass(frozen=True)
class Look:
    """Where a thread is."""

    where: str = ""
    """File, line and function of the innermost frame that is the user's own."""
    waits: bool = False
    """Whether it waits for other ranks, or for the device, as far as its innermost frames tell."""
    at_prompt: bool = False
    """Whether a person has it in a debugger or at a prompt."""


def look_at_thread(ident: int) -> Look:
    """Where a thread of this process is.

    Ranks: local.
    """
    innermost = frame = sys._current_frames().get(ident)
    frames: list[FrameType] = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    if innermost is None:
        return Look()
    own = next((frame for frame in frames if _is_users(frame)), None)
    shown = own or innermost
    where = f"{Path(shown.f_code.co_filename).name}:{shown.f_lineno} in {shown.f_code.co_name}"
    inner = frames[: frames.index(own)] if own is not None else frames
    told = next((frame for frame in inner if not frame.f_code.co_filename.startswith((_STDLIB, "<frozen"))), None)
    return Look(where, told is not None and _is_waiting(told), any(map(_is_debugger, frames)))


def write_stacks(file: IO[str], headline: str) -> None:
    """Write the stack of every thread, under a headline and the threads' names.

    Args:
        file: with a descriptor of its own.
    Ranks: local.
    """
    names = [f"  0x{thread.ident or 0:016x} {thread.name}" for thread in threading.enumerate()]
    file.write("\n".join([headline.rstrip(), "", "threads of Python:", *names, "", ""]))
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)


def torch_collectives(num_last: int = 0) -> dict[str, Any]:
    """What torch's flight recorder keeps of its process groups: `enqueued`, how many operations, and the last of them.

    Empty where torch records none. It takes a lock of torch's own, so ask from a thread that may hang.

    Ranks: local.
    """
    from torch._C import _distributed_c10d as c10d

    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(c10d, name, None)
        if dump is None:
            continue
        with contextlib.suppress(Exception):  # private to torch, and of no weight here
            told = json.loads(dump(includeCollectives=num_last > 0, onlyActive=False))
            enqueued = [int(group["last_enqueued_collective"]) for group in told["pg_status"].values()]
            if enqueued:
                return {"enqueued": sum(map(abs, enqueued)), "last": told.get("entries", [])[-num_last:]}
    return {}


_MAX_WIND_SECONDS = 24 * 3600.0
"""The timer takes no more than a few centuries, and is wound up again long before."""

_timers: weakref.WeakSet[HeldTimer] = weakref.WeakSet()


class HeldTimer:
    """A timer outside of Python that writes the stacks when nobody winds it up again: some thread then holds the GIL.

    There is one such timer in a process, `faulthandler.dump_traceback_later`, and this takes it.

    Args:
        path: where the stacks go; None: to stderr.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._is_refused = False
        # A timer that outlives its file would write into whatever gets the descriptor next.
        self._lock = threading.Lock()
        _timers.add(self)

    def wind(self, seconds: float, *, end: bool = False) -> None:
        """Have the stacks written in so many seconds, instead of when was said before.

        Args:
            end: end the process then, with status 1.
        Ranks: local.
        """
        with self._lock:
            file = self._open()
            if file is not None:
                seconds = min(max(seconds, 0.1), _MAX_WIND_SECONDS)
                faulthandler.dump_traceback_later(seconds, exit=end, file=file)

    def close(self) -> None:
        """Take the timer back; a file in which nothing stands is removed.

        Ranks: local.
        """
        with self._lock:
            file, self._file, self._is_refused = self._file, None, True
            if file is None:
                return
            faulthandler.cancel_dump_traceback_later()
            if self._path is not None:
                file.close()
                with contextlib.suppress(OSError):
                    if self._path.stat().st_size == 0:
                        self._path.unlink()
                        self._path.parent.rmdir()
                        self._path.parent.parent.rmdir()

    def before_fork(self) -> None:
        """Stop until the next winding, and let nobody wind.

        A forked child that has the lock of a timer's thread, and not the thread, waits for it at its exit, for ever.
        """
        self._lock.acquire()
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()

    def forget(self) -> None:
        """In a forked child: the timer and the file are the parent's."""
        file, self._file, self._is_refused = self._file, None, True
        if file is not None and self._path is not None:
            file.close()

    def after_fork(self) -> None:
        """Let go on."""
        self._lock.release()

    def _open(self) -> IO[str] | None:
        if self._file is None and not self._is_refused:
            try:
                if self._path is not None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = open(self._path, "w")  # noqa: SIM115
                elif sys.__stderr__ is not None:
                    sys.__stderr__.fileno()
                    self._file = sys.__stderr__
            except (OSError, ValueError):
                self._is_refused = True
        return self._file


def _is_users(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return not file.startswith((*_NOT_THE_USERS, "<frozen")) and _SITE_PACKAGES not in file


def _is_waiting(frame: FrameType) -> bool:
    code = frame.f_code
    file = code.co_filename.replace(os.sep, "/")
    for end, functions in _WAITS.items():
        if file.endswith(f"/{end}"):
            return functions is None or code.co_name in functions
    return False


def _is_debugger(frame: FrameType) -> bool:
    file = frame.f_code.co_filename.replace(os.sep, "/")
    return frame.f_code.co_filename in _PROMPTS or any(mark in file for mark in _DEBUGGERS)


_forking: list[HeldTimer] = []


def _before_fork() -> None:
    _forking[:] = list(_timers)
    for timer in _forking:
        timer.before_fork()


def _after_fork() -> None:
    for timer in _forking:
        timer.after_fork()
    _forking.clear()


def _after_fork_in_child() -> None:
    for timer in _forking:
        timer.forget()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
