"""`rankwise ckpt ls`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise import CheckpointManager, __version__
from rankwise.ckpt import main


def listed(capsys: pytest.CaptureFixture[str], path: Path) -> list[dict[str, Any]]:
    assert main(["ls", str(path), "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def test_json_says_of_every_step_what_it_holds(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [run.save(step) for step in (10, 9)]
    rows = listed(capsys, run.run)
    # 9 was saved by a later job, so it is the newer one.
    assert [(row["step"], row["epoch"]) for row in rows] == [(10, 1), (9, 2)]
    assert [row["path"] for row in rows] == list(map(str, paths))
    row = rows[0]
    assert row["whole"] is True
    assert row["problem"] is None
    assert (row["items"], row["per_rank_items"]) == (["model", "optimizer", "step"], ["place"])
    assert (row["num_tensors"], row["world_size"]) == (9, 1)
    assert row["versions"] == {"rankwise": __version__, "torch": str(torch.__version__)}
    assert len(row["config_digest"]) == 64
    assert row["saved"].endswith("+00:00")
    assert row["bytes"] == sum(path.stat().st_size for path in paths[0].iterdir() if path.name != "manifest.json")


def test_text_is_one_line_for_a_step(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run.save(5)
    run.save(1000, value=1)
    assert main(["ls", str(run.run)]) == 0
    heading, first, second, note = capsys.readouterr().out.splitlines()
    assert heading.split() == ["step", "epoch", "saved", "(UTC)", "size", "ranks", "tensors", "items", "whole"]
    assert first.split()[0] == "5"
    assert first.endswith("  9  model, optimizer, step, place*  yes")
    assert second.split()[-4:] == ["1", "0", "value", "yes"]
    assert note == "* every rank has its own"


@pytest.mark.parametrize("place", ["run", "folder", "step"])
def test_a_run_its_folder_and_a_step_may_be_named(run: Any, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    run.save(1)
    path = run.save(2)
    rows = listed(capsys, {"run": run.run, "folder": run.folder, "step": path}[place])
    assert [row["step"] for row in rows] == ([2] if place == "step" else [1, 2])


@pytest.mark.parametrize("content", [(), ("checkpoints",), ("logs",)])
def test_none_yet_is_an_empty_list(tmp_path: Path, content: tuple[str], capsys: pytest.CaptureFixture[str]) -> None:
    for name in content:
        (tmp_path / name).mkdir()
    assert listed(capsys, tmp_path) == []
    assert main(["ls", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("no checkpoints in ")


@pytest.mark.parametrize(
    ("name", "said"), [("manifest.json", "cannot be read"), ("__0_0.distcp", "bytes long"), ("tensors.json", "damaged")]
)
def test_a_step_that_is_not_whole_is_listed_as_such(
    run: Any, name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.save(4)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-5])
    [row] = listed(capsys, run.run)
    assert (row["step"], row["whole"]) == (4, False)
    assert name in row["problem"]
    assert said in row["problem"]
    assert main(["ls", str(run.run)]) == 0
    assert f"4: {path / name}" in capsys.readouterr().out


def test_a_step_that_lost_its_manifest_is_not_hidden(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run.save(1)
    (run.save(2) / "manifest.json").unlink()
    assert [(row["step"], row["whole"]) for row in listed(capsys, run.run)] == [(2, False), (1, True)]


def test_leftovers_are_no_steps_and_are_named_with_their_size(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run.save(1)
    for name in (".staging-step-00000002-ab", ".trash-step-00000000-cd", ".broken-step-00000003-ef", ".stale-x"):
        (run.folder / name).mkdir()
        (run.folder / name / "__0_0.distcp").write_bytes(bytes(2048))
    assert [row["step"] for row in listed(capsys, run.run)] == [1]
    assert main(["ls", str(run.run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "left behind (rankwise ckpt prune):" in lines
    [staging] = [line for line in lines if ".staging-step-00000002-ab" in line]
    assert "2.0 KiB" in staging
    assert "a save that is under way or was killed" in staging


def test_who_writes_there_is_named_until_the_lease_is_given_back(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with CheckpointManager(run.folder) as manager:
        manager.save(1, {"value": 1})
        main(["ls", str(run.run)])
        assert "\nwritten by pid " in capsys.readouterr().out
    main(["ls", str(run.run)])
    assert "written by" not in capsys.readouterr().out


def test_text_from_files_cannot_steer_the_terminal(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (run.folder / ".staging-\x1b[2J\udcff").mkdir(parents=True)
    assert main(["ls", str(run.run)]) == 0
    assert r".staging-?[2J\udcff" in capsys.readouterr().out
