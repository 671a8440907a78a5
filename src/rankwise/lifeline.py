"""One connection from every rank to rank 0, which breaks when its process dies: then all ranks hear who is gone.

The kernel closes the connection of a process that was killed, at once and without its help, so nobody has to guess from
a missing heartbeat; keep-alive probes of the kernel cover a node that lost its power or its network. The same
connections carry the first failure of the job to every rank. What each rank is doing is told through the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import selectors
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch.distributed.distributed_c10d import Store

from rankwise import logs
from rankwise.errors import LOST, RankFailure
from rankwise.identity import Identity
from rankwise.store import machine

FIRST_FAILURE = "first_failure"
POST_SECONDS = 1.0
"""How often a rank tells what it is doing."""

MAX_RECORDS = 1000
"""Log records, and as many other messages, that may wait for rank 0 to read them; further ones are refused."""

_MAX_WAITING_BYTES = 1 << 16
_CONNECT_SECONDS = 5.0
_BYE_SECONDS = 1.0
_MAX_LINE_BYTES = 4096
_logger = logs.get_logger(__name__)
_open_lifelines: weakref.WeakSet[Lifeline] = weakref.WeakSet()


class Lifeline:
    """This rank's end; on rank 0 the other end of everybody's too. One thread does all of it.

    Args:
        store: for this thread alone (a clone): one that waits on a shared store stalls everybody else's calls.
        doing: what this rank is doing, as JSON.
        on_first_failure: called once, from the thread, with the first failure of the job.
        on_record: called from the thread with each log record that another rank sends to rank 0, and on other ranks
            with those of their own that rank 0 could not be sent.
        on_message: called from the thread with the sender's rank, the topic and the content of every other message.
    """

    def __init__(
        self,
        store: Store,
        identity: Identity,
        one_machine: bool,
        doing: Callable[[], str],
        on_first_failure: Callable[[RankFailure], None],
        on_record: Callable[[dict[str, Any]], None] = lambda record: None,
        on_message: Callable[[int, str, Any], None] = lambda rank, topic, content: None,
    ) -> None:
        self.first_failure: RankFailure | None = None
        self.heard = threading.Event()
        """Set when `first_failure` is there: on other ranks than 0 only when rank 0 knows of it, or is lost."""
        self._store = store
        self._identity = identity
        self._doing = doing
        self._on_first_failure = on_first_failure
        self._on_record = on_record
        self._on_message = on_message
        self._announced = False
        self._records: deque[dict[str, Any]] = deque()
        self._messages: deque[tuple[str, Any]] = deque()
        self._selector = selectors.DefaultSelector()
        self._peers: dict[socket.socket, _Peer] = {}
        self._closing = False
        self._main_left = False
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)  # a full pipe wakes as well as one byte more
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        self._nonce = ""
        self._listener: socket.socket | None = None
        if identity.is_main_process:
            self._listen(one_machine)
        else:
            self._connect()
        _open_lifelines.add(self)
        self._thread = threading.Thread(target=self._run, name="rankwise-lifeline", daemon=True)
        self._thread.start()

    @property
    def is_whole(self) -> bool:
        """Whether this rank is connected: on rank 0 always, on others where rank 0 could be reached.

        Ranks: local.
        """
        return self._identity.is_main_process or bool(self._peers)

    @property
    def main_is_gone(self) -> bool:
        """Whether rank 0 has died or left the session, and its store is not to be counted on.

        Ranks: local.
        """
        return self.main_is_lost or self._main_left

    @property
    def main_is_lost(self) -> bool:
        """Whether rank 0 died, and the store with it where it was the host.

        Ranks: local.
        """
        return self.first_failure is not None and self.first_failure.rank == 0 and self.first_failure.is_loss

    def announce(self) -> None:
        """Tell everybody soon that a failure stands in the store.

        Ranks: local.
        """
        self._announced = True
        self._wake(b"f")

    @property
    def token(self) -> str:
        """A name of this session that strangers cannot guess, and that is no secret: the same on all ranks.

        Ranks: local.
        """
        return hashlib.sha256(self._nonce.encode()).hexdigest()[:16]

    def learn(self, failure: RankFailure) -> None:
        """Take this for the first failure, on this rank alone, where rank 0 cannot say which it was.

        Ranks: local; on ranks other than the main process.
        """
        if self.first_failure is None:
            self.first_failure = failure
            self.heard.set()

    def send_record(self, record: dict[str, Any]) -> bool:
        """Hand a log record over to rank 0's console; False where it cannot get there.

        Ranks: local; on ranks other than the main process. Never waits.
        """
        if self._closing or not self._peers or self._identity.is_main_process or len(self._records) >= MAX_RECORDS:
            return False
        self._records.append(record)
        self._wake(b"r")
        return True

    def send_message(self, topic: str, content: Any) -> bool:
        """Tell rank 0, or from rank 0 all others, something that may be lost; False where it surely is.

        Args:
            content: what JSON can say.
        Ranks: local. Never waits.
        """
        if self._closing or not self._peers or len(self._messages) >= MAX_RECORDS:
            return False
        self._messages.append((topic, content))
        self._wake(b"r")
        return True

    def post(self) -> None:
        """Tell soon what this rank is doing, rather than within a second.

        Ranks: local.
        """
        self._wake(b"p")

    def close(self, linger_seconds: float) -> None:
        """Leave in good order; rank 0 waits up to `linger_seconds` for the others to leave first.

        Ranks: local.
        """
        _open_lifelines.discard(self)
        if self._identity.is_main_process:
            deadline = time.monotonic() + linger_seconds
            while self._has_ranks() and time.monotonic() < deadline:
                time.sleep(0.01)
        self._closing = True
        self._wake(b"c")
        self._thread.join(2.0)
        with contextlib.suppress(IndexError):
            while True:  # what came while the thread ended
                self._on_record(self._records.popleft())

    def drop(self) -> None:
        """Close the descriptors that a forked child has copies of: they would keep this rank alive for the others."""
        for handle in (*self._peers, self._listener, self._wake_receiver, self._wake_sender):
            if handle is not None:
                with contextlib.suppress(OSError):
                    os.close(handle.detach())

    def _has_ranks(self) -> bool:
        return any(peer.rank is not None for peer in list(self._peers.values()))

    def _wake(self, byte: bytes) -> None:
        with contextlib.suppress(OSError):
            self._wake_sender.send(byte)

    def _listen(self, one_machine: bool) -> None:
        self._nonce = secrets.token_hex(16)
        self._listener = _listener(loopback=one_machine)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        told = {
            "port": self._listener.getsockname()[1],
            "host": self._identity.hostname,
            "nonce": self._nonce,
            "machine": machine(),
            "pid": os.getpid(),
            "addresses": _own_addresses(),
        }
        self._store.set("lifeline", json.dumps(told))

    def _connect(self) -> None:
        told = json.loads(self._store.get("lifeline"))
        self._nonce = told["nonce"]
        addresses = ["127.0.0.1"] if told["machine"] == machine() else told["addresses"]
        for address in addresses:
            with contextlib.suppress(OSError):
                connection = socket.create_connection((address, told["port"]), timeout=_CONNECT_SECONDS)
                hello = {"nonce": told["nonce"], "rank": self._identity.rank, "pid": os.getpid()}
                hello["host"] = self._identity.hostname
                connection.sendall(json.dumps(hello).encode() + b"\n")
                self._add(connection, _Peer(rank=0, host=told["host"], pid=told["pid"]))
                return
        _logger.warning(
            "rank %d cannot reach rank 0 at %s port %d: if a rank dies, this one hears of it only from its broken "
            "connections. Open the ports between the nodes.",
            self._identity.rank,
            " or ".join(addresses),
            told["port"],
        )

    def _add(self, connection: socket.socket, peer: _Peer) -> None:
        _keep_alive(connection)
        connection.setblocking(False)
        self._peers[connection] = peer
        self._selector.register(connection, selectors.EVENT_READ)

    def _run(self) -> None:
        next_post = 0.0
        while not self._closing:
            for key, events in self._selector.select(timeout=max(0.0, next_post - time.monotonic())):
                handle: Any = key.fileobj
                if events & selectors.EVENT_WRITE and handle in self._peers:
                    self._flush(handle)
                if events & selectors.EVENT_READ:
                    self._serve(handle)
            self._send_records()
            if time.monotonic() >= next_post:
                self._post()
                next_post = time.monotonic() + POST_SECONDS
        if self._announced:
            self._spread()
        for connection, peer in list(self._peers.items()):
            while self._records:
                self._send(connection, {"record": self._records.popleft()})
            self._send(connection, {"bye": True})
            connection.settimeout(_BYE_SECONDS)
            self._flush(connection)
            self._take_back(peer)
            connection.close()
        self._selector.close()
        for handle in (self._listener, self._wake_receiver, self._wake_sender):
            if handle is not None:
                handle.close()

    def _serve(self, handle: socket.socket) -> None:
        if handle is self._listener:
            with contextlib.suppress(OSError):
                self._add(handle.accept()[0], _Peer())
        elif handle is self._wake_receiver:
            asked = handle.recv(64)
            if b"p" in asked:
                self._post()
            if b"f" in asked:
                self._spread()
        elif handle in self._peers:
            self._receive(handle, self._peers[handle])

    def _receive(self, connection: socket.socket, peer: _Peer) -> None:
        try:
            content = connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            content = b""
        if not content:
            self._lose(connection, peer)
            return
        *lines, peer.rest = (peer.rest + content).split(b"\n")
        for line in lines:
            self._hear(connection, peer, line)
        if len(peer.rest) > _MAX_LINE_BYTES and peer.rank is None:
            self._forget(connection)

    def _hear(self, connection: socket.socket, peer: _Peer, line: bytes) -> None:
        try:
            told: dict[str, Any] = json.loads(line)
            if self._listener is not None and peer.rank is None:
                if not hmac.compare_digest(str(told["nonce"]), self._nonce):
                    raise ValueError("a stranger")
                peer.rank, peer.host, peer.pid = int(told["rank"]), str(told["host"]), int(told["pid"])
                if self.first_failure is not None:
                    self._send(connection, {"first": asdict(self.first_failure)})
            elif "first" in told:
                self._learn(RankFailure(**told["first"]))
            elif "record" in told:
                self._on_record({**told["record"], "rank": peer.rank})
            elif "topic" in told:
                self._on_message(peer.rank or 0, str(told["topic"]), told["content"])
            elif "failed" in told:
                self._spread()
            elif "bye" in told:
                peer.left = True
                self._main_left = self._main_left or peer.rank == 0
        except (ValueError, KeyError, TypeError, RecursionError):
            if peer.rank is None:  # a stranger
                self._forget(connection)

    def _lose(self, connection: socket.socket, peer: _Peer) -> None:
        self._forget(connection)
        if peer.left or peer.rank is None or self._closing:
            return
        who = f" (pid {peer.pid})" if peer.pid else ""
        gone = RankFailure(
            rank=peer.rank,
            host=peer.host,
            error_type=LOST,
            message=f"its process{who} ended without a word: killed (by SIGKILL, or by the system for want of memory), "
            "crashed, or its node is gone",
            pid=peer.pid,
        )
        if self._identity.is_main_process:  # else the store is gone with rank 0, or there is nobody to tell
            with contextlib.suppress(RuntimeError):
                told = self._store.compare_set(FIRST_FAILURE, "", json.dumps(asdict(gone)))
                gone = RankFailure(**json.loads(told))
        self._learn(gone)

    def _spread(self) -> None:
        """Somebody, or this rank, has left a failure in the store: everybody hears the first."""
        if self.main_is_gone:
            return
        if not self._identity.is_main_process and self._peers:
            # It counts as heard when rank 0 says so: who fails prints its own traceback where nobody else will.
            for connection in list(self._peers):
                self._send(connection, {"failed": True})
            return
        with contextlib.suppress(RuntimeError):
            if self._store.check([FIRST_FAILURE]):
                first = RankFailure(**json.loads(self._store.get(FIRST_FAILURE)))
                if self._identity.is_main_process or first.rank != self._identity.rank:
                    self._learn(first)

    def _learn(self, failure: RankFailure) -> None:
        if self.first_failure is not None:
            return
        self.first_failure = failure
        # Printed before anybody hears: once ranks end in consequence, the launcher may kill this one.
        self._on_first_failure(failure)
        self.heard.set()
        if self._identity.is_main_process:
            for connection, peer in list(self._peers.items()):
                if peer.rank is not None:
                    self._send(connection, {"first": asdict(failure)})

    def _send_records(self) -> None:
        while self._messages:
            topic, content = self._messages.popleft()
            for connection, peer in list(self._peers.items()):
                if peer.rank is not None and len(peer.out) < _MAX_WAITING_BYTES:
                    self._send(connection, {"topic": topic, "content": content})
        for connection, peer in list(self._peers.items()):
            # As fast as rank 0 reads, so that news of a failure never stands behind a flood of records.
            while self._records and len(peer.out) < _MAX_WAITING_BYTES:
                self._send(connection, {"record": self._records.popleft()})

    def _send(self, connection: socket.socket, message: dict[str, Any]) -> None:
        """Send, now or when there is room: a peer that does not read holds up nobody, and no line is cut in two."""
        self._peers[connection].out += json.dumps(message).encode() + b"\n"
        self._flush(connection)

    def _flush(self, connection: socket.socket) -> None:
        peer = self._peers[connection]
        out = peer.out
        with contextlib.suppress(OSError):  # no room yet; or the peer is gone, which reading tells
            while out:
                num_bytes = connection.send(out)
                peer.begun = (peer.begun + out[:num_bytes]).rpartition(b"\n")[2]
                del out[:num_bytes]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if out else 0)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.modify(connection, events)

    def _forget(self, connection: socket.socket) -> None:
        peer = self._peers.pop(connection, None)
        if peer is not None:
            self._take_back(peer)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection)
        connection.close()

    def _take_back(self, peer: _Peer) -> None:
        """Records that were not sent are this rank's own to show: none is lost without a word."""
        for line in (peer.begun + peer.out).split(b"\n"):
            if line.startswith(b'{"record": '):
                with contextlib.suppress(ValueError):
                    self._on_record(json.loads(line)["record"])

    def _post(self) -> None:
        if self.main_is_gone:
            return
        with contextlib.suppress(RuntimeError):
            self._store.set(f"doing/{self._identity.rank}", self._doing())


