"""One line of a log file: what is taken as a record, and when."""

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.logreader.records import message_of, read_fields, read_head, step_of, time_key, traceback_of


def line_of(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


TIME = "2026-05-01T12:00:00.250000+00:00"


def test_a_line_in_the_layout_of_the_contract_is_not_parsed(logs: Any) -> None:
    head = read_head(logs.line(3, 0.25, "hello", level="ERROR"))
    assert head == (b"2026-05-01T12:00:00.250000", "ERROR", None)


@pytest.mark.parametrize("time", ["2026-05-01T12:00:00.25Z", "2026-05-01T14:00:00.250+02:00", "2026-05-01T12:00:00.25"])
def test_a_record_in_another_layout_gets_the_same_time(time: str) -> None:
    head = read_head(line_of(message="hello", level="INFO", time=time))
    assert head is not None
    assert head.time == b"2026-05-01T12:00:00.250000"
    assert head.fields == {"message": "hello", "level": "INFO", "time": time}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"Traceback (most recent call last):",
        b"[1, 2]",
        b'"text"',
        b"{",
        b"\xff\xfe",
        line_of(step=3, loss=0.5),
        line_of(message="no time"),
        line_of(message="time of a number", time=1777636800.0),
        line_of(message="no such day", time="2026-02-31T00:00:00+00:00"),
        line_of(message="before all years", time="0001-01-01T00:00:00+05:00"),
        line_of(message="two", time=TIME) + line_of(message="in one", time=TIME),
        b"[" * 100_000,
        b'{"message": "m", "time": ' + b"9" * 10_000 + b"}",
    ],
    ids=range(14),
)
def test_a_foreign_line_is_no_record(line: bytes) -> None:
    assert read_head(line) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_none(line: bytes) -> None:
    read_head(line)
    read_fields(line)


@given(st.integers(1, 300))
def test_a_torn_line_has_no_fields(num_lost: int) -> None:
    whole = line_of(time=TIME, level="INFO", logger="train", message="x" * 300)
    assert read_fields(whole[:-num_lost]) is None


@given(st.datetimes(min_value=datetime(1, 1, 3), max_value=datetime(9999, 12, 29)), st.integers(-23, 23))
def test_a_time_is_one_text_in_every_zone(moment: datetime, hours: int) -> None:
    aware = moment.replace(tzinfo=UTC)
    assert time_key(aware.astimezone(timezone(timedelta(hours=hours)))) == time_key(moment) == time_key(aware)


def test_an_error_is_part_of_what_a_record_says() -> None:
    fields = {"message": "step failed", "exception": {"type": "ValueError", "message": "bad", "traceback": "Trace\n"}}
    assert message_of(fields) == "step failed\nValueError: bad"
    assert traceback_of(fields) == "Trace\n"
    del fields["exception"]["traceback"]
    assert traceback_of(fields) == "ValueError: bad"


@pytest.mark.parametrize("exception", [None, "ValueError", 7, ["a"]])
def test_an_error_of_another_form_is_left_out(exception: object) -> None:
    assert message_of({"message": 5, "exception": exception}) == "5"
    assert traceback_of({"message": 5, "exception": exception}) == ""


@pytest.mark.parametrize(("step", "expected"), [(7, 7), (0, 0), (None, None), (True, None), ("7", None), (1.5, None)])
def test_a_step_is_a_whole_number(step: object, expected: int | None) -> None:
    assert step_of({"message": "", "step": step}) == expected
