"""The ties of this process to the other ranks: rendezvous, roll call, process group, and whose failure came first."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from rankwise import lastwords, logs
from rankwise.device import device_uuid, find_shared_devices
from rankwise.errors import DeviceError, LaunchError, RankFailedError, RankFailure, RankwiseError
from rankwise.identity import Identity
from rankwise.lifeline import FIRST_FAILURE, Lifeline
from rankwise.rollcall import call_roll, consult
from rankwise.store import find_interface, find_store, in_thread, wait_until
from rankwise.visible import is_sharing_asked, visible_text
from rankwise.waiting import Link, ask, use_link

CLOSE_SECONDS = 10.0
LINGER_SECONDS = 5.0
"""How long rank 0 waits at its end for the others to leave first."""

_ACKNOWLEDGE_SECONDS = 2.0
_SPOKEN_BY_OTHERS = ("SystemExit", "KeyboardInterrupt")
_CONTRADICTION_SECONDS = 10.0
_BY_HAND = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
_logger = logs.get_logger(__name__)
_LONG = timedelta(days=30)
_connection_numbers = itertools.count()
_open_connection: Connection | None = None
_at_end: list[Callable[[bool], None]] = []
_listeners: dict[str, Callable[[int, Any], None]] = {}


class Connection:
    """What ties this process to the other ranks of a session; at world size 1, nothing."""

    def __init__(self, is_stopped: Callable[[], bool], timeout: timedelta) -> None:
        self._telling = threading.Lock()
        self._is_told = False
        self._is_stopped = is_stopped
        self._timeout = timeout
        self._identity: Identity | None = None
        self._device = torch.device("cpu")
        self._store: Store | None = None
        self._lifeline: Lifeline | None = None
        self._link: Link | None = None
        self._one_machine = True
        self._leave: Callable[[bool], None] | None = None

    @property
    def identity(self) -> Identity | None:
        """As all ranks together see it, once they have met."""
        return self._identity

    def find_others(self, identity: Identity) -> Identity:
        """The identity that all ranks together see, once all have come; from here on a failure reaches them.

        Raises:
            LaunchError: the ranks contradict each other; on every rank.
            RankwiseError: they did not all come in time.
        Ranks: every rank must call.
        """
        self._identity = identity
        if not dist.is_initialized() and identity.world_size == 1:
            return identity
        if dist.is_initialized():
            _require_same_place(identity)
            store = _get_default_store()
        else:
            store = find_store(identity, self._timeout, self._is_stopped)
        prefix = f"rankwise/session-{next(_connection_numbers)}"
        self._store = _clone(prefix, store)
        self._identity, self._one_machine = call_roll(self._store, identity, self._timeout, self._is_stopped)
        self._link = Link(self._identity, store=_clone(prefix, store), timeout_seconds=self._timeout.total_seconds())
        if identity.world_size > 1:
            self._lifeline = Lifeline(
                _clone(prefix, store),
                self._identity,
                self._one_machine,
                self._link.doing,
                self._on_first_failure,
                logs.receive,
                _hear,
            )
            self._link.lifeline = self._lifeline
        return self._identity

    def open(
        self,
        device: torch.device,
        setup_error: RankwiseError | None,
        *,
        backend: str | None,
        make_group: bool,
        share_devices: bool,
    ) -> None:
        """Make or find the process group, or raise on every rank what any rank could not set up.

        Ranks: every rank must call.
        """
        identity = self._identity
        assert identity is not None, "find_others comes first"
        self._device = device
        if self._store is not None:
            self._vote_to_start(self._store, identity, setup_error, share_devices)
        elif setup_error is not None:
            raise setup_error
        if self._link is not None:
            self._link.set_device(str(device))
        if dist.is_initialized():
            self._join_group()
        elif identity.world_size > 1 or make_group:
            self._make_group(identity, backend)
        if self._link is not None:
            use_link(self._link)
        _set_open(self)

    def make_side_group(self) -> dist.ProcessGroup:
        """As the function of this name.

        Ranks: every rank must call.
        """
        with _gloo_interface(self._one_machine):
            made = in_thread(lambda: dist.new_group(backend="gloo", timeout=_LONG), "rankwise-group")
            wait_until(lambda: made.done() or self._is_lost(), math.inf, lambda: False)
            self._raise_if_lost()
            group: dist.ProcessGroup = made.result()
        return group

    def close(self, *, failed: bool) -> None:
        """Give up, within seconds, what `find_others` and `open` made; a group that was there before stays.

        Args:
            failed: the other ranks may be gone or stuck, so wait for nobody but those that want to hear why.
        Ranks: local.
        """
        use_link(None)
        _set_open(None)
        leave, self._leave = self._leave, None
        if self._link is not None:
            self._link.say_left()
        if leave is not None:
            # In a thread, because closing a group whose other end is gone may wait for ever.
            thread = threading.Thread(target=leave, args=(failed,), name="rankwise-leave", daemon=True)
            thread.start()
            thread.join(1.0 if failed else CLOSE_SECONDS)
            if thread.is_alive() and not failed:
                _logger.warning("the process group did not close within %g s; it is left behind", CLOSE_SECONDS)
        if self._lifeline is not None:
            self._lifeline.close(linger_seconds=LINGER_SECONDS)
        self._store = self._lifeline = self._link = None

    def send_record(self, record: dict[str, Any]) -> bool:
        """Hand a log record over to the main process's console; False where it cannot get there.

        Ranks: local.
        """
        return self._lifeline is not None and self._lifeline.send_record(record)

    def send_message(self, topic: str, content: Any) -> bool:
        """Tell rank 0, or from rank 0 all others, something that may be lost; False where it surely is.

        Ranks: local.
        """
        return self._lifeline is not None and self._lifeline.send_message(topic, content)

    def first_failure(self, timeout_seconds: float) -> RankFailure | None:
        """The failure that was noted first in the whole job, by order of arrival; None if none comes in time.

        Ranks: local.
        """
        if self._lifeline is None:
            return None
        self._lifeline.heard.wait(timeout_seconds)
        return self._lifeline.first_failure

    def note_failure(self, error: BaseException) -> RankFailure | None:
        """Tell the others that this rank failed; what comes back is whose failure came first, this one's maybe.

        None where there is nobody to tell, or nobody who says that he heard.

        Ranks: local.
        """
        if self._identity is None:
            return None
        failure = RankFailure.of(
            error,
            rank=self._identity.rank,
            host=self._identity.hostname,
            device=str(self._device),
            pid=os.getpid(),
        )
        return self.note(failure)

    def note(self, failure: RankFailure) -> RankFailure | None:
        """As `note_failure`, of any rank: one that hangs cannot say it of itself.

        Ranks: local.
        """
        if self._store is None or self._lifeline is None:
            return None
        store, words = self._store, json.dumps(asdict(failure))
        if ask(lambda: store.compare_set(FIRST_FAILURE, "", words)) is None:
            return None
        self._lifeline.announce()
        return self.first_failure(_ACKNOWLEDGE_SECONDS)

    def learn(self, failure: RankFailure) -> None:
        """Take this for the first failure here, where the main process cannot say which it was.

        Ranks: local.
        """
        if self._lifeline is not None:
            self._lifeline.learn(failure)

    @property
    def token(self) -> str:
        """What only the ranks of this session know, the same on all; empty at world size 1.

        Ranks: local.
        """
        return self._lifeline.token if self._lifeline is not None else ""

    def tell_once(self, failure: RankFailure) -> None:
        """Print the first failure of the job, if this rank has not yet.

        Ranks: local.
        """
        with self._telling:
            if not self._is_told:
                self._is_told = True
                lastwords.print_words(lastwords.in_words(failure))

    def _on_first_failure(self, failure: RankFailure) -> None:
        """In the lifeline's thread: the console of the main process is told at once, whatever its own work does."""
        is_main = self._identity is not None and self._identity.is_main_process
        if is_main and not lastwords.has_launcher() and failure.error_type not in _SPOKEN_BY_OTHERS:
            self.tell_once(failure)

    def _vote_to_start(
        self, store: Store, identity: Identity, setup_error: RankwiseError | None, share_devices: bool
    ) -> None:
        """Raise on every rank if any rank could not set up, or two share a device, before a group is made."""
        place = (identity.rank, identity.local_rank, identity.hostname)
        row: dict[str, Any] = {"rank": identity.rank, "world_size": identity.world_size, "failure": None}
        if setup_error is not None:
            failure = RankFailure.of(setup_error, rank=identity.rank, host=identity.hostname, pid=os.getpid())
            row["failure"] = asdict(failure)
        else:
            uuid, visible = device_uuid(self._device), visible_text(os.environ, self._device.type)
            row["device"] = (*place, str(self._device), uuid, visible)

        def judge(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
            failures = [row["failure"] for row in rows if row["failure"] is not None]
            if failures:
                return {"failures": failures}
            is_meant = share_devices or is_sharing_asked(os.environ)
            shared = None if is_meant else find_shared_devices([tuple(row["device"]) for row in rows])
            return {"failures": [], "shared": shared}

        answer = consult(store, "ready", row, judge, self._timeout, self._is_stopped, check=self._raise_if_lost)
        if answer["failures"]:
            together = RankFailedError(tuple(RankFailure(**failure) for failure in answer["failures"]))
            together.on_every_rank = True
            raise together from setup_error
        if answer["shared"]:
            shared = DeviceError(answer["shared"])
            shared.on_every_rank = True
            raise shared

    def _is_lost(self) -> bool:
        return self._lifeline is not None and self._lifeline.first_failure is not None

    def _raise_if_lost(self) -> None:
        if self._lifeline is not None and self._lifeline.first_failure is not None:
            raise RankFailedError((self._lifeline.first_failure,), "failed first")

    def _make_group(self, identity: Identity, backend: str | None) -> None:
        store: Store = HashStore() if self._store is None else self._store
        self._leave = self._destroy_group

        def make() -> dist.ProcessGroup | None:
            self._use_device()
            dist.init_process_group(
                backend or _default_backend(self._device),
                store=PrefixStore("group", store.clone() if self._store is not None else store),  # type: ignore[attr-defined]
                rank=identity.rank,
                world_size=identity.world_size,
                timeout=self._timeout,
                device_id=self._device if self._device.index is not None else None,
            )
            return _make_cpu_side(self._timeout)

        def is_made() -> bool:
            self._raise_if_lost()
            return made.done()

        with _gloo_interface(self._one_machine):
            # In a thread, because connecting waits for a rank that has failed, and where no signal handler runs.
            made = in_thread(make, "rankwise-group")
            wait_until(is_made, math.inf, lambda: False)
            cpu_group = made.result()
        if self._link is not None:
            self._link.set_group(cpu_group)
            # Gloo connects pair by pair: a rank that is done and leaves now would break those that still connect.
            use_link(self._link)
            self._link.meet()

    def _join_group(self) -> None:
        cpu_group = _make_cpu_side(self._timeout)
        if self._link is not None:
            self._link.set_group(cpu_group)
            self._link.meet()
        if cpu_group is not None:
            self._leave = lambda failed: _forget(cpu_group)

    def _destroy_group(self, failed: bool) -> None:
        if dist.group.WORLD is None:  # it could not be made
            return
        with contextlib.suppress(RuntimeError):
            self._use_device()
            if failed:
                # For good: what waits in it for a rank that is gone would hold up whoever frees it, and the exit.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
                dist.group.WORLD.abort()
        _forget(None)

    def _use_device(self) -> None:
        """In a thread of ours: a new one starts on device 0."""
        if self._device.index is not None:
            torch.accelerator.set_device_index(self._device.index)


def make_side_group() -> dist.ProcessGroup:
    """A process group of all ranks over the CPU, for what goes on in the background: nothing else comes between there.

    It waits for ever: gloo's own time limit, once over, breaks a group for good, and a slow disk must not. Of a rank
    that dies its connections tell.

    Raises:
        RankFailedError: another rank failed first.
    Ranks: every rank must call, in one order with other groups.
    """
    if _open_connection is not None:
        return _open_connection.make_side_group()
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_LONG)
    return group


