"""All ranks hear one verdict on who they are, whoever contradicts, lacks, stops or gives up."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore, TCPStore
from torch.distributed.distributed_c10d import Store

from rankwise import rollcall
from rankwise.errors import LaunchError, MissingRanksError, RankwiseError, StoppedError
from rankwise.identity import ASSUMED, Identity
from rankwise.rollcall import VERIFIED, call_roll, consult, judge_places

LONG = timedelta(seconds=60)
SHORT = timedelta(seconds=0.3)
PLACE = ("local_rank", "node_rank", "local_world_size", "num_nodes")
Row = dict[str, Any]


def never() -> bool:
    return False


def row(rank: int, host: str, place: tuple[int, int, int, int], assumed: Sequence[str] = (), **changed: Any) -> Row:
    """What a rank says of itself; `place` is local rank, node rank, processes of the node, nodes."""
    told = {
        "rank": rank,
        "world_size": 64,
        "hostname": host,
        "machine": f"{host}:boot:net",
        "container": "pids",
        "pid": 1000 + rank,
    }
    return told | dict(zip(PLACE, place, strict=True)) | {"assumed": list(assumed)} | changed


def by_hand(rank: int, host: str, world_size: int, **more: str) -> Identity:
    """The identity of a process that is told its rank and little more."""
    environ = {"RANK": str(rank), "WORLD_SIZE": str(world_size), **more}
    return Identity.resolve(environ, hostname=host)


def corrected(rows: Sequence[Row]) -> list[tuple[int, ...]]:
    """The places after the verdict, in the order of ranks."""
    answer = judge_places(rows)
    assert answer["proven"], answer
    return [tuple((row | answer["places"].get(str(row["rank"]), {}))[name] for name in PLACE) for row in rows]


def test_places_that_are_proven_and_fit_stay() -> None:
    rows = [row(rank, f"n{rank // 8}", (rank % 8, rank // 8, 8, 8)) for rank in range(64)]
    assert judge_places(rows) == {"places": {}, "proven": True, "one_machine": False}


def test_pods_that_share_a_host_become_one_node() -> None:
    rows = [row(rank, f"n{rank // 4}", (0, rank, 1, 64), PLACE) for rank in range(64)]
    assert corrected(rows) == [(rank % 4, rank // 4, 4, 16) for rank in range(64)]


def test_pods_with_host_names_of_their_own_are_a_node_each() -> None:
    rows = [row(rank, f"worker-{rank}", (0, rank, 1, 64), PLACE) for rank in range(64)]
    assert judge_places(rows) == {"places": {}, "proven": True, "one_machine": False}


def test_containers_of_one_host_name_are_told_apart_by_their_network() -> None:
    rows = [row(rank, "image", (0, rank, 1, 64), PLACE, machine=f"image:boot:{rank}") for rank in range(64)]
    assert judge_places(rows)["places"] == {}


def test_nodes_are_found_where_only_rank_and_local_rank_are_given() -> None:
    rows = []
    for rank in range(64):
        known = by_hand(rank, f"n{rank // 8}", 64, LOCAL_RANK=str(rank % 8))
        place = (known.local_rank, known.node_rank, known.local_world_size, known.num_nodes)
        assumed = [name for name in PLACE if known.sources[name] == ASSUMED]
        assert assumed == ["node_rank", "local_world_size", "num_nodes"]
        rows.append(row(rank, f"n{rank // 8}", place, assumed))
    assert corrected(rows) == [(rank % 8, rank // 8, 8, 8) for rank in range(64)]


def test_nodes_of_unequal_size_are_counted() -> None:
    hosts = ["a"] * 40 + ["b"] * 20 + ["c"] * 4
    rows = [row(rank, host, (rank % 32, rank // 32, 32, 2), PLACE) for rank, host in enumerate(hosts)]
    expected = [(rank, 0, 40, 3) for rank in range(40)] + [(rank, 1, 20, 3) for rank in range(20)]
    assert corrected(rows) == expected + [(rank, 2, 4, 3) for rank in range(4)]


def test_ranks_dealt_out_in_turn_find_their_node() -> None:
    rows = [row(rank, f"n{rank % 8}", (rank % 8, rank // 8, 8, 8), PLACE) for rank in range(64)]
    assert corrected(rows) == [(rank // 8, rank % 8, 8, 8) for rank in range(64)]


def test_what_is_proven_stays_where_the_rest_is_corrected() -> None:
    rows = [row(rank, f"n{rank % 8}", (rank // 8, 0, 8, 1), ("node_rank", "num_nodes")) for rank in range(64)]
    assert corrected(rows) == [(rank // 8, rank % 8, 8, 8) for rank in range(64)]


def test_nodes_emulated_on_one_host_are_left_as_they_were_assumed() -> None:
    assumed = ("node_rank", "num_nodes")
    rows = [row(rank, "here", (rank % 8, rank // 8, 8, 8), assumed) for rank in range(64)]
    assert judge_places(rows) == {"places": {}, "proven": False, "one_machine": True}


def test_two_processes_of_one_place_are_both_named() -> None:
    rows = [row(rank, f"n{rank // 8}", (rank % 8, rank // 8, 8, 8)) for rank in range(64)]
    rows[13] |= {"local_rank": 4}
    answer = judge_places(rows)
    assert answer["kind"] == "launch"
    assert answer["error"].startswith(
        "rank 12 (pid 1012 on n1) and rank 13 (pid 1013 on n1) both say local rank 4 of node 1."
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("local_world_size", 7, "rank 21 on n2 says that 7 processes are on node 2, but 8 came. Set LOCAL_WORLD_SIZE"),
        ("num_nodes", 9, "rank 21 on n2 says that there are 9 nodes, but ranks of 8 came. Set GROUP_WORLD_SIZE"),
    ],
)
def test_wrong_count_is_named_with_its_rank(field: str, value: int, message: str) -> None:
    rows = [row(rank, f"n{rank // 8}", (rank % 8, rank // 8, 8, 8)) for rank in range(64)]
    rows[21] |= {field: value}
    answer = judge_places(rows)
    assert answer["kind"] == "launch"
    assert answer["error"].startswith(message)


def test_proven_node_ranks_that_contradict_each_other_are_an_error() -> None:
    rows = [row(rank, f"n{rank // 8}", (rank % 8, 0, 8, 8), ("local_rank", "local_world_size")) for rank in range(64)]
    answer = judge_places(rows)
    assert answer["kind"] == "launch"
    assert "rank 0 (pid 1000 on n0) and rank 8 (pid 1008 on n1) both say local rank 0 of node 0" in answer["error"]


class Stores:
    """The job's store, as a connection of its own for each rank."""

    def __init__(self, kind: str) -> None:
        is_tcp = kind == "tcp"
        self._whole: Store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if is_tcp else HashStore()

    def connect(self) -> Store:
        return self._whole.clone()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(params=["hash", "tcp"])
