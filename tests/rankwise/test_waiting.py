"""A rank that waits hears who failed, who has left, and who lacks and where it is."""

import contextlib
import json
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import HashStore

import rankwise
from rankwise import lifeline, testing, waiting
from rankwise.errors import LOST, MissingRanksError, RankFailedError, RankFailure, RankwiseError
from rankwise.identity import Identity
from rankwise.testing import RankProcesses, on_ranks
from rankwise.waiting import Link, is_lost_connection, link, observe_waiting


def identity_of(rank: int, world_size: int = 3) -> Identity:
    return Identity(rank, rank, 0, world_size, world_size, 1, hostname="here")


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 50
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)


def be_on_two_nodes() -> None:
    """Make the four ranks of a test those of two nodes."""
    rank = dist.get_rank()
    place = {"LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": rank // 2, "GROUP_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in place.items()})


def be_without_group(folder: Path) -> None:
    """Let the session make the group of this test's ranks, which meet through a file."""
    dist.barrier()
    dist.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    tempfile.tempdir = str(folder)


@on_ranks(3)
def test_ranks_at_barriers_of_different_names_hear_who_is_where() -> None:
    rank = dist.get_rank()
    expected = r"rank 0, 2 at barrier 'after loading'; rank 1 at barrier 'before saving'\. All ranks must come"
    with rankwise.init():
        with pytest.raises(RankwiseError, match=expected) as raised:
            rankwise.barrier("before saving" if rank == 1 else "after loading")
        assert raised.value.on_every_rank
        rankwise.barrier("together again")


@on_ranks(2)
def test_ranks_at_different_things_hear_what_without_a_session_too() -> None:
    own, call = (
        ("barrier", rankwise.barrier) if dist.get_rank() == 0 else ("agree on any", lambda: rankwise.agree(True))
    )
    with pytest.raises(RankwiseError, match=f"this rank is at {own}, others are not"):
        call()


def stay_elsewhere(folder: Path) -> None:
    (folder / "there").touch()
    while len(list(folder.glob("waited-*"))) < 2:
        time.sleep(0.01)


@on_ranks(3)
def test_missing_rank_is_named_with_the_line_where_it_is(tmp_path: Path) -> None:
    lifeline.POST_SECONDS = 0.05
    rank = dist.get_rank()
    with rankwise.init():
        rankwise.barrier("before")
        if rank == 1:
            stay_elsewhere(tmp_path)
            os._exit(0)  # what the others started cannot end any more
        wait_for_file(tmp_path / "there")
        with pytest.raises(MissingRanksError) as raised:
            rankwise.barrier("after", timeout_seconds=2.0)
        assert raised.value.ranks == (1,)
        message = str(raised.value)
        assert message.startswith("barrier 'after': the others did not come within 2 s. Missing are rank 1: ")
        assert "last at barrier 'before' (number " in message
        assert "now at test_waiting.py:" in message
        assert "in stay_elsewhere" in message
        (tmp_path / f"waited-{rank}").touch()
        os._exit(0)


@on_ranks(2)
def test_without_a_session_nobody_knows_who_is_missing(tmp_path: Path) -> None:
    if dist.get_rank() == 1:
        wait_for_file(tmp_path / "waited")
        os._exit(0)
    with pytest.raises(MissingRanksError, match=r"within 0\.2 s\. Who is missing is known within `rankwise\.init\(\)`"):
        rankwise.barrier("after", timeout_seconds=0.2)
    (tmp_path / "waited").touch()
    os._exit(0)


@on_ranks(2)
def test_rank_that_has_left_the_session_is_named_when_the_time_is_up(tmp_path: Path) -> None:
    with rankwise.init():
        rankwise.barrier("last of both")
        if dist.get_rank() == 0:
            wait_for_file(tmp_path / "left")
            expected = r"Missing are rank 1: left the session after barrier 'last of both' \(number \d+\)"
            with pytest.raises(MissingRanksError, match=expected):
                rankwise.barrier("one too many", timeout_seconds=0.5)
            (tmp_path / "waited").touch()
            os._exit(0)
    (tmp_path / "left").touch()
    wait_for_file(tmp_path / "waited")
    os._exit(0)


@on_ranks(2)
def test_rank_that_has_left_with_its_group_is_named_at_once(tmp_path: Path) -> None:
    be_without_group(tmp_path)
    with rankwise.init() as session:
        if session.identity.rank == 0:
            wait_for_file(tmp_path / "left")
            with pytest.raises(MissingRanksError, match="barrier: rank 1 has left the session already") as raised:
                rankwise.barrier()
            assert raised.value.ranks == (1,)
    (tmp_path / "left").touch()


def kill_rank_1(folder: Path) -> None:
    be_without_group(folder)
    rank = int(os.environ["RANK"])
    with rankwise.init():
        rankwise.barrier("all are here")
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(2):  # and whoever asks again hears the same
            with pytest.raises(RankFailedError, match=rf"rank 1 \(.*\) failed first: {LOST}: its process \(pid"):
                rankwise.barrier("nobody comes")
        (folder / f"heard-{rank}").touch()
        wait_for_file(folder / f"heard-{2 - rank}")  # else the other may take this one's end for the death of rank 0
        os._exit(0)


def test_ranks_that_wait_for_a_killed_one_hear_of_its_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "GRACE_SECONDS", 30.0)
    with RankProcesses(kill_rank_1, 3, (tmp_path,)) as ranks:
        assert ranks.join(60) == {1: "killed by SIGKILL"}
    assert {path.name for path in tmp_path.glob("heard-*")} == {"heard-0", "heard-2"}


