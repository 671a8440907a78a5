"""One job writes in a folder: real processes that race, are killed, stall and come back."""

import errno
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rankwise
from rankwise.checkpoint import lease as module
from rankwise.checkpoint.holder import Holder, encode, lease_name
from rankwise.checkpoint.lease import Lease, read_holder
from rankwise.errors import CheckpointError, CheckpointLeaseError
from rankwise.parent import launcher_token

# The lease needs no torch, which takes seconds to import: the package that would import it is stood in for.
JOB = """
import errno, json, os, random, sys, time, types
import rankwise
package = types.ModuleType("rankwise.checkpoint")
package.__path__ = [os.path.join(os.path.dirname(rankwise.__file__), "checkpoint")]
sys.modules["rankwise.checkpoint"] = package
from rankwise.checkpoint import holder, lease
from rankwise.errors import CheckpointError

link = os.link
place, mode = sys.argv[1:]
if place:
    token = holder.launcher_token
    holder.launcher_token = lambda: place + token().partition(":")[2]
def no_links(source, target):
    raise PermissionError(errno.EPERM, "Operation not permitted")
def lost_reply(source, target):
    link(source, target)
    raise FileExistsError(errno.EEXIST, "File exists")
os.link = {"link": link, "no links": no_links, "lost reply": lost_reply}[mode]

held, child = None, None
def act(verb, **given):
    global held, child
    if verb == "acquire":
        while time.time() < given.pop("at", 0):
            pass
        held = lease.Lease.acquire(**given)
        return held.epoch
    if verb == "fork":
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            held.release()
            try:
                held.check()
                os.write(writer, b"held")
            except CheckpointError:
                os.write(writer, b"lost")
            time.sleep(60)
            os._exit(0)
        return child, os.read(reader, 4).decode()
    return getattr(held, verb)()

for line in sys.stdin:
    try:
        answer = {"value": act(**json.loads(line))}
    except CheckpointError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), flush=True)
"""


