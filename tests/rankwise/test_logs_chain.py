"""Every record comes to the file and the console once, whatever libraries and configurations do to loggers."""

import json
import logging
import logging.config
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rankwise import logs
from rankwise.identity import Identity
from rankwise.logs.chain import Chain


@pytest.fixture(autouse=True)
def _clean_loggers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No handlers but those of the test, and nothing that it changed is left."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    yield
    root.setLevel(level)
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger):
            logger.disabled = False
        if name.startswith("lib"):
            del logging.root.manager.loggerDict[name]


def configure(run_dir: Path, rank: int, level: str = "INFO") -> logs.LogHandle:
    return logs.configure(Identity(rank, rank, 0, 2, 2, 1, hostname="node-a"), run_dir, level)


def messages(run_dir: Path, rank: int) -> list[str]:
    lines = (run_dir / f"logs/rank-{rank:05d}.jsonl").read_text().splitlines()
    return [json.loads(line)["message"] for line in lines]


def library_logger(level: int = logging.WARNING) -> logging.Logger:
    """A library that prints by itself, as transformers and datasets set themselves up when they are imported."""
    library = logging.getLogger("lib")
    handler = logging.StreamHandler()
    handler.flush = sys.stderr.flush  # type: ignore[method-assign]
    library.addHandler(handler)
    library.setLevel(level)
    library.propagate = False
    return logging.getLogger("lib.models.bert")


def test_torch_s_own_loggers_come_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch  # noqa: F401  # sets up its loggers, which do not propagate

    assert not logging.getLogger("torch").propagate
    handle = configure(tmp_path, 0)
    logging.getLogger("torch.distributed.fsdp").warning("from torch")
    handle.close()
    assert messages(tmp_path, 0) == ["from torch"]
    assert capsys.readouterr().err.count("from torch") == 1


@pytest.mark.parametrize("is_first", [True, False])
def test_logger_that_does_not_propagate_comes_to_file_and_console_once(
    is_first: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = library_logger() if is_first else logging.getLogger("lib.models.bert")
    handle = configure(tmp_path, 0)
    if not is_first:
        library_logger()
    logger.info("not at its level")
    logger.warning("weights are new")
    handle.close()
    assert messages(tmp_path, 0) == ["weights are new"]
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in shown] == ["WARNING lib.models.bert: weights are new"]
    logger.warning("after")
    assert capsys.readouterr().err == "after\n"


def test_console_of_a_library_is_still_on_other_ranks_and_its_files_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = library_logger(logging.INFO)
    file = logging.FileHandler(tmp_path / "lib.log")
    logging.getLogger("lib").addHandler(file)
    handle = configure(tmp_path, 1)
    logger.info("hello")
    handle.close()
    file.close()
    assert capsys.readouterr().err == ""
    assert messages(tmp_path, 1) == ["hello"]
    assert (tmp_path / "lib.log").read_text() == "hello\n"


def _force() -> None:
    logging.basicConfig(force=True, level="INFO", format="theirs %(message)s")


def _clear() -> None:
    logging.getLogger().handlers.clear()


def _configure_all() -> None:
    console = {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}
    root = {"handlers": ["console"], "level": "INFO"}
    logging.config.dictConfig(
        {"version": 1, "disable_existing_loggers": False, "handlers": {"console": console}, "root": root}
    )


