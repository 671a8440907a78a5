"""What one rank says in the background reaches all, and nothing of the training comes between."""

import threading

import pytest
import torch
import torch.distributed as dist

import rankwise
from rankwise.checkpoint.together import KINDS, Assembly, kind_name, tell
from rankwise.errors import CheckpointCorruptError, CheckpointError, CheckpointLeaseError, RankFailure
from rankwise.group import make_side_group
from rankwise.testing import on_ranks


def test_single_process_needs_no_group() -> None:
    alone = Assembly(None)
    assert alone.on_main("it failed", lambda: 3) == 3
    assert alone.gather("it failed", "x") == ["x"]
    with pytest.raises(CheckpointError, match=r"^it failed: ValueError: invalid literal") as raised:
        alone.on_main("it failed", lambda: int("no"))
    assert isinstance(raised.value.__cause__, ValueError)


@on_ranks(3)
def test_what_the_main_process_finds_or_suffers_reaches_all_in_its_class() -> None:
    all_ranks = Assembly(make_side_group())
    rank = dist.get_rank()
    assert all_ranks.on_main("it failed", lambda: f"of rank {rank}") == "of rank 0"
    assert all_ranks.gather("it failed", rank * 2) == ([0, 2, 4] if rank == 0 else [])
    for error, kind, message in (
        (CheckpointLeaseError("it failed: taken"), CheckpointLeaseError, r"^it failed: taken$"),
        (CheckpointCorruptError("bad"), CheckpointCorruptError, r"^it failed: bad$"),
        (OSError(28, "No space"), CheckpointError, r"^it failed, because the disk refused on the main process: .*28"),
        (KeyError("x"), CheckpointError, r"^it failed, because of rank 0 .*KeyError: 'x'"),
    ):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(CheckpointError, match=message) as raised:
            all_ranks.on_main("it failed", fail)
        assert type(raised.value) is kind
        assert raised.value.on_every_rank
    assert all_ranks.on_main("it failed", lambda: 1) == 1


@on_ranks(2)
def test_training_s_collectives_in_another_order_do_not_come_between() -> None:
    all_ranks = Assembly(make_side_group())
    rank = dist.get_rank()
    found: list[object] = []

    def talk() -> None:
        for number in range(20):
            found.append((all_ranks.on_main("x", lambda n=number: n), sum(all_ranks.gather("x", rank))))  # type: ignore[misc]

    thread = threading.Thread(target=talk)
    if rank == 0:  # rank 0 talks first and trains then, rank 1 the other way round
        thread.start()
    for number in range(20):
        total = torch.full((3,), float(number + rank))
        dist.all_reduce(total)
        assert total.tolist() == [2.0 * number + 1] * 3
        rankwise.barrier("of training")
    if rank == 1:
        thread.start()
    thread.join(50)
    assert found == [(number, 1 if rank == 0 else 0) for number in range(20)]


def test_messages_say_which_rank_and_name_it_once_where_all_say_the_same() -> None:
    own = RankFailure(1, "here", "CheckpointError", "no room")
    foreign = RankFailure(2, "there", "ValueError", "bad", traceback="...")
    assert tell("it failed", [own, foreign], 3) == "it failed, because of rank 1 (here): no room"
    assert tell("it failed", [foreign], 3) == "it failed, because of rank 2 (there): ValueError: bad"
    assert tell("it failed", [own, own], 2) == "it failed: no room"


def test_class_of_a_user_travels_as_the_one_of_ours_that_it_comes_from() -> None:
    class Own(CheckpointCorruptError):
        pass

    assert KINDS[kind_name(Own())] is CheckpointCorruptError
    assert KINDS[kind_name(ValueError())] is CheckpointError
