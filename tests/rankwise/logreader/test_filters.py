"""Which records are shown."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from rankwise.logreader.filters import build_filter, build_line_filter, level_number
from rankwise.logreader.options import parse_options
from rankwise.logreader.records import read_head

NOW = datetime(2026, 5, 1, 12, 1, tzinfo=UTC)


def is_shown(line: bytes, *arguments: str) -> bool:
    head = read_head(line)
    assert head is not None
    fields, is_record = build_filter(parse_options(["run", *arguments], NOW))(head, line)
    assert is_record
    return fields is not None


@pytest.mark.parametrize(("level", "shown"), [("DEBUG", False), ("INFO", False), ("WARNING", True), ("CRITICAL", True)])
def test_a_level_shows_itself_and_those_above(logs: Any, level: str, shown: bool) -> None:
    assert is_shown(logs.line(0, 0, "x", level=level), "--level", "warning") is shown


def test_a_level_that_is_not_known_is_shown() -> None:
    assert level_number("VERY LOUD") > level_number("CRITICAL")
    assert level_number("Level 25") == 25


@pytest.mark.parametrize(("name", "shown"), [("train", True), ("train.loop", True), ("trainer", False), ("", False)])
def test_a_logger_shows_itself_and_those_below(logs: Any, name: str, shown: bool) -> None:
    assert is_shown(logs.line(0, 0, "x", logger=name), "--logger", "train") is shown


@pytest.mark.parametrize(("step", "shown"), [(9, False), (10, True), (20, True), (21, False), (None, False)])
def test_steps_show_records_made_in_them(logs: Any, step: int | None, shown: bool) -> None:
    assert is_shown(logs.line(0, 0, "x", step=step), "--steps", "10:20") is shown


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--since", "2026-05-01T12:00:30"], True),
        (["--since", "2026-05-01T12:00:30.000001"], False),
        (["--since", "30s"], True),
        (["--since", "29s"], False),
        (["--until", "2026-05-01T12:00:30"], True),
        (["--until", "2026-05-01T12:00:29.999999"], False),
    ],
)
def test_times_include_both_ends(logs: Any, arguments: list[str], shown: bool) -> None:
    assert is_shown(logs.line(0, 30, "x"), *arguments) is shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [("loss is nan", True), ("nan$", False), (r"loss.*nan", True), ("Loss", False), ("(?i)LOSS", True), ("f.py", True),
     ("FloatingPointError: of", True), ("\u00e9t\u00e9", True), ("ete", False)],
)  # fmt: skip
def test_text_is_looked_for_in_message_error_and_traceback(logs: Any, text: str, shown: bool) -> None:
    error = ("FloatingPointError", "of step 5", "File f.py, line 3\n")
    assert is_shown(logs.line(0, 0, "loss is nan in \u00e9t\u00e9", error=error), "--text", text) is shown


def test_text_is_looked_for_in_the_stack(logs: Any) -> None:
    line = json.dumps(logs.record(0, 0, "hello") | {"stack": "Stack (most recent call last):\n  in prepare"}).encode()
    assert is_shown(line, "--text", "in prepare")
    assert not is_shown(logs.line(0, 0, "hello"), "--text", "in prepare")


def test_text_that_a_file_writes_with_escapes_is_found() -> None:
    line = rb'{"time": "2026-05-01T12:00:00.000000+00:00", "level": "INFO", "message": "\u006coss"}'
    assert is_shown(line, "--text", "loss")


def test_a_line_without_the_text_is_refused_unparsed() -> None:
    wants = build_line_filter(parse_options(["run", "--text", "loss"], NOW))
    assert wants(b'{"message": "loss"')
    assert not wants(b'{"message": "gain"')


def test_a_line_whose_head_alone_is_whole_is_no_record(logs: Any) -> None:
    line = logs.line(0, 0, "cut here", level="ERROR")[:-20]
    head = read_head(line)
    assert head is not None
    assert build_filter(parse_options(["run"], NOW))(head, line) == (None, False)