@on_ranks(2)
def test_what_a_node_does_together_needs_a_session() -> None:
    for _ in range(2):
        with pytest.raises(RankwiseError, match=r"needs a session. Call it within rankwise.init\(\)"):
            rankwise.on_local_main_process(dist.get_rank)
        with rankwise.init():
            assert rankwise.on_local_main_process(dist.get_rank) == 0


@on_ranks(2)
def test_message_that_a_stranger_leaves_in_the_store_is_not_unpickled(tmp_path: Path) -> None:
    with rankwise.init():
        if dist.get_rank() == 1:
            channel = link().node_channel()
            link()._store.set(channel._key, pickle.dumps(Trap(tmp_path / "sprung")).hex())  # type: ignore[union-attr]
            with pytest.raises(RankwiseError, match="not from a rank of this job"):
                channel.receive("test")
        rankwise.barrier("done")
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@on_ranks(4)
def test_local_main_process_goes_first(tmp_path: Path) -> None:
    be_on_two_nodes()
    rank = dist.get_rank()
    with rankwise.init(), rankwise.local_main_process_first():
        names = {path.name for path in tmp_path.iterdir()}
        (tmp_path / str(rank)).touch()
    assert (rank % 2 == 0) or str(rank - 1) in names
    assert str(rank + 1) not in names or rank % 2


@on_ranks(2)
def test_rank_that_waits_in_vain_for_its_node_says_where_the_main_process_is(tmp_path: Path) -> None:
    lifeline.POST_SECONDS = 0.05
    with rankwise.init():
        if dist.get_rank() == 0:
            wait_for_file(tmp_path / "waited")
        else:
            link()._timeout_seconds = 2.0
            expected = r"local_main_process_first: the others .* within 2 s\. Missing are rank 0: .* in wait_for_file"
            with pytest.raises(MissingRanksError, match=expected), rankwise.local_main_process_first():
                pass
            (tmp_path / "waited").touch()


def sealed(identity: Identity, store: HashStore) -> Link:
    """A link as a session has it, with a secret that all ranks know."""
    new = Link(identity, store=store)
    new.secret = b"of this job"
    return new


