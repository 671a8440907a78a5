"""Objects behind URLs: what is there, what goes wrong on the way, and what is told of it."""

import errno
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankwise.checkpoint import objects as module
from rankwise.checkpoint.objects import Objects, clean
from rankwise.errors import CheckpointError


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/run"
    if request.param == "file":
        return f"file://{tmp_path}/run"
    return f"{request.getfixturevalue('bucket')}/run"


def test_what_was_put_is_found_read_and_removed(url: str, tmp_path: Path) -> None:
    objects = Objects(url)
    assert (objects.names(), objects.sizes("step-")) == ([], {})
    objects.write("step-1/a", b"12345")
    objects.write("step-1/a", b"123")
    objects.write("other", b"")
    (tmp_path / "local").write_bytes(b"content")
    objects.upload(tmp_path / "local", "step-1/b")
    assert sorted(objects.names()) == ["other", "step-1"]
    assert objects.sizes("step-") == {"step-1/a": 3, "step-1/b": 7}
    assert objects.sizes("step-1/b") == {"step-1/b": 7}
    assert objects.read("step-1/a") == b"123"
    objects.download("step-1/b", tmp_path / "back", 7)
    assert (tmp_path / "back").read_bytes() == b"content"
    objects.remove(["step-1/a", "step-1/never there"])
    assert objects.sizes("step-") == {"step-1/b": 7}
    objects.remove_below("step-1")
    objects.remove_below("step-1")
    assert objects.names() == ["other"]


def test_what_is_not_there_is_not_found(url: str, tmp_path: Path) -> None:
    objects = Objects(url)
    objects.write("a", b"")
    with pytest.raises(FileNotFoundError):
        objects.read("b")
    with pytest.raises(FileNotFoundError):
        objects.download("b", tmp_path / "b", 1)
    assert not (tmp_path / "b").exists()


def test_an_object_is_created_once(url: str) -> None:
    objects = Objects(url)
    assert objects.create("lease", b"first")
    assert not objects.create("lease", b"second")
    assert objects.read("lease") == b"first"
    assert objects.create("lease", b"first")  # as after an answer that was lost


def test_another_process_s_change_is_seen_at_once(url: str) -> None:
    here, there = Objects(url), Objects(url)
    assert here.names() == []
    there.write("a", b"1")
    assert here.names() == ["a"]
    there.write("a", b"12")
    assert here.sizes("a") == {"a": 2}
    there.remove(["a"])
    assert here.names() == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense://a/b", "nonsense://a/b cannot be opened: ValueError: Protocol not known: nonsense. Give a URL of"),
        ("oss://a/b", r"oss://a/b cannot be opened: .*ossfs.*Install rankwise\[remote\]"),
    ],
)
def test_url_that_nothing_opens_is_refused_with_what_to_do(url: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Objects(url)


def test_missing_fsspec_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(CheckpointError, match=r"s3://a/b cannot be opened: .*Install rankwise\[remote\]"):
        Objects("s3://a/b")


def test_bucket_that_is_not_there_is_empty_and_takes_nothing(s3: Any) -> None:
    objects = Objects("s3://no-such-bucket/run")
    assert objects.names() == []
    with pytest.raises(
        CheckpointError, match=r"cannot write a in s3://no-such-bucket/run: FileNotFoundError: .*bucket"
    ):
        objects.write("a", b"")


class Failing:
    """Fails some times, then does what it stands for."""

    def __init__(self, function: Callable[..., Any], failures: list[Exception]) -> None:
        self._function, self._failures, self.num_calls = function, failures, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        if self._failures:
            raise self._failures.pop(0)
        return self._function(*args, **kwargs)


def fail(objects: Objects, monkeypatch: pytest.MonkeyPatch, verb: str, failures: list[Exception]) -> Failing:
    failing = Failing(getattr(objects._files, verb), failures)
    monkeypatch.setattr(objects._files, verb, failing)
    return failing


def test_a_call_that_fails_for_a_while_is_repeated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    objects = Objects(f"memory://{uuid.uuid4().hex}")
    pauses: list[float] = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    failing = fail(objects, monkeypatch, "pipe_file", [OSError(errno.EBUSY, "Slow Down"), TimeoutError(), EOFError()])
    objects.write("a", b"1")
    assert failing.num_calls == 4
    assert objects.read("a") == b"1"
    assert pauses == sorted(pauses)
    assert pauses[2] > 2 * pauses[0]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "trying again: OSError: [Errno 16] Slow Down" in caplog.text


@pytest.mark.parametrize(
    "error", [PermissionError("Access Denied"), OSError(errno.ENOSPC, "No space left"), ValueError("bad parameter")]
)
def test_what_cannot_get_better_is_not_repeated(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(f"memory://{uuid.uuid4().hex}")
    failing = fail(objects, monkeypatch, "pipe_file", [error] * 9)
    with pytest.raises(CheckpointError, match=f"cannot write a in {objects.location}: {type(error).__name__}: "):
        objects.write("a", b"1")
    assert failing.num_calls == 1


def test_store_that_is_down_for_good_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(f"memory://{uuid.uuid4().hex}")
    monkeypatch.setattr(module, "GIVE_UP_SECONDS", 1.0)
    fail(objects, monkeypatch, "cat_file", [ConnectionError("refused")] * 99)
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=r"cannot read a in .*, tried \d times in \d s: ConnectionError: refused"):
        objects.read("a")
    assert time.monotonic() - begin < 10.0


def test_server_that_never_answers_is_given_up(s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects(bucket)
    monkeypatch.setattr(module, "GIVE_UP_SECONDS", 0.0)
    monkeypatch.setattr(module, "CALL_SECONDS", 0.5)
    begin = time.monotonic()
    s3.meddle = lambda method, path, proceed: time.sleep(3.0)
    with pytest.raises(CheckpointError, match=f"cannot read a in {bucket}: no answer within 0 s|within 1 s"):
        objects.read("a")
    assert time.monotonic() - begin < 3.0


def test_nothing_that_opens_a_store_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-hush")
    monkeypatch.setattr(module, "GIVE_UP_SECONDS", 0.5)
    objects = Objects(f"memory://{uuid.uuid4().hex}")
    text = "GET https://me:pass-word@host/a?X-Amz-Signature=abc123def&sig=xyz987 with hush-hush-hush"
    fail(objects, monkeypatch, "cat_file", [ConnectionError(text)] * 99)
    with pytest.raises(CheckpointError) as raised:
        objects.read("a")
    assert "X-Amz-Signature=***" in str(raised.value)
    for told in ("".join(traceback.format_exception(raised.value)), caplog.text):
        assert not any(secret in told for secret in ("hush", "pass-word", "abc123", "xyz987"))


def test_password_in_the_url_is_not_told() -> None:
    assert Objects("memory://me:pass-word@host/run").location == "memory://***@host/run"
    assert clean("az://a?sv=1&sig=abc") == "az://a?sv=1&sig=***"
