"""What a RUN on the command line stands for."""

import os
from pathlib import Path
from typing import Any

import pytest

from rankwise.ckpt.places import find_leftovers, find_place, load_manifest, step_number
from rankwise.errors import CheckpointCorruptError, CheckpointNotFoundError


def test_a_run_and_its_folder_have_the_same_steps_the_newest_last(run: Any) -> None:
    steps = (run.save(20, value=1), run.save(10, value=1))
    assert find_place(str(run.run)).steps == find_place(str(run.folder)).steps == steps
    assert find_place(str(run.run)).newest() == steps[1]
    assert find_place(str(run.run)).step(20) == steps[0]


def test_the_directory_of_a_step_stands_for_it_alone(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(1, value=1)
    path = run.save(2, value=1)
    place = find_place(str(path))
    assert (place.folder, place.steps) == (None, (path,))
    monkeypatch.chdir(path)
    assert find_place(".").newest() == Path()
    assert step_number(Path()) == 2


def test_a_step_moved_aside_may_be_named(run: Any) -> None:
    aside = run.save(1, value=1).rename(run.folder / ".stale-step-00000001-ab")
    assert find_place(str(aside)).steps == (aside,)
    assert find_place(str(run.run)).steps == ()
    assert find_leftovers(run.folder) == [aside]


def test_a_missing_step_is_told_from_those_that_are_there(run: Any) -> None:
    run.save(5, value=1)
    with pytest.raises(CheckpointNotFoundError, match=r"no step 7 in .*checkpoints\. There is: 5\."):
        find_place(str(run.run)).step(7)
    with pytest.raises(CheckpointNotFoundError, match="there is no folder 'nowhere'"):
        find_place("nowhere")


def test_none_yet_has_no_newest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint in"):
        find_place(str(tmp_path)).newest()


def test_files_with_the_name_of_a_step_are_none(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").write_text("")
    (tmp_path / "step-1").mkdir()
    assert find_place(str(tmp_path)).steps == ()


def test_a_pipe_in_the_place_of_a_manifest_does_not_hold_us_up(run: Any) -> None:
    path = run.save(1, value=1)
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")
    with pytest.raises(CheckpointCorruptError, match=r"manifest\.json is missing"):
        load_manifest(path)
