"""The plugin of flake8, called as flake8 calls it."""

import ast
import importlib
import tomllib
from pathlib import Path

import pytest

from rankwise.check.flake8 import Plugin

pytestmark = pytest.mark.usefixtures("toy_engine")


def report(text: str) -> list[tuple[int, int, str]]:
    found = list(Plugin(ast.parse(text), "a.py", text.splitlines(keepends=True)).run())
    assert all(kind is Plugin for *_, kind in found)
    return [(line, column, message) for line, column, message, _ in found]


def test_findings_have_a_line_a_column_from_zero_and_a_code_in_front() -> None:
    assert report("x = 1\nset_device(rank)\nmakedirs(path)\n") == [
        (2, 11, "RW101 what RW101 says (rank <- dist.get_rank(), line 1)"),
        (3, 0, "RW303 what RW303 says"),
    ]


def test_rules_that_are_off_and_ignored_findings_stay_out() -> None:
    assert report("init_process_group()\nset_device(rank)  # rankwise: ignore[RW101] reason\n") == []


def test_a_file_that_cannot_be_parsed_is_left_to_flake8() -> None:
    assert list(Plugin(None, "a.py", ["x = (\n"]).run()) == []


def test_the_entry_point_names_the_plugin() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    ((code, target),) = project["entry-points"]["flake8.extension"].items()
    assert code == "RW"
    module, _, name = target.partition(":")
    assert getattr(importlib.import_module(module), name) is Plugin
