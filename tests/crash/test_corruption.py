"""Every change of a bit, every cut, and every file that is missing or another's is found, by `verify` and by `load`."""

import shutil
from pathlib import Path

import pytest
from crash_chain import Tally
from crash_damage import CHANGES, change_number, changed, changed_byte, files_of, positions, swap_steps
from crash_jobs import Hatchery

from rankwise import CheckpointManager
from rankwise.checkpoint.manifest import read_manifest
from rankwise.errors import CheckpointCorruptError

NAMES = [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json"]
NAMES += ["rank-00000.json", "rank-00001.json", "tensors.json", "values.json"]


@pytest.fixture(scope="module")
def saved(hatchery: Hatchery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps that two ranks have saved."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    job = hatchery.start("train", directory=str(directory), num_saves=2)
    assert job.join() == [0, 0], job.output()
    assert [path.name for path in files_of(directory / "step-00000002")] == NAMES
    return directory


@pytest.fixture
def steps(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


@pytest.mark.parametrize("num_sampled", [40, pytest.param(4_000, marks=pytest.mark.slow)])
def test_flipped_bits_and_bytes_in_any_file_are_found_and_the_file_is_named(
    steps: Path, tally: Tally, num_sampled: int
) -> None:
    manager = CheckpointManager(steps)
    step = manager.path(2)
    for path in files_of(step):
        for place in positions(path, num_sampled, 2):
            for what, change in (("bit", 1 << place % 8), ("byte", 0xFF)):
                with changed_byte(path, place, change):
                    with pytest.raises(CheckpointCorruptError) as raised:
                        manager.verify(2)
                    assert str(path) in str(raised.value)
                tally.count(f"one {what} changed: found by verify", path.name)
    manager.verify(2)


@pytest.mark.parametrize("damage", CHANGES)
def test_cut_missing_and_replaced_files_are_found_and_named(steps: Path, tally: Tally, damage: str) -> None:
    manager = CheckpointManager(steps)
    for path in files_of(manager.path(2)):
        with changed(path, CHANGES[damage]):
            with pytest.raises(CheckpointCorruptError) as raised:
                manager.verify(2)
            assert str(path) in str(raised.value)
        tally.count("a file changed: found by verify", damage)
    manager.verify(2)


def test_steps_under_each_other_s_name_are_found(steps: Path) -> None:
    manager = CheckpointManager(steps)
    swap_steps(steps)
    for step in (1, 2):
        with pytest.raises(CheckpointCorruptError, match=f"step-0000000{step}"):
            manager.verify(step)


def test_parts_of_two_ranks_in_each_other_s_place_are_found(steps: Path) -> None:
    manager = CheckpointManager(steps)
    step = manager.path(2)
    for pattern in ("rank-0000{}.json", "__{}_0.distcp"):
        one, two = (step / pattern.format(rank) for rank in (0, 1))
        contents = one.read_bytes(), two.read_bytes()
        one.write_bytes(contents[1])
        two.write_bytes(contents[0])
        with pytest.raises(CheckpointCorruptError, match="is damaged"):
            manager.verify(2)
        one.write_bytes(contents[0])
        two.write_bytes(contents[1])
    manager.verify(2)


@pytest.mark.parametrize(("name", "value"), [("step", 3), ("epoch", 9), ("world_size", 1)])
def test_edited_manifest_is_found(steps: Path, name: str, value: int) -> None:
    manager = CheckpointManager(steps)
    assert getattr(read_manifest(manager.path(2)), name) != value
    change_number(manager.path(2), name, value)
    with pytest.raises(CheckpointCorruptError, match=r"manifest\.json is damaged"):
        manager.verify(2)


@pytest.mark.parametrize("num_flips", [1, pytest.param(150, marks=pytest.mark.slow)])
def test_load_on_two_ranks_refuses_each_damage_and_can_go_on_to_the_older_step(
    hatchery: Hatchery, steps: Path, tally: Tally, num_flips: int
) -> None:
    job = hatchery.start("load_damaged", directory=str(steps), num_flips=num_flips)
    assert job.join(900) == [0, 0], job.output()
    rows = list(zip(job.journal(0, "tried"), job.journal(1, "tried"), strict=True))
    assert len(rows) >= len(NAMES) * (min(num_flips, 40) + len(CHANGES))
    for pair in rows:
        name, damage = pair[0]["name"], pair[0]["damage"]
        for row in pair:
            assert row["untouched"], row
            assert row["older"] == 1, row
            assert row["seconds"] < 20, row
            assert row["error"] == "CheckpointCorruptError", row
            assert name in row["told"], row
            assert row["told"] == pair[0]["told"]
        tally.count("damaged step loaded by two ranks: refused on both, and the older one loaded", damage)


@pytest.mark.parametrize("name", ["manifest.json", "__1_0.distcp"])
def test_job_goes_on_from_the_older_step_says_so_loudly_and_keeps_the_damaged_one(
    hatchery: Hatchery, steps: Path, name: str
) -> None:
    path = steps / "step-00000002" / name
    path.write_bytes(path.read_bytes()[:-2])
    job = hatchery.start("train", directory=str(steps), num_saves=1)
    assert job.join() == [0, 0], job.output()
    assert [job.journal(rank, "loaded")[0]["step"] for rank in (0, 1)] == [1, 1]
    (loud,) = [line for line in job.output().splitlines() if "Going on to an older step" in line]
    assert "ERROR" in loud
    assert str(path) in loud
    looking = hatchery.start("look", 1, directories=[str(steps)], num_places=2)
    assert looking.join() == [0], looking.output()
    assert looking.journal(0, "seen")[0]["steps"] == [[1, ""], [2, ""]]
    assert len(list(steps.glob(".broken-step-00000002-*"))) == 1