class Job:
    """A process that takes leases when told to."""

    def __init__(self, place: str, mode: str) -> None:
        environ = os.environ | {"PYTHONPATH": str(Path(rankwise.__file__).parents[1])}
        command = [sys.executable, "-c", JOB, place, mode]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
        )
        self.pid = self.process.pid

    def ask(self, verb: str, **given: Any) -> None:
        assert self.process.stdin is not None
        print(json.dumps({"verb": verb, **given}), file=self.process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        answer: dict[str, Any] = json.loads(line)
        return answer

    def do(self, verb: str, **given: Any) -> dict[str, Any]:
        self.ask(verb, **given)
        return self.answer()

    def acquire(self, directory: Path, timeout_seconds: float = 60.0, heartbeat_seconds: float = 5.0) -> dict[str, Any]:
        return self.do(
            "acquire", directory=str(directory), timeout_seconds=timeout_seconds, heartbeat_seconds=heartbeat_seconds
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start_job() -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start(place: str = "", mode: str = "link") -> Job:
        jobs.append(Job(place, mode))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


@pytest.fixture
def take() -> Iterator[Callable[..., Lease]]:
    """`Lease.acquire`; what it gave is released when the test ends."""
    leases: list[Lease] = []

    def acquire(directory: Path, **given: Any) -> Lease:
        leases.append(Lease.acquire(directory, **given))
        return leases[-1]

    yield acquire
    for lease in leases:
        lease.release()
        lease._thread.join()


def wait_for(condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"waited {seconds} s in vain for {what}"
        time.sleep(0.01)


def stranger(epoch: int = 7) -> Holder:
    """A holder on a host that is not this one."""
    holder = Holder.of_this_process(epoch, f"{epoch:032x}", "vae-12", 0.1, "2026-01-02T03:04:05Z")
    return replace(holder, host="node-3", pid=4242, process="node-3:another-boot:1:4242:1")


def put(directory: Path, holder: Holder, heartbeat: int = 0, *, is_released: bool = False) -> Path:
    path = directory / lease_name(holder.epoch)
    path.write_bytes(encode(holder, heartbeat, is_released=is_released))
    return path


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_the_first_job_takes_epoch_one_and_leaves_one_file(tmp_path: Path, take: Callable[..., Lease]) -> None:
    assert read_holder(tmp_path) is None
    lease = take(tmp_path, job="vae-12")
    assert lease.epoch == 1
    assert names(tmp_path) == ["lease-00000001.json"]
    holder = read_holder(tmp_path)
    assert holder is not None
    assert (holder.epoch, holder.pid, holder.job, holder.alive, holder.released) == (
        1,
        os.getpid(),
        "vae-12",
        True,
        False,
    )
    lease.check()


def test_a_released_lease_is_taken_at_once_with_the_next_epoch(tmp_path: Path, take: Callable[..., Lease]) -> None:
    first = take(tmp_path)
    first.release()
    first.release()
    holder = read_holder(tmp_path)
    assert holder is not None
    assert holder.released
    with pytest.raises(CheckpointLeaseError, match="was released by this job"):
        first.check()
    assert take(tmp_path).epoch == 2


def test_a_lease_released_on_another_host_is_taken_without_watching(tmp_path: Path, take: Callable[..., Lease]) -> None:
    put(tmp_path, stranger(), is_released=True)
    start = time.monotonic()
    assert take(tmp_path, timeout_seconds=600).epoch == 8
    assert time.monotonic() - start < 60


def test_the_epoch_exceeds_that_of_the_steps(tmp_path: Path, take: Callable[..., Lease]) -> None:
    take(tmp_path, minimum_epoch=41).release()
    assert take(tmp_path, minimum_epoch=3).epoch == 43


def test_a_living_holder_is_not_disturbed_and_named(tmp_path: Path, start_job: Callable[..., Job]) -> None:
    job = start_job()
    assert job.do("acquire", directory=str(tmp_path), job="vae-12") == {"value": 1}
    job.process.send_signal(signal.SIGSTOP)
    with pytest.raises(CheckpointLeaseError, match=rf"another job: job vae-12, pid {job.pid} on host .*since 20.* UTC"):
        Lease.acquire(tmp_path)
    job.process.send_signal(signal.SIGCONT)
    assert job.do("check") == {"value": None}
    assert names(tmp_path) == ["lease-00000001.json"]


def test_two_managers_in_one_process_are_told_so(tmp_path: Path, take: Callable[..., Lease]) -> None:
    take(tmp_path)
    with pytest.raises(CheckpointLeaseError, match=r"this very process.*Close the first"):
        Lease.acquire(tmp_path)


def test_a_killed_holder_is_replaced_at_once(
    tmp_path: Path, start_job: Callable[..., Job], take: Callable[..., Lease]
) -> None:
    job = start_job()
    job.acquire(tmp_path)
    job.process.kill()
    # Not waited for: nor does a launcher that was killed itself wait for its ranks.
    os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOWAIT)
    start = time.monotonic()
    assert take(tmp_path, timeout_seconds=600).epoch == 2
    assert time.monotonic() - start < 60


def test_a_program_that_forgets_to_release_ends_all_the_same(
    tmp_path: Path, start_job: Callable[..., Job], take: Callable[..., Lease]
) -> None:
    job = start_job()
    job.acquire(tmp_path)
    job.process.communicate(timeout=60)
    assert job.process.returncode == 0
    assert take(tmp_path, timeout_seconds=600).epoch == 2


def test_a_stalled_job_of_another_host_loses_the_lease_and_is_told(
    tmp_path: Path, start_job: Callable[..., Job], take: Callable[..., Lease]
) -> None:
    job = start_job(place="elsewhere:")
    assert job.acquire(tmp_path, timeout_seconds=1, heartbeat_seconds=0.1) == {"value": 1}
    job.process.send_signal(signal.SIGSTOP)
    second = take(tmp_path, timeout_seconds=0.4, heartbeat_seconds=0.1)
    assert second.epoch == 2
    second.release()
    third = take(tmp_path)
    assert names(tmp_path) == ["lease-00000002.json", "lease-00000003.json"]
    job.process.send_signal(signal.SIGCONT)
    told = job.do("check")
    assert told["error"] == "CheckpointLeaseError"
    assert f"was lost to pid {os.getpid()} on host" in told["message"]
    # Neither a beat nor its release brings its file back.
    time.sleep(0.3)
    job.do("release")
    assert names(tmp_path) == ["lease-00000002.json", "lease-00000003.json"]
    third.check()


def test_a_holder_elsewhere_that_writes_is_refused_before_the_timeout(tmp_path: Path) -> None:
    path, is_over = put(tmp_path, stranger()), threading.Event()

    def beat() -> None:
        with open(path, "r+b", buffering=0) as file:
            for count in itertools.count(1):
                if is_over.wait(0.1):
                    return
                os.pwrite(file.fileno(), encode(stranger(), count), 0)

    thread = threading.Thread(target=beat)
    thread.start()
    start = time.monotonic()
    try:
        with pytest.raises(CheckpointLeaseError, match="job vae-12, pid 4242 on host node-3, since 2026-01-02 03:04"):
            Lease.acquire(tmp_path, timeout_seconds=600)
    finally:
        is_over.set()
        thread.join()
    assert time.monotonic() - start < 60
    holder = read_holder(tmp_path)
    assert holder is not None
    assert (holder.host, holder.alive) == ("node-3", None)


def test_a_silent_holder_elsewhere_is_watched_for_the_whole_timeout(
    tmp_path: Path, take: Callable[..., Lease], caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, stranger())
    start = time.monotonic()
    with caplog.at_level(logging.INFO):
        assert take(tmp_path, timeout_seconds=0.5, heartbeat_seconds=0.1).epoch == 8
    assert time.monotonic() - start >= 0.5
    assert "taken over from job vae-12, pid 4242 on host node-3" in caplog.text


class Clock:
    """Time that passes only in sleep, which does what the test says."""

    def __init__(self, sleeps: list[Callable[[], float]]) -> None:
        self.now = 0.0
        self.sleeps = iter(sleeps)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += next(self.sleeps)()


def test_time_in_which_the_watcher_stood_still_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, stranger())

    def come_back() -> float:
        path.write_bytes(encode(stranger(), 1))
        return 0.5

    monkeypatch.setattr(module, "time", Clock([lambda: 3600.0, come_back]))
    with pytest.raises(CheckpointLeaseError, match="node-3"):
        Lease.acquire(tmp_path)


def test_a_holder_with_slow_heartbeats_is_watched_for_three_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, take: Callable[..., Lease]
) -> None:
    put(tmp_path, replace(stranger(), heartbeat_seconds=30.0))
    clock = Clock([lambda: 0.2] * 1000)
    monkeypatch.setattr(module, "time", clock)
    take(tmp_path, timeout_seconds=2, heartbeat_seconds=1)
    assert clock.now >= 90


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 4096, encode(stranger(), 3)[:100]])
def test_a_damaged_lease_is_watched_then_taken_over(tmp_path: Path, take: Callable[..., Lease], content: bytes) -> None:
    (tmp_path / lease_name(7)).write_bytes(content)
    assert read_holder(tmp_path) == Holder(7)
    start = time.monotonic()
    assert take(tmp_path, timeout_seconds=0.2, heartbeat_seconds=0.1).epoch == 8
    assert time.monotonic() - start >= 0.2