def test_message_is_deleted_once_the_last_of_the_node_has_read_it() -> None:
    store = HashStore()
    source, *others = (sealed(identity_of(rank), store).node_channel() for rank in range(3))
    assert source.is_source
    assert [other.is_source for other in others] == [False, False]
    num_keys = store.num_keys()
    source.send(b"\x00 told")
    assert others[0].receive("test") == b"\x00 told"
    assert store.num_keys() > num_keys
    assert others[1].receive("test") == b"\x00 told"
    assert store.num_keys() == num_keys


def test_message_that_nobody_reads_is_not_left() -> None:
    store = HashStore()
    sealed(identity_of(0, 1), store).node_channel().send(b"told")
    assert store.num_keys() == HashStore().num_keys()


def test_messages_come_in_the_order_in_which_they_were_sent() -> None:
    store = HashStore()
    sender, reader = (sealed(identity_of(rank, 2), store) for rank in range(2))
    for text in (b"first", b"second"):
        sender.node_channel().send(text)
    assert [reader.node_channel().receive("test") for _ in range(2)] == [b"first", b"second"]


def test_wait_ends_when_a_rank_has_failed() -> None:
    waits = Link(identity_of(0), store=HashStore())
    failure = RankFailure(2, "there", "ValueError", "wrong")
    waits.lifeline = SimpleNamespace(first_failure=None)  # type: ignore[assignment]
    waits.wait_for(lambda: True, "test")
    waits.lifeline = SimpleNamespace(first_failure=failure)  # type: ignore[assignment]
    with pytest.raises(RankFailedError, match=r"rank 2 \(there\) failed first: ValueError: wrong"):
        waits.wait_for(lambda: False, "test")


def test_first_failure_of_another_is_raised_and_waited_for_a_moment_where_one_is_due() -> None:
    Link().raise_first_failure(within_seconds=30.0)  # nobody to hear it from
    waits, heard = Link(identity_of(0), store=HashStore()), threading.Event()
    line = SimpleNamespace(first_failure=None, heard=heard)
    waits.lifeline = line  # type: ignore[assignment]
    waits.raise_first_failure()
    waits.raise_first_failure(within_seconds=0.05)

    def tell() -> None:
        line.first_failure = RankFailure(2, "there", "ValueError", "wrong")
        heard.set()

    threading.Timer(0.1, tell).start()
    with pytest.raises(RankFailedError, match=r"rank 2 \(there\) failed first: ValueError: wrong"):
        waits.raise_first_failure(within_seconds=30.0)
    with pytest.raises(RankFailedError, match="failed first"):
        waits.raise_first_failure()


