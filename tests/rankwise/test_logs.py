"""Every rank's records are in its file; the console shows what one person wants to see."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from rankwise import logs
from rankwise.identity import Identity
from rankwise.testing import on_ranks


def identity(rank: int) -> Identity:
    return Identity(rank, rank % 2, rank // 2, 4, 2, 2, hostname="node-a")


Start = Callable[[int], logs.LogHandle]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    handles: list[logs.LogHandle] = []

    def configure(rank: int) -> logs.LogHandle:
        handles.append(logs.configure(identity(rank), tmp_path))
        return handles[-1]

    yield configure
    for handle in handles:
        handle.close()


def read(run_dir: Path, rank: int) -> list[dict[str, Any]]:
    """What has to be in the file half a second after the last record."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    return [json.loads(line) for line in (run_dir / f"logs/rank-{rank:05d}.jsonl").read_text().splitlines()]


logger = logs.get_logger("test.logs")


def test_file_has_every_field(tmp_path: Path, start: Start) -> None:
    start(3)
    try:
        raise ValueError("broken \u00fc")
    except ValueError:
        logger.exception("caught %d", 7)
    (record,) = read(tmp_path, 3)
    error = record.pop("exception")
    assert datetime.fromisoformat(record.pop("time")).utcoffset() == timedelta(0)
    assert abs(record.pop("monotonic_ns") - time.monotonic_ns()) < 60e9
    assert record == {
        "level": "ERROR",
        "logger": "test.logs",
        "message": "caught 7",
        "rank": 3,
        "local_rank": 1,
        "node_rank": 1,
        "host": "node-a",
        "pid": os.getpid(),
    }
    assert (error["type"], error["message"]) == ("ValueError", "broken \u00fc")
    assert "test_file_has_every_field" in error["traceback"]


def test_run_directory_may_be_a_string_and_the_process_is_that_of_the_record(tmp_path: Path) -> None:
    handle = logs.configure(identity(0), str(tmp_path))
    record = logging.makeLogRecord({"msg": "from a fork", "levelno": logging.INFO, "process": 4321})
    logging.getLogger().handle(record)
    handle.close()
    assert read(tmp_path, 0)[0]["pid"] == 4321


def test_file_is_appended_to_by_the_next_session(tmp_path: Path, start: Start) -> None:
    for message in ("first", "second"):
        handle = start(0)
        logger.info(message)
        handle.close()
    assert [record["message"] for record in read(tmp_path, 0)] == ["first", "second"]


def test_console_shows_info_of_the_main_process_and_labelled_warnings_of_others(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 1):
        handle = start(rank)
        logger.info("info of %d", rank)
        logger.warning("warning of %d", rank)
        handle.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "INFO    test.logs: info of 0",
        "WARNING test.logs: warning of 0",
        "WARNING [rank 1, node-a] test.logs: warning of 1",
    ]


def test_other_loggers_and_warnings_come_along(tmp_path: Path, start: Start) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown_before = warnings.showwarning
        handle = start(1)
        logging.getLogger("third.party").warning("theirs")
        warnings.warn("careful", stacklevel=1)
        handle.close()
        assert warnings.showwarning is shown_before
    theirs, careful = read(tmp_path, 1)
    assert (theirs["logger"], theirs["message"]) == ("third.party", "theirs")
    assert "careful" in careful["message"]


def test_close_restores_what_was_there(start: Start) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    handle = start(0)
    assert len(root.handlers) == len(before[1]) + 1
    handle.close()
    handle.close()
    assert (root.level, root.handlers) == before