def at_session_end(callback: Callable[[bool], None]) -> Callable[[], None]:
    """Have `callback` called when the session ends, while the ranks can still talk; with whether it ends by an error.

    Returns:
        What takes that back.
    Ranks: local.
    """
    _at_end.append(callback)

    def forget() -> None:
        with contextlib.suppress(ValueError):
            _at_end.remove(callback)

    return forget


def tell_main(topic: str, content: Any) -> bool:
    """Tell the main process something, past process groups and accelerators; it may be lost.

    Its listener of that topic is called in a thread of its own connection; the main process may tell itself, and is
    called at once. Nobody waits.

    Args:
        content: what JSON can say.
    Returns:
        False where there is no session, no way to the main process, or a thousand messages wait already.
    Ranks: local.
    """
    connection = _open_connection
    if connection is None or connection.identity is None:
        return False
    if connection.identity.is_main_process:
        _hear(connection.identity.rank, topic, content)
        return True
    return connection.send_message(topic, content)


def tell_others(topic: str, content: Any) -> bool:
    """Tell all other ranks something, as `tell_main` does the other way.

    Ranks: main process only.
    """
    return _open_connection is not None and _open_connection.send_message(topic, content)


def listen(topic: str, listener: Callable[[int, Any], None]) -> Callable[[], None]:
    """Have `listener` called with the sender's rank and the content of each message of a topic.

    It is called in the thread that all messages and the news of failures come through: it must be quick, and what it
    raises is logged and dropped.

    Returns:
        What takes that back.
    Ranks: local.
    """
    _listeners[topic] = listener

    def forget() -> None:
        if _listeners.get(topic) is listener:
            del _listeners[topic]

    return forget


