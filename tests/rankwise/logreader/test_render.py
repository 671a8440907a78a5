"""What people and programs read."""

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.logreader.folding import Group, single
from rankwise.logreader.merge import Entry
from rankwise.logreader.records import read_head
from rankwise.logreader.render import Renderer, painter, render_json


def group_of(logs: Any, rank: int, message: str, *, ranks: tuple[int, ...] = (), **more: Any) -> Group:
    line = logs.line(rank, 0.25, message, **more)
    head = read_head(line)
    assert head is not None
    group = single(Entry(head.time, rank, line.rstrip(), logs.record(rank, 0.25, message, **more), rank, None))
    for other in ranks:
        group.add(other, is_equal=True)
    return group


def test_columns_are_aligned_for_all_ranks(logs: Any) -> None:
    renderer = Renderer(range(1024), None)
    assert renderer.render(group_of(logs, 3, "hello")) == (
        "2026-05-01T12:00:00.250Z INFO     rank 3     train: hello\n"
    )
    assert renderer.render(group_of(logs, 1023, "hello", level="WARNING")) == (
        "2026-05-01T12:00:00.250Z WARNING  rank 1023  train: hello\n"
    )


def test_a_folded_line_says_how_many_and_which_ranks(logs: Any) -> None:
    line = Renderer(range(512), None).render(group_of(logs, 0, "hello", ranks=tuple(range(1, 512)), step=7))
    assert line.endswith("rank 0    train: hello  (x512, ranks 0-511, step 7)\n")


def test_a_folded_line_says_where_numbers_differ(logs: Any) -> None:
    group = group_of(logs, 2, "5 GiB")
    group.add(4, is_equal=False)
    assert Renderer([4], None).render(group).endswith("(x2, ranks 2, 4, numbers differ)\n")


def test_a_repeated_line_names_its_one_rank(logs: Any) -> None:
    assert Renderer([4], None).render(group_of(logs, 4, "again", ranks=(4, 4))).endswith("again  (x3, rank 4)\n")


def test_very_many_scattered_ranks_are_cut_short(logs: Any) -> None:
    line = Renderer([1000], None).render(group_of(logs, 0, "hello", ranks=tuple(range(2, 1000, 2))))
    assert len(line) < 250
    assert "x500, ranks 0, 2, 4" in line
    assert ", ...)" in line


def test_more_lines_of_a_message_and_its_traceback_are_indented(logs: Any) -> None:
    error = ("ValueError", "bad", "Traceback (most recent call last):\n  File f.py\nValueError: bad\n")
    text = Renderer([0], None).render(group_of(logs, 0, "failed\nbadly", error=error, step=3))
    assert text.splitlines()[0].endswith("train: failed  (step 3)")
    assert text.splitlines()[1:] == [
        "    badly",
        "    Traceback (most recent call last):",
        "      File f.py",
        "    ValueError: bad",
    ]


def test_a_terminal_is_not_moved_by_what_a_log_says(logs: Any) -> None:
    text = Renderer([0], None).render(group_of(logs, 0, "50%\r100% \x1b]0;title\x07 \x9b2J", logger="\x1b[31m"))
    assert not any(ord(character) < 32 for character in text.rstrip("\n"))
    assert "\\x1b]0;title\\x07 \\x9b2J" in text
    assert "50%\\x0d100%" in text


@given(st.dictionaries(st.sampled_from(["message", "level", "logger", "exception", "step"]), st.text(), max_size=5))
def test_any_fields_are_lines_of_which_the_first_has_the_time(fields: dict[str, Any]) -> None:
    entry = Entry(b"2026-05-01T12:00:00.250000", 0, b"", {"message": "m"} | fields, 0, None)
    first, *others = Renderer([0], None).render(single(entry)).splitlines()
    assert first.startswith("2026-05-01T12:00:00.250Z ")
    assert all(line.startswith("    ") or not line for line in others)


def test_the_worker_that_wrote_is_named(logs: Any) -> None:
    group = group_of(logs, 0, "hello")
    group.first = group.first._replace(worker=77)
    assert Renderer([0], None).render(group).endswith("train: hello  (worker 77)\n")
    group.first.fields["worker"] = 3
    assert Renderer([0], None).render(group).endswith("train: hello  (worker 3)\n")


def test_json_is_the_line_of_the_file(logs: Any) -> None:
    group = group_of(logs, 0, "h\u00e9llo")
    assert render_json(group, is_folded=False) == logs.line(0, 0.25, "h\u00e9llo").decode()


def test_folded_json_adds_ranks_and_count(logs: Any) -> None:
    fields = json.loads(render_json(group_of(logs, 0, "hello", ranks=(1, 1)), is_folded=True))
    assert fields == logs.record(0, 0.25, "hello") | {"ranks": [0, 1], "count": 3, "numbers_differ": False}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_no_colour() -> None:
    assert painter(io.StringIO()) is None


def test_a_terminal_gets_colour_and_the_date_once(logs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    renderer = Renderer([0], painter(Terminal()))
    first, second = (renderer.render(group_of(logs, 0, "hello", level="ERROR")) for _ in range(2))
    assert "-- 2026-05-01 UTC --" in first
    assert "\x1b[1;31mhello\x1b[0m" in first
    assert "2026-05-01" not in second
    assert "12:00:00.250" in second


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colour_can_be_refused(logs: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv(name, value)
    text = Renderer([0], painter(Terminal())).render(group_of(logs, 0, "hello"))
    assert text == "-- 2026-05-01 UTC --\n12:00:00.250 INFO     rank 0  train: hello\n"


def test_stack_stands_below_its_line(logs: Any) -> None:
    group = group_of(logs, 0, "hello")
    group.first.fields["stack"] = "Stack (most recent call last):\n  here"
    shown = Renderer([0], None).render(group).splitlines()
    assert shown[1:] == ["    Stack (most recent call last):", "      here"]
