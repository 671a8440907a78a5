"""Copies of what lies behind a URL: fetched once, compared always, and gone when nobody needs them."""

import os
import threading
import time
import uuid
from pathlib import Path
from unittest import mock

import pytest
import xxhash

from rankwise.checkpoint.fetched import Fetched
from rankwise.checkpoint.manifest import FileRecord, Manifest, encode_manifest
from rankwise.checkpoint.objects import Objects
from rankwise.errors import CheckpointCorruptError, CheckpointError

ATTEMPT = f"step-00000007-00000001-{uuid.uuid4().hex}"
CONTENT = b"content of a"


@pytest.fixture
def objects() -> Objects:
    """What a step with one file has."""
    found = Objects(f"memory://{uuid.uuid4().hex}")
    found.write(f"{ATTEMPT}/a", CONTENT)
    found.write(f"{ATTEMPT}/manifest.json", encode_manifest(MANIFEST))
    return found


MANIFEST = Manifest(7, 1, "", 1, (), (), {"a": FileRecord(len(CONTENT), xxhash.xxh3_128_hexdigest(CONTENT))})


def count_downloads(objects: Objects, monkeypatch: pytest.MonkeyPatch, num_damaged: int = 0) -> list[str]:
    """The names of what is fetched from now on; of the first ones the last byte is lost."""
    names: list[str] = []
    download, read = objects.download, objects.read

    def note(name: str, local: Path, num_bytes: int) -> None:
        names.append(name)
        download(name, local, num_bytes)
        if len(names) <= num_damaged:
            os.truncate(local, num_bytes - 1)

    def note_read(name: str) -> bytes:
        names.append(name)
        return read(name)[: -9 if len(names) <= num_damaged else None]

    monkeypatch.setattr(objects, "download", note)
    monkeypatch.setattr(objects, "read", note_read)
    return names


def test_file_is_fetched_once_and_again_after_it_was_dropped(
    objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = count_downloads(objects, monkeypatch)
    for _ in range(2):  # a second process finds what the first has fetched
        fetched = Fetched(objects, tmp_path)
        manifest = fetched.read_manifest(ATTEMPT)
        for _ in range(2):
            fetched.bring(ATTEMPT, manifest, "a")
        assert (fetched.path(ATTEMPT) / "a").read_bytes() == CONTENT
    assert names == [f"{ATTEMPT}/{name}" for name in ("manifest.json", "a", "manifest.json")]
    fetched.drop(ATTEMPT, "a")
    fetched.drop(ATTEMPT, "a")
    fetched.bring(ATTEMPT, manifest, "a")
    assert names[3:] == [f"{ATTEMPT}/a"]


def test_file_that_the_manifest_does_not_name_is_not_asked_for(
    objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = count_downloads(objects, monkeypatch)
    Fetched(objects, tmp_path).bring(ATTEMPT, MANIFEST, "other")
    assert names == []


def test_copy_that_is_damaged_here_is_fetched_anew(objects: Objects, tmp_path: Path) -> None:
    first = Fetched(objects, tmp_path)
    path = first.path(ATTEMPT) / "a"
    first.read_manifest(ATTEMPT)
    path.write_bytes(b"content of b")
    first.bring(ATTEMPT, MANIFEST, "a")
    assert path.read_bytes() == CONTENT


def test_file_that_comes_damaged_is_fetched_once_more(
    objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = Fetched(objects, tmp_path)
    fetched.read_manifest(ATTEMPT)
    names = count_downloads(objects, monkeypatch, num_damaged=3)
    with pytest.raises(CheckpointCorruptError, match=f"^{objects.location}/{ATTEMPT}/a is damaged: 11 bytes long"):
        fetched.bring(ATTEMPT, MANIFEST, "a")
    assert names == [f"{ATTEMPT}/a"] * 2
    fetched.bring(ATTEMPT, MANIFEST, "a")
    assert names == [f"{ATTEMPT}/a"] * 4


def test_manifest_that_comes_damaged_is_fetched_once_more(
    objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = count_downloads(objects, monkeypatch, num_damaged=3)
    fetched = Fetched(objects, tmp_path)
    with pytest.raises(CheckpointCorruptError, match=f"^{objects.location}/{ATTEMPT}/manifest.json cannot be read"):
        fetched.read_manifest(ATTEMPT)
    assert len(names) == 2
    assert fetched.read_manifest(ATTEMPT).files == MANIFEST.files
    assert len(names) == 4


def test_threads_that_want_one_file_fetch_it_once(
    objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = count_downloads(objects, monkeypatch)
    download = objects.download

    def take_long(name: str, local: Path, num_bytes: int) -> None:
        time.sleep(0.2)
        download(name, local, num_bytes)

    monkeypatch.setattr(objects, "download", take_long)
    all_fetched = [Fetched(objects, tmp_path) for _ in range(4)]  # as of four processes
    all_fetched[0].read_manifest(ATTEMPT)
    threads = [threading.Thread(target=each.bring, args=(ATTEMPT, MANIFEST, "a")) for each in all_fetched]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == [f"{ATTEMPT}/manifest.json", f"{ATTEMPT}/a"]


def test_manifest_of_another_step_is_refused(objects: Objects, tmp_path: Path) -> None:
    other = ATTEMPT.replace("step-00000007", "step-00000008")
    objects.write(f"{other}/manifest.json", encode_manifest(MANIFEST))
    with pytest.raises(
        CheckpointCorruptError, match=f"^{objects.location}/{other}/manifest.json is that of another step"
    ):
        Fetched(objects, tmp_path).read_manifest(other)


def test_known_manifest_is_enough_where_one_says_so(objects: Objects, tmp_path: Path) -> None:
    fetched = Fetched(objects, tmp_path)
    fetched.read_manifest(ATTEMPT)
    objects.remove([f"{ATTEMPT}/manifest.json"])
    assert fetched.read_manifest(ATTEMPT, is_known_enough=True).files == MANIFEST.files
    with pytest.raises(CheckpointCorruptError, match=f"{ATTEMPT}/manifest.json is not there any more"):
        fetched.read_manifest(ATTEMPT)


def test_old_copies_of_what_is_gone_go(objects: Objects, tmp_path: Path) -> None:
    fetched = Fetched(objects, tmp_path)
    fetched.read_manifest(ATTEMPT)
    (tmp_path / "saving").mkdir()
    fetched.keep([])
    assert sorted(os.listdir(tmp_path)) == ["saving", ATTEMPT]  # it may be newer than the list
    os.utime(tmp_path / ATTEMPT, (0, 0))
    fetched.keep([ATTEMPT])
    assert sorted(os.listdir(tmp_path)) == ["saving", ATTEMPT]
    fetched.keep([])
    assert os.listdir(tmp_path) == ["saving"]


def test_temporary_folder_goes_with_its_process_s_object_alone(objects: Objects) -> None:
    fetched = Fetched(objects, None)
    directory = fetched.directory
    if (child := os.fork()) == 0:
        del fetched  # a fork has no say
        os._exit(0)
    os.waitpid(child, 0)
    assert directory.is_dir()
    del fetched
    assert not directory.exists()


def test_folder_that_cannot_be_made_or_filled_is_told(
    objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"no folder can be made for what comes from memory://.*another cache_dir"
    ):
        Fetched(objects, tmp_path / "file" / "cache")
    fetched = Fetched(objects, tmp_path / "cache")
    fetched.read_manifest(ATTEMPT)
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match=r"/a cannot be stored here: .*No space left on device.*with room"):
        fetched.bring(ATTEMPT, MANIFEST, "a")
