"""The ties of this process to the other ranks: rendezvous, process group, and whose failure came first."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.rendezvous import rendezvous

from rankwise import collectives, logs
from rankwise.errors import LaunchError, RankFailedError, RankFailure, RankwiseError, StoppedError
from rankwise.identity import Identity

CLOSE_SECONDS = 10.0
STOP_GRACE_SECONDS = 5.0
"""How long a rank that was asked to stop still waits for the others to start."""

_FIRST_FAILURE = "first_failure"
_SETUP_FAILURE = "setup_failure"
_LOST_CONNECTION = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "gloo/transport",
    "NCCL error",
    "NCCL communicator",
)
_logger = logs.get_logger(__name__)
_connection_numbers = itertools.count()
_rendezvous_store: Store | None = None


class Connection:
    """What ties this process to the other ranks of a session; at world size 1, nothing."""

    def __init__(self, identity: Identity, stop_requested: Callable[[], bool]) -> None:
        self._identity = identity
        self._stop_requested = stop_requested
        self._device = torch.device("cpu")
        self._store: Store | None = None
        self._leave: Callable[[bool], None] | None = None

    def open(
        self, device: torch.device, setup_error: RankwiseError | None, backend: str | None, timeout: timedelta
    ) -> None:
        """Make or find the process group, or raise on every rank what any rank could not set up.

        After an error `note_failure` and `first_failure` still reach the others, until `close`.

        Ranks: every rank must call.
        """
        prefix = f"rankwise/session-{next(_connection_numbers)}"
        self._device = device
        if dist.is_initialized():
            self._join_group(prefix, timeout)
            collectives.raise_together(setup_error)
        elif self._identity.world_size > 1:
            self._make_group(prefix, setup_error, backend, timeout)
        elif setup_error is not None:
            raise setup_error

    def close(self, *, failed: bool) -> None:
        """Give up, within seconds, what `open` made; a group that was there before stays.

        Args:
            failed: the other ranks may be gone or stuck, so wait for nobody.
        Ranks: local.
        """
        leave, self._leave, self._store = self._leave, None, None
        if leave is None:
            return
        # In a thread, because closing a group whose other end is gone may wait for ever.
        thread = threading.Thread(target=leave, args=(failed,), name="rankwise-leave", daemon=True)
        thread.start()
        thread.join(CLOSE_SECONDS)
        if thread.is_alive():
            _logger.warning("the process group did not close within %g s; it is left behind", CLOSE_SECONDS)

    def first_failure(self, timeout_seconds: float) -> RankFailure | None:
        """The failure that was noted first in the whole job, by order of arrival; None if none comes in time.

        Ranks: local.
        """
        deadline = time.monotonic() + timeout_seconds
        # The store lives in another process, which may be gone already; then nobody can tell.
        with contextlib.suppress(RuntimeError):
            while self._store is not None:
                if self._store.check([_FIRST_FAILURE]):
                    return RankFailure(**json.loads(self._store.get(_FIRST_FAILURE)))
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.02)
        return None

    def note_failure(self, error: BaseException, key: str = _FIRST_FAILURE) -> None:
        """Tell the others that this rank failed; the first to tell stays the first.

        Ranks: local.
        """
        if self._store is None:
            return
        failure = RankFailure.of(error, rank=self._identity.rank, host=self._identity.hostname)
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(key, "", json.dumps(asdict(failure)))

    def _make_group(
        self, prefix: str, setup_error: RankwiseError | None, backend: str | None, timeout: timedelta
    ) -> None:
        store = _rendezvous(self._identity, timeout, self._stop_requested)
        self._store = PrefixStore(prefix, store.clone())  # type: ignore[attr-defined]
        self._vote_to_start(self._store, setup_error, timeout)
        self._leave = self._destroy_group
        dist.init_process_group(
            backend or _default_backend(self._device),
            store=PrefixStore(f"{prefix}/group", store),
            rank=self._identity.rank,
            world_size=self._identity.world_size,
            timeout=timeout,
            device_id=self._device if self._device.index is not None else None,
        )
        _add_cpu_side(timeout)
        # Gloo connects pair by pair: a rank that is done and leaves now would break those that still connect.
        collectives.barrier()

    def _join_group(self, prefix: str, timeout: timedelta) -> None:
        here = (self._identity.rank, self._identity.world_size)
        if here != (dist.get_rank(), dist.get_world_size()):
            raise LaunchError(
                f"the process group that is there says rank {dist.get_rank()} of {dist.get_world_size()}, "
                f"the environment says rank {here[0]} of {here[1]}. Make both agree, or let `init` make it."
            )
        self._store = PrefixStore(prefix, _get_default_store().clone())  # type: ignore[attr-defined]
        cpu_group = _add_cpu_side(timeout)
        if cpu_group is not None:
            self._leave = lambda failed: _forget_cpu_group(cpu_group)

    def _vote_to_start(self, store: Store, error: RankwiseError | None, timeout: timedelta) -> None:
        """Raise on every rank if any rank could not set up, before a group is made that would wait for it."""
        world_size = self._identity.world_size
        if error is not None:
            self.note_failure(error, _SETUP_FAILURE)
        if store.add("num_started", 1) == world_size:
            store.set("all_started", "")
        try:
            seconds = timeout.total_seconds()
            if not _wait(lambda: store.check(["all_started"]), seconds, self._stop_requested):
                when = "when this one was asked to stop" if self._stop_requested() else f"within {seconds:g} s"
                kind = StoppedError if self._stop_requested() else RankwiseError
                raise kind(
                    f"{store.add('num_started', 0)} of {world_size} ranks started {when}. "
                    "See the output of the others, or give more time (timeout_seconds)."
                )
        except BaseException as gave_up:
            # Those who still come must not wait for a group that cannot be.
            self.note_failure(gave_up, _SETUP_FAILURE)
            raise
        if store.check([_SETUP_FAILURE]):
            together = RankFailedError((RankFailure(**json.loads(store.get(_SETUP_FAILURE))),))
            together.on_every_rank = True
            raise together from error

    def _destroy_group(self, failed: bool) -> None:
        collectives.use_cpu_group(None)
        if dist.group.WORLD is None:  # it could not be made
            return
        with contextlib.suppress(RuntimeError):
            if self._device.index is not None:
                torch.accelerator.set_device_index(self._device.index)  # a new thread starts on device 0
            if failed:
                dist.group.WORLD.abort()
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error, or what it came from, tells of another rank that is gone, rather than of this one.

    Ranks: local.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError):
            return True
        if isinstance(seen, RuntimeError) and any(words in str(seen) for words in _LOST_CONNECTION):
            return True
        # What it was merely raised in the handling of is no cause: an error of ours while we tidy up stays ours.
        seen = seen.__cause__
    return False


def _default_backend(device: torch.device) -> str:
    """The CPU side carries messages and flags: they must not wait for, or break, what the device does."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def _add_cpu_side(timeout: timedelta) -> dist.ProcessGroup | None:
    """Make a group for what ranks say over the CPU, where the default group has no gloo there."""
    if "cpu:gloo" in dist.get_backend_config():
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    collectives.use_cpu_group(group)
    return group


