"""Lines that align, sizes and times that people read."""

import io
import sys

import pytest

from rankwise.ckpt.output import columns, say, say_table, show_bytes, show_seconds


def test_columns_align_at_their_left_or_right_end() -> None:
    rows = [("step", "name"), ("5", "a"), ("1000", "long one")]
    assert columns(rows, right=(0,)) == ["step  name", "   5  a", "1000  long one"]


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB"), (1 << 60, "1024.0 PiB")],
)
def test_sizes_are_shown_in_the_unit_that_suits_them(num_bytes: int, shown: str) -> None:
    assert show_bytes(num_bytes) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-3, "0 s"), (119, "119 s"), (120, "2 minutes"), (7200, "2 hours"), (86400 * 10, "10 days")],
)
def test_times_are_shown_in_the_unit_that_suits_them(seconds: float, shown: str) -> None:
    assert show_seconds(seconds) == shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_heading_is_bold_on_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for no_color, heading in (("", "\x1b[1mname\x1b[0m\n"), ("1", "name\n")):
        stream = Terminal()
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("NO_COLOR", no_color)
        say_table([["name"], ["\x1b[1mx"]])
        assert stream.getvalue() == heading + "?[1mx\n"


def test_what_the_encoding_lacks_is_written_as_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    say("a\u2713b\nc")
    assert raw.getvalue() == b"a\\u2713b\nc\n"
