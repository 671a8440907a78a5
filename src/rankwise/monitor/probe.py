"""Round trips and small transfers between ranks, over TCP connections of their own: whose network is slow?

Nothing here goes through a process group or an accelerator, and nothing waits in the training thread. It sees the way
that TCP takes between the hosts; collectives over InfiniBand or NVLink take another, of which this says nothing.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rankwise import logs
from rankwise.store import machine

TRANSFER_BYTES = 1 << 18
"""Of one transfer."""

MAX_RATIO = 3.0
"""A link is slow that takes so many times what the faster ones take."""

MIN_SECONDS = 0.002
"""And so much more than they do."""

_NUM_TRANSFERS = 4
_NUM_ROUND_TRIPS = 8
_CONNECT_SECONDS = 3.0
_LINK_SECONDS = 5.0
_BACKLOG = 64
_TOKEN_BYTES = 32
_ACCUSED_SHARE = 0.7
_logger = logs.get_logger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """Where a rank answers probes."""

    machine: str
    """Ranks with the same one share loopback."""
    addresses: Sequence[str]
    port: int
    token: str


@dataclass(frozen=True)
class Link:
    """One direction between two ranks."""

    source: int
    target: int
    transfer_seconds: float
    """For `TRANSFER_BYTES` to get there and a byte back, at best."""
    round_trip_seconds: float


@dataclass(frozen=True)
class SlowLinks:
    """Whose links are slow."""

    ranks: Sequence[int]
    transfer_seconds: float
    """Over the links of these ranks."""
    usual_seconds: float
    """Over the other links."""
    round_trip_seconds: float
    usual_round_trip_seconds: float


class Prober:
    """Measures the links of one rank to a few others, and answers those who measure theirs to it.

    Until `start` is called nothing runs: a socket listens, and that is all.

    Args:
        report: called once for each `start`, in the prober's thread, with the links that could be measured.
        loopback: answer on loopback alone, as is enough where all ranks share one host.
    Ranks: every rank that is to answer has one.
    """

    def __init__(self, rank: int, report: Callable[[list[Link]], None], *, loopback: bool) -> None:
        self._rank = rank
        self._report = report
        self._endpoints: Sequence[Endpoint] = ()
        self._stop = threading.Event()
        self._until = 0.0
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()
        if loopback or not socket.has_dualstack_ipv6():
            self._listener = socket.create_server(("127.0.0.1" if loopback else "", 0), backlog=_BACKLOG)
        else:
            self._listener = socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True
            )
        self._listener.settimeout(0.2)
        self.endpoint = Endpoint(
            machine(), own_addresses(), self._listener.getsockname()[1], secrets.token_hex(_TOKEN_BYTES // 2)
        )

    def know(self, endpoints: Sequence[Endpoint]) -> None:
        """Learn where all ranks answer, in the order of ranks.

        Ranks: local.
        """
        self._endpoints = endpoints

    def start(self, seconds: float = 15.0) -> None:
        """Measure in the background, and answer others for so long; a measurement that goes on is not begun again.

        Ranks: every rank should call at about the same time.
        """
        if self._stop.is_set() or not self._endpoints:
            return
        self._until = time.monotonic() + seconds
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        running = {thread.name for thread in self._threads}
        for name, body in (("rankwise-probe-answers", self._answer_all), ("rankwise-probe", self._measure_all)):
            if name not in running:
                self._threads.append(threading.Thread(target=body, name=name, daemon=True))
                self._threads[-1].start()

    def close(self) -> None:
        """Stop, whatever is waited for.

        Ranks: local.
        """
        self._stop.set()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(1.0)
        self._listener.close()

    def _measure_all(self) -> None:
        found = []
        for peer in peers_of(self._rank, [endpoint.machine for endpoint in self._endpoints]):
            if self._stop.is_set() or time.monotonic() > self._until:
                break
            with contextlib.suppress(OSError):
                found.append(self._measure(peer))
        if not self._stop.is_set():
            self._report(found)

    def _measure(self, peer: int) -> Link:
        endpoint = self._endpoints[peer]
        with _connect(endpoint) as connection, self._kept(connection):
            connection.sendall(endpoint.token.encode())
            _receive(connection, 1)  # from here on the peer's thread is at it
            deadline = time.monotonic() + _LINK_SECONDS
            round_trips, transfers = [], []
            for _ in range(_NUM_ROUND_TRIPS):
                round_trips.append(_exchange(connection, 1))
            for _ in range(_NUM_TRANSFERS):
                transfers.append(_exchange(connection, TRANSFER_BYTES))
                if time.monotonic() > deadline or self._stop.is_set():
                    break
            # The least is what the way takes; more is taken by whoever was busy with something else. A transfer is a
            # round trip too: none takes longer than the quickest of them.
            return Link(self._rank, peer, min(transfers), min(round_trips + transfers))

    def _answer_all(self) -> None:
        threads = []
        while not self._stop.is_set() and time.monotonic() < self._until:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                continue
            thread = threading.Thread(target=self._answer, args=(connection,), name="rankwise-probe-peer", daemon=True)
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join(1.0)

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, self._kept(connection):
            connection.settimeout(_CONNECT_SECONDS)
            token = _receive(connection, _TOKEN_BYTES)
            if not hmac.compare_digest(token, self.endpoint.token.encode()):
                return
            connection.sendall(b"k")
            while not self._stop.is_set():
                num_bytes = int.from_bytes(_receive(connection, 4), "big")
                _receive(connection, min(num_bytes, TRANSFER_BYTES), keep=False)
                connection.sendall(b"k")

    @contextlib.contextmanager
    def _kept(self, connection: socket.socket) -> Iterator[None]:
        """Let `close` end what is waited for on a connection."""
        self._open.add(connection)
        try:
            if self._stop.is_set():
                raise ConnectionError("closed meanwhile")
            yield
        finally:
            self._open.discard(connection)


def peers_of(rank: int, machines: Sequence[str]) -> list[int]:
    """The ranks to which `rank` measures its links: a few, which differ from rank to rank, on other hosts if there are.

    Where hosts have equally many ranks, each is measured by as many others as it measures.
    """
    world_size = len(machines)
    if len(set(machines)) == 1:
        return [peer for peer in dict.fromkeys((rank + stride) % world_size for stride in (1, 2, 3)) if peer != rank]
    per_machine = max(machines.count(machine) for machine in set(machines[:64]))
    found: list[int] = []
    for stride in (per_machine, 2 * per_machine, 3 * per_machine):
        # The next from there on another host: where ranks are dealt out in turn, a host's own lie that far apart.
        away = ((rank + stride + offset) % world_size for offset in range(world_size))
        found += [next(peer for peer in away if machines[peer] != machines[rank])]
    return list(dict.fromkeys(found))


def find_slow_ranks(links: Sequence[Link], machines: Sequence[str]) -> SlowLinks | None:
    """The ranks most of whose links are slow beside the others' links; None where nobody stands out.

    Links within a host are compared with each other alone. A slow link makes neither end slow: of the two that share
    it, the one is accused whose other links are slow too. Where two ranks, or two hosts, are all there is, nobody is.

    Ranks: local.
    """
    between = [link for link in links if machines[link.source] != machines[link.target]]
    compared = between or list(links)
    if len({rank for link in compared for rank in (link.source, link.target)}) < 3:
        return None
    usual = _quartile([link.transfer_seconds for link in compared])
    limit = max(MAX_RATIO * usual, usual + MIN_SECONDS)
    num_links: dict[int, int] = {}
    num_slow: dict[int, int] = {}
    for link in compared:
        for rank in (link.source, link.target):
            num_links[rank] = num_links.get(rank, 0) + 1
            num_slow[rank] = num_slow.get(rank, 0) + (link.transfer_seconds > limit)
    accused = {rank for rank, num in num_links.items() if num_slow[rank] >= max(2, _ACCUSED_SHARE * num)}
    if not accused or 2 * len(accused) > len(num_links):
        return None
    theirs = [link for link in compared if link.transfer_seconds > limit and {link.source, link.target} & accused]
    others = [link for link in compared if not {link.source, link.target} & accused]
    return SlowLinks(
        ranks=sorted(accused),
        transfer_seconds=_middle([link.transfer_seconds for link in theirs]),
        usual_seconds=_middle([link.transfer_seconds for link in others] or [usual]),
        round_trip_seconds=_middle([link.round_trip_seconds for link in theirs]),
        usual_round_trip_seconds=_middle([link.round_trip_seconds for link in others or compared]),
    )


def own_addresses() -> list[str]:
    """Addresses at which other hosts may reach this one, the likeliest first.

    Ranks: local.
    """
    master = os.environ.get("MASTER_ADDR") or "192.0.2.1"
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect((master, 9))  # sends nothing: it only asks which way packets would go
        found.append(asked.getsockname()[0])
    found.append(socket.gethostname())
    return list(dict.fromkeys(found))


def _connect(endpoint: Endpoint) -> socket.socket:
    addresses = ["127.0.0.1"] if endpoint.machine == machine() else endpoint.addresses
    for address in addresses:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((address, endpoint.port), timeout=_CONNECT_SECONDS)
            connection.settimeout(_LINK_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
    raise ConnectionError(f"no way to {' or '.join(addresses)} port {endpoint.port}")


def _exchange(connection: socket.socket, num_bytes: int) -> float:
    begin = time.perf_counter()
    connection.sendall(num_bytes.to_bytes(4, "big") + bytes(num_bytes))
    _receive(connection, 1)
    return time.perf_counter() - begin


def _receive(connection: socket.socket, num_bytes: int, *, keep: bool = True) -> bytes:
    """Exactly so many bytes; with `keep` False they are dropped."""
    content = bytearray()
    while num_bytes:
        part = connection.recv(min(num_bytes, 1 << 16))
        if not part:
            raise ConnectionError("the other end has closed")
        num_bytes -= len(part)
        if keep:
            content += part
    return bytes(content)


def _quartile(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 4]


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