def _hear(rank: int, topic: str, content: Any) -> None:
    listener = _listeners.get(topic)
    if listener is None:
        return
    try:
        listener(rank, content)
    except Exception:
        _logger.exception("a message of rank %d (%s) could not be used", rank, topic, extra=logs.FILE_ONLY)


def end_session(*, failed: bool) -> None:
    """Call what waits for the end of the session, the last first.

    Ranks: every rank must call, unless `failed`.
    """
    while _at_end:
        _at_end.pop()(failed)


def tell_contradiction(error: LaunchError, environ: Mapping[str, str]) -> None:
    """Let the others hear of an environment that contradicts itself, if the launcher's own variables lead to them.

    Otherwise a rank whose variables happen to fit would wait for this one until its time is up.

    Ranks: local.
    """
    with contextlib.suppress(RankwiseError, RuntimeError):
        identity = Identity.resolve({name: value for name, value in environ.items() if name not in _BY_HAND})
        if identity.world_size == 1 or identity.is_main_process:
            return
        store = find_store(identity, timedelta(seconds=_CONTRADICTION_SECONDS), lambda: False)
        words = f"rank {identity.rank} on {identity.hostname}: {error}"
        key = f"rankwise/session-{next(_connection_numbers)}/roll/verdict"
        store.compare_set(key, "", json.dumps({"kind": "launch", "error": words, "judged": False}))


