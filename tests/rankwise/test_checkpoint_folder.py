"""A step's directory appears whole, and a change of any of its files is found."""

import errno
import os
from pathlib import Path

import pytest

from rankwise.checkpoint import folder
from rankwise.checkpoint.manifest import FileRecord, Manifest, encode_manifest, read_manifest
from rankwise.errors import CheckpointCorruptError, CheckpointError, CheckpointLeaseError

CONTENTS = {"values.json": b"{}", "__0_0.distcp": bytes(range(100)), "empty": b""}


def holds() -> None:
    """The lease is held."""


def make_step(directory: Path, step: int = 10, epoch: int = 1) -> Path:
    staging = folder.make_staging(directory, step)
    files = {name: folder.write_file(staging / name, content) for name, content in CONTENTS.items()}
    return folder.commit(staging, Manifest(step, epoch, "abc", 1, (), (), files), holds)


def test_only_directories_with_a_manifest_are_steps(tmp_path: Path) -> None:
    assert folder.find_steps(tmp_path / "missing") == []
    for step in (300, 20, 123456789):
        make_step(tmp_path, step)
    for name in ("step-00000040", "step-50", ".staging-step-00000060-x", "step-00000070.old", "step-000000080"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000000080" / "manifest.json").touch()
    (tmp_path / "step-00000090").touch()
    assert folder.find_steps(tmp_path) == [20, 300, 123456789]


def test_steps_of_a_later_job_are_newer_and_damaged_ones_stand_by_their_number(tmp_path: Path) -> None:
    for step, epoch in ((10, 1), (20, 1), (30, 1), (15, 2), (25, 2), (1, 3)):
        make_step(tmp_path, step, epoch)
    assert folder.find_steps(tmp_path) == [10, 20, 30, 15, 25, 1]
    assert folder.highest_epoch(tmp_path) == 3
    (tmp_path / "step-00000020" / "manifest.json").write_text("{")
    (tmp_path / "step-00000001" / "manifest.json").write_text("{")
    assert folder.find_steps(tmp_path) == [10, 30, 1, 15, 20, 25]
    assert folder.highest_epoch(tmp_path) == 2


def test_directory_appears_by_one_rename_when_it_is_whole_and_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    rename, fsync = os.rename, os.fsync

    def check_and_rename(source: Path, target: Path) -> None:
        assert not target.exists()
        folder.verify(source)
        events.append(f"rename to {target.name}")
        rename(source, target)

    def record_fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        events.append(f"fsync {name.partition('step-')[0] or name}")
        fsync(descriptor)

    monkeypatch.setattr(os, "rename", check_and_rename)
    monkeypatch.setattr(os, "fsync", record_fsync)
    step = make_step(tmp_path)
    folder.verify(step)
    place = events.index("rename to step-00000010")
    assert {*(f"fsync {name}" for name in CONTENTS), "fsync .staging-"} <= set(events[:place])
    assert any(event.startswith("fsync .manifest.json") for event in events[:place])
    assert events[place + 1 :] == [f"fsync {tmp_path.name}"]


def test_new_parents_of_the_checkpoints_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def record_fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    folder.make_staging(tmp_path / "run" / "checkpoints", 10)
    assert synced == [str(tmp_path), str(tmp_path / "run")]


def test_lease_is_asked_last_and_a_refusal_leaves_no_step(tmp_path: Path) -> None:
    staging = folder.make_staging(tmp_path, 10)
    files = {"values.json": folder.write_file(staging / "values.json", b"{}")}

    def refuse() -> None:
        assert (staging / "manifest.json").is_file()
        raise CheckpointLeaseError("lost")

    with pytest.raises(CheckpointLeaseError, match="lost"):
        folder.commit(staging, Manifest(10, 1, "abc", 1, (), (), files), refuse)
    assert folder.find_steps(tmp_path) == []


def test_commit_never_replaces_a_step_that_is_there(tmp_path: Path) -> None:
    step = make_step(tmp_path, 10, epoch=2)
    before = (step / "manifest.json").read_bytes()
    with pytest.raises(OSError, match="not empty"):
        make_step(tmp_path, 10, epoch=1)
    assert (step / "manifest.json").read_bytes() == before
    folder.verify(step)


def test_file_that_changed_length_after_it_was_written_is_not_committed(tmp_path: Path) -> None:
    staging = folder.make_staging(tmp_path, 10)
    record = folder.write_file(staging / "values.json", b"{}")
    (staging / "values.json").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"values.json was changed by another process"):
        folder.commit(staging, Manifest(10, 1, "abc", 1, (), (), {"values.json": record}), holds)
    assert folder.find_steps(tmp_path) == []


def test_step_whose_name_the_disk_did_not_confirm_stays_and_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folder, "fsync_directory", refuse)
    with pytest.raises(CheckpointError, match=r"step-00000010 is there and whole, .*Input/output error.* may undo it"):
        make_step(tmp_path)
    folder.verify(tmp_path / "step-00000010")


def test_leftovers_of_killed_saves_and_removals_go_with_the_next_and_what_was_put_aside_stays(tmp_path: Path) -> None:
    leftover = folder.make_staging(tmp_path, 10)
    folder._in_use.clear()  # as in the process that comes after the killed one
    (leftover / "__0_0.distcp").write_text("{")
    (tmp_path / ".trash-step-00000005-1").mkdir()
    aside = {".broken-step-00000003-1", ".stale-step-00000004-1"}
    for name in aside:
        (tmp_path / name).mkdir()
    staging = folder.make_staging(tmp_path, 20)
    assert {entry.name for entry in tmp_path.iterdir()} == {staging.name, *aside}