@pytest.mark.parametrize("set_up_anew", [_force, _clear, _configure_all])
def test_whoever_sets_up_logging_anew_takes_no_record_away(
    set_up_anew: Callable[[], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handle = configure(tmp_path, 0)
    logging.getLogger("a").info("before")
    set_up_anew()
    logging.getLogger("a").info("info")
    logging.getLogger("a").warning("warning")
    assert messages(tmp_path, 0) == ["before", "info", "warning"]
    handle.close()
    captured = capsys.readouterr()
    assert [line.rpartition(" ")[2] for line in captured.err.splitlines()] == ["before", "info", "warning"]
    assert captured.out == ""


def test_process_that_sets_up_logging_anew_and_just_ends_has_written_all(tmp_path: Path) -> None:
    code = f"""
import atexit, logging, logging.config
atexit.register(lambda: logging.getLogger("a").info("last words"))
from rankwise import logs
from rankwise.identity import Identity
logs.configure(Identity(0, 0, 0, 1, 1, 1), {str(tmp_path)!r}, capture_prints=True)
logging.config.dictConfig({{"version": 1, "disable_existing_loggers": False}})
logging.getLogger("a").info("info")
print("never ended", end="")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert messages(tmp_path, 0) == ["info", "last words", "never ended"]


def test_handler_that_sends_records_on_to_the_root_makes_none_twice(tmp_path: Path) -> None:
    class SendOn(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logging.getLogger().handle(record)

    logger = logging.getLogger("lib")
    logger.propagate = False
    logger.addHandler(SendOn())
    handle = configure(tmp_path, 0)
    logger.info("hello")
    handle.close()
    assert messages(tmp_path, 0) == ["hello"]


def test_what_a_logger_keeps_from_the_root_is_not_for_the_console_but_for_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("lib.measures")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    file = logging.FileHandler(tmp_path / "lib.log")
    logger.addHandler(file)
    handle = configure(tmp_path, 0)
    logger.debug("below the session's level")
    logger.info("a measure")
    logger.warning("a warning")
    handle.close()
    file.close()
    assert messages(tmp_path, 0) == ["a measure", "a warning"]
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == ["a warning"]
    assert len((tmp_path / "lib.log").read_text().splitlines()) == 3


def test_logger_that_is_switched_off_stays_off_and_one_that_only_promises_a_handler_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("lib.off", "lib.on"):
        logging.getLogger(name).addHandler(logging.NullHandler())
    logging.getLogger("lib.off").propagate = False
    handle = configure(tmp_path, 0)
    logging.getLogger().handlers.clear()
    logging.getLogger("lib.off").error("for nobody")
    logging.getLogger("lib.on").info("for all")
    handle.close()
    assert messages(tmp_path, 0) == ["for all"]
    assert "for nobody" not in capsys.readouterr().err


def test_below_the_session_s_level_a_console_s_own_level_still_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = library_logger(logging.DEBUG)
    logging.getLogger("lib").propagate = True
    handle = configure(tmp_path, 0)
    logger.debug("shown as before")
    logging.getLogger("lib").handlers[0].setLevel(logging.ERROR)
    logger.debug("for its files")
    logger.info("at the session's level")
    handle.close()
    assert messages(tmp_path, 0) == ["shown as before", "for its files", "at the session's level"]
    shown = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["shown as before", "at the session's level"]


def test_handlers_of_other_classes_and_streams_elsewhere_get_what_they_got(tmp_path: Path) -> None:
    heard: list[Any] = []

    class Listening(logging.StreamHandler):  # type: ignore[type-arg]
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    moved = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("lib")
    logger.addHandler(Listening(sys.stderr))
    logger.addHandler(moved)
    handle = configure(tmp_path, 0)
    logger.info("still")
    with (tmp_path / "moved.txt").open("w") as elsewhere:
        moved.setStream(elsewhere)
        logger.info("moved")
        moved.setStream(sys.stderr)
    handle.close()
    assert heard == ["still", "moved"]
    assert (tmp_path / "moved.txt").read_text() == "moved\n"


def test_close_puts_everything_back(tmp_path: Path) -> None:
    logger = library_logger()
    before = (logging.Logger.callHandlers, list(logging.getLogger().handlers))
    handle = configure(tmp_path, 0)
    logger.warning("hello")
    assert logging.Logger.callHandlers is not before[0]
    handle.close()
    assert (logging.Logger.callHandlers, logging.getLogger().handlers) == before
    assert logging.getLogger("lib").handlers[0].filters == []
    assert logging.lastResort is not None
    assert logging.lastResort.filters == []


def test_level_that_somebody_chose_meanwhile_stays(tmp_path: Path) -> None:
    handle = configure(tmp_path, 0)
    logging.getLogger().setLevel("ERROR")
    handle.close()
    assert logging.getLogger().level == logging.ERROR


def test_layer_that_came_later_stays_and_ours_inside_it_passes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: heard.append("ours"))
    monkeypatch.setattr(logging.Logger, "callHandlers", lambda self, record: heard.append("below"))
    chain = Chain(handler, logging.INFO)
    inside = logging.Logger.callHandlers

    def later(self: logging.Logger, record: logging.LogRecord) -> None:
        heard.append("later")
        inside(self, record)

    monkeypatch.setattr(logging.Logger, "callHandlers", later)
    logging.getLogger("lib").error("a")
    chain.close()
    assert logging.Logger.callHandlers is later
    logging.getLogger("lib").error("b")
    assert heard == ["later", "ours", "below", "later", "below"]
