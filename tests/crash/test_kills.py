"""Ranks are killed while they save: the newest step always loads, and no committed one is ever lost."""

import random
import shutil
import time
from pathlib import Path

import pytest
from crash_chain import Chain, Tally
from crash_faults import CHANGES
from crash_jobs import Hatchery

VICTIMS = ({0}, {1}, {0, 1})
MANY_SECONDS = 0.4
"""A save of these small states takes about a tenth of it, so kills fall anywhere in some save."""


@pytest.mark.parametrize("num_kills", [8, pytest.param(240, marks=pytest.mark.slow)])
def test_kill_at_a_random_moment_loses_nothing(
    hatchery: Hatchery, tmp_path: Path, tally: Tally, num_kills: int
) -> None:
    chain = Chain(hatchery, tmp_path, tally)
    for number in range(num_kills):
        async_save, killed = number % 2 == 1, VICTIMS[number // 2 % 3]
        job = chain.start(async_save=async_save)
        job.wait_for("saved")
        time.sleep(random.uniform(0, MANY_SECONDS))
        chain.judge(job, killed, job.kill(*killed))
        tally.count("kills", f"{'async' if async_save else 'sync'} save, rank {' and '.join(map(str, sorted(killed)))}")
    chain.go_on(3)
    assert tally.total("kills") == tally.total("what the killed job left") == num_kills
    assert tally.number("lives", "took the lease over and saved at once") > num_kills


@pytest.mark.parametrize("async_save", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("victim", [0, 1])
def test_kill_at_each_place_that_changes_the_disk_loses_nothing(
    hatchery: Hatchery, tmp_path: Path, tally: Tally, victim: int, async_save: bool
) -> None:
    kill_at_calls(hatchery, tmp_path, tally, victim, async_save, every_call=False)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_kill_at_every_call_that_changes_the_disk_loses_nothing(
    hatchery: Hatchery, tmp_path: Path, tally: Tally, victim: int
) -> None:
    kill_at_calls(hatchery, tmp_path, tally, victim, async_save=False, every_call=True)


@pytest.mark.parametrize("async_save", [False, True])
def test_saved_step_outlasts_a_loss_of_power_where_no_removal_syncs_its_folder(
    hatchery: Hatchery, tmp_path: Path, tally: Tally, async_save: bool
) -> None:
    chain = Chain(hatchery, tmp_path, tally, shadow=True)
    for _ in range(2):
        chain.go_on(2, async_save=async_save, keep_last=None)
    assert chain.told == {1, 2, 3, 4}


def kill_at_calls(
    hatchery: Hatchery, folder: Path, tally: Tally, victim: int, async_save: bool, *, every_call: bool
) -> None:
    """Kill before each call and amid each write, of a save that removes an old step, and of the taking of the lease."""
    chain = Chain(hatchery, folder, tally, shadow=True)
    chain.go_on(3)
    done: set[tuple[str, str]] = set()
    for save in (2, 0) if victim == 0 else (2,):  # the lease is the main process's
        fault = {"rank": victim, "kind": "none", "index": -1, "counted": sorted(CHANGES), "save": save}
        seen = set(done)
        leave_the_same(chain)
        calls = chain.go_on(3, async_save=async_save, fault=fault).journal(victim, "calls")[0]["calls"]
        assert {kind for kind, _, _ in calls} >= {"create", "write", "sync"}
        for index, (kind, place, _) in enumerate(calls):
            # The taking of the lease is followed by a save like the other one.
            if (kind, place) in (seen if every_call else done):
                continue
            done.add((kind, place))
            for how in ("kill", "torn") if kind == "write" else ("kill",):
                leave_the_same(chain)
                job = chain.start(async_save=async_save, fault={**fault, "kind": how, "index": index})
                job.join()
                (fired,) = job.journal(victim, "fired")
                assert fired["call"][:2] == [kind, place]
                tally.count("kills", f"{'amid' if how == 'torn' else 'before'} {kind} in {place.split()[-1]}")
                chain.judge(job, {victim}, job.ends[victim]["at"])
    chain.go_on(3)


def leave_the_same(chain: Chain) -> None:
    """Let each job meet the same leftovers, as they change the calls: of a save, of a removal, and one old lease."""
    for leftover in chain.directory.glob(".*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for lease in sorted(chain.directory.glob("lease-*.json"))[:-2]:
        lease.unlink()
    for name in (".staging-step-00000001-x", ".trash-step-00000001-x"):
        (chain.directory / name).mkdir()
        (chain.directory / name / "__0_0.distcp").write_bytes(b"half")
