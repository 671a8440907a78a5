"""The files to check: found below the given paths, read, and decoded as Python does."""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import tokenize
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from rankwise.check.finding import CannotParse
from rankwise.check.gitignore import IgnoreFile, is_ignored, outer_ignore_files, read_ignore_file

MAX_BYTES = 4 << 20
"""Larger files are written by programs; their syntax tree would take gigabytes."""

SUFFIXES = (".py", ".pyw")

DEFAULT_EXCLUDE = (
    *(".bzr", ".direnv", ".eggs", ".git", ".hg", ".hypothesis", ".ipynb_checkpoints", ".mypy_cache", ".nox"),
    *(".pants.d", ".pyenv", ".pytest_cache", ".pytype", ".ruff_cache", ".svn", ".tox", ".venv", ".vscode"),
    *("__pycache__", "__pypackages__", "_build", "buck-out", "build", "dist", "node_modules", "site-packages", "venv"),
)
"""Names of folders and files that nobody asked about, nearly those that other tools leave out."""

LINE_END = re.compile(r"\r\n|\r|\n")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class SourceFile:
    """One file to check."""

    path: str
    """As it is shown."""
    raw: bytes
    text: str
    """Without the byte order mark, its line ends as they are."""
    encoding: str

    def encode(self, text: str) -> bytes | None:
        """The bytes of the file with another text; None where its encoding cannot say it, or has no one way to."""
        mark = BOM if self.raw.startswith(BOM) else b""
        with _quiet():
            try:
                # An encoding with more than one way to say a thing would change bytes that no one asked to change.
                if mark + self.text.encode(self.encoding) != self.raw:
                    return None
                return mark + text.encode(self.encoding)
            except (LookupError, ValueError):
                return None


def split_lines(text: str) -> list[str]:
    """The lines as Python counts them, without their ends: no form feed or Unicode separator ends one.

    Ranks: local.
    """
    return LINE_END.split(text)


class Lines:
    """The lines of some texts, looked up by path and number."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts
        self._lines: dict[str, list[str]] = {}

    def __call__(self, path: str, line: int) -> str:
        """The text of a line; empty where there is none."""
        if path not in self._lines:
            self._lines[path] = split_lines(self._texts.get(path, ""))
        lines = self._lines[path]
        return lines[line - 1] if 0 < line <= len(lines) else ""


def find_files(
    paths: list[str], is_excluded: Callable[[str], bool], *, respects_gitignore: bool, excludes_given: bool
) -> tuple[list[str], list[CannotParse]]:
    """The Python files at and below `paths`, each once, and the folders that cannot be read.

    Links to folders are not followed; a link to a file is, unless that file is found by itself.

    Args:
        is_excluded: asked with a path as it is shown, of a file or of a folder.
        excludes_given: asks it also about the paths that were given.
    Ranks: local.
    """
    found: dict[str, str] = {}
    unreadable: list[CannotParse] = []
    for path in paths:
        shown = shown_path(path)
        if excludes_given and is_excluded(shown):
            continue
        below = _walk(path, is_excluded, respects_gitignore, unreadable) if os.path.isdir(path) else iter([shown])
        for file in below:
            real = os.path.realpath(file)
            if real not in found or (os.path.islink(found[real]) and not os.path.islink(file)):
                found[real] = file
    return sorted(found.values()), unreadable


def shown_path(path: str) -> str:
    """The path relative to the working directory where it lies below it, else as it is; no `./` in front.

    Ranks: local.
    """
    # A link before `..` leads elsewhere than the names say.
    normal = path if ".." in path.split("/") else os.path.normpath(path)
    if not os.path.isabs(normal):
        return normal
    here = os.getcwd()
    return os.path.relpath(normal, here) if normal.startswith(here.rstrip("/") + "/") else normal


def _walk(
    root: str, is_excluded: Callable[[str], bool], respects_gitignore: bool, unreadable: list[CannotParse]
) -> Iterator[str]:
    outer = outer_ignore_files(os.path.abspath(root)) if respects_gitignore else ()
    folders: list[tuple[str, tuple[IgnoreFile, ...]]] = [(root, outer)]
    while folders:
        folder, ignore_files = folders.pop()
        shown = shown_path(folder)
        if respects_gitignore and (own := read_ignore_file(os.path.abspath(folder))) is not None:
            ignore_files = (*ignore_files, own)
        try:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            unreadable.append(CannotParse(shown, 1, f"the folder cannot be read: {error.strerror}"))
            continue
        for entry in entries:
            path = entry.name if shown == "." else os.path.join(shown, entry.name)
            is_directory = _is_directory(entry)
            if not (is_directory or (entry.name.endswith(SUFFIXES) and _is_file(entry))) or is_excluded(path):
                continue
            if ignore_files and is_ignored(os.path.abspath(entry.path), ignore_files, is_directory=is_directory):
                continue
            if is_directory:
                folders.append((entry.path, ignore_files))
            else:
                yield path


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Also a file that is not allowed to be read; no pipe or device, which might never end."""
    try:
        return entry.is_file()
    except OSError:
        return False


def read_file(path: str) -> SourceFile | CannotParse:
    """The file at `path`, decoded.

    Ranks: local.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return CannotParse(path, 1, "this is no regular file; pipe it in instead: rankwise check -")
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        return CannotParse(path, 1, f"the file cannot be read: {error.strerror}")
    return decode(path, raw)


def decode(path: str, raw: bytes) -> SourceFile | CannotParse:
    """The text of a file, by its byte order mark, its coding line, or else UTF-8.

    Ranks: local.
    """
    if len(raw) > MAX_BYTES:
        return CannotParse(path, 1, f"the file has more than {MAX_BYTES >> 20} MiB, and is not checked")
    try:
        encoding = _encoding(raw)
        body = raw.removeprefix(BOM) if encoding == "utf-8" else raw
        with _quiet():
            text = body.decode(encoding)
    except UnicodeDecodeError as error:
        line = len(split_lines(raw[: error.start].decode("latin-1")))
        return CannotParse(path, line, f"byte 0x{raw[error.start : error.start + 1].hex()} is not {error.encoding}")
    except (SyntaxError, LookupError, ValueError) as error:
        return CannotParse(path, 1, f"the file cannot be decoded: {error}")
    return SourceFile(path, raw, text, encoding)


def _encoding(raw: bytes) -> str:
    stream = io.BytesIO(raw)
    if b"coding" not in stream.readline() + stream.readline():
        return "utf-8"
    stream.seek(0)
    encoding, _ = tokenize.detect_encoding(stream.readline)
    return "utf-8" if encoding == "utf-8-sig" else encoding


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Some codecs warn of what they are given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
