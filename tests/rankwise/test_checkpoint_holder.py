"""What the file of a lease says, and whether its process lives: files and real processes."""

import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import rankwise.parent as module
from rankwise.checkpoint.holder import Holder, decode, encode, find_epochs, lease_name, read_highest, staged_epoch
from rankwise.parent import launcher_token, start_time


def mine(epoch: int = 7, job: str | None = "vae-12") -> Holder:
    return Holder.of_this_process(epoch, "0123abcd", job, 5.0, "2026-01-02T03:04:05Z")


def of_process(pid: int, started: int | None) -> Holder:
    place = launcher_token().rsplit(":", 2)[0]
    return decode(7, encode(replace(mine(), pid=pid, process=f"{place}:{pid}:{started}"), 0))


def test_what_was_written_is_read() -> None:
    holder = decode(7, encode(mine(), 41))
    assert holder == replace(mine(), heartbeat=41)
    assert holder.alive is True
    assert decode(7, encode(mine(), 41, is_released=True)).released


def test_a_message_names_job_process_host_and_time() -> None:
    text = str(mine())
    assert text.startswith(f"job vae-12, pid {os.getpid()} on host ")
    assert text.endswith("since 2026-01-02 03:04:05 UTC (lease epoch 7)")
    assert str(mine(job=None)).startswith("pid ")
    assert str(Holder(7)) == "an unknown holder (lease-00000007.json cannot be read)"


@pytest.mark.parametrize(("before", "after"), [(9, 10), (99, 100), (0, 999_999)])
def test_half_of_a_heartbeat_leaves_the_holder_known(before: int, after: int) -> None:
    old, new = encode(mine(), before), encode(mine(), after)
    assert len(old) == len(new)
    mixed = [decode(7, old[:cut] + new[cut:]) for cut in range(len(old.rstrip()))]
    mixed += [decode(7, new[:cut] + old[cut:]) for cut in range(len(old.rstrip()))]
    assert {replace(holder, heartbeat=0) for holder in mixed} == {mine()}


def test_half_of_a_release_is_never_taken_for_another_holder() -> None:
    old, new = encode(mine(), 3), encode(mine(), 3, is_released=True)
    assert len(old) == len(new)
    nonces = {decode(7, old[:cut] + new[cut:]).nonce for cut in range(len(old.rstrip()))}
    assert nonces <= {None, "0123abcd"}


def test_a_job_name_cannot_break_the_file_nor_the_terminal() -> None:
    holder = decode(7, encode(mine(job="\x1b[2J" + "\U0001f600" * 5000 + '"\n'), 0))
    assert holder.job is not None
    assert holder.job.startswith("?[2J")
    assert holder.job.isprintable()
    assert len(encode(mine(job="\U0001f600" * 5000), 0)) == len(encode(mine(), 0))


def changed(**fields: object) -> bytes:
    return json.dumps(json.loads(encode(mine(), 0)) | fields).encode()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 4096,
        encode(mine(), 0)[:100],
        b"[" * 4096,
        b"7",
        b"{}",
        b"\xff\xfe",
        changed(format=2),
        changed(epoch=8),
        changed(pid="1"),
        changed(pid=-1),
        changed(host=None),
        changed(host="\x1b[2J"),
        changed(process="1:2"),
        changed(process=f"{launcher_token().rsplit(':', 2)[0]}:x:y"),
        changed(process=f"{launcher_token().rsplit(':', 2)[0]}:{10**30}:1"),
        changed(heartbeat_seconds=0),
        changed(heartbeat_seconds=1e9),
        changed(heartbeat_seconds=10**400),
        changed(heartbeat_seconds=float("nan")),
    ],
    ids=itertools.count(),  # what they hold differs from process to process
)
def test_of_a_damaged_file_only_the_epoch_is_known(raw: bytes) -> None:
    assert decode(7, raw) == Holder(7)


def test_the_highest_epoch_is_read(tmp_path: Path) -> None:
    assert read_highest(tmp_path) is None
    for epoch in (2, 100_000_000, 11):
        (tmp_path / lease_name(epoch)).write_bytes(encode(mine(epoch), 0))
    for name in ("lease-1.json", "lease-00000099.json.bak", ".lease-00000099.json.ab", "step-00000099"):
        (tmp_path / name).write_bytes(b"")
    assert find_epochs(tmp_path) == [2, 11, 100_000_000]
    found = read_highest(tmp_path)
    assert found == (mine(100_000_000), encode(mine(100_000_000), 0))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_thing_that_is_no_file_neither_blocks_nor_breaks_the_reader(tmp_path: Path, make: object) -> None:
    assert callable(make)
    make(tmp_path / lease_name(7))
    assert read_highest(tmp_path) == (Holder(7), b"")


def test_a_staged_file_tells_its_epoch() -> None:
    assert staged_epoch(".lease-00000012.json.0a1b") == 12
    assert staged_epoch("lease-00000012.json") is None


def test_a_process_lives_until_it_is_killed_even_before_it_is_waited_for() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = start_time(process.pid)
        assert of_process(process.pid, started).alive is True
        process.send_signal(signal.SIGSTOP)
        assert of_process(process.pid, started).alive is True
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert of_process(process.pid, started).alive is False
    finally:
        process.kill()
        process.communicate()
    assert of_process(process.pid, started).alive is False


def test_another_process_with_the_same_id_is_not_the_holder() -> None:
    started = start_time(os.getpid())
    assert started is not None
    assert of_process(os.getpid(), started - 1).alive is False


def test_a_process_that_the_system_hides_is_not_judged_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(module, "start_time", lambda pid: None)
    monkeypatch.setattr(os, "kill", refuse)
    assert of_process(os.getpid(), 1).alive is None


@pytest.mark.parametrize("place", ["elsewhere:boot:4026531836", "", "::"])
def test_a_process_of_another_host_cannot_be_seen(place: str) -> None:
    holder = replace(mine(), process=f"{place}:{os.getpid()}:{start_time(os.getpid())}")
    assert decode(7, encode(holder, 0)).alive is None


def test_where_the_system_has_no_boot_id_no_process_is_judged_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "launcher_token", lambda: "host:::1:0")
    assert decode(7, encode(replace(mine(), process="host:::999999999:0"), 0)).alive is None
