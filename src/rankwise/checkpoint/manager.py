"""`CheckpointManager`: training states on disk, each all there or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch.distributed as dist

from rankwise import collectives, logs
from rankwise.checkpoint import loading
from rankwise.checkpoint.background import Worker
from rankwise.checkpoint.choosing import find_candidates, say_passed_over
from rankwise.checkpoint.folder import step_name
from rankwise.checkpoint.lease import Lease
from rankwise.checkpoint.lifetime import at_end, on_main, told_of_disk, wait_with_others
from rankwise.checkpoint.local import Committed, LocalFolder
from rankwise.checkpoint.places import give_back_lease, open_folder, share_lease
from rankwise.checkpoint.remote_lease import RemoteLease
from rankwise.checkpoint.saving import Saver, take_snapshot
from rankwise.checkpoint.staging import Arena, in_host_memory
from rankwise.checkpoint.together import Assembly
from rankwise.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from rankwise.group import make_side_group

FAILED_END_SECONDS = 10.0
"""How long a program that ends with an error waits for a save that is under way."""

MIN_LEASE_TIMEOUT_SECONDS = 10.0

_logger = logs.get_logger(__name__)


class CheckpointManager:
    """Saves and loads training states in one directory, a step at a time.

    Args:
        directory: shared by all ranks, made by the first save; or a URL of fsspec (s3://bucket/run), see
            `RemoteFolder` for what holds there.
        keep_last: how many of the newest steps to keep; None keeps all. Older ones go when a newer one is durable.
        keep_every: besides, keep the steps that are multiples of this.
        async_save: `save` returns when this rank's part is copied to host memory; threads write it.
        max_pending: how many such copies there may be. A `save` that would make one more waits for the oldest.
        on_failure: "raise" the error of a save on every rank (an asynchronous one's at the next `save`, `wait` or
            `close`), or "warn" and go on training.
        config: what the states belong to, as JSON; its digest stands in the manifest, and a load from a step of
            another config says so in the log.
        cache_dir: for URLs, a local folder of what is on its way and of what was fetched. Ranks of one host that share
            it fetch each file once. None takes a temporary one for each process.
        lease_timeout_seconds: how long the heartbeat of another host's job must be silent for it to count as dead.
    Raises:
        CheckpointError: an argument is out of range, or the URL cannot be opened.
    Ranks: local; the same arguments on every rank.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        async_save: bool = False,
        max_pending: int = 1,
        on_failure: Literal["raise", "warn"] = "raise",
        config: Mapping[str, object] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        lease_timeout_seconds: float = 60.0,
    ) -> None:
        for name, value in (("keep_last", keep_last), ("keep_every", keep_every), ("max_pending", max_pending)):
            if value is not None and (type(value) is not int or value < 1):
                raise CheckpointError(f"{name} is a whole number from 1 on, not {value!r}.")
        if on_failure not in ("raise", "warn"):
            raise CheckpointError(f"on_failure is 'raise' or 'warn', not {on_failure!r}.")
        if not lease_timeout_seconds >= MIN_LEASE_TIMEOUT_SECONDS:
            raise CheckpointError(
                f"lease_timeout_seconds is {MIN_LEASE_TIMEOUT_SECONDS:g} or more, not {lease_timeout_seconds!r}: "
                "a living job would be judged dead."
            )
        self._folder = open_folder(directory, cache_dir)
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._async_save = async_save
        self._max_pending = max_pending
        self._on_failure = on_failure
        self._config_digest = _digest(config)
        self._lease_timeout_seconds = lease_timeout_seconds
        self._lease: Lease | RemoteLease | None = None
        self._saver: Saver | None = None
        self._worker: Worker | None = None
        self._group: dist.ProcessGroup | None = None
        self._pending: deque[tuple[int, Future[None], Arena]] = deque()
        self._arenas: list[Arena] = []
        self._loaded_step: int | None = None
        self._pid = os.getpid()
        self._forget_end: Callable[[], None] = lambda: None

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or (isinstance(error, SystemExit) and error.code in (0, None)):
            self.close()
        else:
            self._end(failed=True)

    @property
    def directory(self) -> Path:
        """Where the steps lie.

        Raises:
            CheckpointError: behind a URL.
        Ranks: local.
        """
        if isinstance(self._folder, LocalFolder):
            return self._folder.directory
        raise CheckpointError(
            f"{self._folder.location} is no directory here. Get an item with `read`, or copy the step with the tools "
            "of its store."
        )

    def steps(self) -> list[int]:
        """The steps that can be loaded, the newest last.

        Newest is what the job that took the lease last has saved; among its own steps, the one of the highest number.

        Raises:
            CheckpointError: the directory cannot be read.
        Ranks: local; while a save runs, ranks may see different ones.
        """
        with self._read():
            return [found.step for found in self._folder.find()]

    def latest(self, *, verified: bool = False) -> int | None:
        """The newest step that can be loaded, None when there is none.

        Args:
            verified: compare every file with its checksum, and pass over damaged steps, saying so loudly.
        Raises:
            CheckpointCorruptError: with `verified`, where every step there is is damaged.
            CheckpointError: the directory cannot be read.
        Ranks: local; while a save runs, ranks may see different ones.
        """
        with self._read():
            steps = self._folder.find()
        if not verified:
            return steps[-1].step if steps else None
        for found in reversed(steps):
            try:
                with self._read():
                    self._folder.verify(found)
                return found.step
            except CheckpointCorruptError as error:
                if found == steps[0]:
                    raise
                say_passed_over(error)
        return None

    def path(self, step: int) -> Path:
        """Where a step lies, or would lie.

        Raises:
            CheckpointError: behind a URL.
        Ranks: local.
        """
        return self.directory / step_name(step)

    def acquire(self) -> None:
        """Become the one job that writes here; the first `save` does it otherwise. `close` gives it back.

        Raises:
            CheckpointLeaseError: another job writes here; says who, where and since when.
            CheckpointError: the directory cannot be written.
        Ranks: every rank must call.
        """
        if self._saver is not None:
            return
        # Nobody writes in the background before all know that this job may.
        epoch = on_main("no checkpoint can be saved", self._take_lease)
        self._group = make_side_group() if dist.is_initialized() and dist.get_world_size() > 1 else None
        self._saver = Saver(
            self._folder,
            Assembly(self._group),
            # The lease's own: once it is given back, a save that is still under way must be refused.
            self._lease.check if self._lease is not None else lambda: None,
            epoch,
            self._keep_last,
            self._keep_every,
            self._config_digest,
        )
        self._saver.loaded_step = self._loaded_step
        self._worker = Worker("rankwise-checkpoint")
        self._pid = os.getpid()
        self._forget_end = at_end(
            lambda failed: self._end(failed=failed), before_threads=not isinstance(self._folder, LocalFolder)
        )

    def save(self, step: int, state: Mapping[str, object]) -> None:
        """Store `state` as `step`.

        A synchronous save returns when the step is whole and durable, or every rank raises. An asynchronous one
        returns with a copy in host memory, and the step appears later. Other steps are never touched but by
        `keep_last`. A step that is there whole already stays as it is, with a warning; a broken one is moved aside.

        Args:
            state: by name, anything with `state_dict` and `load_state_dict`, tensors (DTensors too), plain values and
                nested dicts, lists and tuples of these. What is equal on all ranks is written once, spread over them;
                every rank stores its own of what is wrapped in `PerRank`.
        Raises:
            CheckpointError: a rank could not write its part, or ranks save different things; names rank and cause.
                There is no such step then, but for one case: where the disk refused only to confirm the name of the
                finished step, it is there, and the message says so. Also an earlier asynchronous save's error.
            CheckpointLeaseError: another job writes here, or has taken over.
            RankFailedError, MissingRanksError: another rank failed or left meanwhile.
        Ranks: every rank must call, with the same step and names.
        """
        self.acquire()
        # Here, where those that do not come are named; in the background nobody would be waited for in vain.
        collectives.barrier("save of a checkpoint")
        saver, worker = self._saver, self._worker
        assert saver is not None, "acquire makes it"
        assert worker is not None, "acquire makes it"
        while len(self._pending) >= self._max_pending:
            self._finish_oldest()
        arena = self._arenas.pop() if self._arenas else Arena()
        snapshot = take_snapshot(step, state, arena.copy if self._async_save else in_host_memory)
        self._pending.append((step, worker.submit(lambda: saver.save(snapshot)), arena))
        if not self._async_save:
            try:
                self._finish_oldest()
            except BaseException:
                snapshot.is_abandoned = True  # the state is no copy, and from here on it may change
                raise

    def wait(self) -> None:
        """Wait until every save is durable.

        Raises:
            CheckpointError: one of them failed; on every rank.
        Ranks: every rank must call.
        """
        first: CheckpointError | None = None
        while self._pending:
            try:
                self._finish_oldest()
            except CheckpointError as error:
                if first is not None:
                    _logger.error("%s", error, ranks="main")
                first = first or error
        try:
            if first is not None:
                raise first
        finally:
            del first  # or its traceback would hold itself, and with it the group and its threads

    def close(self) -> None:
        """Wait for the saves that are under way, and let other jobs write here. A later `save` begins anew.

        The end of a session, and of the program, does it too.

        Raises:
            CheckpointError: the last save failed; on every rank.
        Ranks: every rank must call.
        """
        try:
            self.wait()
        except CheckpointError:  # told by all ranks, so nothing is under way any more
            self._end(failed=False)
            raise
        except BaseException:
            self._end(failed=True)
            raise
        self._end(failed=False)

    def load(self, state: Mapping[str, object], step: int | Literal["latest"] = "latest") -> int | None:
        """Bring the saved state back into the objects and tensors of `state`.

        Saves that are under way are waited for first: "latest" may be one of them. Every file of the step is then
        compared with its checksum. Where the newest step is damaged, that is said loudly and the newest whole one is
        loaded. Plain values in `state` are only compared by name: get them with `read`. The number of ranks may be
        another than at the save, unless there are `PerRank` items that do not say how to share them out anew.

        Returns:
            The step that was loaded; None when "latest" was asked for and there is none.
        Raises:
            CheckpointError: an earlier asynchronous save failed; `state` is untouched.
            CheckpointNotFoundError: there is no such step.
            CheckpointCorruptError: a file is missing or damaged, for "latest" in every step there is; `state` is
                untouched.
            CheckpointMismatchError: saved with other items, keys, shapes, types or number of ranks; `state` is
                untouched on all ranks, unless it was an object's own `load_state_dict` that refused: the message
                then tells that `state` is partly loaded.
        Ranks: every rank must call; if it fails on one, it fails on all.
        """
        self.wait()
        candidates = on_main("no step was loaded", find_candidates, self._folder, step)
        newest = on_main("no step was loaded", self.latest)
        for candidate in candidates:
            try:
                loading.verify_together(self._folder, candidate)
                loading.load_together(self._folder, candidate, state)
            except CheckpointCorruptError as error:
                if step != "latest" or candidate == candidates[-1]:
                    raise
                say_passed_over(error)
            else:
                _logger.info("loaded %s", self._folder.describe(candidate), ranks="main")
                self._compare_config(candidate)
                self._loaded_step = candidate.step
                if self._saver is not None and candidate.step != newest:
                    self.close()  # what is saved from here on is newer than what was left behind, and has a new lease
                if self._saver is not None:
                    self._saver.loaded_step = candidate.step
                return candidate.step
        if isinstance(self._folder, LocalFolder) and LocalFolder(self.directory / "checkpoints").find():
            _logger.warning("there is no step in %s, but in its folder checkpoints", self.directory, ranks="main")
        return None

    def read(self, name: str, step: int | Literal["latest"] = "latest", *, rank: int | None = None) -> Any:
        """One item as plain tree of tensors (whole, on the CPU) and values, without touching the others.

        Args:
            rank: whose item, for what was saved as `PerRank`.
        Raises:
            CheckpointNotFoundError: there is no such step or item.
            CheckpointCorruptError: what is read of it is missing or damaged.
        Ranks: local.
        """
        found = self._find_candidates(step)[0]
        with self._read():
            return loading.read_item(self._folder.open(found), name, rank)

    def verify(self, step: int | Literal["latest"] = "latest") -> None:
        """Compare every file of a step with its checksum.

        Raises:
            CheckpointNotFoundError: there is no such step.
            CheckpointCorruptError: names the first file that is missing or damaged.
        Ranks: local.
        """
        found = self._find_candidates(step)[0]
        with self._read():
            self._folder.verify(found)

    def _find_candidates(self, step: int | Literal["latest"]) -> list[Committed]:
        """At least one."""
        with self._read():
            candidates = find_candidates(self._folder, step)
        if not candidates:
            raise CheckpointNotFoundError(f"there is no checkpoint in {self._folder.location}.")
        return candidates

    def _read(self) -> contextlib.AbstractContextManager[None]:
        return told_of_disk(f"{self._folder.location} cannot be read")

    def _compare_config(self, found: Committed) -> None:
        if not self._config_digest:
            return
        with contextlib.suppress(CheckpointError):
            saved = self._folder.open(found).manifest.config_digest
            if saved and saved != self._config_digest:
                _logger.info("%s was saved with another config", self._folder.describe(found), ranks="main")

    def _take_lease(self) -> int:
        self._lease = share_lease(self._folder, self._lease_timeout_seconds)
        return self._lease.epoch

    def _finish_oldest(self) -> None:
        """Wait for the oldest save, and raise or tell its error: the same on every rank."""
        _, future, arena = self._pending[0]
        try:
            wait_with_others(future)
        except CheckpointError as error:
            if self._on_failure == "raise":
                raise
            _logger.error("%s Training goes on.", error, ranks="main")
        finally:
            if future.done():  # not so where the wait was interrupted: then it can still be waited for
                self._pending.popleft()
                self._arenas.append(arena)
            del future  # as in `wait`

    def _end(self, *, failed: bool) -> None:
        """Wait for what is under way, briefly if others may be gone, and give back the lease."""
        if os.getpid() != self._pid:
            return  # a fork has neither the threads that write nor a part in the group
        self._forget_end()
        try:
            if not failed:
                self.wait()
            begin = time.monotonic()
            for step, future, _ in self._pending:
                try:
                    future.result(max(0.0, FAILED_END_SECONDS - (time.monotonic() - begin)))
                except Exception as error:
                    _logger.error("the program ends, and %s", str(error) or f"step {step} is not saved yet")
        finally:
            is_quiet = all(future.done() for _, future, _ in self._pending)
            self._pending.clear()
            if self._worker is not None:
                self._worker.close()
            if self._lease is not None:
                give_back_lease(self._lease)
            if self._group is not None and is_quiet:
                with contextlib.suppress(RuntimeError, ValueError, AssertionError):  # gone with the session's own
                    dist.destroy_process_group(self._group)
            self._arenas.clear()
            self._lease = self._saver = self._worker = self._group = None


def _digest(config: Mapping[str, object] | None) -> str:
    if config is None:
        return ""
    try:
        content = json.dumps(config, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config is not JSON: {error}. Give plain values and dicts of them.") from error
    return hashlib.sha256(content.encode()).hexdigest()
