"""This rank's batches: which clips belong to it, in an order that does not depend on who decodes them."""

import hashlib
import os
import signal
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from videovae.data.clips import Clip, ClipDataset, ClipSpec, generator
from videovae.data.ffmpeg import printable
from videovae.data.worker import Keys, read_clips
from videovae.errors import DataError

_ORDER = 2  # beside the words that clips.py ends its seeds with
_EXIT_SECONDS = 5.0


@dataclass(frozen=True)
class Batch:
    """This rank's clips of one step."""

    video: UInt8[Tensor, "b c t h w"]
    specs: tuple[ClipSpec, ...]
    """Where each clip comes from."""
    failures: tuple[tuple[str, str], ...]
    """(name, reason) of each video that could not be decoded, and that another one stands in for."""


@dataclass(frozen=True)
class ClipOrder:
    """The endless sequence of clips that all ranks together go through: every epoch shuffled anew."""

    num_clips: int
    seed: int

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(epoch, index) of the clip at a position, counted over all epochs and ranks."""
        epoch, place = divmod(position, self.num_clips)
        return epoch, int(_permutation(self.num_clips, self.seed, epoch)[place])


@lru_cache(maxsize=4)
def _permutation(num_clips: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return generator(seed, epoch, _ORDER).permutation(num_clips)


def build_loader(
    dataset: ClipDataset,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    num_workers: int = 0,
    start_position: int = 0,
    pin_memory: bool = False,
) -> "ClipLoader":
    """Endless batches of this rank, from `start_position` on.

    The step at position p takes the clips p to p + world_size * batch_size - 1 of the order, and deals them to
    the ranks like cards: which clips a step sees depends on the global batch only.

    Args:
        num_workers: processes that decode ahead; with 0 the caller decodes.
        start_position: clips that all ranks together have consumed.
        pin_memory: lay batches where a copy to CUDA can overlap with computing.
    Ranks: every rank, each with its own rank and the same of all else. No communication.
    """
    return ClipLoader(dataset, rank, world_size, batch_size, num_workers, start_position, pin_memory)


class ClipLoader(Iterator[Batch]):
    """What `build_loader` gives; close it, or use it as a context manager."""

    def __init__(
        self,
        dataset: ClipDataset,
        rank: int,
        world_size: int,
        batch_size: int,
        num_workers: int,
        start_position: int,
        pin_memory: bool,
    ) -> None:
        self.position = start_position
        """Clips that all ranks together have consumed; workers that decode ahead do not move it."""
        self.failures: dict[str, str] = {}
        """Reason by name, of each video that could not be decoded. They are replaced, however many there are.

        Each rank meets its own; who brings those of all ranks together decides when there are too many.
        """
        self.videos_changed = False
        """Whether the videos are not those of the checkpoint: other clips follow than in a run that was never stopped.

        Set by `load_state_dict`.
        """
        self._dataset = dataset
        self._order = ClipOrder(len(dataset), dataset.seed)
        self._deal = range(rank, world_size * batch_size, world_size)
        self._global_batch_size = world_size * batch_size
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._pool: WorkerPool | None = None

    def __next__(self) -> Batch:
        """The next batch of this rank.

        Raises:
            DataError: no video can be decoded, or a worker died.
        """
        clips = self._read()
        if isinstance(clips, DataError):
            raise clips
        failures = tuple(dict.fromkeys(failure for clip in clips for failure in clip.failures))
        for name, reason in failures:
            self.failures.setdefault(name, reason)
        video = torch.from_numpy(np.stack([clip.pixels for clip in clips]))
        self.position += self._global_batch_size
        return Batch(video.pin_memory() if self._pin_memory else video, tuple(clip.spec for clip in clips), failures)

    def __enter__(self) -> "ClipLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. The loader may go on: they are started again when needed."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, equal on every rank, and the failures that this rank knows of."""
        return {"position": self.position, "videos": self._fingerprint(), "failures": dict(self.failures)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loader stood, of any number of ranks and workers."""
        self.close()
        self.videos_changed = state["videos"] != self._fingerprint()
        self.position = int(state["position"])
        names = {printable(video.name) for video in self._dataset.videos}
        self.failures = {name: reason for name, reason in state.get("failures", {}).items() if name in names}

    def _read(self) -> list[Clip] | DataError:
        if self._num_workers == 0:
            return read_clips(self._dataset, self._keys(self.position))
        if self._pool is None:
            self._pool = WorkerPool(self._dataset, self._num_workers)
        # One request per worker is under way: while one batch is trained on, the next are decoded.
        while self._pool.num_requests < self._num_workers:
            self._pool.request(self._keys(self.position + self._pool.num_requests * self._global_batch_size))
        return self._pool.receive()

    def _keys(self, position: int) -> Keys:
        return [self._order[position + offset] for offset in self._deal]

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for video in self._dataset.videos:
            digest.update(f"{video.name!r} {video.start_frame} {video.stop_frame}\n".encode())
        return digest.hexdigest()


class WorkerPool:
    """Processes that read clips; requests are answered in the order in which they were made."""

    def __init__(self, dataset: ClipDataset, num_workers: int) -> None:
        self._workers = [_start_worker() for _ in range(num_workers)]
        self._requests: deque[int] = deque()
        self._next = 0
        self._finalizer = weakref.finalize(self, _stop_workers, self._workers)
        for number in range(num_workers):
            self._send(number, dataset)

    @property
    def num_requests(self) -> int:
        """Requests that were made and not received."""
        return len(self._requests)

    def request(self, keys: Keys) -> None:
        """Let the worker whose turn it is read these clips."""
        self._send(self._next, keys)
        self._requests.append(self._next)
        self._next = (self._next + 1) % len(self._workers)

    def receive(self) -> list[Clip] | DataError:
        """The answer to the oldest request."""
        number = self._requests.popleft()
        try:
            answer: list[Clip] | DataError = self._workers[number][1].recv()
        except (EOFError, OSError) as error:
            raise self._died(number) from error
        return answer

    def close(self) -> None:
        """End the processes, whatever they are at."""
        self._finalizer()

    def _send(self, number: int, message: object) -> None:
        try:
            self._workers[number][1].send(message)
        except OSError as error:
            raise self._died(number) from error

    def _died(self, number: int) -> DataError:
        process = self._workers[number][0]
        with suppress(subprocess.TimeoutExpired):
            process.wait(_EXIT_SECONDS)
        self.close()
        return DataError(
            f"loader worker {number} (pid {process.pid}) ended with status {process.returncode} while reading clips. "
            "A negative status is a signal; -9 is mostly too little memory: give fewer num_workers."
        )


Worker = tuple["subprocess.Popen[bytes]", "Connection[Any, Any]"]


def _start_worker() -> Worker:
    ours, theirs = Pipe()
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-P", "-m", "videovae.data.worker", str(theirs.fileno())]
    with theirs, _stop_signals_blocked():
        process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),))
    return process, ours


def _stop_workers(workers: list[Worker]) -> None:
    for _, connection in workers:
        connection.close()
    for process, _ in workers:
        try:
            process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Children started in here never see SIGINT and SIGTERM.

    Terminals and schedulers send them to every process of a job. The ranks then agree on a last step, and need
    their workers until it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
