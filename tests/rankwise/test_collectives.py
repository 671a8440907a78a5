"""Collectives give every rank the same, with and without a process group, and failures reach everybody."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import rankwise
from rankwise.errors import CheckpointNotFoundError, RankFailedError, RankwiseError
from rankwise.testing import on_ranks


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
