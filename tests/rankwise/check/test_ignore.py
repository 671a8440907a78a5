"""Comments that silence findings."""

import pytest

from rankwise.check.finding import Finding
from rankwise.check.ignore import IgnoreComments


def at(line: int, rule: str = "RW101", *, column: int = 1, end_line: int | None = None) -> Finding:
    return Finding(rule, "a.py", line, column, end_line or line, column + 1, "error", "what it says")


def ignores(text: str, finding: Finding) -> bool:
    return IgnoreComments("a.py", text).ignores(finding)


@pytest.mark.parametrize(
    "comment",
    [
        "# rankwise: ignore[RW101] it is a test",
        "#rankwise:ignore[RW101]",
        "# rankwise: ignore[RW301, RW101]",
        "# rankwise: ignore [ rw101 ] reason",
        "# rankwise: ignore[device-from-global-rank]",
        "# rankwise: ignore[RW1]",
        "# rankwise: ignore",
        "# rankwise: ignore because",
        "# type: ignore  # rankwise: ignore[RW101] reason",
        "# noqa: E501 rankwise: # rankwise: ignore[RW101]",
    ],
)
def test_a_comment_ignores_the_findings_of_its_line(comment: str) -> None:
    text = f"x = 1\nset_device(rank)  {comment}\ny = 2\n"
    assert ignores(text, at(2))
    assert not ignores(text, at(1))
    assert not ignores(text, at(3))


@pytest.mark.parametrize("comment", ["# rankwise: ignore[RW301]", "# rankwise ignore[RW101]", "x = 'rankwise'"])
def test_another_comment_ignores_nothing(comment: str) -> None:
    assert not ignores(f"set_device(rank)  {comment}\n", at(1))


def test_text_in_a_string_is_no_comment() -> None:
    text = 'x = "# rankwise: ignore[RW101]"; set_device(rank)\n"""\n# rankwise: ignore-file\n"""\n'
    assert not ignores(text, at(1))


MULTI_LINE = """\
call(
    first,
    second,
)
"""


@pytest.mark.parametrize(("line", "expected"), [(0, True), (1, False), (2, False), (3, True)])
def test_a_comment_at_the_start_or_the_end_of_a_statement_covers_it(line: int, expected: bool) -> None:
    lines = MULTI_LINE.splitlines()
    lines[line] += "  # rankwise: ignore[RW101] reason"
    assert ignores("\n".join(lines), at(3, column=5)) is (expected or line == 2)
    assert ignores("\n".join(lines), at(2, column=5)) is (expected or line == 1)


def test_a_comment_at_the_end_of_the_finding_covers_it() -> None:
    text = "call(\n    a(\n    ),  # rankwise: ignore[RW101]\n    c,\n)\n"
    assert ignores(text, at(2, column=5, end_line=3))


COMPOUND = """\
if (  # one
    a
):  # two

    # three
    x()
    while b:  # four
        y()
"""


@pytest.mark.parametrize(
    ("word", "line", "expected"),
    [
        ("one", 2, True),
        ("two", 2, True),
        ("three", 2, False),
        ("two", 6, False),
        ("three", 6, True),
        ("two", 8, False),
        ("four", 8, False),
        ("four", 7, True),
    ],
)
def test_of_a_statement_with_a_body_the_head_alone_is_covered(word: str, line: int, expected: bool) -> None:
    text = COMPOUND.replace(f"# {word}", "# rankwise: ignore[RW101] reason")
    assert ignores(text, at(line, column=5)) is expected


@pytest.mark.parametrize(
    "head", ["match a:", "try:", "for a in b:", "with a:", "class A:", "@decorated\n    def f():", "async def f():"]
)
def test_a_comment_behind_a_head_does_not_cover_the_body(head: str) -> None:
    body = "case 1:\n            set_device(rank)" if head.startswith("match") else "set_device(rank)"
    text = f"if a:\n    {head}  # rankwise: ignore[RW101]\n        {body}\n"
    text += "    finally:\n        pass\n" if head == "try:" else ""
    compile(text, "a.py", "exec")
    line = text[: text.index("set_device")].count("\n") + 1
    assert not ignores(text, at(line, column=9))
    assert ignores(text, at(line - body.count("\n") - 1, column=5))


def test_a_comment_alone_on_its_line_covers_the_next_statement() -> None:
    text = (
        "def f():\n    # rankwise: ignore[RW101] reason\n    # more of it\n\n    call(\n        rank)\n    call(rank)\n"
    )
    assert ignores(text, at(5, column=5))
    assert ignores(text, at(6, column=9))
    assert not ignores(text, at(7, column=5))


def test_a_file_can_ignore_rules_as_a_whole() -> None:
    text = "x = 1\n\n# rankwise: ignore-file[RW101, RW301] an example of mistakes\n"
    assert ignores(text, at(1))
    assert ignores(text, at(1, "RW301"))
    assert not ignores(text, at(1, "RW302"))
    assert ignores("# rankwise: ignore-file\n", at(9, "RW302"))


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_line_ends_of_every_kind_are_counted_alike(newline: str) -> None:
    text = newline.join(["x = 1", "set_device(rank)  # rankwise: ignore[RW101] reason", "y = 1", ""])
    assert ignores(text, at(2))
    assert not ignores(text, at(3))


@pytest.mark.parametrize(
    ("comment", "message"),
    [
        ("# rankwise: ignore[RW109]", "'RW109' is no rule"),
        ("# rankwise: ignore[]", "no code in the brackets"),
        ("# rankwise: ignore[RW101", "codes cannot be read"),
        ("# rankwise: ignore: RW101", "codes cannot be read"),
        ("# rankwise: ignroe[RW101]", "'ignroe' is nothing to say"),
        ("# rankwise: disable=RW101", "'disable' is nothing to say"),
    ],
)
def test_a_comment_that_is_not_understood_ignores_nothing_and_is_told_of(comment: str, message: str) -> None:
    comments = IgnoreComments("a.py", f"x = 1\nset_device(rank)  {comment}\n")
    assert not comments.ignores(at(2))
    (mistake,) = comments.mistakes
    assert (mistake.rule, mistake.severity, mistake.line, mistake.column) == ("RW001", "warning", 2, 19)
    assert mistake.end_column == 19 + len(comment)
    assert message in mistake.message


def test_comments_that_ignored_nothing_are_known() -> None:
    text = (
        "a(rank)  # rankwise: ignore[RW101, RW301]\n"
        "b(rank)  # rankwise: ignore\n"
        "c(rank)  # rankwise: ignore[RW602]\n"
        "d(rank)  # rankwise: ignore\n"
    )
    comments = IgnoreComments("a.py", text)
    assert comments.ignores(at(1))
    assert comments.ignores(at(4))
    unused = comments.unused({"RW101", "RW301"})
    assert [(finding.line, finding.severity) for finding in unused] == [(1, "info"), (2, "info")]
    assert "RW301" in unused[0].message
    assert "RW101" not in unused[0].message


def test_a_file_that_is_no_python_has_the_comments_before_the_fault() -> None:
    text = "x = 1  # rankwise: ignore[RW101]\n  y = (\n'''\n"
    assert ignores(text, at(1))
    assert not ignores("\0" * 5 + text, at(2))
