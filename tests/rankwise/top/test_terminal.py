"""Keys as terminals send them, and lines as they take them."""

import pytest
from rich.color import ColorSystem

from rankwise.top.terminal import Painter, color_system, parse_keys


@pytest.mark.parametrize(
    ("sent", "keys"),
    [
        ("jk", ["j", "k"]),
        ("\x1b[A\x1b[B\x1bOC\x1b[D", ["up", "down", "right", "left"]),
        ("\x1b[5~\x1b[6~\x1b[H\x1b[4~", ["pgup", "pgdn", "home", "end"]),
        ("\r\x7f\x15", ["enter", "backspace", "clear"]),
        ("\x1b", ["escape"]),
        ("\x1bq", ["escape", "q"]),
        ("\x1b[200~q\x1b[1;5A\x1b[<0;3;4M", ["q"]),
        ("\x00\x07", []),
    ],
)
def test_keys_are_named(sent: str, keys: list[str]) -> None:
    assert parse_keys(sent) == keys


@pytest.mark.parametrize(
    ("environ", "colors"),
    [
        ({"TERM": "xterm"}, ColorSystem.STANDARD),
        ({"TERM": "xterm-256color"}, ColorSystem.EIGHT_BIT),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, ColorSystem.TRUECOLOR),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, None),
    ],
)
def test_colours_are_those_of_the_terminal(environ: dict[str, str], colors: ColorSystem | None) -> None:
    assert color_system(environ) == colors


def test_painted_line_has_its_codes_and_no_colour_where_there_is_none() -> None:
    line = [("DD", "black on #E69F00"), (" plain ", ""), ("x", "bold red")]
    assert Painter(ColorSystem.TRUECOLOR).paint(line) == "\x1b[30;48;2;230;159;0mDD\x1b[0m plain \x1b[1;31mx\x1b[0m"
    assert Painter(None).paint(line) == "DD plain \x1b[1mx\x1b[0m"