def place_in_group(identity: Identity) -> Identity:
    """The identity that a process group gives which was made without a launcher, as by torch.multiprocessing.spawn.

    Ranks: local.
    """
    if identity.launcher != "single" or not dist.is_initialized() or dist.get_world_size() == 1:
        return identity
    place = {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    found = Identity.resolve(place, hostname=identity.hostname)
    sources = {name: "process group" if source == "RANK" else source for name, source in found.sources.items()}
    return dataclasses.replace(found, launcher="group", sources=sources | {"world_size": "process group"})


def _require_same_place(identity: Identity) -> None:
    if (identity.rank, identity.world_size) != (dist.get_rank(), dist.get_world_size()):
        raise LaunchError(
            f"the process group that is there says rank {dist.get_rank()} of {dist.get_world_size()}, the environment "
            f"says rank {identity.rank} of {identity.world_size}. Make both agree, or let `init` make it."
        )


def _set_open(connection: Connection | None) -> None:
    global _open_connection
    _open_connection = connection


def _clone(prefix: str, store: Store) -> Store:
    """A connection of its own: a thread that waits on a shared one stalls the calls of all others."""
    clone: Callable[[], Store] = store.clone  # type: ignore[attr-defined]
    return PrefixStore(prefix, clone())


def _default_backend(device: torch.device) -> str:
    """The CPU side carries messages and flags: they must not wait for, or break, what the device does."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def _make_cpu_side(timeout: timedelta) -> dist.ProcessGroup | None:
    """A group for what ranks say over the CPU, where the default group has no gloo there."""
    if "cpu:gloo" in dist.get_backend_config():
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    return group


@contextlib.contextmanager
def _gloo_interface(one_machine: bool) -> Iterator[None]:
    """Loopback where nobody is elsewhere; else gloo takes the address of this host's name, if others can reach that."""
    name = "GLOO_SOCKET_IFNAME"
    interface = "lo" if one_machine else find_interface()
    if name in os.environ or interface not in psutil.net_if_addrs():
        yield
        return
    os.environ[name] = interface
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _forget(group: dist.ProcessGroup | None) -> None:
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group(group)
