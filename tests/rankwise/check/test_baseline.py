"""Findings that are known and not reported again."""

import json
import re
from pathlib import Path

import pytest

from rankwise.check.baseline import read_baseline, write_baseline
from rankwise.check.config import ConfigError
from rankwise.check.files import Lines
from rankwise.check.finding import Finding

TEXT = "import torch\nset_device(rank)\nsave(x)\nset_device(rank)\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def at(line: int, rule: str = "RW101", path: str = "a.py") -> Finding:
    return Finding(rule, path, line, 1, line, 2, "error", f"line {line}")


def test_known_findings_are_dropped_also_where_their_lines_moved() -> None:
    write_baseline("known.json", [at(2), at(3, "RW301"), at(4)], Lines({"a.py": TEXT}))
    moved = Lines({"a.py": "# new\n\n" + TEXT.replace("set", "    set")})
    known = read_baseline("known.json")
    assert known.drop_known([at(4), at(5, "RW301"), at(6)], moved) == []


def test_what_is_new_is_left() -> None:
    write_baseline("known.json", [at(2)], Lines({"a.py": TEXT}))
    known = read_baseline("known.json")
    lines = Lines({"a.py": TEXT, "b.py": TEXT})
    assert known.drop_known([at(2), at(4)], lines) == [at(4)]  # one more of the same
    assert known.drop_known([at(2, "RW301")], lines) == [at(2, "RW301")]
    assert known.drop_known([at(2, path="b.py")], lines) == [at(2, path="b.py")]
    assert known.drop_known([at(3)], lines) == [at(3)]
    assert known.drop_known([at(2)], lines) == []  # asked again from the start


def test_findings_that_are_gone_are_counted_in_the_checked_files_alone() -> None:
    lines = Lines({"a.py": TEXT, "b.py": TEXT})
    write_baseline("known.json", [at(2), at(4), at(3), at(3, path="b.py")], lines)
    known = read_baseline("known.json")
    assert known.num_gone([at(2)], ["a.py"], lines) == 2
    assert known.num_gone([at(2), at(4), at(3)], ["a.py"], lines) == 0


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_baseline("known.json", [at(2, path="src/a.py")], Lines({"src/a.py": TEXT}))
    assert json.loads(Path("known.json").read_text())["findings"][0]["path"] == "src/a.py"
    (tmp_path / "src").mkdir()
    monkeypatch.chdir(tmp_path / "src")
    assert read_baseline("../known.json").drop_known([at(2)], Lines({"a.py": TEXT})) == []


def test_the_same_findings_make_the_same_file() -> None:
    lines = Lines({"a.py": TEXT})
    write_baseline("one.json", [at(2), at(3), at(4)], lines)
    write_baseline("two.json", [at(4), at(3), at(2)], lines)
    assert Path("one.json").read_bytes() == Path("two.json").read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"version": 1}',
        b'{"version": 1, "findings": 3}',
        b'{"version": 1, "findings": [{"path": "a", "rule": "RW101", "code": 1, "count": 1}]}',
        b'{"version": 1, "findings": [{"path": "a", "rule": "RW101", "code": "x", "count": "1"}]}',
        b"[" * 100_000,
    ],
)
def test_a_file_that_is_no_baseline_is_refused(content: bytes) -> None:
    Path("known.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"known.json is no baseline .*--write-baseline"):
        read_baseline("known.json")


def test_a_baseline_of_another_version_or_place_is_told_of() -> None:
    Path("known.json").write_text('{"version": 2, "findings": []}')
    with pytest.raises(ConfigError, match="of version 2; this rankwise reads 1"):
        read_baseline("known.json")
    with pytest.raises(ConfigError, match=re.escape("gone.json cannot be read: No such file")):
        read_baseline("gone.json")
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        write_baseline("nowhere/known.json", [], Lines({}))
