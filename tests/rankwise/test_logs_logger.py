"""A call says which ranks it is for, and costs the others nothing."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rankwise import logs
from rankwise.identity import Identity


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


def test_logger_works_before_any_session(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, local_rank in (("1", "1"), ("0", "0"), ("7", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        logger.warning("rank %s", rank, ranks="main")
    # The environment of rank 7 of 2 contradicts itself; a log call is no place to say so.
    assert [record.getMessage() for record in caplog.records] == ["rank 0", "rank 7"]


def test_rank_of_the_session_counts_and_not_the_environment_s(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    start(0)
    logger.info("main", ranks="main")
    assert [record["message"] for record in read(tmp_path, 0)] == ["main"]


def test_call_for_the_main_process_makes_no_record_on_others(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(1)
    made: list[object] = []
    monkeypatch.setattr(logging, "_logRecordFactory", lambda *args, **kwargs: made.append(args))
    for say in (logger.debug, logger.info, logger.warning, logger.error):
        say("main", ranks="main")
    logger.log(logging.CRITICAL, "main", ranks="main")
    assert made == []


def test_every_level_has_its_call_and_its_place(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for name in ("debug", "info", "warning", "error", "critical"):
            getattr(logger, name)("said %s", name, once=True)
        logger.log(logging.INFO, "said log")
        logger.info("said here", ranks=[0])
    assert {record.funcName for record in caplog.records} == {"test_every_level_has_its_call_and_its_place"}
    assert [record.levelname for record in caplog.records[:5]] == ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    logs.said_once.clear()


def test_ranks_that_name_none_are_refused_with_what_is_needed(start: Start) -> None:
    start(0)
    for wrong in ("mian", 3, None):
        with pytest.raises(ValueError, match=r'names no ranks\. Give "main", "all", or a list'):
            logger.warning("here", ranks=wrong)  # type: ignore[arg-type]


def test_once_remembers_so_many_records_and_no_more(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    start(1)
    monkeypatch.setattr("rankwise.logs.logger.MAX_SAID_ONCE", 10)
    for number in range(100):
        logger.info("number %d", number, once=True)
    assert len(logs.said_once) == 10