def test_a_lease_that_is_being_written_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / lease_name(1)
    path.touch()

    def complete() -> float:
        path.write_bytes(encode(Holder.of_this_process(1, "ab", None, 5.0, "2026-01-02T03:04:05Z"), 0))
        return 0.5

    monkeypatch.setattr(module, "time", Clock([complete]))
    with pytest.raises(CheckpointLeaseError, match=f"pid {os.getpid()}"):
        Lease.acquire(tmp_path)


def test_a_fork_of_the_holder_neither_releases_nor_beats(
    tmp_path: Path, start_job: Callable[..., Job], take: Callable[..., Lease]
) -> None:
    job = start_job()
    job.acquire(tmp_path, timeout_seconds=1, heartbeat_seconds=0.05)
    child, seen = job.do("fork")["value"]
    try:
        assert seen == "held"
        before = (tmp_path / lease_name(1)).read_bytes()
        wait_for(lambda: (tmp_path / lease_name(1)).read_bytes() != before, "a heartbeat")
        holder = read_holder(tmp_path)
        assert holder is not None
        assert not holder.released
        assert job.do("check") == {"value": None}
        os.kill(job.pid, signal.SIGKILL)
        os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOWAIT)
        before = (tmp_path / lease_name(1)).read_bytes()
        time.sleep(0.3)
        assert (tmp_path / lease_name(1)).read_bytes() == before
        assert take(tmp_path).epoch == 2
    finally:
        os.kill(child, signal.SIGKILL)


