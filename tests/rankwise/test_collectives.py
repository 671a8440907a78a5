"""Collectives give every rank the same, with and without a process group, and failures reach everybody."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import rankwise
from rankwise.errors import CheckpointNotFoundError, MissingRanksError, RankFailedError, RankwiseError
from rankwise.testing import RankProcesses, on_ranks


class UnpicklableError(RankwiseError):
    """One of ours that cannot travel: its constructor wants two arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def test_everything_works_without_a_process_group() -> None:
    rankwise.barrier()
    assert rankwise.broadcast_object({"a": 1}) == {"a": 1}
    assert rankwise.gather_objects("row") == ["row"]
    assert rankwise.agree(True) is True
    assert rankwise.agree(False, "all") is False
    assert rankwise.on_main_process(max, 3, 4) == 4
    assert rankwise.reduce_mean({"loss": torch.tensor(0.5)}) == {"loss": 0.5}
    rankwise.raise_together(None)
    with rankwise.main_process_first():
        pass
    with pytest.raises(RankFailedError, match=r"rank 0 \(.*\) failed: ValueError: wrong"):
        rankwise.raise_together(ValueError("wrong"))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_objects_and_flags_are_equal_on_every_rank(world_size: int) -> None:
    on_ranks(world_size)(exchange_objects_and_flags)()


def exchange_objects_and_flags() -> None:
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    rankwise.barrier()
    assert rankwise.broadcast_object({"from": rank}, source=last) == {"from": last}
    assert rankwise.gather_objects((rank, "x" * rank)) == [(r, "x" * r) for r in range(last + 1)]
    assert rankwise.agree(rank == last) is True
    assert rankwise.agree(rank == last, "all") is (last == 0)
    assert rankwise.agree(False) is False
    assert rankwise.on_main_process(lambda: ("made on", rank)) == ("made on", 0)


@on_ranks(3)
def test_mean_is_equal_to_the_bit_and_keeps_what_is_not_finite() -> None:
    rank = dist.get_rank()
    value = 0.1 * 3.0**rank
    mean = rankwise.reduce_mean({"loss": value, "bad": math.inf if rank == 1 else 0.0})
    assert mean == {"loss": (0.1 + 0.1 * 3.0 + 0.1 * 9.0) / 3, "bad": math.inf}
    assert len(set(rankwise.gather_objects(mean["loss"].hex()))) == 1


@on_ranks(2)
def test_mean_of_different_keys_is_an_error_on_every_rank() -> None:
    with pytest.raises(RankwiseError, match=r"rank 1 and rank 0 report different values \(extra\)") as raised:
        rankwise.reduce_mean({"loss": 1.0} | ({"extra": 2.0} if dist.get_rank() == 1 else {}))
    assert raised.value.on_every_rank


@on_ranks(2)
def test_our_error_on_the_main_process_is_the_same_type_on_every_rank() -> None:
    def look() -> None:
        raise CheckpointNotFoundError("there is no step 7")

    with pytest.raises(CheckpointNotFoundError, match="there is no step 7") as raised:
        rankwise.on_main_process(look)
    assert raised.value.on_every_rank
    assert rankwise.agree(True)


@on_ranks(2)
def test_foreign_error_on_the_main_process_reaches_every_rank_with_its_traceback() -> None:
    def fall_over() -> None:
        raise KeyError("wheel")

    def fall_over_in_our_way() -> None:
        raise UnpicklableError("one", "two")

    for function, message in (
        (fall_over, "(?s)rank 0 .* failed: KeyError: 'wheel'.*in fall_over"),
        (fall_over_in_our_way, "failed: UnpicklableError: one and two"),
        (lambda: lambda: None, "(?s)rank 0 .* failed: .*pickle"),
    ):
        with pytest.raises(RankFailedError, match=message) as raised:
            rankwise.on_main_process(function)
        assert raised.value.on_every_rank
        assert raised.value.failures[0].rank == 0


@on_ranks(2)
def test_main_process_goes_first(tmp_path: Path) -> None:
    with rankwise.main_process_first():
        there_before = (tmp_path / "made-first").exists()
        if dist.get_rank() == 0:
            (tmp_path / "made-first").touch()
    assert rankwise.gather_objects(there_before) == [False, True]