def told_while_waiting(world_size: int, told: dict[int, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a wait says at its end if the ranks have said that."""
    monkeypatch.setattr(waiting.dist, "get_world_size", lambda: world_size)
    store = HashStore()
    for rank, words in told.items():
        store.set(f"doing/{rank}", json.dumps(words))
    with pytest.raises(MissingRanksError) as raised:
        Link(identity_of(0, world_size), store=store, timeout_seconds=0.05).wait_for(lambda: False, "test")
    assert list(raised.value.ranks) == list(range(1, world_size))
    return str(raised.value)


def test_every_missing_rank_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"what": "barrier 'a'", "number": 4, "seconds": 7, "waiting": False}
    told = {0: step | {"waiting": True}, 1: step | {"where": "train.py:12 in load"}, 2: step | {"left": True}}
    message = told_while_waiting(4, told, monkeypatch)
    assert message == (
        "test: the others did not come within 0.05 s. "
        "Missing are rank 1: last at barrier 'a' (number 4), 7 s ago, now at train.py:12 in load; "
        "rank 2: left the session after barrier 'a' (number 4); rank 3: it has said nothing."
    )


def test_only_the_first_of_many_missing_ranks_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {0: {"what": "test", "number": 0, "seconds": 0, "waiting": True}}
    message = told_while_waiting(64, told, monkeypatch)
    assert message.endswith("; rank 8: it has said nothing; and 55 more.")


def test_rank_that_waits_at_an_earlier_call_is_missing_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting.dist, "get_world_size", lambda: 2)
    store = HashStore()
    store.set("doing/0", json.dumps({"what": "x", "number": 5, "seconds": 0, "waiting": True}))
    store.set("doing/1", json.dumps({"what": "barrier 'old'", "number": 4, "seconds": 9, "waiting": True}))
    waits = Link(identity_of(0, 2), store=store, timeout_seconds=0.05)
    waits._number = 5
    with pytest.raises(MissingRanksError, match=r"rank 1: waits at barrier 'old' \(number 4\) since 9 s") as raised:
        waits.wait_for(lambda: False, "test")
    assert raised.value.ranks == (1,)


class FailingStore:
    """A store that gives nothing for rank 0."""

    def __init__(self, store: HashStore) -> None:
        self._store = store

    def check(self, keys: list[str]) -> bool:
        if keys == ["doing/0"]:
            raise RuntimeError("no connection")
        return self._store.check(keys)

    def get(self, key: str) -> bytes:
        return self._store.get(key)


def test_ranks_keep_their_numbers_where_the_store_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting.dist, "get_world_size", lambda: 3)
    whole = HashStore()
    for rank in range(3):
        whole.set(f"doing/{rank}", json.dumps({"what": "x", "number": 0, "seconds": 0, "waiting": rank != 2}))
    waits = Link(identity_of(1), store=FailingStore(whole), timeout_seconds=0.05)  # type: ignore[arg-type]
    with pytest.raises(MissingRanksError) as raised:
        waits.wait_for(lambda: False, "test")
    assert raised.value.ranks == (0, 2)


def test_rank_tells_the_line_of_the_user_s_code_that_it_is_at() -> None:
    told: list[str] = []
    busy = Link(identity_of(0))
    thread = threading.Thread(target=lambda: told.append(busy.doing()))
    thread.start()
    thread.join()
    doing = json.loads(told[0])
    assert doing["where"].startswith("test_waiting.py:")
    assert doing["where"].endswith(" in test_rank_tells_the_line_of_the_user_s_code_that_it_is_at")
    assert (doing["what"], doing["number"], doing["waiting"]) == ("the start", 0, False)


def test_rank_that_waits_tells_at_what() -> None:
    busy = Link(identity_of(0))
    told: list[str] = []

    def is_done() -> bool:
        told.append(busy.doing())
        return True

    busy.wait_for(is_done, "barrier 'a'")
    doing = json.loads(told[0])
    assert (doing["what"], doing["waiting"]) == ("barrier 'a'", True)
    assert "where" not in doing
    assert not json.loads(busy.doing())["waiting"]


def test_link_is_the_session_s_while_it_is_open() -> None:
    bare = link()
    opened = Link(identity_of(0))
    waiting.use_link(opened)
    try:
        assert link() is opened
        assert opened.here == ("here", "")
    finally:
        waiting.use_link(None)
    assert link() is bare
    assert bare.here is None


def test_error_in_a_chain_is_known_as_a_lost_connection() -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    assert is_lost_connection(lost)
    assert is_lost_connection(dist.DistNetworkError("reset"))
    wrapped = KeyError("x")
    wrapped.__context__ = lost
    assert not is_lost_connection(wrapped)
    wrapped.__cause__ = lost
    assert is_lost_connection(wrapped)
    assert not is_lost_connection(RuntimeError("shape mismatch"))
    assert not is_lost_connection(ValueError("Connection closed by peer"))


@on_ranks(2)
def test_observer_is_entered_around_each_collective() -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def observer(what: str) -> Iterator[None]:
        seen.append(f"in {what}")
        yield
        seen.append(f"out {what}")

    with rankwise.init():
        observe_waiting(observer)
        rankwise.barrier("lunch")
        assert rankwise.agree(False) is False
        observe_waiting(None)
        rankwise.barrier("tea")
    assert len(seen) == 4
    assert "lunch" in seen[0]
    assert seen[1] == seen[0].replace("in ", "out ", 1)
    assert not any("tea" in line for line in seen)