def test_save_that_is_under_way_in_this_process_is_no_leftover(tmp_path: Path) -> None:
    one = folder.make_staging(tmp_path, 10)
    two = folder.make_staging(tmp_path, 20)
    assert one.is_dir()
    for staging in (one, two):
        folder.remove_staging(staging)
    assert os.listdir(tmp_path) == []
    assert folder._in_use.isdisjoint({one.name, two.name})


def test_no_two_stagings_have_one_name(tmp_path: Path) -> None:
    assert folder.make_staging(tmp_path, 1).name != folder.make_staging(tmp_path, 1).name


def test_every_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    step = make_step(tmp_path)
    path = step / "__0_0.distcp"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(CheckpointCorruptError, match=r"__0_0.distcp is damaged: its checksum is"):
            folder.verify(step)
    path.write_bytes(whole)
    folder.verify(step)


@pytest.mark.parametrize("name", ["values.json", "__0_0.distcp"])
def test_truncated_grown_and_missing_files_are_found_and_named(tmp_path: Path, name: str) -> None:
    step = make_step(tmp_path)
    path, manifest = step / name, read_manifest(step)
    for content in (CONTENTS[name][:-1], CONTENTS[name] + b" ", b""):
        path.write_bytes(content)
        assert not folder.looks_whole(step)
        with pytest.raises(CheckpointCorruptError, match=f"{name} is damaged: .* bytes long"):
            folder.verify(step)
        with pytest.raises(CheckpointCorruptError, match=f"{name} is damaged: .* bytes long"):
            folder.read_checked(step, manifest, name)
    path.unlink()
    assert not folder.looks_whole(step)
    with pytest.raises(CheckpointCorruptError, match=f"{name} cannot be read: No such file"):
        folder.verify(step)
    with pytest.raises(CheckpointCorruptError, match=f"{name} cannot be read: No such file"):
        folder.read_checked(step, manifest, name)


def test_step_looks_whole_by_the_lengths_of_its_files_alone(tmp_path: Path) -> None:
    step = make_step(tmp_path)
    assert folder.looks_whole(step)
    (step / "__0_0.distcp").write_bytes(bytes(100))
    assert folder.looks_whole(step)
    (step / "manifest.json").unlink()
    assert not folder.looks_whole(step)


def test_pipe_or_device_in_place_of_a_file_is_damage_and_does_not_hang(tmp_path: Path) -> None:
    step = make_step(tmp_path)
    path = step / "values.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointCorruptError, match=r"values.json cannot be read: it is no regular file"):
        folder.verify(step)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointCorruptError, match=r"values.json cannot be read: it is no regular file"):
        folder.read_checked(step, read_manifest(step), "values.json")


def test_content_comes_back_only_as_it_was_written_and_where_it_is_listed(tmp_path: Path) -> None:
    step = make_step(tmp_path)
    manifest = read_manifest(step)
    for name, content in CONTENTS.items():
        assert folder.read_checked(step, manifest, name) == content
    with pytest.raises(CheckpointCorruptError, match=r"manifest.json does not list other.json\. Load another step"):
        folder.read_checked(step, manifest, "other.json")


def test_ranks_read_every_file_once_when_they_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step(tmp_path)
    read: list[str] = []

    def note(path: Path) -> FileRecord:
        read.append(path.name)
        return read_manifest(step).files[path.name]

    monkeypatch.setattr(folder, "file_record", note)
    for rank in range(2):
        folder.verify(step, rank, 2)
    assert sorted(read) == sorted(CONTENTS)


def test_step_that_is_in_the_way_is_moved_aside_and_kept(tmp_path: Path) -> None:
    make_step(tmp_path)
    aside = folder.move_aside(tmp_path, 10, folder.BROKEN)
    assert aside.name.startswith(".broken-step-00000010-")
    assert (aside / "values.json").exists()
    assert folder.find_steps(tmp_path) == []


def test_removed_step_loses_its_name_durably_before_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_step(tmp_path, 10)
    make_step(tmp_path, 20)
    events: list[str] = []
    monkeypatch.setattr(folder, "fsync_directory", lambda path: events.append("sync"))
    monkeypatch.setattr(folder.shutil, "rmtree", lambda path, **_: events.append(path.name[: len(".trash-step")]))
    folder.remove_steps(tmp_path, [10])
    assert events == ["sync", ".trash-step"]
    assert folder.find_steps(tmp_path) == [20]


def test_wait_for_what_never_comes_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "VISIBLE_SECONDS", 0.1)
    assert folder.wait_until_visible(tmp_path)
    assert not folder.wait_until_visible(tmp_path / "missing" / "deeper")


def test_large_step_numbers_and_names_of_files() -> None:
    assert (folder.step_name(7), folder.step_name(10**9)) == ("step-00000007", "step-1000000000")
    assert (folder.rank_file(3), folder.shard_file(12)) == ("rank-00003.json", "__12_0.distcp")
    assert b'"format": 2' in encode_manifest(Manifest(1, 1, "", 1, (), (), {}))