@pytest.mark.parametrize("error_type", [SystemExit, KeyboardInterrupt])
@on_ranks(2, timeout_seconds=20)
def test_exit_of_the_main_process_reaches_those_who_wait_for_it(error_type: type[BaseException]) -> None:
    def leave() -> None:
        raise error_type("enough")

    expected = error_type if dist.get_rank() == 0 else RankFailedError
    with pytest.raises(expected, match="enough"):
        rankwise.on_main_process(leave)
    with pytest.raises(expected, match="enough"), rankwise.main_process_first():
        leave()
    assert rankwise.agree(True)


@on_ranks(2, timeout_seconds=20)
def test_failure_of_the_main_process_reaches_those_who_wait_for_it() -> None:
    expected: type[Exception] = ValueError if dist.get_rank() == 0 else RankFailedError
    entered = False
    with pytest.raises(expected, match="no such data"), rankwise.main_process_first():  # noqa: PT012
        entered = True
        raise ValueError("no such data")
    assert entered is (dist.get_rank() == 0)
    assert rankwise.agree(True)


def ends_without_word() -> None:
    with rankwise.main_process_first():
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_main_process_frees_those_who_wait_for_it() -> None:
    with pytest.raises(AssertionError, match=r"rank 1: (?s:.*)Connection (closed|reset) by peer"):
        on_ranks(2, timeout_seconds=30)(ends_without_word)()


@on_ranks(3)
def test_error_of_any_rank_is_raised_on_all() -> None:
    rank = dist.get_rank()
    errors: dict[int, Callable[[], Exception]] = {
        1: lambda: CheckpointNotFoundError("nothing there"),
        2: lambda: ValueError("two"),
    }
    with pytest.raises(RankFailedError, match=r"rank 1 .* failed: CheckpointNotFoundError: nothing there") as raised:
        rankwise.raise_together(errors[rank]() if rank in errors else None)
    assert [failure.rank for failure in raised.value.failures] == [1, 2]
    assert raised.value.on_every_rank
    assert (raised.value.__cause__ is None) == (rank == 0)
    rankwise.raise_together(None)


@pytest.mark.parametrize("world_size", [1, 3])
def test_rows_of_all_ranks_come_in_order_whatever_their_number_and_dtype(world_size: int) -> None:
    on_ranks(world_size)(gather_uneven_rows)()


def gather_uneven_rows() -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        mine = torch.full((rank, 2), rank, dtype=dtype, requires_grad=dtype.is_floating_point)
        whole = rankwise.gather_rows(mine)
        assert whole.dtype == dtype
        assert not whole.requires_grad
        expected = [r for r in range(world_size) for _ in range(r)]
        assert torch.equal(whole, torch.tensor(expected, dtype=dtype)[:, None].expand(-1, 2))
    assert rankwise.gather_rows(torch.zeros(0, 4)).shape == (0, 4)
    assert rankwise.gather_rows(torch.eye(3).t()[rank : rank + 1]).tolist() == torch.eye(3)[:world_size].tolist()


@on_ranks(2)
def test_rows_that_do_not_fit_are_an_error_on_every_rank() -> None:
    rank = dist.get_rank()
    for mine in (torch.zeros(1, 2 + rank), torch.zeros(1, dtype=(torch.int32, torch.int64)[rank]), torch.tensor(1.0)):
        with pytest.raises(RankwiseError, match=r"rank [01] has rows of shape") as raised:
            rankwise.gather_rows(mine)
        assert raised.value.on_every_rank


@on_ranks(2)
def test_source_that_does_not_exist_is_an_error_on_every_rank() -> None:
    with pytest.raises(RankwiseError, match="there is no rank 2 among 2") as raised:
        rankwise.broadcast_object("x", source=2)
    assert raised.value.on_every_rank