def before_race(directory: Path, number: int, epoch: int) -> int:
    """Leave the folder as one of several kinds of last holder does; its epoch."""
    kind = number % 5
    dead = replace(stranger(epoch + 1), process=f"{launcher_token().rsplit(':', 2)[0]}:{os.getpid()}:1")
    if kind == 1:
        put(directory, dead)
    elif kind == 2:
        put(directory, stranger(epoch + 1))
    elif kind == 3:
        (directory / lease_name(epoch + 1)).touch()
    elif kind == 4:
        put(directory, stranger(epoch + 1), is_released=True)
    return epoch + (kind > 0)


@pytest.mark.parametrize(("mode", "num_rounds"), [("link", 20), ("no links", 5), ("lost reply", 5)])
def test_of_eight_that_race_exactly_one_wins(
    tmp_path: Path, start_job: Callable[..., Job], mode: str, num_rounds: int
) -> None:
    jobs = [start_job(mode=mode) for _ in range(8)]
    for job in jobs:
        job.do("__str__")
    epoch = 0
    for number in range(num_rounds):
        epoch = before_race(tmp_path, number, epoch)
        together = time.time() + 0.02
        for job in jobs:
            job.ask("acquire", directory=str(tmp_path), timeout_seconds=0.2, heartbeat_seconds=0.1, at=together)
        answers = [job.answer() for job in jobs]
        winners = [job for job, answer in zip(jobs, answers, strict=True) if "value" in answer]
        assert len(winners) == 1, answers
        epoch += 1
        assert answers[jobs.index(winners[0])] == {"value": epoch}
        refusals = [answer for answer in answers if "error" in answer]
        assert {answer["error"] for answer in refusals} == {"CheckpointLeaseError"}
        assert all(f"pid {winners[0].pid} on host" in answer["message"] for answer in refusals)
        assert winners[0].do("check") == {"value": None}
        assert not [name for name in names(tmp_path) if name.startswith(".")]
        assert winners[0].do("release") == {"value": None}


@pytest.mark.parametrize("is_held", [False, True])
def test_one_that_stalls_before_the_link_gets_no_epoch_of_the_past(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, take: Callable[..., Lease], is_held: bool
) -> None:
    link, late = os.link, []

    def stall(source: Path, target: Path) -> None:
        if not late:
            late.append(target)
            kept = Path(source).read_bytes()
            take(tmp_path).release()
            take(tmp_path).release()
            third = take(tmp_path)
            if not is_held:
                third.release()
            assert names(tmp_path) == [lease_name(2), lease_name(3)]
            # As if its file had escaped the cleaning of the others.
            Path(source).write_bytes(kept)
        link(source, target)

    monkeypatch.setattr(os, "link", stall)
    if is_held:
        with pytest.raises(CheckpointLeaseError, match="lease epoch 3"):
            take(tmp_path)
        assert names(tmp_path) == [lease_name(2), lease_name(3)]
    else:
        assert take(tmp_path).epoch == 4
        assert names(tmp_path) == [lease_name(3), lease_name(4)]
    assert late == [tmp_path / lease_name(1)]


def test_leftovers_of_those_that_were_killed_while_they_took_it_are_removed(
    tmp_path: Path, take: Callable[..., Lease]
) -> None:
    for name in (f".{lease_name(6)}.ab", f".{lease_name(9)}.ab", lease_name(5), lease_name(6), "step-00000001"):
        (tmp_path / name).touch()
    put(tmp_path, stranger(7), is_released=True)
    assert take(tmp_path).epoch == 8
    assert names(tmp_path) == [f".{lease_name(9)}.ab", lease_name(7), lease_name(8), "step-00000001"]


