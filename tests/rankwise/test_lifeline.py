"""When a process dies, every other rank hears which; the first failure of the job reaches all of them."""

import json
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore
from torch.distributed.distributed_c10d import Store, _get_default_store

from rankwise import lifeline as lifeline_module
from rankwise import testing
from rankwise.errors import LOST, RankFailure
from rankwise.identity import Identity
from rankwise.lifeline import FIRST_FAILURE, Lifeline
from rankwise.testing import RankProcesses

HEARD_SECONDS = 15.0
"""Less than the kernel's keep-alive probes need: what is heard by then was not heard from those."""


def rank_of(world_size: int, rank: int) -> Identity:
    return Identity(rank, rank, 0, world_size, world_size, 1, hostname="here")


def comes_true(is_so: Callable[[], bool], timeout_seconds: float = HEARD_SECONDS) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class Job:
    """Lifelines of several ranks in one process."""

    def __init__(self, num_ranks: int = 3) -> None:
        self.store: Store = HashStore()
        self.num_ranks = num_ranks
        self.told: dict[int, list[RankFailure]] = {}
        self.lifelines: list[Lifeline] = []
        self.messages: list[tuple[int, int, str, Any]] = []
        """Who heard what from whom."""

    def open(self, rank: int, doing: Callable[[], str] = lambda: "{}") -> Lifeline:
        told = self.told[rank] = []

        def hear(sender: int, topic: str, content: Any) -> None:
            self.messages.append((rank, sender, topic, content))

        place = rank_of(self.num_ranks, rank)
        opened = Lifeline(self.store, place, True, doing, told.append, on_message=hear)
        self.lifelines.append(opened)
        return opened

    def close(self) -> None:
        for opened in reversed(self.lifelines):
            opened.close(0.0)

    def fail(self, rank: int) -> RankFailure:
        """Note a failure in the store, as a session does; what comes back is the first one."""
        failure = RankFailure(rank, "here", "ValueError", f"of rank {rank}", "its traceback", "cuda:1", 100 + rank)
        told = self.store.compare_set(FIRST_FAILURE, "", json.dumps(asdict(failure)))
        return RankFailure(**json.loads(told))


@pytest.fixture
def job() -> Iterator[Job]:
    opened = Job()
    yield opened
    opened.close()
    assert [thread.name for thread in threading.enumerate() if thread.name == "rankwise-lifeline"] == []


class Peer:
    """The end of a rank that says what the test wants and no more."""

    def __init__(self, job: Job, rank: int | None = None, nonce: str | None = None) -> None:
        told = json.loads(job.store.get("lifeline"))
        self.connection = socket.create_connection(("127.0.0.1", told["port"]), timeout=HEARD_SECONDS)
        if rank is not None:
            hello = {"nonce": told["nonce"] if nonce is None else nonce, "rank": rank, "host": "there", "pid": 4711}
            self.send(json.dumps(hello).encode() + b"\n")

    def send(self, content: bytes) -> None:
        self.connection.sendall(content)

    def hear(self) -> dict[str, Any]:
        """The next line; empty when the other end has closed."""
        line = b""
        while not line.endswith(b"\n"):
            try:
                content = self.connection.recv(1)
            except ConnectionResetError:  # closed with something of ours unread
                content = b""
            if not content:
                return {}
            line += content
        heard: dict[str, Any] = json.loads(line)
        return heard

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.connection.close()


def test_connection_that_breaks_names_its_rank_to_all(job: Job) -> None:
    main, other = job.open(0), job.open(1)
    with Peer(job, rank=2):
        pass
    for lifeline in (main, other):
        assert lifeline.heard.wait(HEARD_SECONDS)
        lost = lifeline.first_failure
        assert lost is not None
        assert (lost.rank, lost.host, lost.error_type, lost.pid) == (2, "there", LOST, 4711)
        assert lost.is_loss
        assert "its process (pid 4711) ended without a word: killed" in lost.message
        assert not lifeline.main_is_lost
    assert json.loads(job.store.get(FIRST_FAILURE))["rank"] == 2
    assert comes_true(lambda: job.told == {0: [main.first_failure], 1: [main.first_failure]})


