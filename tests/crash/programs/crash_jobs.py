"""Starts jobs in the hatchery, kills their ranks, and asks what they did."""

from __future__ import annotations

import itertools
import json
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rankwise

Line = dict[str, Any]


class Hatchery:
    """The server, and the jobs that it has forked."""

    def __init__(self, folder: Path, prefix: Sequence[str] = ()) -> None:
        self.folder = folder
        self._numbers = itertools.count()
        self._pids: dict[int, queue.Queue[list[int]]] = {}
        self._ends: dict[int, queue.Queue[Line]] = {}
        self._lock = threading.Lock()
        program = Path(__file__).with_name("crash_hatchery.py")
        self._error_path = folder / "hatchery-errors"
        with open(self._error_path, "wb") as errors:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, str(program)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "PYTHONPATH": str(Path(rankwise.__file__).parents[1])},
            )
        self._reader = threading.Thread(target=self._read, name="crash-hatchery", daemon=True)
        self._reader.start()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, body: str, num_ranks: int = 2, user: int = 0, **arguments: Any) -> Job:
        number = next(self._numbers)
        folder = self.folder / f"job-{number:04d}"
        folder.mkdir()
        folder.chmod(0o777)
        environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())} if num_ranks > 1 else {}
        job = {"job": number, "folder": str(folder), "body": body, "num_ranks": num_ranks}
        answer: queue.Queue[list[int]] = queue.Queue()
        self._pids[number] = answer
        self._send({**job, "user": user, "environ": environ, "arguments": arguments})
        pids = answer.get(timeout=60)
        if not pids:
            raise AssertionError(f"the hatchery has ended: {self._error_path.read_text()}")
        return Job(self, folder, pids)

    def end_of(self, pid: int, timeout_seconds: float) -> Line | None:
        try:
            return self._queue_of(pid).get(timeout=timeout_seconds)
        except queue.Empty:
            return None

    def _queue_of(self, pid: int) -> queue.Queue[Line]:
        with self._lock:
            return self._ends.setdefault(pid, queue.Queue())

    def _send(self, words: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(words).encode() + b"\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            words = json.loads(line)
            if "pids" in words:
                self._pids.pop(words["job"]).put(words["pids"])
            else:
                self._queue_of(words["pid"]).put(words)
        for waiting in self._pids.values():
            waiting.put([])


class Job:
    """The ranks of one job."""

    def __init__(self, hatchery: Hatchery, folder: Path, pids: list[int]) -> None:
        self._hatchery = hatchery
        self.folder = folder
        self.pids = pids
        self.ends: dict[int, Line] = {}

    def kill(self, *ranks: int) -> float:
        """SIGKILL ranks; gives the moment."""
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGKILL)
        return time.monotonic()

    def join(self, timeout_seconds: float = 60.0) -> list[int]:
        """The exit status of each rank, once all have ended; what does not end in time is killed, and fails."""
        deadline = time.monotonic() + timeout_seconds
        for rank, pid in enumerate(self.pids):
            if rank not in self.ends:
                end = self._hatchery.end_of(pid, max(0.0, deadline - time.monotonic()))
                if end is None:
                    told = self.output()
                    self.kill(*(other for other in range(len(self.pids)) if other not in self.ends))
                    raise AssertionError(f"rank {rank} did not end within {timeout_seconds:g} s\n{told}")
                self.ends[rank] = end
        return [self.ends[rank]["status"] for rank in range(len(self.pids))]

    def journal(self, rank: int, what: str | None = None) -> list[Line]:
        path = self.folder / f"journal-{rank}"
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        return [line for line in lines if what is None or line["what"] == what]

    def wait_for(self, what: str, timeout_seconds: float = 60.0, num_lines: int = 1) -> None:
        """Wait until every rank has noted this."""
        deadline = time.monotonic() + timeout_seconds
        while not all(len(self.journal(rank, what)) >= num_lines for rank in range(len(self.pids))):
            ended = [rank for rank, pid in enumerate(self.pids) if not Path(f"/proc/{pid}").exists()]
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"no rank may end before all have noted {what!r}: {ended}\n{self.output()}")
            time.sleep(0.005)

    def output(self) -> str:
        paths = [self.folder / f"output-{rank}" for rank in range(len(self.pids))]
        return "\n".join(path.read_text(errors="replace") for path in paths if path.exists())

    def clear(self) -> None:
        """Remove what it has left."""
        shutil.rmtree(self.folder)


def find_free_port() -> int:
    """A port that is free; below the range that the system hands out itself."""
    for _ in range(200):
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")
