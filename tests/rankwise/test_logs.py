"""Every rank's records are in its file; the console shows what one person wants to see."""

import errno
import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime
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
    assert datetime.fromisoformat(record.pop("time")).utcoffset() is not None
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
        "WARNING [rank 1] test.logs: warning of 1",
    ]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_ranks_choose_who_makes_a_record_and_a_list_shows_it(
    tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    start(rank)
    logger.info("all")
    logger.info("main", ranks="main")
    logger.info("listed", ranks=[1, 2])
    assert [record["message"] for record in read(tmp_path, rank)] == (
        ["all", "main"] if rank == 0 else ["all", "listed"]
    )
    assert ("listed" in capsys.readouterr().err) == (rank != 0)


def test_once_drops_equal_records_until_the_session_ends(tmp_path: Path, start: Start) -> None:
    for _ in range(2):
        handle = start(0)
        for number in (1, 1, 2):
            logger.info("number %d", number, once=True)
        handle.close()
    assert [record["message"][-1] for record in read(tmp_path, 0)] == ["1", "2", "1", "2"]


def test_records_below_the_level_go_nowhere_and_cost_no_formatting(tmp_path: Path, start: Start) -> None:
    start(0)
    logger.debug("%s", object.__new__(_Explosive))
    assert read(tmp_path, 0) == []


class _Explosive:
    def __str__(self) -> str:
        raise AssertionError("formatted")


def test_place_of_the_call_is_the_caller_s(caplog: pytest.LogCaptureFixture, start: Start) -> None:
    start(0)
    logger.info("here")
    assert caplog.records[0].funcName == "test_place_of_the_call_is_the_caller_s"


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
    assert len(root.handlers) == len(before[1]) + 2
    handle.close()
    handle.close()
    assert (root.level, root.handlers) == before


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


def test_full_disk_costs_records_and_never_the_run(
    tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = start(1)
    write = os.write
    room = [12]

    def write_until_full(descriptor: int, content: bytes) -> int:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= (num_written := write(descriptor, content[: room[0]]))
        return num_written

    monkeypatch.setattr(os, "write", write_until_full)
    for number in range(3):
        logger.info("lost %d", number)
    monkeypatch.setattr(os, "write", write)
    logger.info("after")
    handle.close()
    assert (tmp_path / "logs/rank-00001.jsonl").read_text().splitlines()[0] == '{"time": "20'
    assert json.loads((tmp_path / "logs/rank-00001.jsonl").read_text().splitlines()[1])["message"] == "after"
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "12 of" in told[0]
    assert "3 log records are missing" in told[1]


def test_logger_works_before_any_session(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, local_rank in (("1", "1"), ("0", "0"), ("7", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        logger.warning("rank %s", rank, ranks="main")
    # The environment of rank 7 of 2 contradicts itself; a log call is no place to say so.
    assert [record.getMessage() for record in caplog.records] == ["rank 0", "rank 7"]


def test_terminal_gets_rich_lines_with_the_same_label(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    start(1)
    logger.warning("look [here]")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert "[rank 1] test.logs: look [here]" in plain
    assert plain != terminal.getvalue()


@on_ranks(2)
def test_each_rank_writes_its_own_file(tmp_path: Path) -> None:
    rank = int(os.environ["RANK"])
    handle = logs.configure(Identity.resolve(os.environ), tmp_path)
    logger.info("hello from %d", rank)
    handle.close()
    assert [record["message"] for record in read(tmp_path, rank)] == [f"hello from {rank}"]
