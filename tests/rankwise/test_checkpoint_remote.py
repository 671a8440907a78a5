"""Steps behind a URL: whole or not listed, fetched and compared, and never written twice."""

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
import xxhash

from rankwise.checkpoint import folder
from rankwise.checkpoint.manifest import FileRecord, Manifest
from rankwise.checkpoint.objects import Objects
from rankwise.checkpoint.remote import RemoteFolder
from rankwise.errors import CheckpointCorruptError, CheckpointError, CheckpointLeaseError


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/run"
    if request.param == "file":
        return f"file://{tmp_path}/run"
    return f"{request.getfixturevalue('bucket')}/run"


@pytest.fixture
def memory() -> str:
    return f"memory://{uuid.uuid4().hex}/run"


def fine() -> None:
    pass


def write(
    remote: RemoteFolder, step: int, epoch: int = 1, files: dict[str, bytes] | None = None
) -> tuple[str, Manifest]:
    """All of a save but its commit."""
    contents = {"a": b"content of a", "b": bytes(1000)} if files is None else files
    name = remote.begin(step, epoch)
    directory = remote.join(name)
    for file, content in contents.items():
        (directory / file).write_bytes(content)
    remote.publish(name, contents)
    records = {file: FileRecord(len(content), xxhash.xxh3_128_hexdigest(content)) for file, content in contents.items()}
    return name, Manifest(step, epoch, name.rpartition("-")[2], 1, ("x",), (), records)


def save(remote: RemoteFolder, step: int, epoch: int = 1, **given: Any) -> str:
    name, manifest = write(remote, step, epoch, **given)
    remote.commit(name, manifest, fine)
    remote.discard(name, is_committed=True)
    return name


def steps(remote: RemoteFolder) -> list[int]:
    return [found.step for found in remote.find()]


def test_committed_step_is_found_and_read_by_another_process(url: str, tmp_path: Path) -> None:
    writer, reader = RemoteFolder(url), RemoteFolder(url, tmp_path / "cache")
    assert reader.find() == []
    name = save(writer, 7)
    (found,) = reader.find()
    assert (found.step, found.name) == (7, name)
    assert reader.describe(found) == f"{url}/{name}"
    step = reader.open(found)
    for file, content in (("a", b"content of a"), ("b", bytes(1000))):
        assert not (step.path / file).exists()
        step.bring(file)
        assert (step.path / file).read_bytes() == content
    assert step.where == f"{url}/{name}"
    reader.verify(found)
    assert reader.looks_whole(found)
    assert reader.read_epoch(found) == 1


def test_what_is_not_committed_is_not_listed_and_the_next_job_removes_it(url: str) -> None:
    remote = RemoteFolder(url)
    killed, _ = write(remote, 7, epoch=1)
    assert steps(remote) == []
    save(remote, 8, epoch=2)
    assert steps(remote) == [8]
    left = Objects(url).sizes(killed)
    assert list(left) == [f"{killed}/.aside"]
    # The killed job was only stalled: what it still commits is never listed.
    Objects(url).write(f"{killed}/manifest.json", b"late")
    assert steps(remote) == [8]
    Objects(url).remove([f"{killed}/manifest.json"])
    save(remote, 9, epoch=3)
    assert Objects(url).sizes(killed) == {}


def test_own_unfinished_attempt_is_left_to_the_one_who_makes_it(memory: str) -> None:
    remote = RemoteFolder(memory)
    name, manifest = write(remote, 7)
    remote.begin(8, 1)
    remote.commit(name, manifest, fine)
    assert steps(remote) == [7]


def test_discarded_attempt_leaves_nothing(url: str, tmp_path: Path) -> None:
    remote = RemoteFolder(url, tmp_path / "cache")
    name, _ = write(remote, 7)
    remote.discard(name, is_committed=False)
    assert Objects(url).sizes("step-") == {}
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_steps_are_ordered_by_epoch_and_the_newest_attempt_stands_for_its_step(memory: str) -> None:
    remote = RemoteFolder(memory)
    for step, epoch in ((3, 1), (4, 1), (5, 1), (4, 2)):
        last = save(remote, step, epoch)
    assert steps(remote) == [3, 5, 4]
    assert remote.find()[-1].name == last


def test_step_that_was_set_aside_is_not_listed_and_keeps_its_files(memory: str) -> None:
    remote = RemoteFolder(memory)
    name = save(remote, 3)
    assert remote.set_aside(remote.find()[0], folder.STALE) == f"{memory}/{name}"
    assert steps(remote) == []
    assert set(Objects(memory).sizes(name)) == {f"{name}/{file}" for file in ("a", "b", "manifest.json", ".aside")}


def test_removed_step_goes_with_its_earlier_attempts_and_its_copies(memory: str, tmp_path: Path) -> None:
    remote = RemoteFolder(memory, tmp_path)
    for step, epoch in ((3, 1), (4, 1), (3, 2)):
        save(remote, step, epoch)
    for found in remote.find():
        remote.verify(found)
    assert len(list(tmp_path.glob("*/step-*"))) == 2
    remote.remove([remote.find()[-1]])
    assert steps(remote) == [4]
    assert len({name.partition("/")[0] for name in Objects(memory).sizes("step-")}) == 1
    assert len(list(tmp_path.glob("*/step-*"))) == 1


