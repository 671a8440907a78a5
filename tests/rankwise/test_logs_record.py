"""A record in words: every field in its place, and no secret."""

import json
import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.identity import Identity
from rankwise.logs import state
from rankwise.logs.record import Form, make_item

IDENTITY = Identity(3, 1, 1, 4, 2, 2, hostname="node-a")
ORDER = ["time", "monotonic_ns", "level", "logger", "message", "rank", "local_rank", "node_rank", "host", "pid"]


def log_record(message: str = "hello", **more: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": message, "name": "a.b", "levelno": 20, "levelname": "INFO"} | more)


@settings(deadline=None)  # a loaded machine
@given(st.text(), st.one_of(st.none(), st.integers(0)))
def test_line_holds_the_fields_in_their_order(message: str, step: int | None) -> None:
    form = Form(IDENTITY, environ={})
    item = make_item(log_record(message))._replace(step=step)
    line = form.line(item)
    assert line.count(b"\n") == 1
    read = json.loads(line)
    assert read == form.fields(item)
    assert list(read) == ORDER + (["step"] if step is not None else [])
    assert read["message"] == message


def test_exception_and_worker_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "is_worker", True)
    error = ValueError("broken")
    item = make_item(log_record(exc_info=(ValueError, error, None), processName="loader-1"))
    read = json.loads(Form(IDENTITY, environ={}).line(item))
    assert list(read) == [*ORDER, "exception", "worker"]
    assert read["exception"] == {"type": "ValueError", "message": "broken", "traceback": "ValueError: broken\n"}
    assert read["worker"] == "loader-1"


def test_time_has_a_fixed_width_also_at_a_whole_second() -> None:
    item = make_item(log_record(created=1_700_000_000.0))
    assert Form(IDENTITY, environ={}).fields(item)["time"] == "2023-11-14T22:13:20.000000+00:00"


def test_secrets_are_hidden_in_message_and_traceback() -> None:
    secret = "abc-secret-abc"
    error = ValueError(secret)
    item = make_item(log_record(f"with {secret}", exc_info=(ValueError, error, None)))
    line = Form(IDENTITY, environ={"MY_TOKEN": secret}).line(item).decode()
    assert secret not in line
    assert "with ***" in line


def test_console_hears_of_the_device_too() -> None:
    told = Form(IDENTITY, "cuda:1", environ={}).told(make_item(log_record()))
    assert (told["device"], told["rank"]) == ("cuda:1", 3)


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


def test_value_without_text_costs_neither_the_record_nor_the_traceback() -> None:
    try:
        raise Mute
    except Mute as error:
        item = make_item(log_record("%s of %s", args=(error, "host"), exc_info=(Mute, error, error.__traceback__)))
    assert item.message == ("'%s of %s' with (<Mute that has no text: RuntimeError>, 'host') (RuntimeError: no words)")
    assert item.error is not None
    assert item.error["message"] == "<Mute that has no text: RuntimeError>"
    assert "test_value_without_text_costs" in item.error["traceback"]


def test_stack_that_was_asked_for_is_a_field_without_secrets() -> None:
    item = make_item(log_record(stack_info='Stack (most recent call last):\n  File "a.py", secret-value'))
    form = Form(IDENTITY, environ={"MY_KEY": "secret-value"})
    read = json.loads(form.line(item))
    assert list(read) == [*ORDER, "stack"]
    assert read["stack"] == 'Stack (most recent call last):\n  File "a.py", ***'
    assert form.told(item)["stack"] == read["stack"]


def test_record_of_a_class_of_its_own_says_its_message_in_its_own_way() -> None:
    class BraceRecord(logging.LogRecord):
        def getMessage(self) -> str:
            return str(self.msg).format(*self.args)  # type: ignore[misc]

    def braces(message: str) -> logging.LogRecord:
        return BraceRecord("a.b", logging.INFO, "a.py", 1, message, (3, 4), None)

    assert make_item(braces("{} of {}")).message == "3 of 4"
    assert make_item(braces("{} of {} in {}")).message.startswith("'{} of {} in {}' with (3, 4)")
