"""`on_ranks` passes what is right, and tells of every way to be wrong without hanging."""

import multiprocessing
import os
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from rankwise.identity import Identity
from rankwise.testing import RankProcesses, on_ranks, run_on_ranks


@dataclass(frozen=True)
class Parcel:
    """A type of this module, to travel from pytest's process to the ranks."""

    content: int


@pytest.fixture
def parcel() -> Parcel:
    return Parcel(7)


@on_ranks(3)
def test_body_runs_on_every_rank_with_a_group_and_its_place(tmp_path: Path) -> None:
    identity = Identity.resolve(os.environ)
    assert (identity.rank, identity.world_size) == (dist.get_rank(), dist.get_world_size())
    assert (identity.launcher, identity.local_world_size, dist.get_world_size()) == ("env", 3, 3)
    total = torch.tensor([identity.rank])
    dist.all_reduce(total)
    assert total.item() == 3
    assert torch.get_num_threads() == 1
    assert tmp_path.is_dir()


@pytest.mark.parametrize("number", [7])
@on_ranks(2)
def test_fixtures_and_parameters_reach_the_ranks(parcel: Parcel, number: int) -> None:
    assert parcel == Parcel(number)


@on_ranks(2)
def test_warnings_are_errors_on_the_ranks_too() -> None:
    with pytest.raises(UserWarning, match="a warning"):
        warnings.warn("a warning", stacklevel=1)


def every_rank_skips() -> None:
    pytest.skip(f"rank {dist.get_rank()} has no such device")


def one_rank_skips_and_one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 is wrong")
    pytest.skip("no such device")


def ranks_start_children() -> None:
    child = multiprocessing.get_context("fork").Process(target=os._exit, args=(7,))
    child.start()
    child.join()
    assert child.exitcode == 7


def one_rank_raises() -> None:
    print("rank", dist.get_rank(), "speaks")
    if dist.get_rank() == 1:
        raise ValueError("rank 1 is wrong")


def one_rank_dies() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def one_rank_leaves() -> None:
    if dist.get_rank() == 1:
        os._exit(0)  # rankwise: ignore[RW402] the mistake that is tested
    dist.barrier()


def one_rank_waits() -> None:
    if dist.get_rank() == 0:
        wait_in_a_named_place()


def wait_in_a_named_place() -> None:
    time.sleep(600)


def test_exception_on_one_rank_fails_with_its_traceback_and_output() -> None:
    with pytest.raises(AssertionError, match="1 of 2 ranks failed") as raised:
        run_on_ranks(one_rank_raises, 2)
    text = str(raised.value)
    assert "rank 1 is wrong" in text
    assert "in one_rank_raises" in text
    assert "rank 0 speaks" in text


def test_skip_in_the_body_skips_the_test() -> None:
    with pytest.raises(pytest.skip.Exception, match="rank 0 has no such device"):
        run_on_ranks(every_rank_skips, 2)


def test_failure_of_one_rank_outweighs_the_skip_of_another() -> None:
    with pytest.raises(AssertionError, match="rank 1 is wrong"):
        run_on_ranks(one_rank_skips_and_one_raises, 2)


def test_ranks_may_start_processes_of_their_own() -> None:
    run_on_ranks(ranks_start_children, 1)
    assert multiprocessing.active_children() == []


def test_killed_rank_fails_the_test() -> None:
    with pytest.raises(AssertionError, match="rank 1: killed by SIGKILL"):
        run_on_ranks(one_rank_dies, 2)


def test_rank_that_leaves_early_fails_the_others() -> None:
    with pytest.raises(AssertionError, match=r"rank 0: (?s:.*)Connection (closed|reset) by peer"):
        run_on_ranks(one_rank_leaves, 2)


def test_deadlock_fails_in_time_and_shows_where() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"did not end within 1.5 s(?s:.*)in wait_in_a_named_place"):
        run_on_ranks(one_rank_waits, 2, timeout_seconds=1.5)
    assert time.monotonic() - start < 15


def test_no_process_and_no_file_is_left() -> None:
    with RankProcesses(one_rank_waits, 2) as ranks:
        pids = [process.pid for process in ranks.processes]
        folder = ranks._job.folder
        assert folder.is_dir()
    assert not any(psutil.pid_exists(pid) for pid in pids if pid)
    assert not folder.exists()
    assert multiprocessing.active_children() == []


def test_function_within_a_function_is_refused() -> None:
    def inner() -> None: ...

    with pytest.raises(TypeError, match="inner must stand at the top level"):
        run_on_ranks(inner, 2)


def test_argument_that_does_not_pickle_is_named() -> None:
    with pytest.raises(TypeError, match=r"one_rank_waits \(thing\) does not pickle"):
        run_on_ranks(one_rank_waits, 2, kwargs={"thing": lambda: None})
