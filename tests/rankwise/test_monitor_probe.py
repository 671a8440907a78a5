"""Links are measured over real connections; of slow ones, the rank or host that they have in common is named."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from rankwise.monitor import probe
from rankwise.monitor.probe import TRANSFER_BYTES, Endpoint, Link, Prober, find_slow_ranks, peers_of


class SlowWire:
    """A TCP proxy on loopback that passes on so many bytes a second, each way and over all its connections."""

    def __init__(self, port: int, bytes_per_second: float) -> None:
        self._target = port
        self._bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            self._sockets += [near, far]
            for source, target in ((near, far), (far, near)):
                thread = threading.Thread(target=self._pass_on, args=(source, target), daemon=True)
                thread.start()
                self._threads.append(thread)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while content := source.recv(16384):
                with self._lock:
                    time.sleep(len(content) / self._bytes_per_second)
                target.sendall(content)
        except OSError:
            return
        finally:
            target.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for handle in self._sockets:
            handle.close()
        for thread in self._threads:
            thread.join(5)


class Group:
    """Probers of some ranks in this one process."""

    def __init__(self, num_ranks: int) -> None:
        self.links: dict[int, list[Link]] = {}
        self.probers = [
            Prober(rank, lambda links, rank=rank: self.links.__setitem__(rank, links), loopback=True)
            for rank in range(num_ranks)
        ]
        self.endpoints = [prober.endpoint for prober in self.probers]

    def measure(self, seconds: float = 15.0) -> list[Link]:
        for prober in self.probers:
            prober.know(self.endpoints)
        for prober in self.probers:
            prober.start(seconds)
        deadline = time.monotonic() + 60
        while len(self.links) < len(self.probers) and time.monotonic() < deadline:
            time.sleep(0.01)
        return [link for links in self.links.values() for link in links]


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group(6)
    yield made
    for prober in made.probers:
        prober.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("rankwise-probe")]


def made(num_ranks: int, seconds: dict[frozenset[int], float], machines: list[str], usual: float = 0.001) -> list[Link]:
    return [
        Link(rank, peer, seconds.get(frozenset((rank, peer)), usual), usual / 10)
        for rank in range(num_ranks)
        for peer in peers_of(rank, machines)
    ]


def touching(ranks: set[int], num_ranks: int, seconds: float) -> dict[frozenset[int], float]:
    pairs = itertools.combinations(range(num_ranks), 2)
    return {frozenset(pair): seconds for pair in pairs if ranks & set(pair)}


def test_every_rank_measures_its_links(group: Group) -> None:
    links = group.measure()
    assert {(link.source, link.target) for link in links} == {
        (rank, (rank + stride) % 6) for rank in range(6) for stride in (1, 2, 3)
    }
    assert all(0 < link.round_trip_seconds <= link.transfer_seconds < 5 for link in links)


def test_round_trip_takes_no_longer_than_a_transfer_even_where_something_delayed_every_one(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_exchange", lambda connection, num_bytes: 0.5 if num_bytes == 1 else 0.1)
    assert {(link.round_trip_seconds, link.transfer_seconds) for link in group.measure()} == {(0.1, 0.1)}


def test_rank_behind_a_slow_wire_is_found(group: Group) -> None:
    # What comes to rank 4 is slow; what it sends goes through the wire of the rank that it sends to.
    slow = SlowWire(group.endpoints[4].port, TRANSFER_BYTES * 10)
    own = [SlowWire(group.endpoints[(4 + stride) % 6].port, TRANSFER_BYTES * 10) for stride in (1, 2, 3)]
    told = list(group.endpoints)
    told[4] = moved(told[4], slow.port)
    for rank, prober in enumerate(group.probers):
        prober.know(told)
        if rank == 4:
            routes = list(told)
            for stride, wire in zip((1, 2, 3), own, strict=True):
                routes[(4 + stride) % 6] = moved(routes[(4 + stride) % 6], wire.port)
            prober.know(routes)
    for prober in group.probers:
        prober.start(30.0)
    deadline = time.monotonic() + 60
    while len(group.links) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    links = [link for found in group.links.values() for link in found]
    found = find_slow_ranks(links, [endpoint.machine for endpoint in told])
    for wire in (slow, *own):
        wire.close()
    assert found is not None
    assert found.ranks == [4]
    assert found.transfer_seconds > 0.05 > found.usual_seconds


def moved(endpoint: Endpoint, port: int) -> Endpoint:
    return Endpoint(endpoint.machine, endpoint.addresses, port, endpoint.token)


def test_rank_that_does_not_answer_holds_up_nobody(group: Group) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections, and says nothing
        group.endpoints[2] = moved(group.endpoints[2], deaf.getsockname()[1])
        silent = group.probers.pop(2)
        begin = time.monotonic()
        links = group.measure(seconds=30.0)
        assert time.monotonic() - begin < 30
    silent.close()
    assert 2 not in {link.target for link in links}
    assert len({link.source for link in links}) == 5


def test_stranger_is_not_answered(group: Group) -> None:
    group.measure(seconds=3.0)
    with socket.create_connection(("127.0.0.1", group.endpoints[0].port), timeout=10) as stranger:
        stranger.sendall(b"0" * 32)
        assert stranger.recv(1) == b""


def test_second_start_while_one_goes_on_starts_no_more_threads(group: Group) -> None:
    group.probers[0].know(group.endpoints)
    for _ in range(5):
        group.probers[0].start(3.0)
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("rankwise-probe")]
    assert names.count("rankwise-probe-answers") == 1
    assert names.count("rankwise-probe") <= 1


def test_links_can_be_measured_again_while_others_are_still_answered(group: Group) -> None:
    assert len(group.measure(seconds=20.0)) == 18
    group.links.clear()
    assert len(group.measure(seconds=20.0)) == 18


def test_closed_prober_starts_nothing() -> None:
    prober = Prober(0, lambda links: None, loopback=True)
    prober.know([prober.endpoint])
    prober.close()
    prober.start()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("rankwise-probe")]


@pytest.mark.parametrize("num_ranks", [3, 4, 8, 100])
def test_one_slow_rank_stands_out(num_ranks: int) -> None:
    machines = [f"machine {rank}" for rank in range(num_ranks)]
    found = find_slow_ranks(made(num_ranks, touching({1}, num_ranks, 0.05), machines), machines)
    assert found is not None
    assert (found.ranks, found.transfer_seconds, found.usual_seconds) == ([1], 0.05, 0.001)


def test_all_ranks_of_a_slow_host_stand_out_though_loopback_is_fast() -> None:
    machines = [f"machine {rank // 4}" for rank in range(16)]
    found = find_slow_ranks(made(16, touching({4, 5, 6, 7}, 16, 0.05), machines), machines)
    assert found is not None
    assert found.ranks == [4, 5, 6, 7]


def test_one_slow_link_is_no_slow_rank() -> None:
    machines = [f"machine {rank}" for rank in range(8)]
    assert find_slow_ranks(made(8, {frozenset((2, 3)): 1.0}, machines), machines) is None


def test_links_that_are_all_slow_accuse_nobody() -> None:
    machines = [f"machine {rank}" for rank in range(8)]
    assert find_slow_ranks(made(8, touching(set(range(8)), 8, 0.5), machines), machines) is None


def test_two_ranks_cannot_be_told_apart() -> None:
    assert find_slow_ranks(made(2, touching({1}, 2, 0.5), ["a", "b"]), ["a", "b"]) is None
    assert find_slow_ranks([], ["a", "b", "c"]) is None


def test_uneven_links_accuse_nobody() -> None:
    rng = np.random.default_rng(0)
    machines = [f"machine {rank}" for rank in range(64)]
    for _ in range(200):
        seconds = {frozenset(pair): 0.001 * rng.lognormal(0, 0.4) for pair in itertools.combinations(range(64), 2)}
        assert find_slow_ranks(made(64, seconds, machines), machines) is None


def test_peers_lie_on_other_hosts_where_there_are_any() -> None:
    machines = [f"machine {rank // 8}" for rank in range(64)]
    for rank in range(64):
        peers = peers_of(rank, machines)
        assert len(peers) == 3
        assert machines[rank] not in {machines[peer] for peer in peers}
    in_turn = [f"machine {rank % 8}" for rank in range(64)]
    for rank in range(64):
        assert in_turn[rank] not in {in_turn[peer] for peer in peers_of(rank, in_turn)}
    assert peers_of(0, ["a", "a", "a", "b"]) == [3]
    assert peers_of(0, ["a"]) == []
    assert peers_of(1, ["a", "a"]) == [0]
