"""Edits change what they say and not one byte more."""

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankwise.check.files import SourceFile, decode, split_lines
from rankwise.check.finding import Edit, Finding
from rankwise.check.fixes import MAX_PASSES, apply_findings, diff, mend, write_source


def finding(*edits: Edit) -> Finding:
    return Finding("RW101", "a.py", 1, 1, 1, 2, "error", "what it says", (), edits)


def source(path: Path, raw: bytes) -> SourceFile:
    path.write_bytes(raw)
    decoded = decode(str(path), raw)
    assert isinstance(decoded, SourceFile)
    return decoded


def replace_all(old: str, new: str) -> Callable[[Mapping[str, str]], list[Finding]]:
    """What `mend` asks: a finding with an edit for every `old` in the texts."""

    def find(texts: Mapping[str, str]) -> list[Finding]:
        found = []
        for path, text in texts.items():
            for number, line in enumerate(split_lines(text), 1):
                if (column := line.find(old)) >= 0:
                    edit = Edit(number, column, number, column + len(old), new)
                    found.append(Finding("RW101", path, number, 1, number, 2, "error", "x", (), (edit,)))
        return found

    return find


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_an_edit_leaves_everything_else_as_it_is(newline: str, end: str) -> None:
    text = newline.join(["x = '\u6f22\u00e9'  ", "\tset_device(rank) # \x0c\u2028 ", "\ty = 1"]) + end.replace(
        "\n", newline
    )
    changed = apply_findings(text, [finding(Edit(2, 12, 2, 16, "local_rank"))])
    assert changed == text.replace("(rank)", "(local_rank)")


def test_new_lines_end_as_those_around_them() -> None:
    text = "a = 1\r\nb = 2\nc = 3"
    edits = [finding(Edit(line, 5, line, 5, "\nz = 0")) for line in (1, 2, 3)]
    assert apply_findings(text, edits) == "a = 1\r\nz = 0\r\nb = 2\nz = 0\nc = 3\nz = 0"


def test_edits_over_several_lines_and_at_the_end_are_applied() -> None:
    text = "a = (1,\n  2)\nb"
    assert apply_findings(text, [finding(Edit(1, 4, 2, 4, "3"), Edit(3, 1, 3, 1, " = 5\n"))]) == "a = 3\nb = 5\n"


def test_equal_edits_of_two_findings_are_applied_once() -> None:
    edit = Edit(1, 0, 1, 0, "import x\n")
    assert apply_findings("a = 1\n", [finding(edit), finding(edit)]) == "import x\na = 1\n"


def test_of_findings_that_meet_the_first_is_mended_whole_and_the_other_not_at_all() -> None:
    first = finding(Edit(1, 0, 1, 3, "x"), Edit(1, 6, 1, 7, "y"))
    other = finding(Edit(1, 2, 1, 4, "z"), Edit(1, 8, 1, 9, "w"))
    assert apply_findings("abcdefghij", [first, other]) == "xdefyhij"
    assert apply_findings("abcdefghij", [other, first]) == "abzefghwj"


@pytest.mark.parametrize(
    "edit", [Edit(0, 0, 0, 1, "x"), Edit(2, 0, 2, 9, "x"), Edit(9, 0, 9, 0, "x"), Edit(2, 1, 1, 0, "x")]
)
def test_an_edit_outside_of_the_text_is_not_applied(edit: Edit) -> None:
    assert apply_findings("a\nb", [finding(edit, Edit(1, 0, 1, 1, "c"))]) == "a\nb"


def test_mending_goes_on_until_nothing_is_left_and_then_changes_nothing() -> None:
    find = replace_all("g(", "(")
    texts = {"a.py": "g(g(g(1)))\n", "b.py": "y = 1\n"}
    changed = mend(texts, find)
    assert changed == {"a.py": "(((1)))\n"}
    assert mend(changed, find) == {}


def test_edits_without_an_end_are_given_up() -> None:
    changed = mend({"a.py": "x\n"}, replace_all("x", "xx"))
    assert changed == {"a.py": "x" * (MAX_PASSES + 1) + "\n"}


def test_a_file_that_would_no_longer_parse_stays() -> None:
    texts = {"a.py": "x = 1\n", "b.py": "x = [1]\n"}
    assert mend(texts, replace_all("= 1", "= (")) == {}
    assert mend(texts, replace_all("1", "2")) == {"a.py": "x = 2\n", "b.py": "x = [2]\n"}


def test_a_mended_file_keeps_its_permissions_and_its_link(tmp_path: Path) -> None:
    real = tmp_path / "real.py"
    source(real, b"\xef\xbb\xbfx = 1\r\n")
    real.chmod(0o754)
    link = tmp_path / "link.py"
    link.symlink_to("real.py")
    read = decode(str(link), real.read_bytes())
    assert isinstance(read, SourceFile)
    assert write_source(read, "x = 2\r\n") is None
    assert link.is_symlink()
    assert real.read_bytes() == b"\xef\xbb\xbfx = 2\r\n"
    assert real.stat().st_mode & 0o777 == 0o754
    assert sorted(os.listdir(tmp_path)) == ["link.py", "real.py"]


def test_a_file_that_changed_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    read = source(path, b"x = 1\n")
    path.write_bytes(b"x = 5\n")
    assert write_source(read, "x = 2\n") == "it was changed meanwhile"
    assert path.read_bytes() == b"x = 5\n"
    path.unlink()
    assert write_source(read, "x = 2\n") == "it cannot be written: No such file or directory"


def test_a_file_whose_encoding_is_in_the_way_stays(tmp_path: Path) -> None:
    raw = b"# coding: ascii\nx = 1\n"
    read = source(tmp_path / "a.py", raw)
    refused = write_source(read, "# coding: ascii\nx = '\u00e9'\n")
    assert refused is not None
    assert "its encoding, ascii" in refused
    assert diff(read, "x = '\u00e9'\n") == b""
    assert (tmp_path / "a.py").read_bytes() == raw


@pytest.mark.parametrize(
    "raw",
    [
        b"x = 1\ny = 2\n",
        b"x = 1\r\ny = 2\r\n",
        b"x = 1",
        b"a = 0\nx = 1",
        b"\xef\xbb\xbfz = 5\nx = 1\n",
        b"# coding: latin-1\nz = '\xe9'\nx = 1\n",
        b"z = '\x0c'\n\x0c\nx = 1\n",
    ],
)
def test_the_patch_does_what_fix_does(raw: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("git") is None and os.environ.get("CI") != "true":
        pytest.skip("no git")
    monkeypatch.chdir(tmp_path)
    read = source(Path("a.py"), raw)
    text = read.text.replace("x = 1", "x = 3\r\nw = 4" if b"\r" in raw else "x = 3\nw = 4")
    patch = diff(read, text)
    command = ["git", "apply", "--whitespace=nowarn", "-"]
    subprocess.run(command, input=patch, check=True, env={"PATH": os.environ["PATH"], "GIT_DIR": "/nowhere"})
    assert Path("a.py").read_bytes() == read.encode(text)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(alphabet="ab\r\n\t\u6f22", max_size=20), st.lists(st.tuples(*[st.integers(0, 5)] * 4), max_size=6))
def test_any_edits_leave_what_they_do_not_name(text: str, places: list[tuple[int, int, int, int]]) -> None:
    findings = [finding(Edit(*place, "#")) for place in places]
    changed = apply_findings(text, findings)
    left = changed.replace("#", "")
    rest = iter(text)
    assert all(char in rest for char in left), "what is left is the text with pieces cut out"
    assert changed.count("#") <= len(places)