def test_step_loses_its_manifest_first(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = RemoteFolder(memory)
    save(remote, 3)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(remote._objects, "remove_below", die)
    with pytest.raises(KeyboardInterrupt):
        remote.remove(remote.find())
    assert steps(RemoteFolder(memory)) == []


def test_lost_lease_refuses_the_commit(memory: str) -> None:
    remote = RemoteFolder(memory)
    name, manifest = write(remote, 7)

    def lost() -> None:
        raise CheckpointLeaseError("lost")

    with pytest.raises(CheckpointLeaseError):
        remote.commit(name, manifest, lost)
    assert steps(remote) == []


@pytest.mark.parametrize(("change", "message"), [(b"short", "has 5 bytes of"), (None, "does not have")])
def test_commit_is_refused_where_the_store_lacks_something(memory: str, change: bytes | None, message: str) -> None:
    remote = RemoteFolder(memory)
    name, manifest = write(remote, 7)
    if change is None:
        Objects(memory).remove([f"{name}/a"])
    else:
        Objects(memory).write(f"{name}/a", change)
    with pytest.raises(CheckpointError, match=f"{memory} {message} {name}/a, of which a rank has put 12 bytes"):
        remote.commit(name, manifest, fine)
    assert steps(remote) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Content of a", "a is damaged: its checksum is"),
        (b"content", "a is damaged: 7 bytes long, 12 were written"),
        (None, "a is not there any more"),
    ],
)
def test_damaged_object_is_named(url: str, content: bytes | None, message: str) -> None:
    remote = RemoteFolder(url)
    name = save(remote, 7)
    (found,) = remote.find()
    remote.verify(found)
    if content is None:
        Objects(url).remove([f"{name}/a"])
    else:
        Objects(url).write(f"{name}/a", content)
    remote.verify(found, is_cache_enough=True)  # what was fetched whole is whole
    with pytest.raises(CheckpointCorruptError, match=f"^{url}/{name}/{message}"):
        remote.verify(found)
    assert steps(remote) == [7]
    if content is None or len(content) != 12:
        assert not remote.looks_whole(found)


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100000, None])
def test_damaged_manifest_is_told_by_its_url(memory: str, content: bytes | None) -> None:
    remote = RemoteFolder(memory)
    name = save(remote, 7)
    (found,) = remote.find()
    if content is None:
        Objects(memory).remove([f"{name}/manifest.json"])
    else:
        Objects(memory).write(f"{name}/manifest.json", content)
    with pytest.raises(CheckpointCorruptError, match=f"^{memory}/{name}/manifest.json "):
        remote.open(found)
    assert not remote.looks_whole(found)


def test_files_that_were_fetched_are_not_fetched_again(s3: Any, bucket: str, tmp_path: Path) -> None:
    save(RemoteFolder(bucket), 7)
    for _ in range(2):
        remote = RemoteFolder(bucket, tmp_path)
        fetched: list[str] = []

        def note(method: str, path: str, proceed: object, fetched: list[str] = fetched) -> None:
            if method == "GET" and "/step-" in path:
                fetched.append(path.rpartition("/")[2])

        s3.meddle = note
        remote.verify(remote.find()[0], is_cache_enough=True)
    assert fetched == ["manifest.json"]


def test_manifest_that_names_files_elsewhere_is_refused(memory: str, tmp_path: Path) -> None:
    remote = RemoteFolder(memory, tmp_path)
    name = save(remote, 7)
    body = json.loads(Objects(memory).read(f"{name}/manifest.json"))
    body["files"]["../../evil"] = body["files"].pop("a")
    del body["xxh3"]
    body["xxh3"] = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    Objects(memory).write(f"{name}/manifest.json", json.dumps(body).encode())
    with pytest.raises(CheckpointCorruptError, match="no name of a file in this directory"):
        remote.verify(remote.find()[0])


def test_objects_that_are_none_of_ours_are_left_alone(memory: str) -> None:
    remote, objects = RemoteFolder(memory), Objects(memory)
    strange = ["step-7/manifest.json", "step-00000007/manifest.json", "notes.txt", "step-00000001-x-y/manifest.json"]
    for name in strange:
        objects.write(name, b"")
    save(remote, 7)
    save(remote, 8, epoch=3)
    remote.remove(remote.find())
    assert sorted(objects.sizes("")) == sorted(strange)


def test_answer_that_is_lost_at_the_commit_leaves_a_whole_step(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = RemoteFolder(memory)
    name, manifest = write(remote, 7)
    put = remote._objects.write

    def lose(path: str, content: bytes) -> None:
        put(path, content)
        raise CheckpointError("cannot write it, tried 9 times")

    monkeypatch.setattr(remote._objects, "write", lose)
    with pytest.raises(CheckpointError, match=r"tried 9 times\. If it was the answer alone that was lost, the step is"):
        remote.commit(name, manifest, fine)
    remote.verify(remote.find()[0])
