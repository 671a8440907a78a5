"""One check: what is reported, in which order, by one process or by several."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import pytest

from rankwise.check.analyze import Analysis
from rankwise.check.config import Config
from rankwise.check.finding import CannotParse, Finding
from rankwise.check.run import Checker, separate

pytestmark = pytest.mark.usefixtures("toy_engine")

TEXT = "set_device(rank)\nmakedirs(path)\ninit_process_group()\n"


def places(findings: list[Finding]) -> list[tuple[str, int, str]]:
    return [(finding.path, finding.line, finding.rule) for finding in findings]


def test_findings_are_sorted_with_the_files_that_could_not_be_read_among_them() -> None:
    texts = {"b.py": TEXT, "a.py": "x = 1\n" + TEXT, "c.py": "x = (\n"}
    found = Checker(Config()).find(texts, [CannotParse("aa.py", 3, "the file cannot be read")])
    assert places(found) == [
        ("a.py", 2, "RW101"),
        ("a.py", 3, "RW303"),
        ("aa.py", 3, "RW000"),
        ("b.py", 1, "RW101"),
        ("b.py", 2, "RW303"),
        ("c.py", 1, "RW000"),
    ]
    assert found[2].message == "cannot parse: the file cannot be read"
    assert found[2].severity == "error"


@pytest.mark.parametrize(
    ("config", "rules"),
    [
        (Config(), ["RW101", "RW303"]),
        (Config(select=("ALL",)), ["RW101", "RW303", "RW103"]),
        (Config(select=("ALL",), severity="warning"), ["RW101", "RW303"]),
        (Config(severity="error"), ["RW101"]),
        (Config(ignore=("RW303",)), ["RW101"]),
        (Config(per_file_ignores={"a.py": ("RW1",)}), ["RW303"]),
        (Config(per_file_ignores={"b.py": ("RW1",)}), ["RW101", "RW303"]),
    ],
)
def test_the_settings_choose_what_is_reported(config: Config, rules: list[str]) -> None:
    assert [finding.rule for finding in Checker(config).find({"a.py": TEXT})] == rules


def test_ignored_findings_are_not_reported_and_wrong_comments_are() -> None:
    text = "set_device(rank)  # rankwise: ignore[RW101] reason\nset_device(rank)  # rankwise: ignore[RW999]\n"
    assert places(Checker(Config()).find({"a.py": text})) == [("a.py", 2, "RW101"), ("a.py", 2, "RW001")]


def test_comments_without_effect_are_reported_where_that_was_asked_for() -> None:
    text = "x = 1  # rankwise: ignore[RW101] reason\n"
    assert Checker(Config()).find({"a.py": text}) == []
    (found,) = Checker(Config(unused_ignores=True)).find({"a.py": text})
    assert (found.rule, found.severity) == ("RW001", "info")
    quiet = "# rankwise: ignore-file[RW001] kept for later\n" + text
    assert Checker(Config(unused_ignores=True)).find({"a.py": quiet}) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RecursionError("deep"), "it is nested too deeply to be checked"),
        (KeyError("x"), "this rankwise fails on it (KeyError: 'x'); please report it"),
    ],
)
def test_a_file_that_the_engine_fails_on_is_told_of_and_the_others_are_checked(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankwise.check import run

    analyze = run.analyze

    def fail(sources: Mapping[str, str], enabled: Collection[str]) -> Analysis:
        if any("boom" in text for text in sources.values()):
            raise error
        return analyze(sources, enabled)

    monkeypatch.setattr(run, "analyze", fail)
    found = Checker(Config()).find({"a.py": TEXT, "b.py": "boom"})
    assert places(found) == [("a.py", 1, "RW101"), ("a.py", 2, "RW303"), ("b.py", 1, "RW000")]
    assert message in found[2].message


@pytest.mark.parametrize("num_jobs", [2, 3, 8])
def test_several_processes_find_the_same(num_jobs: int) -> None:
    texts = {f"file{number}.py": TEXT if number % 2 else "x = (" for number in range(9)} | {"z.py": "import file1\n"}
    checker = Checker(Config())
    assert replace(checker, num_jobs=num_jobs).find(texts) == checker.find(texts)
    assert replace(checker, num_jobs=num_jobs).find({}) == []


def test_files_that_import_each_other_stay_together() -> None:
    texts = {
        "pkg/__init__.py": "",
        "pkg/helpers.py": "def rank(): ...\n",
        "train.py": "from pkg.helpers import (\n    rank,\n)\n",
        "eval.py": "import os, pkg\n",
        "lone.py": "import torch\n",
        "inner/deep.py": "if True:\n    from . import other\n",
        "inner/other.py": "",
        "one.py": "",
        "two.py": "try: import a, \\\n    one\nfinally: x = 1\n",
        "three.py": "",
        "four.py": "x = 1; from a import (b,  # not c)\n    three)\n",
    }
    groups = sorted(sorted(group) for group in separate(texts))
    assert groups == [
        ["eval.py", "pkg/__init__.py", "pkg/helpers.py", "train.py"],
        ["four.py", "three.py"],
        ["inner/deep.py", "inner/other.py"],
        ["lone.py"],
        ["one.py", "two.py"],
    ]