def stores(request: pytest.FixtureRequest) -> Stores:
    return Stores(request.param)


@pytest.fixture
def own_pids(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give the calling thread a process id, as if it were a process."""
    local = threading.local()
    monkeypatch.setattr(rollcall, "os", SimpleNamespace(getpid=lambda: local.pid))

    def be(pid: int) -> None:
        local.pid = pid

    return be


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What the calls return or raise, each in a thread of its own."""

    def run(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RankwiseError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def roll_call(stores: Stores, identity: Identity, timeout: timedelta = LONG) -> Callable[[], Any]:
    return lambda: call_roll(stores.connect(), identity, timeout, never)


def ask(stores: Stores, rank: int, world_size: int = 3, timeout: timedelta = LONG, **more: Any) -> Callable[[], Any]:
    """A consultation that sums up what the ranks say: their own number, squared."""
    told = {"rank": rank, "world_size": world_size, "square": rank * rank}

    def judge(rows: Sequence[Mapping[str, Any]]) -> Row:
        return {"sum": sum(row["square"] for row in rows), "ranks": [row["rank"] for row in rows]}

    is_stopped = more.pop("is_stopped", never)
    judge = more.pop("judge", judge)
    return lambda: consult(stores.connect(), "test", told, judge, timeout, is_stopped, **more)


def test_all_ranks_get_the_place_that_they_see_together(stores: Stores) -> None:
    identities = [by_hand(rank, "ab"[rank % 2], 4) for rank in range(4)]
    answers = together(*(roll_call(stores, identity) for identity in identities))
    for rank, (identity, one_machine) in enumerate(answers):
        place = (identity.rank, *(getattr(identity, name) for name in PLACE))
        assert place == (rank, rank // 2, rank % 2, 2, 2)
        assert [identity.sources[name] for name in PLACE] == [VERIFIED] * 4
        assert identity.sources["rank"] == "RANK"
        assert one_machine


def test_places_that_host_names_cannot_prove_stay_assumed(stores: Stores) -> None:
    emulated = [by_hand(rank, "here", 4, LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2") for rank in range(4)]
    answers = together(*(roll_call(stores, identity) for identity in emulated))
    assert [identity for identity, _ in answers] == emulated
    assert {identity.sources["node_rank"] for identity, _ in answers} == {ASSUMED}


def test_contradiction_is_raised_on_every_rank(stores: Stores) -> None:
    same = [by_hand(rank, "here", 3, LOCAL_RANK="0", LOCAL_WORLD_SIZE="3", GROUP_RANK="0") for rank in range(3)]
    errors = together(*(roll_call(stores, identity) for identity in same))
    assert {type(error) for error in errors} == {LaunchError}
    assert len({str(error) for error in errors}) == 1
    assert "both say local rank 0 of node 0" in str(errors[0])
    assert all(error.on_every_rank for error in errors)


def test_two_processes_of_one_rank_are_named_on_all(stores: Stores, own_pids: Callable[[int], None]) -> None:
    def call(pid: int, rank: int, host: str) -> Callable[[], Any]:
        def run() -> Any:
            own_pids(pid)
            return call_roll(stores.connect(), by_hand(rank, host, 3), LONG, never)

        return run

    errors = together(call(101, 0, "a"), call(102, 1, "a"), call(103, 1, "b"))
    assert {type(error) for error in errors} == {LaunchError}
    assert len({str(error) for error in errors}) == 1
    for words in ("two processes claim rank 1", "pid 102 on a", "pid 103 on b"):
        assert words in str(errors[0])


def test_process_that_claims_a_rank_after_all_have_come_is_told_so(
    stores: Stores, own_pids: Callable[[int], None]
) -> None:
    own_pids(101)
    whole, _ = call_roll(stores.connect(), by_hand(0, "a", 1), LONG, never)
    own_pids(102)
    with pytest.raises(LaunchError, match="two processes claim rank 0: pid 101 on a and pid 102 on b"):
        call_roll(stores.connect(), by_hand(0, "b", 1), LONG, never)
    assert whole.rank == 0


def test_world_sizes_that_differ_are_named_on_all(stores: Stores) -> None:
    errors = together(roll_call(stores, by_hand(0, "a", 3)), roll_call(stores, by_hand(1, "b", 2)))
    assert {type(error) for error in errors} == {LaunchError}
    assert len({str(error) for error in errors}) == 1
    assert "says WORLD_SIZE=2" in str(errors[0])
    assert "says WORLD_SIZE=3" in str(errors[0])


def test_missing_rank_is_named_to_all_who_waited(stores: Stores) -> None:
    errors = together(*(roll_call(stores, by_hand(rank, "a", 3), timedelta(seconds=1.5)) for rank in (0, 2)))
    gave_up = [error for error in errors if isinstance(error, MissingRanksError)]
    assert gave_up
    assert all(error.ranks == (1,) for error in gave_up)
    for error in errors:
        assert isinstance(error, RankwiseError)
        assert "2 of 3 ranks started within 1.5 s; missing: rank 1" in str(error)
        assert not error.on_every_rank  # the one that is missing does not raise it


def test_only_the_first_of_many_missing_ranks_are_listed(stores: Stores) -> None:
    with pytest.raises(MissingRanksError, match=r"1 of 64 .*: rank 1, 2, .*, 15, 16, \.\.\.\. See") as raised:
        ask(stores, 0, world_size=64, timeout=SHORT)()
    assert raised.value.ranks == tuple(range(1, 64))


def test_stop_request_ends_the_wait_after_a_grace(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollcall, "STOP_GRACE_SECONDS", 0.1)
    with pytest.raises(StoppedError, match="1 of 3 ranks started when this one was asked to stop; missing: rank 1, 2"):
        call_roll(stores.connect(), by_hand(0, "a", 3), LONG, lambda: True)
    with pytest.raises(RankwiseError, match="rank 0 gave up: StoppedError: 1 of 3"):
        roll_call(stores, by_hand(1, "a", 3))()


def test_ranks_that_all_come_within_the_grace_start_although_one_is_to_stop(stores: Stores) -> None:
    answers = together(*(ask(stores, rank, is_stopped=lambda: True) for rank in range(3)))
    assert [answer["sum"] for answer in answers] == [5, 5, 5]


def test_answer_of_rank_0_is_the_answer_on_every_rank(stores: Stores) -> None:
    answers = together(*(ask(stores, rank) for rank in range(3)))
    assert answers == [{"sum": 5, "ranks": [0, 1, 2]}] * 3


def test_late_rank_gets_the_answer_too(stores: Stores) -> None:
    waiting = threading.Event()

    def late() -> Any:
        waiting.wait(30)
        return ask(stores, 2)()

    def first() -> Any:
        return ask(stores, 0, check=waiting.set)()

    assert [answer["sum"] for answer in together(first, ask(stores, 1), late)] == [5, 5, 5]


def test_error_of_the_judge_is_raised_on_every_rank(stores: Stores) -> None:
    def refuse(rows: Sequence[Mapping[str, Any]]) -> Row:
        return {"kind": "other", "error": f"{len(rows)} are too many"}

    errors = together(*(ask(stores, rank, judge=refuse) for rank in range(3)))
    assert [str(error) for error in errors] == ["3 are too many"] * 3
    assert all(error.on_every_rank and type(error) is RankwiseError for error in errors)


@pytest.fixture
def given_up(stores: Stores) -> Stores:
    """A store that rank 1 has left with an error of its own."""

    def fail() -> None:
        raise LaunchError("the cable is out")

    with pytest.raises(LaunchError, match=r"^the cable is out"):
        ask(stores, 1, check=fail)()
    return stores


def test_rank_that_gives_up_is_heard_by_those_who_wait(stores: Stores) -> None:
    are_waiting = threading.Event()

    def fail() -> None:
        are_waiting.wait(30)
        raise ValueError("no such thing")

    def give_up() -> Any:
        with pytest.raises(ValueError, match="no such thing"):
            ask(stores, 1, check=fail)()

    errors = together(ask(stores, 0, check=are_waiting.set), give_up, ask(stores, 2))
    assert [str(errors[rank]) for rank in (0, 2)] == ["rank 1 gave up: ValueError: no such thing"] * 2
    assert type(errors[0]) is RankwiseError


@pytest.mark.parametrize("rank", [0, 2])
def test_rank_that_comes_late_hears_who_gave_up(given_up: Stores, rank: int) -> None:
    with pytest.raises(LaunchError, match=r"^rank 1 gave up: LaunchError: the cable is out") as raised:
        ask(given_up, rank)()
    assert not raised.value.on_every_rank


def test_first_verdict_stays(given_up: Stores) -> None:
    with pytest.raises(LaunchError, match="seen by rank 2"):
        ask(given_up, 2, verdict={"kind": "launch", "error": "seen by rank 2"})()
    with pytest.raises(LaunchError, match="rank 1 gave up"):
        ask(given_up, 0)()
