"""Disks that are full, read-only, forbidden or slow: every rank hears why within seconds, and goes on when it may."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from crash_jobs import Hatchery, Job

SECONDS = 20.0
"""How long a save that must fail may take: hundredths of a second where the cores are free."""
NOBODY = 65534


def missing(reason: str) -> NoReturn:
    """Skip the test; where everything has to be there, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (nothing may be missing where CI=true)")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def namespaced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hatchery]:
    """Jobs whose mounts nobody else sees, and that vanish with them."""
    prefix = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--user", "--map-root-user"])]
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        missing("no unshare or mount here")
    tried = subprocess.run([*prefix, "mount", "-t", "tmpfs", "tmpfs", "/tmp"], capture_output=True, text=True)
    if tried.returncode:
        missing(f"no mounts in a namespace of one's own here: {tried.stderr.strip()}")
    server = Hatchery(tmp_path_factory.mktemp("namespaced"), prefix)
    yield server
    server.close()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may reach, which those of pytest are not."""
    folder = Path(tempfile.mkdtemp(prefix="rankwise-crash-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def attempts(job: Job, num_attempts: int) -> list[list[dict[str, object]]]:
    """What each rank noted of each save, once the job has ended well."""
    assert job.join(150) == [0, 0], job.output()
    rows = [job.journal(rank, "tried") for rank in (0, 1)]
    assert [len(row) for row in rows] == [num_attempts] * 2
    for here, there in zip(*rows, strict=True):
        assert here["told"] == there["told"]
        assert {here["error"], there["error"]} in ({""}, {"CheckpointError"})
        assert max(here["seconds"], there["seconds"]) < SECONDS
    return rows


@pytest.mark.parametrize("async_save", [False, True])
def test_full_disk_fails_the_save_on_every_rank_until_there_is_room(
    namespaced: Hatchery, tmp_path: Path, async_save: bool
) -> None:
    job = namespaced.start("meet_full_disk", directory=str(tmp_path / "disk"), async_save=async_save)
    first, full, full_again, roomy, last = attempts(job, 5)[0]
    assert not first["error"]
    for rank in (0, 1):
        (line,) = job.journal(rank, "save_on_main")
        assert "net.pt was not saved on the main process: [Errno 28] No space left on device" in line["told"]
        assert line["names"] == ["checkpoints", "filler"]
    for row in (full, full_again):
        assert "No space left on device" in str(row["told"])
        assert row["steps"] == [1]
        assert row["leftovers"] == []
    assert (roomy["error"], roomy["steps"]) == ("", [1, 2])
    assert (last["error"], last["steps"]) == ("", [2, 3])


def test_disk_that_becomes_read_only_fails_the_save_and_what_was_there_still_loads(
    namespaced: Hatchery, tmp_path: Path
) -> None:
    job = namespaced.start("meet_read_only_disk", directory=str(tmp_path / "disk"))
    first, read_only, writable = attempts(job, 3)[0]
    assert not first["error"]
    assert "Read-only file system" in str(read_only["told"])
    assert (read_only["steps"], read_only["loaded"]) == ([1], 1)
    assert (writable["error"], writable["steps"]) == ("", [1, 2])


def test_folder_on_a_read_only_disk_is_refused_before_anything_is_copied(namespaced: Hatchery, tmp_path: Path) -> None:
    job = namespaced.start("meet_read_only_disk", directory=str(tmp_path / "disk"), from_start=True)
    read_only, writable = attempts(job, 2)[0]
    assert "Read-only file system" in str(read_only["told"])
    assert "lease" in str(read_only["told"]) or "no checkpoint can be saved" in str(read_only["told"])
    assert (writable["error"], writable["steps"]) == ("", [1])


@pytest.mark.parametrize("is_there", [False, True])
def test_folder_that_this_user_may_not_write_is_refused_on_every_rank(
    hatchery: Hatchery, open_folder: Path, is_there: bool
) -> None:
    directory = open_folder / "checkpoints"
    if is_there:
        directory.mkdir()
        directory.chmod(0o555)
    open_folder.chmod(0o555)
    job = hatchery.start("try_to_save", user=NOBODY, directory=str(directory), num_saves=1)
    (row,) = attempts(job, 1)[0]
    assert "Permission denied" in str(row["told"])
    assert row["user"] != 0
    assert list(open_folder.glob("checkpoints/*")) == []


def test_disk_that_syncs_slowly_holds_up_synchronous_saves_alone(hatchery: Hatchery, tmp_path: Path) -> None:
    rows = {}
    for async_save in (False, True):
        job = hatchery.start(
            "save_slowly", directory=str(tmp_path / f"{async_save}"), async_save=async_save, seconds=0.1
        )
        assert job.join(150) == [0, 0], job.output()
        rows[async_save] = job.journal(0, "slow")[0]
    # Seven files and folders are synced, one after the other, on the main process, 0.1 s each.
    assert rows[False]["save"] > 0.6
    assert rows[True]["save"] < 0.5 * rows[True]["whole"]
    assert rows[True]["second"] > 0.4, "the second save may not begin before the first is durable"
    assert rows[False]["steps"] == rows[True]["steps"] == [1, 2]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("vote", ["begin", "gather", "finish"])
def test_rank_killed_amid_a_vote_ends_the_other_and_loses_nothing(
    hatchery: Hatchery, tmp_path: Path, victim: int, vote: str
) -> None:
    job = hatchery.start("die_in_vote", directory=str(tmp_path / "checkpoints"), victim=victim, vote=vote)
    statuses = job.join()
    assert statuses[victim] == -9, job.output()
    assert statuses[1 - victim] == 1, job.output()
    assert job.ends[1 - victim]["at"] - job.ends[victim]["at"] < SECONDS
    looking = hatchery.start("look", 1, directories=[str(tmp_path / "checkpoints")], num_places=2)
    assert looking.join() == [0], looking.output()
    # The main process commits before the last talk, which tells the others.
    expected = [[1, ""], [2, ""]] if vote == "finish" else [[1, ""]]
    assert looking.journal(0, "seen")[0]["steps"] == expected
    again = hatchery.start("train", directory=str(tmp_path / "checkpoints"), num_saves=1)
    assert again.join() == [0, 0], again.output()


@pytest.mark.parametrize("async_save", [False, True])
def test_training_goes_on_after_a_failed_save_where_it_should(
    hatchery: Hatchery, tmp_path: Path, async_save: bool
) -> None:
    fault = {"rank": 1, "save": 3, "kind": "ENOSPC", "index": 2, "counted": ["create", "write", "sync"]}
    job = hatchery.start(
        "train",
        directory=str(tmp_path / "checkpoints"),
        async_save=async_save,
        num_saves=5,
        fault=fault,
        on_failure="warn",
    )
    assert job.join() == [0, 0], job.output()
    assert len(job.journal(1, "fired")) == 1
    assert [line["step"] for line in job.journal(0, "saving")] == [1, 2, 3, 4, 5]
    said = [line for line in job.output().splitlines() if "Training goes on" in line]
    assert len(said) == 1
    assert "ERROR" in said[0]
    assert "step 3 was not saved, because of rank 1" in said[0]
    assert "No space left on device" in said[0]
    looking = hatchery.start("look", 1, directories=[str(tmp_path / "checkpoints")], num_places=2)
    assert looking.join() == [0], looking.output()
    assert looking.journal(0, "seen")[0]["steps"] == [[4, ""], [5, ""]]
