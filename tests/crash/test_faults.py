"""A file-system call fails on one rank: the save fails on all with the cause, nothing is lost, and the next works."""

import errno
import os
from pathlib import Path

import pytest
from crash_chain import Tally
from crash_jobs import Hatchery

KINDS = ["ENOSPC", "EIO", "EACCES", "EROFS"]


@pytest.mark.parametrize("faulty_rank", [0, 1])
def test_failure_at_each_place_fails_the_save_on_all_ranks_and_the_next_one_works(
    hatchery: Hatchery, tmp_path: Path, tally: Tally, faulty_rank: int
) -> None:
    fail_at_calls(hatchery, tmp_path, tally, faulty_rank, async_save=False, from_start=faulty_rank == 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("async_save", "from_start", "first_kind"), [(False, False, 0), (False, True, 1), (True, False, 2), (True, True, 3)]
)
@pytest.mark.parametrize("faulty_rank", [0, 1])
def test_failure_at_every_call_fails_the_save_on_all_ranks_and_the_next_one_works(
    hatchery: Hatchery,
    tmp_path: Path,
    tally: Tally,
    faulty_rank: int,
    async_save: bool,
    from_start: bool,
    first_kind: int,
) -> None:
    fail_at_calls(hatchery, tmp_path, tally, faulty_rank, async_save, from_start, first_kind, every_call=True)


def fail_at_calls(
    hatchery: Hatchery,
    folder: Path,
    tally: Tally,
    faulty_rank: int,
    async_save: bool,
    from_start: bool,
    first_kind: int = 0,
    every_call: bool = False,
) -> None:
    job = hatchery.start(
        "fail_and_go_on",
        directory=str(folder / "checkpoints"),
        async_save=async_save,
        faulty_rank=faulty_rank,
        kinds=KINDS[first_kind:] + KINDS[:first_kind],
        from_start=from_start,
        every_call=every_call,
    )
    assert job.join(1500 if every_call else 200) == [0, 0], job.output()
    rows = list(zip(job.journal(0, "tried"), job.journal(1, "tried"), strict=True))
    for pair in rows:
        kind, place, path = pair[faulty_rank]["fired"]
        here = f"{pair[faulty_rank]['kind']} at {kind} in {place}: {pair}"
        assert not pair[0]["problem"], here
        assert not pair[1]["problem"], here
        assert {row["error"] for row in pair} in ({""}, {"CheckpointError"}), here
        assert pair[0]["told"] == pair[1]["told"], here
        if pair[0]["error"]:
            assert os.strerror(getattr(errno, pair[0]["kind"])) in pair[0]["told"], here
        if kind in ("write", "sync") and ".staging" in path:
            assert pair[0]["error"], f"what was not written, or not synced, was committed: {here}"
        assert max(row["seconds"] for row in pair) < 20, here
        outcome = "fails on both ranks, and the next works" if pair[0]["error"] else "succeeds on both, and is whole"
        tally.count(f"a failed call on rank {faulty_rank}: the save", outcome)
        tally.count("failed calls", f"{pair[0]['kind']} at {kind}")
        tally.time("a save at which a call fails", max(row["seconds"] for row in pair))
    assert any(pair[0]["error"] for pair in rows)
    told = {name for pair in rows for name in [pair[faulty_rank]["fired"][0]] if pair[0]["error"]}
    assert told >= {"create", "write", "sync"}
