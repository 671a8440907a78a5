"""`rankwise ckpt prune`."""

import os
from pathlib import Path
from typing import Any

import pytest

from rankwise import CheckpointManager
from rankwise.checkpoint.lease import read_holder
from rankwise.ckpt import main

LEFTOVERS = [".staging-step-00000007-ab", ".trash-step-00000001-cd"]
ASIDE = [".broken-step-00000003-ef", ".stale-step-00000004-12"]


@pytest.fixture
def filled(run: Any) -> Any:
    """Steps 1 to 5, two leftovers, two steps that were moved aside."""
    with CheckpointManager(run.folder) as manager:
        for step in range(1, 6):
            manager.save(step, {"value": step})
    for name in LEFTOVERS + ASIDE:
        (run.folder / name).mkdir()
        (run.folder / name / "__0_0.distcp").write_bytes(b"x")
    return run


def steps_of(run: Any) -> list[int]:
    return [int(name[5:]) for name in run.names() if name.startswith("step-")]


def test_leftovers_go_and_steps_stay_without_a_number_to_keep(filled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", str(filled.run)]) == 0
    assert capsys.readouterr().out.count("removed ") == 2
    assert steps_of(filled) == [1, 2, 3, 4, 5]
    assert [name for name in filled.names() if name[0] == "."] == ASIDE


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--keep-last", "2"], [4, 5]),
        (["--keep-last", "9"], [1, 2, 3, 4, 5]),
        (["--keep-last", "1", "--keep-every", "2"], [2, 4, 5]),
        (["--keep-every", "3"], [3, 5]),
    ],
)
def test_the_newest_and_the_multiples_are_kept(filled: Any, options: list[str], kept: list[int]) -> None:
    assert main(["prune", str(filled.run), *options]) == 0
    assert steps_of(filled) == kept
    assert main(["verify", str(filled.run)]) == 0


def test_a_dry_run_changes_nothing_and_says_all(filled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir(filled.folder))
    assert main(["prune", str(filled.run), "--keep-last", "1", "--broken", "--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert sorted(os.listdir(filled.folder)) == before
    assert len(shown) == 8
    assert all(line.startswith("would remove ") for line in shown)
    assert main(["prune", str(filled.run), "--keep-last", "1", "--broken"]) == 0
    assert [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()] == [
        line.partition(" ")[2].partition(" ")[2] for line in shown
    ]
    assert filled.names() == ["step-00000005"]


def test_a_damaged_step_does_not_count_as_kept(filled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (filled.folder / "step-00000005" / "values.json").write_bytes(b"")
    assert main(["prune", str(filled.run), "--keep-last", "2"]) == 0
    assert steps_of(filled) == [3, 4, 5]
    assert "step-00000005 is damaged and stays" in capsys.readouterr().err
    assert main(["prune", str(filled.run), "--broken"]) == 0
    assert filled.names() == ["step-00000003", "step-00000004"]


def test_broken_alone_takes_damaged_steps_and_what_was_set_aside(filled: Any) -> None:
    (filled.folder / "step-00000002" / "manifest.json").unlink()
    assert main(["prune", str(filled.run), "--broken"]) == 0
    assert filled.names() == [f"step-0000000{step}" for step in (1, 3, 4, 5)]


def test_no_step_goes_where_none_is_whole(filled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for step in range(1, 6):
        (filled.folder / f"step-0000000{step}" / "values.json").write_bytes(b"")
    assert main(["prune", str(filled.run), "--keep-last", "1", "--broken"]) == 1
    assert steps_of(filled) == [1, 2, 3, 4, 5]
    assert "no step in" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_job_that_writes_there_is_not_disturbed(
    filled: Any, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = filled.names()
    with CheckpointManager(filled.folder) as manager:
        manager.acquire()
        assert main(["prune", str(filled.run), "--keep-last", "1", *options]) == 2
        assert f"pid {os.getpid()}" in capsys.readouterr().err
        assert filled.names() == before
        manager.save(9, {"value": 9})


def test_the_lease_is_given_back_and_a_later_save_is_the_newest(filled: Any) -> None:
    assert main(["prune", str(filled.run), "--keep-last", "1"]) == 0
    with CheckpointManager(filled.folder) as manager:
        manager.save(2, {"value": 2})
        assert manager.steps() == [5, 2]
    holder = read_holder(filled.folder)
    assert holder is not None
    assert holder.released


@pytest.mark.parametrize("content", [(), ("checkpoints",)])
def test_nothing_to_remove_leaves_no_trace(
    tmp_path: Path, content: tuple[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in content:
        (tmp_path / name).mkdir()
    assert main(["prune", str(tmp_path), "--keep-last", "1", "--broken"]) == 0
    assert capsys.readouterr().out.startswith("nothing to remove in ")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / name for name in content]


def test_one_step_cannot_be_pruned(filled: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", str(filled.folder / "step-00000001")]) == 2
    assert "is one step" in capsys.readouterr().err


def test_what_cannot_be_removed_is_told_and_the_rest_goes(
    filled: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    rmtree = shutil.rmtree

    def refuse(path: Path, *args: Any, **more: Any) -> None:
        if "step-00000002" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        rmtree(path, *args, **more)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert main(["prune", str(filled.run), "--keep-last", "1"]) == 1
    assert "step-00000002 could not be removed: Permission denied" in capsys.readouterr().err
    # Half of a step is no step, even then.
    assert steps_of(filled) == [5]
