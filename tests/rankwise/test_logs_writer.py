"""Records come into the file in time, in order, and are counted where they cannot."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankwise.identity import Identity
from rankwise.logs import writer as writer_module
from rankwise.logs.record import Form, Item, notice
from rankwise.logs.writer import FileWriter


def item(message: str, level: int = logging.INFO) -> Item:
    return notice(message)._replace(level_number=level, level=logging.getLevelName(level))


def messages(path: Path) -> list[str]:
    return [json.loads(line)["message"] for line in path.read_text().splitlines()]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[FileWriter]:
    made = FileWriter(tmp_path / "logs" / "a.jsonl", Form(Identity(0, 0, 0, 1, 1, 1), environ={}), 1 << 20, None)
    made.open()
    yield made
    made.close()


def test_warning_is_in_the_file_when_the_call_returns_and_what_came_before_it_too(writer: FileWriter) -> None:
    writer.put(item("info"))
    writer.put(item("warning", logging.WARNING))
    assert messages(writer.path) == ["info", "warning"]


def test_info_is_in_the_file_soon(writer: FileWriter) -> None:
    writer.put(item("info"))
    deadline = time.monotonic() + 20
    while not writer.path.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert messages(writer.path) == ["info"]


def test_info_does_not_wait_for_a_disk_that_hangs(writer: FileWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, goes_on = threading.Event(), threading.Event()
    write = os.write

    def write_slowly(descriptor: int, content: bytes) -> int:
        hangs.set()
        goes_on.wait(20)
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", write_slowly)
    writer.put(item("0"))
    assert hangs.wait(20)
    for number in range(1, 1000):
        writer.put(item(str(number)))
    goes_on.set()
    writer.flush()
    assert messages(writer.path) == [str(number) for number in range(1000)]


def test_order_is_that_of_each_thread(writer: FileWriter) -> None:
    def say(name: str) -> None:
        for number in range(300):
            writer.put(item(f"{name} {number}", logging.WARNING if number % 50 == 0 else logging.INFO))

    threads = [threading.Thread(target=say, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.flush()
    said = messages(writer.path)
    assert len(said) == 900
    for name in "abc":
        assert [line for line in said if line[0] == name] == [f"{name} {number}" for number in range(300)]


def test_oldest_records_below_warning_are_dropped_where_the_disk_does_not_keep_up(
    writer: FileWriter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writer_module, "MAX_WAITING", 10)
    monkeypatch.setattr(writer._background, "wake", lambda: None)
    for number in range(100):
        writer.put(item(str(number)))
    writer.put(item("warning", logging.WARNING))
    writer.put(item("later", logging.WARNING))
    expected = ["90 log records are missing here", *map(str, range(90, 100)), "warning", "later"]
    assert messages(writer.path) == expected
    writer.close()
    assert "90 log records are missing" in capsys.readouterr().err


def test_long_messages_are_bounded_in_memory_too(writer: FileWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MAX_WAITING_CHARACTERS", 1000)
    monkeypatch.setattr(writer._background, "wake", lambda: None)
    for _ in range(20):
        writer.put(item("x" * 300))
    writer.flush()
    assert [len(message) for message in messages(writer.path)[1:]] == [300] * 3


def test_full_disk_costs_records_and_how_many_is_written_once_there_is_room(
    writer: FileWriter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", refuse)
        for number in range(3):
            writer.put(item(f"lost {number}", logging.WARNING))
    writer.put(item("after", logging.WARNING))
    assert messages(writer.path) == ["3 log records are missing here", "after"]
    writer.close()
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "No space left on device" in told[0]
    assert "3 log records are missing" in told[1]


def test_file_that_cannot_be_opened_later_is_told_once(
    writer: FileWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    writer.move_to(tmp_path / "file" / "a.jsonl")
    for _ in range(2):
        writer.put(item("lost", logging.WARNING))
    writer.close()
    told = capsys.readouterr().err.splitlines()
    assert ["cannot write" in told[0], "2 log records are missing" in told[1], len(told)] == [True, True, 2]


def test_close_writes_what_waits_and_later_records_open_nothing(writer: FileWriter) -> None:
    writer.put(item("last"))
    writer.close()
    writer.put(item("too late", logging.WARNING))
    assert messages(writer.path) == ["last"]


@pytest.mark.parametrize("last", ["time.sleep(1.5)", 'logging.getLogger("b").warning("warning")'])
def test_sigkill_loses_nothing_older_than_half_a_second_and_no_warning(last: str, tmp_path: Path) -> None:
    assert writer_module.PAUSE_SECONDS < 0.25  # the sleep is longer than half a second for slow machines only
    code = f"""
import logging, os, signal, time
from rankwise import logs
from rankwise.identity import Identity
logs.configure(Identity(0, 0, 0, 2, 2, 1), {str(tmp_path)!r})
log = logs.get_logger("a")
for number in range(500):
    log.info("info %d", number)
{last}
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    said = messages(tmp_path / "logs/rank-00000.jsonl")
    assert said == [*(f"info {number}" for number in range(500)), *(["warning"] if "warning" in last else [])]


def test_record_that_cannot_be_formed_costs_no_other(writer: FileWriter) -> None:
    writer.put(item("before"))
    writer.put(item("broken")._replace(created=float("nan")))
    writer.put(item("after", logging.WARNING))
    before, broken, after = messages(writer.path)
    assert (before, after) == ("before", "after")
    assert broken.startswith("a record of rankwise.logs cannot be written (ValueError: ")


def test_flush_never_raises_and_counts_what_it_lost(
    writer: FileWriter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(lines: list[bytes]) -> int:
        raise RuntimeError("no way")

    with monkeypatch.context() as patched:
        patched.setattr(writer._file, "write", fail)
        writer.put(item("lost", logging.WARNING))
    writer.put(item("after", logging.WARNING))
    assert messages(writer.path) == ["1 log records are missing here", "after"]
    assert "RuntimeError: no way" in capsys.readouterr().err