def _forget_cpu_group(group: dist.ProcessGroup) -> None:
    collectives.use_cpu_group(None)
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group(group)


def _wait(is_done: Callable[[], bool], timeout_seconds: float, stop_requested: Callable[[], bool]) -> bool:
    """Whether `is_done` came true in time; signal handlers run meanwhile, as they would not in the store's own wait.

    A stop request leaves some seconds: ranks that start only a moment later all stop together in good order.
    """
    start = time.monotonic()
    deadline, stopping = start + timeout_seconds, False
    while not is_done():
        now = time.monotonic()
        if stop_requested() and not stopping:
            stopping, deadline = True, min(deadline, now + STOP_GRACE_SECONDS)
        if now >= deadline:
            return False
        time.sleep(min(1.0, max(0.01, (now - start) / 8)))
    return True


def _rendezvous(identity: Identity, timeout: timedelta, stop_requested: Callable[[], bool]) -> Store:
    """The store through which the ranks find each other; one for all sessions of this process.

    A second store on the same port would race with the first one's end, and torch's own default prefix would
    find the addresses of the first session's group.
    """
    global _rendezvous_store
    if _rendezvous_store is not None:
        return _rendezvous_store
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise LaunchError(
            f"WORLD_SIZE={identity.world_size} but {' and '.join(missing)} not set, so the ranks cannot find "
            "each other. Set the address and a free port of the node of rank 0, or start through torchrun."
        )
    if not os.environ["MASTER_PORT"].isdecimal():
        raise LaunchError(f"MASTER_PORT={os.environ['MASTER_PORT']!r} is no port. Set a number in 1..65535.")
    found: Future[Store] = Future()

    def find() -> None:
        try:
            handler = rendezvous("env://", identity.rank, identity.world_size, timeout=timeout)
            found.set_result(next(iter(handler))[0])
        except BaseException as error:
            found.set_exception(error)

    # In a thread, because it waits where no signal handler runs; it ends by its own timeout.
    threading.Thread(target=find, name="rankwise-rendezvous", daemon=True).start()
    told = f"rank {identity.rank} of {identity.world_size} did not find the others at "
    told += f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if not _wait(found.done, math.inf, stop_requested):
        raise StoppedError(f"{told} before it was asked to stop.")
    try:
        _rendezvous_store = found.result()
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise RankwiseError(f"{told} within {timeout.total_seconds():g} s: {reason}") from error
    return _rendezvous_store
