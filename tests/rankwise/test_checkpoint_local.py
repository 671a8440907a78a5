"""A folder of checkpoints on a disk, as those who save and load see it."""

import os
from pathlib import Path

import pytest
import xxhash

from rankwise.checkpoint import folder
from rankwise.checkpoint.local import Committed, LocalFolder
from rankwise.checkpoint.manifest import FileRecord, Manifest
from rankwise.errors import CheckpointCorruptError, CheckpointError, CheckpointLeaseError


def fine() -> None:
    pass


def save(local: LocalFolder, step: int, epoch: int = 1) -> Committed:
    name = local.begin(step, epoch)
    record = FileRecord(7, xxhash.xxh3_128_hexdigest(b"content"))
    (local.join(name) / "a").write_bytes(b"content")
    local.publish(name, ["a"])
    local.commit(name, Manifest(step, epoch, name.rpartition("-")[2], 1, (), (), {"a": record}), fine)
    local.discard(name, is_committed=True)
    return local.committed(step, name)


@pytest.fixture
def local(tmp_path: Path) -> LocalFolder:
    (tmp_path / "run").mkdir()
    return LocalFolder(tmp_path / "run")


def test_committed_step_is_found_and_read(local: LocalFolder) -> None:
    assert (local.find(), local.at(3)) == ([], None)
    found = save(local, 3)
    assert found == Committed(3, "step-00000003")
    assert local.find() == [found] == [local.at(3)]
    assert local.wait_until_visible(3)
    assert local.looks_whole(found)
    assert local.read_epoch(found) == 1
    local.verify(found)
    step = local.open(found)
    step.bring("a")
    assert (step.path / "a").read_bytes() == b"content"
    assert step.where == local.describe(found) == str(local.directory / "step-00000003")
    assert os.listdir(local.directory) == ["step-00000003"]


def test_newest_is_what_the_last_job_has_saved(local: LocalFolder) -> None:
    for step, epoch in ((5, 1), (6, 1), (4, 2)):
        save(local, step, epoch)
    assert [found.step for found in local.find()] == [5, 6, 4]


def test_discarded_attempt_leaves_nothing(local: LocalFolder) -> None:
    name = local.begin(3, 1)
    (local.join(name) / "a").write_bytes(b"")
    local.discard(name, is_committed=False)
    assert os.listdir(local.directory) == []
    assert local.at(3) is None


def test_step_without_manifest_is_in_the_way_but_not_found(local: LocalFolder) -> None:
    found = save(local, 3)
    (local.directory / found.name / "manifest.json").unlink()
    assert (local.find(), local.at(3)) == ([], found)
    with pytest.raises(CheckpointCorruptError):
        local.verify(found)
    with pytest.raises(CheckpointCorruptError):
        local.open(found)
    aside = local.set_aside(found, folder.BROKEN)
    assert Path(aside).name.startswith(".broken-step-00000003-")
    assert local.at(3) is None


def test_removed_steps_are_gone(local: LocalFolder) -> None:
    found = [save(local, step) for step in (1, 2, 3)]
    local.remove(found[:2])
    assert os.listdir(local.directory) == ["step-00000003"]


def test_attempt_of_another_folder_is_refused(local: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "VISIBLE_SECONDS", 0.1)
    with pytest.raises(
        CheckpointError, match=r"not seen here after 0\.1 s\. Checkpoints need one folder that all hosts"
    ):
        local.join(".staging-elsewhere")


def test_lease_is_of_a_higher_epoch_than_every_step(local: LocalFolder, tmp_path: Path) -> None:
    save(local, 3, epoch=7)
    lease = local.take_lease(10.0)
    assert lease.epoch == 8
    with pytest.raises(CheckpointLeaseError, match="is written by this very process"):
        LocalFolder(local.directory).take_lease(10.0)
    lease.release()
    new = LocalFolder(tmp_path / "new" / "run")
    new.take_lease(10.0).release()
    assert new.directory.is_dir()
