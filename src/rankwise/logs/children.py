"""Processes that a rank makes for itself, such as the workers of a data loader: what they say, and where it goes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankwise.identity import Identity


def log_path(run_dir: str | os.PathLike[str], rank: int, worker_pid: int | None = None) -> Path:
    """The file of a rank, or of another process that belongs to it.

    Ranks: local.
    """
    worker = "" if worker_pid is None else f".worker-{worker_pid}"
    return Path(run_dir, "logs", f"rank-{rank:05d}{worker}.jsonl")


class ChildLine:
    """Carries records from forked and spawned processes to the rank that started them.

    One message is one record. A child never waits: where the rank does not keep up the child is told so.
    """

    def __init__(self, receive: Callable[[dict[str, Any]], None]) -> None:
        self._receive = receive
        self._at_rank, self._at_child = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._thread: threading.Thread | None = None

    def send(self, record: dict[str, Any]) -> bool:
        """From a child: False where the record could not be handed over.

        Ranks: in a forked process.
        """
        return _send(self._at_child, record)

    def for_spawned(self) -> Any:
        """The child's end for a process that multiprocessing starts right now, to be pickled; None at other times.

        Ranks: local.
        """
        from multiprocessing.context import get_spawning_popen
        from multiprocessing.reduction import DupFd

        if get_spawning_popen() is None or self._at_child.fileno() < 0:
            return None
        self.listen()
        return DupFd(self._at_child.fileno())

    def listen(self) -> None:
        """Begin to receive, now that there is a child.

        Ranks: local.
        """
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="rankwise-children", daemon=True)
            with contextlib.suppress(RuntimeError):
                thread.start()
                self._thread = thread

    def close(self) -> None:
        """Take what has arrived, and end.

        Ranks: local.
        """
        if self._thread is not None:
            with contextlib.suppress(OSError):
                self._at_child.send(b"")  # behind all records; a datagram of nothing ends the loop
                self._thread.join(timeout=2.0)
                self._at_rank.shutdown(socket.SHUT_RDWR)
            self._thread.join(timeout=2.0)
            self._thread = None
        self._at_rank.close()
        self._at_child.close()

    def leave_rank(self) -> None:
        """In a child: let go of the end that is not its own.

        Ranks: in a forked process.
        """
        self._thread = None  # the parent's: it must not be told to end
        self._at_rank.close()

    def _run(self) -> None:
        while True:
            try:
                message = self._at_rank.recv(1 << 20)
            except OSError:
                return
            if not message:
                return
            with contextlib.suppress(ValueError):
                self._receive(json.loads(message))


class WorkerInit:
    """Sets up the logs of a process that was spawned, not forked; picklable, and a data loader's `worker_init_fn`.

    Where multiprocessing hands it to a process that it starts, its way to the rank goes along.

    Ranks: called in the spawned process.
    """

    def __init__(
        self,
        identity: Identity | None,
        run_dir: str | None,
        level: int | str,
        device: str,
        line: ChildLine | None = None,
    ) -> None:
        self.identity = identity
        self.run_dir = run_dir
        self.level = level
        self.device = device
        self._line = line
        self._inherited: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # A descriptor can only be given to a process that is being started; in any other pickle it means nothing.
        inherited = self._line.for_spawned() if self._line is not None else None
        return {**vars(self), "_line": None, "_inherited": inherited}

    def __call__(self, worker_id: int | None = None) -> None:
        from rankwise import logs

        inherited, self._inherited = self._inherited, None
        if self.identity is None or not logs.configure_worker(
            self.identity, self.run_dir, self.level, device=self.device
        ):
            return
        if inherited is not None:
            at_child = socket.socket(fileno=inherited.detach())
            logs.set_channel(lambda record: _send(at_child, record))


def _send(at_child: socket.socket, record: dict[str, Any]) -> bool:
    try:
        at_child.send(json.dumps(record).encode(), socket.MSG_DONTWAIT)
    except OSError:
        return False
    return True


def at_exit_of_child(function: Callable[[], object]) -> Callable[[], bool]:
    """Call the function when this process ends, if multiprocessing started it: it runs no atexit functions.

    Returns:
        Whether that still stands: multiprocessing forgets what was asked for before the process's own work begins.
    Ranks: in a forked or spawned process.
    """
    util = sys.modules.get("multiprocessing.util")
    process = sys.modules.get("multiprocessing.process")
    if util is None or process is None or process.parent_process() is None:
        return lambda: True
    is_known: Callable[[], bool] = util.Finalize(None, function, exitpriority=10).still_active
    return is_known
