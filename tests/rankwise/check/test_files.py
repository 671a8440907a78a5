"""Finding files, and reading whatever is in them."""

import os
from pathlib import Path

import pytest

from rankwise.check.files import (
    DEFAULT_EXCLUDE,
    MAX_BYTES,
    Lines,
    SourceFile,
    decode,
    find_files,
    read_file,
    shown_path,
    split_lines,
)
from rankwise.check.finding import CannotParse
from rankwise.check.globs import PathPatterns


def find(*paths: str, exclude: tuple[str, ...] = (), force: bool = False) -> list[str]:
    found, unreadable = find_files(
        list(paths), PathPatterns(exclude).match, respects_gitignore=True, excludes_given=force
    )
    assert not unreadable
    return found


def make(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def source(raw: bytes) -> SourceFile:
    decoded = decode("a.py", raw)
    assert isinstance(decoded, SourceFile), decoded
    return decoded


def refusal(raw: bytes) -> CannotParse:
    decoded = decode("a.py", raw)
    assert isinstance(decoded, CannotParse)
    return decoded


def test_python_files_below_a_folder_are_found_sorted_and_once() -> None:
    make("b.py", "a/z.py", "a/c.pyw", "a/notes.txt", "a/.hidden/x.py")
    assert find(".", "a", "./b.py") == ["a/.hidden/x.py", "a/c.pyw", "a/z.py", "b.py"]


def test_what_is_excluded_is_left_out_but_not_when_it_was_named() -> None:
    make("a.py", ".venv/lib/x.py", "node_modules/y.py", "src/build/z.py")
    assert find(".", exclude=DEFAULT_EXCLUDE) == ["a.py"]
    assert find(".venv/lib/x.py", exclude=DEFAULT_EXCLUDE) == [".venv/lib/x.py"]
    assert find(".venv/lib/x.py", "a.py", exclude=DEFAULT_EXCLUDE, force=True) == ["a.py"]


def test_a_named_file_needs_no_suffix() -> None:
    make("train")
    assert find("train") == ["train"]
    assert find(".") == []


def test_links_lead_neither_around_in_circles_nor_twice_to_one_file() -> None:
    make("a/real.py", "elsewhere/far.py")
    os.symlink("..", "a/up")
    os.symlink("real.py", "a/another.py")
    os.symlink("gone.py", "a/dangling.py")
    os.symlink("loop.py", "a/loop.py")
    os.symlink("../elsewhere/far.py", "a/near.py")
    assert find("a") == ["a/near.py", "a/real.py"]
    assert find(".") == ["a/real.py", "elsewhere/far.py"]


def test_pipes_and_folders_that_are_called_like_files_are_no_files() -> None:
    os.mkdir("folder.py")
    os.mkfifo("pipe.py")
    assert find(".") == []
    result = read_file("pipe.py")
    assert isinstance(result, CannotParse)
    assert "no regular file" in result.message


def test_a_folder_that_cannot_be_read_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    make("a.py", "closed/b.py")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root reads everything
    found, unreadable = find_files(["."], lambda path: False, respects_gitignore=True, excludes_given=False)
    assert found == ["a.py"]
    assert unreadable == [CannotParse("closed", 1, "the folder cannot be read: Permission denied")]


def test_paths_are_shown_relative_to_the_working_directory(tmp_path: Path) -> None:
    assert shown_path("./a//b.py") == "a/b.py"
    assert shown_path(str(tmp_path / "a.py")) == "a.py"
    assert shown_path("/elsewhere/a.py") == "/elsewhere/a.py"
    assert shown_path("link/../a.py") == "link/../a.py"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"x = 1\r\ny = 2\r\n",
        b"\xef\xbb\xbfx = 1",
        b"# coding: latin-1\nx = '\xe9'\n",
        b"#!/usr/bin/python\n# -*- coding: cp1252 -*-\r\nx = '\x80'\r\n",
        "# coding: utf-8\nx = '\u00e9\u6f22'\n".encode(),
        "# coding: shift_jis\nx = '\u6f22'\n".encode("shift_jis"),
    ],
)
def test_the_same_text_gives_the_same_bytes_again(raw: bytes) -> None:
    decoded = source(raw)
    assert decoded.encode(decoded.text) == raw
    assert not decoded.text.startswith("\ufeff")
    compile(decoded.text, "a.py", "exec", dont_inherit=True)


def test_bytes_that_have_two_ways_to_be_written_are_not_written_again() -> None:
    raw = b"# coding: utf-7\nx = '+AGE-'\n"  # `a`, written the long way
    assert source(raw).encode(source(raw).text) is None


def test_text_that_the_encoding_lacks_cannot_be_written() -> None:
    assert source(b"# coding: ascii\nx = 1\n").encode("x = '\u00e9'") is None


@pytest.mark.parametrize(
    ("raw", "line", "message"),
    [
        (b"x = 1\r\ny = '\xff'\n", 2, "byte 0xff is not utf-8"),
        (b"# coding: nonsense\n", 1, "unknown encoding"),
        (b"# coding: rot13\n", 1, "not a text encoding"),
        (b"\xef\xbb\xbf# coding: latin-1\n", 1, "cannot be decoded"),
        (b"x" * (MAX_BYTES + 1), 1, "more than 4 MiB"),
        ("x = 1".encode("utf-16"), 1, "byte 0xff is not utf-8"),
    ],
)
def test_what_cannot_be_decoded_is_told_with_its_line(raw: bytes, line: int, message: str) -> None:
    refused = refusal(raw)
    assert refused.line == line
    assert message in refused.message


def test_a_file_that_is_gone_is_told_of() -> None:
    assert read_file("gone.py") == CannotParse("gone.py", 1, "the file cannot be read: No such file or directory")


def test_lines_are_those_that_python_counts() -> None:
    text = "a = 1\r\nb = '\x0c\u2028'\rc = 2\nd"
    assert split_lines(text) == ["a = 1", "b = '\x0c\u2028'", "c = 2", "d"]
    lines = Lines({"a.py": text})
    assert [lines("a.py", number) for number in (0, 1, 4, 5)] == ["", "a = 1", "d", ""]
    assert lines("other.py", 1) == ""