def place_on_two_nodes() -> int:
    """Let ranks 0, 1 and 2, 3 be nodes of their own; what comes back is this rank."""
    rank = dist.get_rank()
    os.environ.update(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2", GROUP_RANK=str(rank // 2), GROUP_WORLD_SIZE="2")
    return rank


@on_ranks(4)
def test_local_main_process_goes_first_on_its_node(tmp_path: Path) -> None:
    rank = place_on_two_nodes()
    with rankwise.init() as session:
        for turn in range(3):
            mark = tmp_path / f"{turn}-{session.identity.node_rank}"
            with rankwise.local_main_process_first():
                there_before = mark.exists()
                mark.touch()
            assert there_before is (rank % 2 == 1)
            assert rankwise.on_local_main_process(lambda turn=turn: (rank, turn)) == (rank // 2 * 2, turn)


@on_ranks(4)
def test_failure_of_a_local_main_process_reaches_its_node_and_no_other() -> None:
    rank = place_on_two_nodes()

    def unpack() -> str:
        if rank == 2:
            raise OSError("no space on the local disk")
        return "unpacked"

    with rankwise.init():
        if rank < 2:
            assert rankwise.on_local_main_process(unpack) == "unpacked"
        else:
            expected, words = (OSError, "no space") if rank == 2 else (RankFailedError, "rank 2 .*no space.*in unpack")
            with pytest.raises(expected, match=f"(?s){words}"):
                rankwise.on_local_main_process(unpack)
        expected = {2: OSError, 3: RankFailedError}.get(rank)
        outcome = pytest.raises(expected) if expected else contextlib.nullcontext()
        with outcome, rankwise.local_main_process_first():
            unpack()
        rankwise.barrier("all still talk")


@on_ranks(3)
def test_failure_inside_main_process_first_reaches_all_within_seconds() -> None:
    with rankwise.init() as session:
        rankwise.barrier("together")
        start = time.monotonic()
        expected = ValueError if session.identity.rank == 0 else RankFailedError
        with pytest.raises(expected, match="no download") as raised, rankwise.main_process_first():
            raise ValueError("no download")
        assert time.monotonic() - start < 5
        if session.identity.rank:
            assert raised.value.failures[0].rank == 0
            assert "test_collectives.py" in raised.value.failures[0].traceback


def wait_for_a_rank_that_dies(folder: Path, number: int) -> None:
    with rankwise.init() as session:
        rankwise.barrier("together")
        if session.identity.rank == number:
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.monotonic()
        waits = (rankwise.barrier, lambda: rankwise.gather_objects(1), lambda: rankwise.on_main_process(int))
        with pytest.raises(RankFailedError) as raised:
            waits[session.identity.rank % 3]()
        (folder / f"{session.identity.rank}").write_text(f"{time.monotonic() - start:.1f} {raised.value}")
        raise raised.value


@pytest.mark.parametrize("number", [0, 2])
def test_rank_that_was_killed_is_named_by_all_others_within_seconds(number: int, tmp_path: Path) -> None:
    with RankProcesses(wait_for_a_rank_that_dies, 4, (tmp_path, number)) as ranks:
        for rank, process in enumerate(ranks.processes):
            process.join(60)
            assert process.exitcode == (-signal.SIGKILL if rank == number else 1)
    told = {int(path.name): path.read_text() for path in tmp_path.iterdir()}
    assert set(told) == {0, 1, 2, 3} - {number}
    for text in told.values():
        seconds, _, words = text.partition(" ")
        assert float(seconds) < 30
        assert words.startswith(f"rank {number} (")
        assert "ended without a word" in words


@on_ranks(3)
def test_barrier_names_the_ranks_that_did_not_come_and_what_they_did(tmp_path: Path) -> None:
    left = tmp_path / "left"
    rank = dist.get_rank()
    try:
        with rankwise.init():
            rankwise.barrier("epoch start")
            if rank == 1:
                count_sheep(left)
            with pytest.raises(MissingRanksError) as raised:
                rankwise.barrier("epoch end", timeout_seconds=2)
            assert raised.value.ranks == (1,)
            assert "barrier 'epoch end': the others did not come within 2 s" in str(raised.value)
            assert "rank 1: last at barrier 'epoch start'" in str(raised.value)
            assert "test_collectives.py" in str(raised.value)
            assert "in count_sheep" in str(raised.value)
            (tmp_path / f"told-{rank}").touch()
            while len(list(tmp_path.glob("told-*"))) < 2:  # else the other hears of this rank's error instead
                time.sleep(0.02)
            raise raised.value
    except MissingRanksError:
        assert rank != 1
    except RankFailedError:
        assert rank == 1
    left.touch()


def count_sheep(left: Path) -> None:
    while not left.exists():
        time.sleep(0.05)
