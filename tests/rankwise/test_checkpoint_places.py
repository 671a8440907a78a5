"""A path, or a URL, and the folder of checkpoints that it names."""

import uuid
from pathlib import Path

import pytest

from rankwise import CheckpointManager
from rankwise.checkpoint.local import LocalFolder
from rankwise.checkpoint.places import give_back_lease, open_folder, share_lease
from rankwise.checkpoint.remote import RemoteFolder
from rankwise.errors import CheckpointError, CheckpointLeaseError


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_path_on_this_host_is_a_local_folder(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = open_folder(f"{scheme}{tmp_path}/run", None)
    assert isinstance(found, LocalFolder)
    assert (found.directory, found.location) == (tmp_path / "run", f"{tmp_path}/run")
    assert open_folder("run", None).key == open_folder(Path("run"), None).key == found.key


def test_other_urls_are_remote_folders(tmp_path: Path) -> None:
    found = open_folder("memory://run", tmp_path)
    assert isinstance(found, RemoteFolder)
    assert found.location == "memory://run"


def test_what_only_a_directory_has_is_refused(tmp_path: Path) -> None:
    manager = CheckpointManager("memory://run")
    with pytest.raises(CheckpointError, match=r"memory://run is no directory here\. Get an item with `read`"):
        manager.path(1)
    with pytest.raises(CheckpointError, match="memory://run is no directory here"):
        _ = manager.directory
    with pytest.raises(CheckpointError, match=r"cache_dir='.*' is for URLs; .* is read where it is"):
        CheckpointManager(tmp_path, cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match="is a URL no more: give it as a str"):
        CheckpointManager(Path("s3://bucket/run"))
    with pytest.raises(CheckpointError, match="nonsense://a cannot be opened"):
        CheckpointManager("nonsense://a")


@pytest.mark.parametrize("is_remote", [False, True])
def test_managers_of_one_process_share_the_lease_until_the_last_gives_it_back(is_remote: bool, tmp_path: Path) -> None:
    place = f"memory://{uuid.uuid4().hex}/run" if is_remote else str(tmp_path)
    first, second = open_folder(place, None), open_folder(place, None)
    lease = share_lease(first, 60.0)
    assert share_lease(second, 60.0) is lease
    give_back_lease(lease)
    lease.check()
    give_back_lease(lease)
    with pytest.raises(CheckpointLeaseError, match="was released by this job"):
        lease.check()
    with CheckpointManager(place) as one, CheckpointManager(place) as two:
        one.save(1, {"a": 1})
        two.save(2, {"a": 2})
        assert one.steps() == [1, 2]
