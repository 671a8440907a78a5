"""One job commits behind a URL: leases of objects that race, stall, are lost and are given back."""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from rankwise.checkpoint import lease as waiting
from rankwise.checkpoint import objects as calls
from rankwise.checkpoint import remote_lease as module
from rankwise.checkpoint.holder import Holder, decode, encode
from rankwise.checkpoint.objects import Objects
from rankwise.checkpoint.remote_lease import RemoteLease
from rankwise.errors import CheckpointLeaseError


@pytest.fixture
def objects() -> Objects:
    return Objects(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def take() -> Iterator[Callable[..., RemoteLease]]:
    """`RemoteLease.acquire`; what it gave is released when the test ends."""
    leases: list[RemoteLease] = []

    def acquire(objects: Objects, timeout_seconds: float = 60.0, minimum_epoch: int = 0) -> RemoteLease:
        lease = RemoteLease.acquire(objects, timeout_seconds=timeout_seconds, minimum_epoch=minimum_epoch)
        leases.append(lease)
        return lease

    yield acquire
    for lease in leases:
        lease.release()


def foreign(epoch: int, heartbeat_seconds: float = 0.1) -> Holder:
    """A holder on another host."""
    holder = Holder.of_this_process(epoch, uuid.uuid4().hex, "vae-12", heartbeat_seconds, "2026-01-02T03:04:05Z")
    return replace(holder, host="node-3", pid=4242, process=f"node-3:{holder.process}".replace(":", "x:", 1))


def put(objects: Objects, holder: Holder, **given: Any) -> None:
    objects.write(f"lease-{holder.epoch:08d}.json", encode(holder, given.pop("heartbeat", 0), **given))


def test_each_taking_has_a_higher_epoch_and_old_objects_go(objects: Objects, take: Callable[..., RemoteLease]) -> None:
    for epoch in (1, 2, 3, 4):
        lease = take(objects)
        assert lease.epoch == epoch
        lease.check()
        lease.release()
    assert sorted(objects.names()) == ["lease-00000003.json", "lease-00000004.json"]
    assert take(objects, minimum_epoch=9).epoch == 10


def test_living_holder_of_this_host_is_told_at_once(objects: Objects, take: Callable[..., RemoteLease]) -> None:
    take(objects)
    with pytest.raises(CheckpointLeaseError, match=f"{objects.location} is written by this very process: pid "):
        take(objects)


def test_dead_holder_of_this_host_is_replaced_at_once(objects: Objects, take: Callable[..., RemoteLease]) -> None:
    holder = Holder.of_this_process(5, "abc", None, 10.0, "2026-01-02T03:04:05Z")
    place, pid, started = str(holder.process).rsplit(":", 2)
    put(objects, replace(holder, process=f"{place}:{pid}:{int(started) - 1}"))
    assert take(objects).epoch == 6


def test_silent_holder_of_another_host_is_replaced_after_the_timeout(
    objects: Objects, take: Callable[..., RemoteLease], caplog: pytest.LogCaptureFixture
) -> None:
    put(objects, foreign(5))
    assert take(objects, timeout_seconds=0.5).epoch == 6
    assert "taken over from job vae-12, pid 4242 on host node-3" in caplog.text


def test_beating_holder_of_another_host_is_refused(objects: Objects, take: Callable[..., RemoteLease]) -> None:
    holder, ended = foreign(5), threading.Event()

    def beat() -> None:
        num_beats = 0
        while not ended.wait(0.05):
            num_beats += 1
            put(objects, holder, heartbeat=num_beats)

    put(objects, holder)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(CheckpointLeaseError, match=r"written by another job: job vae-12, pid 4242 on host node-3"):
            take(objects, timeout_seconds=30.0)
    finally:
        ended.set()
        thread.join()


def test_released_lease_of_another_host_is_taken_at_once(objects: Objects, take: Callable[..., RemoteLease]) -> None:
    put(objects, foreign(5), is_released=True)
    assert take(objects).epoch == 6


def test_lost_lease_is_told_with_who_has_it(objects: Objects, take: Callable[..., RemoteLease]) -> None:
    lease = take(objects)
    put(objects, foreign(2))
    with pytest.raises(CheckpointLeaseError, match=r"\(epoch 1\) was lost to job vae-12, pid 4242 on host node-3"):
        lease.check()
    objects.remove(["lease-00000002.json", "lease-00000001.json"])
    with pytest.raises(CheckpointLeaseError, match=r"lease-00000001.json, the lease of this job, was removed"):
        lease.check()
    put(objects, foreign(1))  # a store that cannot refuse let another job replace ours
    with pytest.raises(CheckpointLeaseError, match="was lost to job vae-12"):
        lease.check()
    lease.release()
    with pytest.raises(CheckpointLeaseError, match="was released by this job"):
        lease.check()


def test_holder_beats_and_says_when_it_ends(
    objects: Objects, take: Callable[..., RemoteLease], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.05)
    lease = take(objects)

    def now() -> Holder:
        return decode(1, objects.read("lease-00000001.json"))

    deadline = time.monotonic() + 30.0
    while now().heartbeat < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not now().released
    lease.release()
    lease.release()
    assert now().released


def test_failing_heartbeat_is_told_once_and_goes_on(
    objects: Objects,
    take: Callable[..., RemoteLease],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(calls, "GIVE_UP_SECONDS", 0.0)
    num_calls, pipe = 0, objects._files.pipe_file

    def fail(*args: Any, **kwargs: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        raise ConnectionError("refused")

    lease = take(objects)
    monkeypatch.setattr(objects._files, "pipe_file", fail)
    deadline = time.monotonic() + 30.0
    while num_calls < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.setattr(objects._files, "pipe_file", pipe)
    lease.release()
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "the heartbeat of the lease fails, so another host's job may take it: cannot write lease-0" in errors[0]
    assert decode(1, objects.read("lease-00000001.json")).released


def test_of_many_that_race_one_gets_the_lease(s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_MAX_POLL_SECONDS", 0.05)
    won: list[RemoteLease] = []
    refused: list[str] = []
    start = threading.Barrier(6)

    def race() -> None:
        start.wait()
        try:
            won.append(RemoteLease.acquire(Objects(bucket), timeout_seconds=30.0, minimum_epoch=0))
        except CheckpointLeaseError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=race) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 5)
    won[0].check()
    won[0].release()