def test_stream_handlers_of_the_console_are_off_while_ours_is_on(
    start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    theirs, kept = logging.StreamHandler(sys.stderr), logging.NullHandler()
    monkeypatch.setattr(root, "handlers", [theirs, kept])
    handle = start(1)
    logger.info("told to nobody")
    handle.flush()
    assert capsys.readouterr().err == ""
    handle.close()
    assert root.handlers == [theirs, kept]
    logger.error("theirs again")
    assert capsys.readouterr().err == "theirs again\n"


def test_record_that_a_filter_fails_on_does_not_raise(
    tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(record: logging.LogRecord) -> bool:
        raise ValueError("no")

    monkeypatch.setenv("SOME_API_TOKEN", "do-not-tell-anybody")
    start(0)
    logging.getLogger().handlers[-1].addFilter(fail)
    logger.info("do-not-tell-anybody")
    assert [record["message"] for record in read(tmp_path, 0)] == ["***"]
    assert "a log record is not filtered (ValueError: no): ***\n" in capsys.readouterr().err


def test_message_that_cannot_be_formatted_is_kept_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest's own handlers raise on such a message.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    handle = logs.configure(identity(0), tmp_path)
    logger.info("%d items", "many")
    handle.close()
    assert "'%d items' with ('many',)" in read(tmp_path, 0)[0]["message"]
    assert "'%d items' with ('many',)" in capsys.readouterr().err


@on_ranks(2)
def test_each_rank_writes_its_own_file(tmp_path: Path) -> None:
    rank = int(os.environ["RANK"])
    handle = logs.configure(Identity.resolve(os.environ), tmp_path)
    logger.info("hello from %d", rank)
    handle.close()
    assert [record["message"] for record in read(tmp_path, rank)] == [f"hello from {rank}"]


def test_records_carry_the_step_from_when_it_is_set(tmp_path: Path, start: Start) -> None:
    handle = start(0)
    logger.info("before")
    logs.set_step(7)
    logger.info("within")
    logs.set_step(None)
    logger.info("after")
    assert [record.get("step") for record in read(tmp_path, 0)] == [None, 7, None]
    logs.set_step(8)
    handle.close()
    start(0)
    logger.info("next session")
    assert "step" not in read(tmp_path, 0)[-1]


def test_channel_carries_warnings_and_what_is_addressed_to_the_rank(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[dict[str, Any]] = []
    handle = start(1)
    logs.set_channel(lambda record: sent.append(record) is None)
    logger.info("quiet")
    logger.info("listed", ranks=[1])
    logger.warning("loud")
    logger.warning("in the file", extra=logs.FILE_ONLY)
    handle.close()
    assert [(record["message"], record["rank"]) for record in sent] == [("listed", 1), ("loud", 1)]
    assert capsys.readouterr().err == ""


def test_channel_ends_with_the_session(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    handle = start(1)
    logs.set_channel(lambda record: True)
    handle.close()
    handle = start(1)
    logger.warning("loud")
    handle.close()
    assert "loud" in capsys.readouterr().err


def test_records_of_other_ranks_are_folded_with_the_main_process_s_own(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[dict[str, Any]] = []
    handle = start(1)
    logs.set_channel(lambda record: sent.append(record) is None)
    logger.warning("hot")
    handle.close()
    handle = start(0)
    logger.warning("hot")
    for rank in (1, 2, 3):
        logs.receive(sent[0] | {"rank": rank})
    handle.close()
    assert [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()] == [
        "WARNING test.logs: hot (x4, ranks 0-3)"
    ]


def test_record_that_comes_after_the_session_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    logs.receive({"level": "ERROR", "logger": "a", "message": "late", "rank": 3})
    assert "[rank 3] a: late" in capsys.readouterr().err


def test_prints_become_records_where_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        handle = logs.configure(identity(rank), tmp_path, capture_prints=True)
        print("printed by", rank)
        handle.close()
        assert [(record["logger"], record["message"]) for record in read(tmp_path, rank)] == [
            ("print", f"printed by {rank}")
        ]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("print: printed by 0\n")


def test_files_are_rotated_and_every_record_is_in_one_of_them(tmp_path: Path) -> None:
    handle = logs.configure(identity(0), tmp_path, max_bytes=2000)
    for number in range(100):
        logger.info("number %d", number)
    handle.close()
    files = sorted((tmp_path / "logs").glob("*.0*.jsonl"))
    assert len(files) > 5
    lines = [line for path in [*files, tmp_path / "logs/rank-00000.jsonl"] for line in path.read_text().splitlines()]
    assert [json.loads(line)["message"] for line in lines] == [f"number {number}" for number in range(100)]


def test_values_of_secret_variables_are_in_neither_file_nor_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", "do-not-tell-anybody")
    handle = logs.configure(identity(0), tmp_path)
    logging.getLogger("third.party").info("login with do-not-tell-anybody")
    handle.close()
    assert read(tmp_path, 0)[0]["message"] == "login with ***"
    assert "do-not-tell" not in capsys.readouterr().err


def test_wrong_level_leaves_nothing_behind(tmp_path: Path) -> None:
    handlers = list(logging.getLogger().handlers)
    with pytest.raises(ValueError, match="LOUD"):
        logs.configure(identity(0), tmp_path, "LOUD")
    assert logging.getLogger().handlers == handlers
    assert not list(tmp_path.iterdir())


def test_import_needs_no_torch() -> None:
    code = "import sys, rankwise.logs.fold; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_signal_handler_may_log_at_any_time(tmp_path: Path) -> None:
    code = f"""
import signal
from rankwise import logs
from rankwise.identity import Identity
handle = logs.configure(Identity(1, 1, 0, 2, 2, 1), {str(tmp_path)!r})
logs.set_channel(lambda record: True)
log = logs.get_logger("a")
num_signals = 0
def on_alarm(number, frame):
    global num_signals
    num_signals += 1
    log.log(20 + 10 * (num_signals % 2), "signal")
signal.signal(signal.SIGALRM, on_alarm)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
for number in range(3000):
    log.log(20 + 10 * (number % 2), "main")
signal.setitimer(signal.ITIMER_REAL, 0)
handle.close()
print(num_signals)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stderr == ""
    said = [record["message"] for record in read(tmp_path, 1)]
    assert (said.count("main"), said.count("signal")) == (3000, int(done.stdout))
    assert int(done.stdout) > 10


def test_info_does_not_wait_for_a_warning_of_another_thread_that_waits_for_the_disk(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(1)
    hangs, goes_on, is_done = threading.Event(), threading.Event(), threading.Event()
    write = os.write

    def write_slowly(descriptor: int, content: bytes) -> int:
        hangs.set()
        goes_on.wait(60)
        return write(descriptor, content)

    def train() -> None:
        logger.info("step")
        is_done.set()

    # Other handlers of the root logger do wait for each other.
    monkeypatch.setattr(logging.getLogger(), "handlers", logging.getLogger().handlers[-1:])
    monkeypatch.setattr(os, "write", write_slowly)
    threads = [threading.Thread(target=logger.warning, args=("slow",)), threading.Thread(target=train)]
    threads[0].start()
    assert hangs.wait(20)
    threads[1].start()
    try:
        assert is_done.wait(20)
    finally:
        goes_on.set()
        for thread in threads:
            thread.join()
    assert [record["message"] for record in read(tmp_path, 1)] == ["slow", "step"]
