"""What git ignores, read from the .gitignore files themselves: git need not be there.

Source: gitignore(5), of git 2.39.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from rankwise.check.globs import compile_glob

_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class _Line:
    pattern: re.Pattern[str]
    is_anchored: bool
    """It is for paths below the file's own folder; else for a name at any depth."""
    is_negated: bool
    for_directories: bool


@dataclass(frozen=True)
class IgnoreFile:
    """The lines of the .gitignore file of one folder."""

    folder: str
    """Absolute."""
    lines: tuple[_Line, ...]

    def verdict(self, path: str, *, is_directory: bool) -> bool | None:
        """Whether the absolute path below the folder is ignored; None where no line speaks of it."""
        relative = path[len(self.folder.rstrip("/")) + 1 :]
        name = relative.rpartition("/")[2]
        for line in reversed(self.lines):
            if line.for_directories and not is_directory:
                continue
            if line.pattern.fullmatch(relative if line.is_anchored else name):
                return not line.is_negated
        return None


def read_ignore_file(folder: str, name: str = ".gitignore") -> IgnoreFile | None:
    """The ignore file of a folder; None where there is none, or none that can be read.

    Ranks: local.
    """
    path = os.path.join(folder, name)
    try:
        if not os.path.isfile(path):  # a pipe of that name would never end
            return None
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read(_MAX_BYTES)
    except OSError:
        return None
    lines = tuple(line for raw in text.split("\n") if (line := _parse(raw)) is not None)
    return IgnoreFile(folder, lines) if lines else None


def outer_ignore_files(folder: str) -> tuple[IgnoreFile, ...]:
    """The ignore files of the folders around `folder`, outermost first, from the root of its git repository on.

    Empty outside of a repository.

    Ranks: local.
    """
    around: list[str] = []
    current = folder
    while not os.path.exists(os.path.join(current, ".git")):
        parent = os.path.dirname(current)
        if parent == current:
            return ()
        around.append(parent)
        current = parent
    excluded = read_ignore_file(current, os.path.join(".git", "info", "exclude"))
    found = [excluded] if excluded is not None else []
    return (*found, *(file for outer in reversed(around) if (file := read_ignore_file(outer)) is not None))


def is_ignored(path: str, files: tuple[IgnoreFile, ...], *, is_directory: bool) -> bool:
    """Whether the innermost file that speaks of the absolute path ignores it.

    Args:
        files: of the folders that the path is in, outermost first.
    Ranks: local.
    """
    for file in reversed(files):
        verdict = file.verdict(path, is_directory=is_directory)
        if verdict is not None:
            return verdict
    return False


def _parse(raw: str) -> _Line | None:
    line = raw.removesuffix("\r")
    stripped = line.rstrip(" ")
    if stripped.endswith("\\") and len(stripped) < len(line):
        stripped += " "  # a space behind a backslash belongs to the pattern
    if not stripped or stripped.startswith("#"):
        return None
    is_negated = stripped.startswith("!")
    pattern = stripped[1:] if is_negated else stripped
    for_directories = pattern.endswith("/")
    pattern = pattern.removesuffix("/")
    if not pattern:
        return None
    is_anchored = "/" in pattern
    return _Line(compile_glob(pattern.removeprefix("/")), is_anchored, is_negated, for_directories)