class _Peer:
    """The process at the other end of a connection."""

    def __init__(self, rank: int | None = None, host: str = "", pid: int | None = None) -> None:
        self.rank = rank
        self.host = host
        self.pid = pid
        self.rest = b""
        self.out = bytearray()
        self.begun = bytearray()
        """What was sent of the line that `out` goes on with."""
        self.left = False


def _keep_alive(connection: socket.socket) -> None:
    """Let the kernel notice within some twenty seconds that the other node is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 8), ("TCP_KEEPINTVL", 4), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _listener(*, loopback: bool) -> socket.socket:
    """On loopback alone where nobody is elsewhere; strangers do not know the nonce."""
    if loopback:
        return socket.create_server(("127.0.0.1", 0), backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=1024)


def _own_addresses() -> list[str]:
    """Addresses at which other nodes may reach this one, the likeliest first."""
    master = os.environ.get("MASTER_ADDR")
    found = [master] if master else []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master or "192.0.2.1", 9))  # sends nothing: it only asks which way packets would go
        found.append(probe.getsockname()[0])
    found.append(socket.gethostname())
    return list(dict.fromkeys(found))


def _drop_in_child() -> None:
    for lifeline in list(_open_lifelines):
        lifeline.drop()
    _open_lifelines.clear()


os.register_at_fork(after_in_child=_drop_in_child)
