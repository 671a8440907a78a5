"""`rankwise ckpt verify`."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import xxhash

from rankwise.checkpoint.manifest import TENSORS
from rankwise.ckpt import listing, main, places, verifying


def test_whole_steps_are_well(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run.save(1)
    run.save(2)
    assert main(["verify", str(run.run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["well", "well"]
    assert "6 files" in lines[0]


def test_none_yet_and_leftovers_of_a_killed_save_are_well(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run.run)]) == 0
    assert "no checkpoints" in capsys.readouterr().out
    (run.folder / ".staging-step-00000001-ab").mkdir(parents=True)
    (run.folder / ".staging-step-00000001-ab" / "__0_0.distcp").write_bytes(b"half")
    assert main(["verify", str(run.run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_flipped_bit_is_found_anywhere_in_every_file(run: Any, flip: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.save(1, value=[1.5, "x"], small=make_tensor())
    for file in sorted(path.iterdir()):
        size = file.stat().st_size
        for position in sorted({0, size // 3, size // 2, size - 1}):
            flip(file, position)
            assert main(["verify", str(run.run)]) == 1, f"{file.name} at {position}"
            assert f"DAMAGED  {file}" in capsys.readouterr().out
            flip(file, position)
    assert main(["verify", str(run.run)]) == 0


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "pipe"])
@pytest.mark.parametrize("name", ["manifest.json", "tensors.json", "rank-00000.json", "__0_0.distcp", ".metadata"])
def test_a_file_that_is_not_as_it_was_written_is_named(
    run: Any, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run.save(1)
    file = run.save(2) / name
    content = file.read_bytes()
    file.unlink()
    if damage == "pipe":
        os.mkfifo(file)
    elif damage != "missing":
        file.write_bytes(content[:-5] if damage == "truncated" else content + b"x")
    assert main(["verify", str(run.run), "--json"]) == 1
    first, second = sorted(json.loads(capsys.readouterr().out), key=lambda report: report["step"])
    assert (first["ok"], second["ok"]) == (True, False)
    assert first["problems"] == []
    [problem] = second["problems"]
    assert str(file) in problem


def test_the_tensors_that_a_damage_hit_are_named(run: Any, flip: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.save(1)
    record = json.loads((path / TENSORS).read_text())["model.weight"]["chunks"][0]
    flip(path / record["file"], record["start"] + 5)
    assert main(["verify", str(run.run)]) == 1
    assert "Tensors that it hit: 'model.weight'." in capsys.readouterr().out


def test_a_file_that_is_well_beside_a_wrong_list_of_tensors_is_found(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.save(1, a=make_tensor(), b=make_tensor() + 1)
    # As if a save had mixed up two tensors before it wrote its checksums.
    tensors = json.loads((path / TENSORS).read_text())
    tensors["a"], tensors["b"] = tensors["b"], tensors["a"]
    tensors["a"]["chunks"][0]["xxh3"], tensors["b"]["chunks"][0]["xxh3"] = (
        tensors[name]["chunks"][0]["xxh3"] for name in ("b", "a")
    )
    rewrite(path, TENSORS, json.dumps(tensors).encode())
    assert main(["verify", str(run.run)]) == 1
    assert "is what was written, but not what tensors.json says of 'b', 'a'" in capsys.readouterr().out


def test_one_step_alone_may_be_verified(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run.save(1)
    (run.save(2) / "values.json").unlink()
    assert main(["verify", str(run.run), "--step", "1"]) == 0
    assert main(["verify", str(run.run), "--step", "2"]) == 1
    capsys.readouterr()
    assert main(["verify", str(run.run), "--step", "3"]) == 2
    assert "there is no step 3" in capsys.readouterr().err


def test_a_renamed_step_is_damaged_and_a_copy_under_a_name_of_its_own_is_not(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.save(1)
    shutil.copytree(path, run.run / "best")
    assert main(["verify", str(run.run / "best")]) == 0
    capsys.readouterr()
    path.rename(run.folder / "step-00000009")
    assert main(["verify", str(run.run)]) == 1
    assert "manifest.json is that of another step" in capsys.readouterr().out


def make_tensor() -> Any:
    import torch

    return torch.arange(6.0)


def rewrite(path: Path, name: str, content: bytes) -> None:
    """Replace a file of a step, and what its manifest says of it."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content)}
    del manifest["xxh3"]
    manifest["xxh3"] = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("command", ["verify", "ls"])
def test_a_step_that_a_running_job_removes_meanwhile_is_not_damaged(
    run: Any, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.save(1)
    run.save(2)
    load = places.load_manifest

    def remove_first(step_directory: Path) -> Any:
        if path.exists():
            shutil.rmtree(path)
        return load(step_directory)

    for module in (listing, verifying):
        monkeypatch.setattr(module, "load_manifest", remove_first)
    assert main([command, str(run.run), "--json"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)] == [2]
