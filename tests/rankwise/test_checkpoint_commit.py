"""A step's directory appears whole, and a change of any of its files is found."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from rankwise.checkpoint import commit
from rankwise.errors import CheckpointCorruptError, CheckpointError


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


def test_new_parents_of_the_checkpoints_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def record_fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    commit.make_staging(tmp_path / "run" / "checkpoints", 10)
    assert synced == [str(tmp_path), str(tmp_path / "run")]


def test_step_whose_name_the_disk_did_not_confirm_stays_and_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(commit, "fsync_directory", refuse)
    with pytest.raises(CheckpointError, match=r"step-00000010 is there and whole, .*Input/output error.* may undo it"):
        make_step(tmp_path)
    commit.verify(tmp_path / "step-00000010")


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
    written = json.loads((step / "manifest.json").read_text())
    assert set(written["versions"]) == {"rankwise", "torch"}
    assert written["files"]["net.json"]["bytes"] == (step / "net.json").stat().st_size
    assert {name: commit.file_record(step / name) for name in manifest.files} == manifest.files


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


@pytest.mark.parametrize("folder", ["", "rank-00000"])
def test_item_without_its_file_in_the_manifest_is_told_in_a_sentence(tmp_path: Path, folder: str) -> None:
    step = make_step(tmp_path)
    manifest = commit.Manifest(10, 1, ("net",), ("net",), {})
    relative = f"{folder}/net" if folder else "net"
    with pytest.raises(CheckpointCorruptError) as raised:
        commit.read_item(step, manifest, "net", folder)
    expected = f"{step}/manifest.json lists the item 'net', but not its file {relative}.json. Load another step"
    assert str(raised.value).startswith(expected)


def test_message_names_the_path_of_what_cannot_be_read(tmp_path: Path) -> None:
    step = make_step(tmp_path)
    (step / "net.json").write_text('{"w": {"$tensor": "x"}}')
    files = {name: commit.file_record(step / name) for name in ("net.json", "net.safetensors")}
    with pytest.raises(CheckpointCorruptError) as raised:
        commit.read_item(step, commit.Manifest(10, 1, ("net",), (), files), "net")
    message = f"{step}/net.json cannot be read: the tensor 'x' is missing in the safetensors file."
    assert str(raised.value) == message


def test_manifest_that_lacks_something_is_told_in_a_sentence(tmp_path: Path) -> None:
    step = make_step(tmp_path)
    (step / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(CheckpointCorruptError, match=r"manifest.json cannot be read: it lacks 'crc32'\.$"):
        commit.read_manifest(step)


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
