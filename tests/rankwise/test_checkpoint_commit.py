"""A step's directory appears whole, and a change of any of its files is found."""

import json
import os
from pathlib import Path

import pytest
import torch

from rankwise.checkpoint import commit
from rankwise.errors import CheckpointCorruptError


def make_step(directory: Path, step: int = 10) -> Path:
    staging = commit.make_staging(directory, step)
    files = commit.write_item(staging, "net", {"w": torch.arange(4.0), "lr": 0.1})
    commit.commit(staging, commit.Manifest(step, 1, ("net",), (), files))
    return directory / commit.step_name(step)


def test_only_directories_with_a_manifest_are_steps(tmp_path: Path) -> None:
    assert commit.find_steps(tmp_path / "missing") == []
    make_step(tmp_path, 300)
    make_step(tmp_path, 20)
    make_step(tmp_path, 123456789)
    for name in ("step-00000040", "step-50", ".staging-step-00000060-x", "step-00000070.old", "step-000000080"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000000080" / "manifest.json").touch()
    (tmp_path / "step-00000090").touch()
    assert commit.find_steps(tmp_path) == [20, 300, 123456789]


def test_directory_appears_by_one_rename_when_it_is_whole_and_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    rename, fsync = os.rename, os.fsync

    def check_and_rename(source: Path, target: Path) -> None:
        assert not target.exists()
        commit.verify(source)
        events.append(f"rename to {target.name}")
        rename(source, target)

    def record_fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.rpartition(".")[2].partition("-")[0]
        events.append(f"fsync {name}")
        fsync(descriptor)

    monkeypatch.setattr(os, "rename", check_and_rename)
    monkeypatch.setattr(os, "fsync", record_fsync)
    step = make_step(tmp_path)
    commit.verify(step)
    place = events.index("rename to step-00000010")
    assert {"fsync json", "fsync safetensors", "fsync staging"} <= set(events[:place])
    assert len(events) == place + 2


def test_leftovers_of_killed_saves_are_removed_by_the_next(tmp_path: Path) -> None:
    leftover = commit.make_staging(tmp_path, 10)
    (leftover / "rank-00000").mkdir()
    (leftover / "rank-00000" / "x.json").write_text("{")
    staging = commit.make_staging(tmp_path, 20)
    assert [entry.name for entry in tmp_path.iterdir()] == [staging.name]


def test_item_comes_back_and_names_are_readable_by_others(tmp_path: Path) -> None:
    step = make_step(tmp_path)
    manifest = commit.read_manifest(step)
    item = commit.read_item(step, manifest, "net")
    assert (item["w"].tolist(), item["lr"]) == ([0.0, 1.0, 2.0, 3.0], 0.1)
    assert (manifest.step, manifest.world_size, set(manifest.files)) == (10, 1, {"net.json", "net.safetensors"})
    assert "versions" in json.loads((step / "manifest.json").read_text())


@pytest.mark.parametrize("name", ["net.json", "net.safetensors"])
def test_every_flipped_bit_in_an_item_is_found_and_named(tmp_path: Path, name: str) -> None:
    step = make_step(tmp_path)
    manifest, path = commit.read_manifest(step), step / name
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(CheckpointCorruptError, match=f"{name} is damaged: its checksum is"):
            commit.read_item(step, manifest, "net")
    path.write_bytes(whole)
    commit.verify(step)


def test_every_change_of_the_manifest_s_content_is_found(tmp_path: Path) -> None:
    step = make_step(tmp_path)
    path = step / "manifest.json"
    whole = path.read_bytes()
    sound = commit.read_manifest(step)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 7]) + whole[place + 1 :])
        try:
            # White space may change without harm.
            assert commit.read_manifest(step) == sound
        except CheckpointCorruptError as error:
            assert str(path) in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", ["net.json", "net.safetensors"])
def test_truncated_and_missing_files_are_found_and_named(tmp_path: Path, name: str) -> None:
    step = make_step(tmp_path)
    path = step / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointCorruptError, match=f"{name} is damaged: .* bytes long"):
        commit.verify(step)
    path.unlink()
    with pytest.raises(CheckpointCorruptError, match=f"{name} cannot be read: No such file"):
        commit.verify(step)
    with pytest.raises(CheckpointCorruptError, match=f"{name} cannot be read: No such file"):
        commit.read_item(step, commit.read_manifest(step), "net")


def test_manifest_of_a_later_format_is_refused(tmp_path: Path) -> None:
    step = make_step(tmp_path)
    path = step / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointCorruptError, match="has format 2, this rankwise reads 1"):
        commit.read_manifest(step)


def test_broken_step_is_moved_aside_and_kept(tmp_path: Path) -> None:
    make_step(tmp_path)
    aside = commit.move_aside(tmp_path, 10)
    assert aside.name.startswith(".broken-step-00000010-")
    assert (aside / "net.json").exists()
    assert commit.find_steps(tmp_path) == []