def test_rank_that_says_goodbye_is_no_failure(job: Job) -> None:
    main = job.open(0)
    leaving, staying = job.open(1), job.open(2)
    leaving.close(0.0)
    with Peer(job, rank=1) as peer:
        peer.send(b'{"bye": true}\n')
    assert comes_true(lambda: len(main._peers) == 1)
    main.close(0.0)
    assert comes_true(lambda: not staying._peers)
    assert [lifeline.first_failure for lifeline in job.lifelines] == [None, None, None]
    assert not job.store.check([FIRST_FAILURE])


def test_of_two_failures_all_ranks_hear_the_one_that_came_first(job: Job) -> None:
    lifelines = [job.open(rank) for rank in range(3)]
    first = job.fail(2)
    assert job.fail(1) == first
    lifelines[1].announce()
    lifelines[2].announce()
    for lifeline in lifelines:
        assert lifeline.heard.wait(HEARD_SECONDS)
        assert lifeline.first_failure == first
    assert comes_true(lambda: job.told == {rank: [first] for rank in range(3)})


def test_failure_of_the_main_process_is_announced_to_all(job: Job) -> None:
    lifelines = [job.open(rank) for rank in range(3)]
    first = job.fail(0)
    lifelines[0].announce()
    for lifeline in lifelines:
        assert lifeline.heard.wait(HEARD_SECONDS)
        assert lifeline.first_failure == first
        assert not lifeline.main_is_lost  # it failed, and is still there


def test_rank_that_dies_after_a_failure_does_not_replace_it(job: Job) -> None:
    main = job.open(0)
    first = job.fail(1)
    with Peer(job, rank=1):
        pass
    assert main.heard.wait(HEARD_SECONDS)
    assert main.first_failure == first
    assert json.loads(job.store.get(FIRST_FAILURE))["message"] == "of rank 1"


def test_rank_that_connects_after_a_failure_hears_it(job: Job) -> None:
    main = job.open(0)
    first = job.fail(0)
    main.announce()
    assert main.heard.wait(HEARD_SECONDS)
    late = job.open(2)
    assert late.heard.wait(HEARD_SECONDS)
    assert late.first_failure == first


def test_stranger_without_the_nonce_is_dropped(job: Job) -> None:
    main = job.open(0)
    with Peer(job, rank=1, nonce="guess") as stranger:
        assert stranger.hear() == {}
    with Peer(job, rank=1, nonce="\u00e9") as stranger:
        assert stranger.hear() == {}
    assert comes_true(lambda: not main._peers)
    assert main.first_failure is None


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\xff\n",
        b"5\n",
        b"[]\n",
        b"null\n",
        b'{"nonce": null}\n',
        b'{"bye": true}\n',
        b'{"failed": true}\n{"first": {}}\n',
        b"[" * 60000 + b"\n",
        b"9" * 60000 + b"\n",
        b"x" * 10000,
    ],
    ids=lambda garbage: garbage[:12].decode(errors="replace"),
)
def test_garbage_does_no_harm(job: Job, garbage: bytes) -> None:
    main = job.open(0)
    with Peer(job) as stranger:
        stranger.send(garbage)
        assert stranger.hear() == {}
    assert main.first_failure is None
    with Peer(job, rank=2):  # still listens
        pass
    assert main.heard.wait(HEARD_SECONDS)


def test_stranger_that_leaves_without_a_word_is_no_failure(job: Job) -> None:
    main = job.open(0)
    with Peer(job) as stranger:
        stranger.send(b"half a li")
        assert comes_true(lambda: len(main._peers) == 1)
    assert comes_true(lambda: not main._peers)
    assert main.first_failure is None