@pytest.mark.parametrize("damage", [Path.unlink, Path.touch])
def test_a_lease_file_removed_by_hand_is_no_lease(
    tmp_path: Path, take: Callable[..., Lease], damage: Callable[[Path], None]
) -> None:
    lease = take(tmp_path)
    path = tmp_path / lease_name(1)
    path.unlink()
    if damage is Path.touch:
        put(tmp_path, stranger(1))
    with pytest.raises(CheckpointLeaseError, match=r"lease-00000001\.json, the lease of this job, was removed or over"):
        lease.check()


def test_the_loss_of_the_lease_is_told_once_without_waiting_for_a_save(
    tmp_path: Path, take: Callable[..., Lease], caplog: pytest.LogCaptureFixture
) -> None:
    lease = take(tmp_path, heartbeat_seconds=0.05)
    put(tmp_path, stranger(9))
    lease._thread.join(30)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "was lost to job vae-12, pid 4242 on host node-3" in caplog.text


def test_a_heartbeat_that_fails_is_told_once_and_ends_nothing(
    tmp_path: Path, take: Callable[..., Lease], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def fail(descriptor: int, content: bytes, offset: int) -> int:
        tries.append(offset)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", fail)
    lease = take(tmp_path, heartbeat_seconds=0.02)
    wait_for(lambda: len(tries) > 4, "several heartbeats")
    lease.check()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "Input/output error" in caplog.text
    monkeypatch.undo()
    before = (tmp_path / lease_name(1)).read_bytes()
    wait_for(lambda: (tmp_path / lease_name(1)).read_bytes() != before, "the heartbeat to go on")


def test_a_disk_that_hangs_does_not_hold_up_the_release(
    tmp_path: Path, take: Callable[..., Lease], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_back, pwrite = threading.Event(), os.pwrite

    def hang(descriptor: int, content: bytes, offset: int) -> int:
        is_back.wait(60)
        return pwrite(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", hang)
    monkeypatch.setattr(module, "_RELEASE_SECONDS", 0.1)
    lease = take(tmp_path)
    start = time.monotonic()
    try:
        lease.release()
        assert time.monotonic() - start < 30
        assert "not released yet" in caplog.text
    finally:
        is_back.set()
    lease._thread.join()
    holder = read_holder(tmp_path)
    assert holder is not None
    assert holder.released


def test_a_folder_that_is_missing_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No such file or directory\. Make the folder first"):
        Lease.acquire(tmp_path / "none")
    assert read_holder(tmp_path / "none") is None
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"Not a directory\. Name a folder"):
        Lease.acquire(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"Not a directory\. Name a folder"):
        read_holder(tmp_path / "file")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "the right to write"),
        (errno.EROFS, "mounted read-only"),
        (errno.ENOSPC, "Free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "the disk and its mount"),
    ],
)
@pytest.mark.parametrize("call", ["open", "write", "fsync", "link"])
def test_a_disk_that_fails_is_told_with_what_to_do_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, advice: str
) -> None:
    real = getattr(os, call)

    def fail(*given: Any) -> Any:
        if call == "open" and not given[1] & os.O_CREAT:
            return real(*given)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match=f"{os.strerror(number)}.*{advice}") as caught:
            Lease.acquire(tmp_path)
    assert isinstance(caught.value.__cause__, OSError)
    assert not isinstance(caught.value, CheckpointLeaseError)
    assert names(tmp_path) == []


def test_a_link_that_was_not_made_durable_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module, "fsync_directory", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        Lease.acquire(tmp_path)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_read_when_checked_is_no_loss(
    tmp_path: Path, take: Callable[..., Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = take(tmp_path)

    def fail(path: Path) -> list[str]:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", fail)
        with pytest.raises(CheckpointError, match="Could not check the lease of") as caught:
            lease.check()
    assert not isinstance(caught.value, CheckpointLeaseError)
    lease.check()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"heartbeat_seconds": 0}, "is not in"),
        ({"heartbeat_seconds": 61}, "is not in"),
        ({"timeout_seconds": 9}, "less than two heartbeats"),
        ({"timeout_seconds": float("nan")}, "less than two heartbeats"),
    ],
)
def test_times_that_would_judge_the_living_dead_are_refused(
    tmp_path: Path, given: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Lease.acquire(tmp_path, **given)
