"""How a rank waits for the others: until all have come, a rank has failed, or the time is up and it says who lacks."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from rankwise.errors import MissingRanksError, RankFailedError, RankwiseError
from rankwise.identity import Identity
from rankwise.lifeline import Lifeline
from rankwise.store import in_thread

TIMEOUT_SECONDS = 600.0
FIRST_FAILURE_SECONDS = 5.0
"""How long a rank whose connection broke waits to hear whose fault it was."""

T = TypeVar("T")

_LONG = timedelta(days=30)
_MOMENT = timedelta(seconds=0.1)
ANSWER_SECONDS = 3.0
"""How long the store may take to answer."""

_SAY_AFTER_SECONDS = 0.2
_SETTLE_SECONDS = 1.2
_MAX_NAMED = 8
_OWN_FOLDERS = tuple(f"{Path(file).parent}{os.sep}" for file in (os.__file__, torch.__file__, __file__))
LOST_CONNECTION = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "gloo/transport",
    "NCCL error",
    "NCCL communicator",
)
"""What torch says of a rank that is gone."""


Place = tuple[int, int]
"""Node rank and local rank."""


class Link:
    """What this rank's collectives go through.

    Args:
        group: that talks over the CPU; None means the default group.
        store, lifeline: of the session, the store for the main thread alone; None without a session.
    """

    def __init__(
        self,
        identity: Identity | None = None,
        device: str = "",
        *,
        group: dist.ProcessGroup | None = None,
        store: Store | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self.lifeline: Lifeline | None = None
        self.secret: bytes | None = None
        self._identity = identity
        self._device = device
        self._group = group
        self._store = store
        self._timeout_seconds = timeout_seconds
        self._number = 0
        self._num_channels = 0
        self._what = "the start"
        self._waiting = False
        self._since = time.monotonic()

    @property
    def here(self) -> tuple[str, str] | None:
        """Host and device of this rank; None without a session."""
        return (self._identity.hostname, self._device) if self._identity is not None else None

    def set_device(self, device: str) -> None:
        """Know the device, once it is chosen.

        Ranks: local.
        """
        self._device = device

    def set_group(self, group: dist.ProcessGroup | None) -> None:
        """Talk through `group`; None means the default group.

        Ranks: every rank must call.
        """
        self._group = group

    def meet(self) -> None:
        """Wait until the group works for every rank, and share a secret through it.

        Messages that go through the store, which anybody on the network may reach, are unpickled only if they carry it.

        Ranks: every rank must call.
        """
        secret = torch.frombuffer(bytearray(secrets.token_bytes(32)), dtype=torch.uint8)
        options = dist.BroadcastOptions()
        self.run(lambda group: group.broadcast([secret], options), options, "the start", None)
        self.secret = secret.numpy().tobytes()
        # A broadcast does not hold its source back; only this says that all are here.
        ready, summing = torch.zeros(1), dist.AllreduceOptions()
        self.run(lambda group: group.allreduce([ready], summing), summing, "the start", None)

    def run(
        self, start: Callable[[dist.ProcessGroup], dist.Work], options: Any, what: str, timeout_seconds: float | None
    ) -> None:
        """Start one operation of the group and wait for its end.

        Raises:
            MissingRanksError, RankFailedError: as the collectives.
        Ranks: every rank must call.
        """
        options.timeout = _LONG  # the time is kept here, where the missing can be named
        group = self._group or dist.group.WORLD
        assert group is not None, "collectives ask for an initialized group first"
        self._number += 1
        with self._at(what):
            self._raise_first_failure()
            try:
                work = start(group)
                self._wait(work, what, timeout_seconds)
            except (RuntimeError, ValueError) as error:
                if not is_lost_connection(error):
                    raise
                self._explain(error, what)
                raise

    def node_channel(self) -> NodeChannel:
        """The way from the local main process to the others of its node, for one message.

        Ranks: every rank of the node must call.
        """
        if self._identity is None or self._store is None or self.secret is None:
            raise RankwiseError(
                "what the ranks of one node do together needs a session. Call it within rankwise.init()."
            )
        self._num_channels += 1
        return NodeChannel(self, self._store, f"node/{self._identity.node_rank}/{self._num_channels}", self._identity)

    def doing(self) -> str:
        """What this rank is doing, as JSON, for those who wait for it.

        Ranks: local; the lifeline's thread asks.
        """
        waiting = self._waiting
        told: dict[str, Any] = {"number": self._number, "what": self._what, "waiting": waiting}
        if self._identity is not None:
            told["place"] = (self._identity.node_rank, self._identity.local_rank)
        told["seconds"] = round(time.monotonic() - self._since)
        if not waiting:
            told["where"] = _where_main_thread_is()
        return json.dumps(told)

    def say_left(self) -> None:
        """Tell those who may wait that this rank has left.

        Ranks: local.
        """
        is_gone = self.lifeline is not None and self.lifeline.main_is_gone
        if self._store is not None and self._identity is not None and not is_gone:
            store, key = self._store, f"doing/{self._identity.rank}"
            told = {"number": self._number, "what": self._what, "waiting": False, "left": True}
            ask(lambda: store.set(key, json.dumps(told)))

    def where_all_are(self, what: str) -> str:
        """Which ranks are at something else than `what`, in words.

        Ranks: local.
        """
        if self._store is None or self._identity is None:
            return f"this rank is at {what}, others are not"
        self._what = what
        store, key, doing = self._store, f"doing/{self._identity.rank}", self.doing()
        ask(lambda: store.set(key, doing))
        time.sleep(_SAY_AFTER_SECONDS)  # the others are saying it too
        at: dict[str, list[int]] = {}
        for rank, told in enumerate(ask(self._told) or []):
            at.setdefault(told.get("what", "an unknown place"), []).append(rank)
        return "; ".join(f"rank {_listed(ranks)} at {place}" for place, ranks in at.items())

    def wait_for(self, is_done: Callable[[], bool], what: str, place: Place | None = None) -> None:
        """Wait until `is_done`, for the process at `place`, or for all.

        Raises:
            MissingRanksError, RankFailedError: as the collectives.
        Ranks: local.
        """
        with self._at(what):
            begin = time.monotonic()
            while not is_done():
                self._require_hope(what, begin, None, place)
                time.sleep(min(0.02, (time.monotonic() - begin) / 20))

    def raise_first_failure(self, within_seconds: float = 0.0) -> None:
        """Raise if another rank has failed, or does so within this time.

        Raises:
            RankFailedError: names the rank that failed first.
        Ranks: local.
        """
        if self.lifeline is not None and within_seconds:
            self.lifeline.heard.wait(within_seconds)
        self._raise_first_failure()

    def _require_hope(self, what: str, begin: float, timeout_seconds: float | None, place: Place | None = None) -> None:
        """Raise if there is no more use in waiting."""
        self._raise_first_failure()
        limit = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        if time.monotonic() - begin > limit:
            missing, told = self._missing(place)
            raise MissingRanksError(f"{what}: the others did not come within {limit:g} s. {told}", missing)

    def _wait(self, work: dist.Work, what: str, timeout_seconds: float | None) -> None:
        """Wait in the group itself, which is quickest, a moment at a time."""
        begin, said = time.monotonic(), False
        while True:
            try:
                work.wait(_MOMENT)
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # its own end, or error: it may have come just after the moment was over
                    return
            self._require_hope(what, begin, timeout_seconds)
            if not said and self.lifeline is not None:
                said = True
                self.lifeline.post()

    @contextlib.contextmanager
    def _at(self, what: str) -> Any:
        self._what, self._waiting, self._since = what, True, time.monotonic()
        try:
            with _observed(what):
                yield
        finally:
            self._waiting, self._since = False, time.monotonic()

    def _raise_first_failure(self) -> None:
        if self.lifeline is not None and self.lifeline.first_failure is not None:
            raise RankFailedError((self.lifeline.first_failure,), "failed first")

    def _explain(self, error: Exception, what: str) -> None:
        """Raise what really happened, where it can be known: who failed, or who has left."""
        if self.lifeline is None:
            return
        begin = time.monotonic()
        while time.monotonic() - begin < FIRST_FAILURE_SECONDS:
            if self.lifeline.heard.wait(0.1):
                raise RankFailedError((self.lifeline.first_failure,), "failed first") from None  # type: ignore[arg-type]
            left = (0,) if self.lifeline.main_is_gone else self._who_left()
            if left:
                raise MissingRanksError(
                    f"{what}: rank {_listed(left)} has left the session already. All ranks must make the same calls.",
                    left,
                ) from None

    def _who_left(self) -> tuple[int, ...]:
        return tuple(rank for rank, told in enumerate(ask(self._told) or []) if told.get("left"))

    def _missing(self, place: Place | None) -> tuple[tuple[int, ...], str]:
        if self._store is None:
            return (), "Who is missing is known within `rankwise.init()` only."
        time.sleep(_SETTLE_SECONDS)  # every rank that is alive says where it is within a second
        told = ask(self._told)
        if told is None:
            return (0,), "Rank 0, whose process holds the store, does not answer: it hangs, or its node is gone."
        own = self._identity.rank if self._identity is not None else None
        missing = [rank for rank, other in enumerate(told) if rank != own and self._is_awaited(other, place)]
        told_by = "; ".join(f"rank {rank}: {_in_words(told[rank])}" for rank in missing[:_MAX_NAMED])
        more = f"; and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        if not missing:
            return (), "All have come, but the group did not bring them together."
        return tuple(missing), f"Missing are {told_by}{more}."

    def _is_awaited(self, other: dict[str, Any], place: Place | None) -> bool:
        """Whether a rank has not come to the call at which this one waits, for all or for the process at `place`."""
        if place is not None:
            return other.get("place") == list(place)
        return "left" in other or (other.get("number"), other.get("what")) != (self._number, self._what)

    def _told(self) -> list[dict[str, Any]]:
        """What each rank last said that it is doing; empty for one that has said nothing."""
        assert self._store is not None, "asked within a session only"
        found: list[dict[str, Any]] = []
        for rank in range(dist.get_world_size()):
            found.append({})
            with contextlib.suppress(RuntimeError):
                if self._store.check([f"doing/{rank}"]):
                    found[rank] = json.loads(self._store.get(f"doing/{rank}"))
        return found


_SEAL_BYTES = hashlib.sha256().digest_size


class NodeChannel:
    """One message from the local main process to the other processes of its node."""

    def __init__(self, link: Link, store: Store, key: str, identity: Identity) -> None:
        self.is_source = identity.is_local_main_process
        self._link = link
        self._store = store
        self._key = key
        self._main_place = (identity.node_rank, 0)
        self._num_readers = identity.local_world_size - 1

    def send(self, payload: bytes) -> None:
        """Leave the message for the others of this node.

        Ranks: the local main process only.
        """
        if self._num_readers:
            self._store.set(self._key, (self._seal(payload) + payload).hex())

    def receive(self, what: str) -> bytes:
        """Wait for the message.

        Raises:
            MissingRanksError, RankFailedError: as the collectives.
        Ranks: all of the node but the local main process.
        """
        self._link.wait_for(lambda: bool(self._store.check([self._key])), what, self._main_place)
        sealed = bytes.fromhex(self._store.get(self._key).decode())
        seal, payload = sealed[:_SEAL_BYTES], sealed[_SEAL_BYTES:]
        if not hmac.compare_digest(seal, self._seal(payload)):
            raise RankwiseError(f"{what}: a message in the store is not from a rank of this job. See who else uses it.")
        if self._store.add(f"{self._key}/read", 1) == self._num_readers:
            for key in (self._key, f"{self._key}/read"):
                self._store.delete_key(key)
        return payload

    def _seal(self, payload: bytes) -> bytes:
        assert self._link.secret is not None, "node_channel asks for a session"
        return hmac.digest(self._link.secret, self._key.encode() + b"\0" + payload, "sha256")


_bare = Link()
_link: Link | None = None
_observed: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def observe_waiting(observer: Callable[[str], contextlib.AbstractContextManager[Any]] | None) -> None:
    """Have `observer(what)` entered around whatever this rank does together with others by our collectives.

    Ranks: local; the observer must not raise. None takes it back.
    """
    global _observed
    _observed = observer or contextlib.nullcontext


def link() -> Link:
    """The open session's link; without a session a bare one, through the group that is there.

    Ranks: local.
    """
    return _link or _bare


def use_link(new: Link | None) -> None:
    """Send what ranks do together through `new`; None means that there is no session.

    Ranks: every rank must call, with a link to the same group. Sessions do.
    """
    global _link
    _link = new


def ask(call: Callable[[], T]) -> T | None:
    """What the store gives, None where it fails or does not answer: rank 0 may hang, and its store with it.

    Ranks: local.
    """
    answer = in_thread(call, "rankwise-ask")
    with contextlib.suppress(RuntimeError, TimeoutError):
        return answer.result(ANSWER_SECONDS)
    return None


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error, or what it came from, tells of another rank that is gone, rather than of this one.

    Ranks: local.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError):
            return True
        if isinstance(seen, RuntimeError) and any(words in str(seen) for words in LOST_CONNECTION):
            return True
        # What it was merely raised in the handling of is no cause: an error of ours while we tidy up stays ours.
        seen = seen.__cause__
    return False


def _where_main_thread_is() -> str:
    """File, line and function of the innermost frame that is the user's own."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = frame
    while frame is not None and frame.f_code.co_filename.startswith((*_OWN_FOLDERS, "<frozen")):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return ""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _in_words(told: dict[str, Any]) -> str:
    if not told:
        return "it has said nothing"
    last = f"{told['what']} (number {told['number']})"
    if told.get("left"):
        return f"left the session after {last}"
    if told.get("waiting"):
        return f"waits at {last} since {told['seconds']} s"
    where = f", now at {told['where']}" if told.get("where") else ""
    return f"last at {last}, {told['seconds']} s ago{where}"


def _listed(ranks: tuple[int, ...] | list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_MAX_NAMED]))
    return f"{shown}, ..." if len(ranks) > _MAX_NAMED else shown