def test_words_that_come_in_pieces_are_put_together(job: Job) -> None:
    main = job.open(0)
    with Peer(job) as peer:
        told = json.loads(job.store.get("lifeline"))
        hello = json.dumps({"nonce": told["nonce"], "rank": 2, "host": "there", "pid": 1}).encode() + b"\n"
        peer.send(hello[:20])
        assert comes_true(lambda: any(other.rest == hello[:20] for other in list(main._peers.values())))
        peer.send(hello[20:] + b'{"by')
        assert comes_true(lambda: any(other.rank == 2 for other in list(main._peers.values())))
        peer.send(b'e": true}\n')
    assert comes_true(lambda: not main._peers)
    assert main.first_failure is None


def test_rank_that_cannot_reach_the_main_process_warns_and_goes_on(
    job: Job, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(lifeline_module, "_CONNECT_SECONDS", 0.5)
    told = {"port": port, "nonce": "n", "machine": "elsewhere", "addresses": ["no-such-host.invalid", "127.0.0.1"]}
    job.store.set("lifeline", json.dumps(told))
    alone = job.open(2)
    words = f"rank 2 cannot reach rank 0 at no-such-host.invalid or 127.0.0.1 port {port}"
    assert [record.levelname for record in caplog.records if words in record.getMessage()] == ["WARNING"]
    assert not alone.is_whole
    first = job.fail(1)
    alone.announce()  # it still learns what stands in the store
    assert alone.heard.wait(HEARD_SECONDS)
    assert alone.first_failure == first


def test_rank_is_whole_while_it_is_connected(job: Job) -> None:
    main, other = job.open(0), job.open(1)
    assert main.is_whole
    assert other.is_whole
    main.close(0.0)
    assert comes_true(lambda: not other.is_whole)


def test_ranks_of_other_machines_try_every_address_of_the_main_process(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    main = Lifeline(job.store, rank_of(3, 0), False, lambda: "{}", lambda failure: None)  # listens on all interfaces
    job.lifelines.append(main)
    told = json.loads(job.store.get("lifeline"))
    assert told["addresses"][0] == "localhost"
    job.store.set("lifeline", json.dumps(told | {"machine": "elsewhere", "addresses": ["127.0.0.1"]}))
    assert job.open(1).is_whole


def test_what_a_rank_is_doing_is_told_at_once_when_asked(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline_module, "POST_SECONDS", 3600.0)
    words = ["first"]
    main = job.open(0, lambda: words[-1])
    assert comes_true(lambda: job.store.check(["doing/0"]))
    words.append("second")
    main.post()
    assert comes_true(lambda: job.store.get("doing/0") == b"second")


def test_what_a_rank_is_doing_is_told_again_and_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline_module, "POST_SECONDS", 0.02)
    count = iter(range(10**6))
    job.open(0, lambda: str(next(count)))
    assert comes_true(lambda: job.store.check(["doing/0"]) and int(job.store.get("doing/0")) > 3)


class CountingStore:
    """A store that counts what is asked of it."""

    def __init__(self, store: Store) -> None:
        self.num_calls = 0
        self._store = store

    def __getattr__(self, name: str) -> Any:
        self.num_calls += 1
        return getattr(self._store, name)


def test_store_is_left_alone_once_the_main_process_is_lost(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline_module, "POST_SECONDS", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as main:
        told = {"port": main.getsockname()[1], "nonce": "n", "machine": lifeline_module.machine()}
        told |= {"host": "main", "pid": 7}
        job.store.set("lifeline", json.dumps(told))
        counting = CountingStore(job.store)
        other = Lifeline(counting, rank_of(3, 1), True, lambda: "{}", lambda failure: None)  # type: ignore[arg-type]
        job.lifelines.append(other)
        assert not other.main_is_lost
        main.accept()[0].close()
    assert other.heard.wait(HEARD_SECONDS)
    assert other.main_is_lost
    lost = other.first_failure
    assert lost is not None
    assert (lost.rank, lost.error_type) == (0, LOST)
    num_calls = counting.num_calls
    other.announce()
    other.post()
    time.sleep(0.3)
    assert counting.num_calls <= num_calls + 1  # one may have been under way
    other.close(0.0)


def test_main_process_lingers_until_the_others_have_left(job: Job) -> None:
    main = job.open(0)
    with Peer(job, rank=1) as peer:
        assert comes_true(main._has_ranks)
        closing = threading.Thread(target=main.close, args=(60.0,))
        closing.start()
        closing.join(0.3)
        assert closing.is_alive()
        job.fail(1)
        peer.send(b'{"failed": true}\n')
        assert peer.hear()["first"]["message"] == "of rank 1"  # it serves them while it waits
        peer.send(b'{"bye": true}\n')
    closing.join(HEARD_SECONDS)
    assert not closing.is_alive()


def test_main_process_lingers_no_longer_than_asked(job: Job) -> None:
    main = job.open(0)
    with Peer(job, rank=1) as peer:
        assert comes_true(main._has_ranks)
        begin = time.monotonic()
        main.close(0.3)
        assert 0.3 <= time.monotonic() - begin < HEARD_SECONDS
        assert peer.hear() == {"bye": True}
        assert peer.hear() == {}
    assert main.first_failure is None


def test_main_process_does_not_linger_for_strangers(job: Job) -> None:
    main = job.open(0)
    with Peer(job):
        assert comes_true(lambda: len(main._peers) == 1)
        begin = time.monotonic()
        main.close(60.0)
        assert time.monotonic() - begin < HEARD_SECONDS


def test_other_ranks_do_not_linger(job: Job) -> None:
    job.open(0)
    begin = time.monotonic()
    job.open(1).close(60.0)
    assert time.monotonic() - begin < HEARD_SECONDS


def test_nothing_is_left_open_after_close() -> None:
    me = psutil.Process()
    Job().store.set("warm", "up")
    num_threads, num_descriptors = threading.active_count(), me.num_fds()
    job = Job()
    for rank in range(3):
        job.open(rank)
    assert threading.active_count() == num_threads + 3
    assert me.num_fds() > num_descriptors
    with Peer(job, rank=2):  # a second one of that rank, that breaks
        pass
    assert job.lifelines[0].heard.wait(HEARD_SECONDS)
    job.close()
    job.close()  # once more does no harm
    assert threading.active_count() == num_threads
    assert me.num_fds() == num_descriptors
    for lifeline in job.lifelines:
        lifeline.announce()
        lifeline.post()


def die(how: str, victim: int, folder: Path) -> None:
    """The body of a rank: the victim is killed once all are connected; the others must hear of it."""
    rank = dist.get_rank()
    store = _get_default_store().clone()  # type: ignore[attr-defined]
    lifeline = Lifeline(PrefixStore("test", store), rank_of(3, rank), True, lambda: "{}", lambda failure: None)
    if rank == 0:
        assert comes_true(lambda: {peer.rank for peer in list(lifeline._peers.values())} == {1, 2})
    dist.barrier()
    if rank == victim:
        if how == "with a child":
            leave_child(folder / "child")
        os.kill(os.getpid(), signal.SIGKILL)
    assert lifeline.heard.wait(HEARD_SECONDS), f"rank {rank} heard nothing"
    lost = lifeline.first_failure
    assert lost is not None
    assert (lost.rank, lost.error_type) == (victim, LOST)
    assert lifeline.main_is_lost == (victim == 0)
    if how == "with a child":
        assert psutil.pid_exists(int((folder / "child").read_text()))
    lifeline.close(0.0)
    (folder / f"heard-{rank}").touch()
    os._exit(0)  # the group is broken


def leave_child(path: Path) -> None:
    """Fork a child that outlives this process, as data loaders may, and ends when the path is gone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons: this process has threads
        pid = os.fork()
    if pid == 0:
        deadline = time.monotonic() + 60
        comes_true(path.exists, 30)
        while path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os._exit(0)
    path.write_text(str(pid))


@pytest.mark.parametrize(("how", "victim"), [("alone", 0), ("alone", 2), ("with a child", 1), ("with a child", 0)])
def test_killed_process_is_named_by_all_others(
    how: str, victim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testing, "GRACE_SECONDS", 30.0)
    try:
        with RankProcesses(die, 3, (how, victim, tmp_path)) as ranks:
            failed = ranks.join(60)
        assert failed == {victim: "killed by SIGKILL"}
        assert {path.name for path in tmp_path.glob("heard-*")} == {f"heard-{rank}" for rank in {0, 1, 2} - {victim}}
    finally:
        child = tmp_path / "child"
        if child.exists():
            pid = int(child.read_text())
            child.unlink()
            assert comes_true(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")


def test_records_that_rank_0_could_not_be_sent_come_back_and_none_is_lost(job: Job) -> None:
    goes_on, heard, came_back = threading.Event(), [], []

    def hang() -> str:
        goes_on.wait(60)
        return "{}"

    job.num_ranks = 2
    main = Lifeline(job.store, rank_of(2, 0), True, hang, lambda failure: None, heard.append)
    other = Lifeline(job.store, rank_of(2, 1), True, lambda: "{}", lambda failure: None, came_back.append)
    job.lifelines.append(main)
    # More than the kernel holds for a connection that nobody reads.
    made = [{"number": number, "message": "x" * 100_000} for number in range(300)]
    assert all(other.send_record(record) for record in made)
    other.close(0.0)
    goes_on.set()
    assert comes_true(lambda: len(heard) + len(came_back) >= len(made))
    assert sorted(record["number"] for record in heard + came_back) == list(range(300))
    assert heard
    assert came_back


def test_records_after_rank_0_is_gone_come_back(job: Job) -> None:
    came_back: list[dict[str, Any]] = []
    main = job.open(0)
    other = Lifeline(job.store, rank_of(3, 1), True, lambda: "{}", lambda failure: None, came_back.append)
    main.close(0.0)
    assert comes_true(lambda: not other.is_whole)
    assert not other.send_record({"number": 1})
    other._records.append({"number": 2})  # handed over a moment before
    other.close(0.0)
    assert came_back == [{"number": 2}]


def test_messages_go_to_rank_0_and_from_it_to_all_others(job: Job) -> None:
    main, *others = (job.open(rank) for rank in range(3))
    assert comes_true(lambda: len([peer for peer in main._peers.values() if peer.rank is not None]) == 2)
    assert others[0].send_message("steps", [1, 2.5])
    assert others[1].send_message("steps", {"rank": "two"})
    assert comes_true(lambda: len(job.messages) == 2)
    assert sorted(job.messages) == [(0, 1, "steps", [1, 2.5]), (0, 2, "steps", {"rank": "two"})]
    assert main.send_message("dump", None)
    assert comes_true(lambda: len(job.messages) == 4)
    assert sorted(job.messages[2:]) == [(1, 0, "dump", None), (2, 0, "dump", None)]


def test_message_is_refused_where_nobody_can_hear_it(job: Job) -> None:
    main = job.open(0)
    assert not main.send_message("dump", None)
    one = job.open(1)
    one.close(0.0)
    assert not one.send_message("steps", 1)


def test_all_ranks_know_their_session_by_one_name_that_is_not_its_secret(job: Job) -> None:
    tokens = {job.open(rank).token for rank in range(3)}
    assert len(tokens) == 1
    assert json.loads(job.store.get("lifeline"))["nonce"] not in tokens.pop()


def test_failure_that_rank_0_cannot_tell_is_learned_alone_and_the_first_stays(job: Job) -> None:
    main, one, two = (job.open(rank) for rank in range(3))
    hang = RankFailure(0, "here", "Hang", "no progress")
    one.learn(hang)
    one.learn(RankFailure(2, "here", "ValueError", "later"))
    assert one.heard.is_set()
    assert one.first_failure == hang
    assert main.first_failure is None
    assert two.first_failure is None
