"""Findings for programs: JSON and GitHub's annotations."""

import json

import pytest

from rankwise.check.finding import Edit, Finding, Step
from rankwise.check.formats import as_github, as_json, printable_path

TRAIL = (Step("rank <- dist.get_rank()", "b.py", 40),)
FULL = Finding("RW101", "a.py", 3, 5, 4, 9, "error", "what it says", TRAIL, (Edit(3, 4, 3, 8, "local_rank"),))
PLAIN = Finding("RW000", "a.py", 1, 1, 1, 1, "error", "cannot parse: no Python")


def test_json_is_a_list_with_an_object_for_each_finding() -> None:
    assert json.loads(as_json([FULL, PLAIN])) == [
        {
            "rule": "RW101",
            "name": "device-from-global-rank",
            "path": "a.py",
            "line": 3,
            "column": 5,
            "end_line": 4,
            "end_column": 9,
            "severity": "error",
            "message": "what it says",
            "trail": [{"text": "rank <- dist.get_rank()", "path": "b.py", "line": 40}],
            "fixable": True,
        },
        {
            "rule": "RW000",
            "name": "cannot-parse",
            "path": "a.py",
            "line": 1,
            "column": 1,
            "end_line": 1,
            "end_column": 1,
            "severity": "error",
            "message": "cannot parse: no Python",
            "trail": [],
            "fixable": False,
        },
    ]
    assert json.loads(as_json([])) == []


def test_a_path_that_is_no_text_is_written_with_escapes() -> None:
    strange = Finding("RW101", "a\udcff\n.py", 1, 1, 1, 2, "error", "x")
    assert printable_path("a\udcff.py") == "a\\xff.py"
    assert json.loads(as_json([strange]))[0]["path"] == "a\\xff\n.py"
    as_github([strange]).encode()


@pytest.mark.parametrize(("severity", "level"), [("error", "error"), ("warning", "warning"), ("info", "notice")])
def test_an_annotation_has_the_level_place_and_title(severity: str, level: str) -> None:
    finding = Finding("RW301", "src/a.py", 3, 5, 3, 9, severity, "what it says")  # type: ignore[arg-type]
    place = "file=src/a.py,line=3,endLine=3,col=5,endColumn=9"
    assert as_github([finding]) == f"::{level} {place},title=RW301 unguarded-write::what it says\n"


def test_an_annotation_over_several_lines_has_no_columns_and_one_line_of_output() -> None:
    assert as_github([FULL]) == (
        "::error file=a.py,line=3,endLine=4,title=RW101 device-from-global-rank"
        "::what it says%0Arank <- dist.get_rank() (b.py:40)\n"
    )


def test_characters_that_steer_an_annotation_are_escaped() -> None:
    finding = Finding("RW301", "a,b:c%\r.py", 1, 1, 1, 2, "error", "100%\r\nof: it, ::error::")
    (line,) = as_github([finding]).split("\n")[:-1]
    assert "file=a%2Cb%3Ac%25%0D.py," in line
    assert line.endswith("::100%25%0D%0Aof: it, ::error::")
