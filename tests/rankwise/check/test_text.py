"""Findings for people."""

import pytest

from rankwise.check.finding import Edit, Finding, Step
from rankwise.check.text import as_text, count, summary, visible


def shown(finding: Finding, code: str, *, is_colored: bool = False) -> list[str]:
    return as_text([finding], lambda path, line: code if line == finding.line else "", is_colored=is_colored).split(
        "\n"
    )


def at(column: int, end_column: int, *, line: int = 41, end_line: int | None = None) -> Finding:
    return Finding("RW101", "a.py", line, column, end_line or line, end_column, "error", "what it says")


def test_a_finding_shows_its_place_code_and_the_way_of_the_value() -> None:
    trail = (Step("rank <- dist.get_rank()", "a.py", 40), Step("dist.get_rank()", "b.py", 7))
    finding = Finding("RW101", "a.py", 41, 23, 41, 27, "error", "what it says", trail, (Edit(1, 1, 1, 1, ""),))
    assert shown(finding, "    torch.cuda.set_device(rank)") == [
        "a.py:41:23: RW101 error: what it says [device-from-global-rank]",
        "     |",
        "  41 | torch.cuda.set_device(rank)",
        "     |                   ^^^^",
        "    = rank <- dist.get_rank()  line 40",
        "    = dist.get_rank()  b.py line 7",
        "    = --fix mends this",
        "",
        "",
    ]


@pytest.mark.parametrize(
    ("code", "finding", "expected"),
    [
        ("\tset(rank)", at(6, 10), ("set(rank)", "    ^^^^")),
        ("a =\tset(rank)", at(9, 13), ("a =    set(rank)", "           ^^^^")),
        ("x = '\u6f22\u5b57'; rank", at(11, 15), ("x = '\u6f22\u5b57'; rank", " " * 12 + "^^^^")),
        ("x = 'e\u0301'; rank", at(11, 15), ("x = 'e\u0301'; rank", " " * 9 + "^^^^")),
        ("rank", at(5, 5), ("rank", "    ^")),
        ("rank(", at(1, 3, end_line=43), ("rank(", "^^^^^")),
        ("x = '\x1b[31m' + rank", at(15, 19), ("x = '\\x1b[31m' + rank", " " * 17 + "^^^^")),
        ("short", at(90, 95), ("short", "     ^")),
    ],
)
def test_the_mark_stands_under_the_code(code: str, finding: Finding, expected: tuple[str, str]) -> None:
    lines = shown(finding, code)
    assert (lines[2].removeprefix("  41 | "), lines[3].removeprefix("     | ")) == expected


@pytest.mark.parametrize("column", [1, 60, 5_000, 9_998])
def test_a_long_line_is_cut_around_the_mark(column: int) -> None:
    code = ("0123456789" * 1000)[: column - 1] + "rank" + "0123456789" * 100
    _, _, line, mark, *_ = shown(at(column, column + 4), code)
    assert len(line) < 170
    assert line[mark.index("^") : mark.rindex("^") + 1] == "rank"


def test_a_finding_without_code_shows_its_place_alone() -> None:
    assert shown(Finding("RW000", "a.py", 1, 1, 1, 1, "error", "cannot parse: x"), "") == [
        "a.py:1:1: RW000 error: cannot parse: x [cannot-parse]",
        "",
        "",
    ]


def test_a_source_cannot_steer_the_terminal() -> None:
    trail = (Step("\x1b]0;x\x07", "\x1b.py", 1),)
    finding = Finding("RW101", "a\x1b\n.py", 1, 1, 1, 2, "error", "\x1b[2J", trail)
    text = "\n".join(shown(finding, "\x1b[2J\x00\x85\u202e"))
    assert not set(text) & set("\x1b\x07\x00\x85\u202e")
    assert visible("a\nb\u6f22") == "a\\nb\u6f22"


def test_colours_are_there_where_they_were_asked_for_alone() -> None:
    assert "\033[" in "\n".join(shown(at(1, 2), "rank", is_colored=True))
    assert "\033[" not in "\n".join(shown(at(1, 2), "rank"))


def test_the_summary_counts() -> None:
    info = Finding("RW602", "b.py", 1, 1, 1, 2, "info", "x", (), (Edit(1, 0, 1, 0, ""),))
    said = summary([at(1, 2), at(3, 4), info], 5, num_known=2)
    assert said == "Found 2 errors, 1 note in 2 of 5 files (2 known from the baseline). --fix mends 1 of them."
    assert summary([], 1) == "Nothing found in 1 file."
    assert count(2, "file") == "2 files"
