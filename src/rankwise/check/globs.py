"""Patterns for paths, as .gitignore has them: `*` stays within a name, `**` goes over any number of folders."""

from __future__ import annotations

import functools
import re


@functools.lru_cache(maxsize=4096)
def compile_glob(pattern: str) -> re.Pattern[str]:
    """A regular expression for whole paths with `/` between their names; anything is a pattern.

    Ranks: local.
    """
    pieces: list[str] = []
    position = 0
    while position < len(pattern):
        rest = pattern[position:]
        if rest.startswith("**/") and (position == 0 or pattern[position - 1] == "/"):
            piece, length = "(?:[^/]+/)*", 3
        elif rest == "**" and (position == 0 or pattern[position - 1] == "/"):
            piece, length = ".*", 2
        elif rest[0] == "*":
            piece, length = "[^/]*", 1
        elif rest[0] == "?":
            piece, length = "[^/]", 1
        elif rest[0] == "[":
            piece, length = _character_class(rest)
        elif rest[0] == "\\" and len(rest) > 1:
            piece, length = re.escape(rest[1]), 2
        else:
            piece, length = re.escape(rest[0]), 1
        if not (piece == "[^/]*" and pieces and pieces[-1] == piece):  # many stars in a row mean one, and cost as much
            pieces.append(piece)
        position += length
    return re.compile("".join(pieces), re.DOTALL)


def _character_class(rest: str) -> tuple[str, int]:
    """The expression for the `[...]` in front, and its length; a bracket that nothing closes is itself."""
    negated = rest[1:2] in ("!", "^")
    start = 2 if negated else 1
    end = rest.find("]", start + 1)  # a bracket right behind the opening one is a member
    if end < 0:
        return re.escape("["), 1
    members = rest[start:end].replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
    members = members.replace("^", "\\^").replace("&", "\\&").replace("~", "\\~").replace("|", "\\|")
    try:
        re.compile(f"[{members}]")
    except re.error:  # a range that ends before it begins matches nothing
        return "(?!)", end + 1
    return (f"(?!/)[^{members}]" if negated else f"(?!/)[{members}]"), end + 1


class PathPatterns:
    """Patterns of one settings file: those with a slash are for paths below its folder, others for any name in them."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self.patterns = patterns
        self._names = [compile_glob(pattern.rstrip("/")) for pattern in patterns if "/" not in pattern.rstrip("/")]
        self._paths = [
            compile_glob(pattern.removeprefix("./").strip("/")) for pattern in patterns if "/" in pattern.rstrip("/")
        ]

    def match(self, path: str) -> bool:
        """Whether the path, relative to the folder of the settings, or a folder that it is in, is meant.

        Ranks: local.
        """
        names = [name for name in path.split("/") if name not in ("", ".")]
        if any(pattern.fullmatch(name) for pattern in self._names for name in names):
            return True
        if not self._paths:
            return False
        heads = ["/".join(names[:depth]) for depth in range(1, len(names) + 1)]
        return any(pattern.fullmatch(head) for pattern in self._paths for head in heads)
