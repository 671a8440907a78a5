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
    """Carries records from forked processes to the rank that they were forked from.

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
        try:
            self._at_child.send(json.dumps(record).encode(), socket.MSG_DONTWAIT)
        except OSError:
            return False
        return True

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

    Ranks: called in the spawned process.
    """

    def __init__(self, identity: Identity | None, run_dir: str | None, level: int | str, device: str) -> None:
        self.identity = identity
        self.run_dir = run_dir
        self.level = level
        self.device = device

    def __call__(self, worker_id: int | None = None) -> None:
        from rankwise import logs

        if self.identity is not None:
            logs.configure_worker(self.identity, self.run_dir, self.level, device=self.device)


def at_exit_of_child(function: Callable[[], object]) -> None:
    """Call the function when this process ends, if multiprocessing started it: it runs no atexit functions.

    Ranks: in a forked or spawned process.
    """
    util = sys.modules.get("multiprocessing.util")
    process = sys.modules.get("multiprocessing.process")
    if util is not None and process is not None and process.parent_process() is not None:
        util.Finalize(None, function, exitpriority=10)
