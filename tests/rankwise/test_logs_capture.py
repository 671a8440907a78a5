"""Exceptions, warnings and prints become records, and every hook is put back."""

import builtins
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankwise.logs.capture import Capture


def hooks() -> tuple[object, ...]:
    return sys.excepthook, threading.excepthook, warnings.showwarning, builtins.print


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[logging.LogRecord]]:
    """All records, of these tests and no handler but this one."""
    made: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", made.append)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield made
    logging.getLogger().setLevel(level)


def test_close_puts_back_every_hook() -> None:
    before = hooks()
    capture = Capture(lambda: None, prints=True)
    assert not set(before) & set(hooks())
    capture.close()
    assert hooks() == before


def test_hook_that_came_later_stays_and_ours_inside_it_passes_on(
    records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(sys, "excepthook", lambda *exception: heard.append("first"))
    capture = Capture(lambda: None)
    inside = sys.excepthook

    def later(*exception: object) -> None:
        heard.append("later")
        inside(*exception)  # type: ignore[arg-type]

    monkeypatch.setattr(sys, "excepthook", later)
    capture.close()
    assert sys.excepthook is later
    sys.excepthook(ValueError, ValueError(), None)
    assert heard == ["later", "first"]
    assert records == []


def test_uncaught_exception_is_a_record_of_the_file_only_and_goes_on_to_the_hook_before(
    records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[object] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: heard.append(error))
    capture = Capture(lambda: heard.append("flushed"))
    error = ValueError("boom")
    sys.excepthook(ValueError, error, None)
    capture.close()
    assert heard == ["flushed", error]
    (record,) = records
    assert (record.levelname, record.getMessage()) == ("CRITICAL", "uncaught ValueError in the main thread")
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert record.rankwise_file_only  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_default", [True, False])
def test_exception_of_a_thread_is_said_once(
    is_default: bool, records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[object] = []

    def theirs(args: threading.ExceptHookArgs) -> None:
        heard.append(args.exc_value)

    def fail() -> None:
        raise ValueError("boom")

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__ if is_default else theirs)
    capture = Capture(lambda: None)
    thread = threading.Thread(target=fail, name="loader")
    thread.start()
    thread.join()
    capture.close()
    (record,) = records
    assert record.getMessage() == "uncaught ValueError in thread loader"
    assert hasattr(record, "rankwise_file_only") is not is_default
    assert len(heard) == (0 if is_default else 1)


def test_thread_that_exits_is_no_news(records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    capture = Capture(lambda: None)
    thread = threading.Thread(target=sys.exit)
    thread.start()
    thread.join()
    capture.close()
    assert records == []


def test_warning_has_its_category_and_its_place(records: list[logging.LogRecord]) -> None:
    capture = Capture(lambda: None)
    warnings.warn("careful 100%", FutureWarning, stacklevel=1)
    capture.close()
    (record,) = records
    assert (record.name, record.levelname) == ("py.warnings", "WARNING")
    assert record.getMessage().startswith(f"FutureWarning: careful 100% ({__file__}:")


def test_prints_are_records_a_line_each(records: list[logging.LogRecord], capsys: pytest.CaptureFixture[str]) -> None:
    capture = Capture(lambda: None, prints=True)
    print("one", 2, sep="-")
    print("begun, ", end="")
    print("ended\nand another")
    print("1 %\r2 %\r3 %")
    print("elsewhere", file=sys.stderr)
    print("never ended", end="")
    capture.close()
    print("after")
    assert [record.getMessage() for record in records] == [
        "one-2", "begun, ended", "and another", "3 %", "never ended",
    ]  # fmt: skip
    assert {(record.name, record.levelname) for record in records} == {("print", "INFO")}
    assert capsys.readouterr() == ("after\n", "elsewhere\n")


def test_traceback_of_a_dying_process_stands_last_and_is_in_the_file(tmp_path: Path) -> None:
    code = f"""
import threading
from rankwise import logs
from rankwise.identity import Identity
logs.configure(Identity(0, 0, 0, 2, 2, 1), {str(tmp_path)!r})
logs.get_logger("a").warning("held for a second")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise ValueError("boom")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("held for a second") == done.stderr.count("ZeroDivisionError: division") == 1
    assert done.stderr.index("held for") < done.stderr.index("ValueError: boom")
    assert done.stderr.count("ValueError: boom") == 1
    assert '"type": "ValueError", "message": "boom"' in (tmp_path / "logs/rank-00000.jsonl").read_text()


def test_handler_that_prints_what_it_is_given_does_not_come_back(
    records: list[logging.LogRecord], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = logging.getLogger().handlers[0]
    monkeypatch.setattr(handler, "emit", lambda record: print("heard", record.getMessage()))
    capture = Capture(lambda: None, prints=True)
    print("hello")
    capture.close()
    assert capsys.readouterr().out == "heard hello\n"


def test_prints_are_prints_where_info_is_off(
    records: list[logging.LogRecord], capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    capture = Capture(lambda: None, prints=True)
    print("hello")
    capture.close()
    assert (capsys.readouterr().out, records) == ("hello\n", [])


def test_lines_that_threads_never_ended_come_out_apart(records: list[logging.LogRecord]) -> None:
    capture = Capture(lambda: None, prints=True)
    print("main ", end="")
    for name in ("one", "two"):
        thread = threading.Thread(target=print, args=(name,), kwargs={"end": ""})
        thread.start()
        thread.join()
    print("goes on")
    capture.close()
    assert sorted(record.getMessage() for record in records) == ["main goes on", "one", "two"]


def test_lines_of_threads_that_ended_do_not_gather_until_the_end(records: list[logging.LogRecord]) -> None:
    capture = Capture(lambda: None, prints=True)
    for number in range(3):
        thread = threading.Thread(target=print, args=(number,), kwargs={"end": ""})
        thread.start()
        thread.join()
    assert [record.getMessage() for record in records] == ["0", "1"]
    capture.close()
