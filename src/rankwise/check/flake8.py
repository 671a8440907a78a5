"""The rules as a plugin of flake8, which then reports them with its own: `flake8 --select RW`.

flake8 gives one file at a time, so values are not followed from file to file; its `# noqa` holds, and our own ignore
comments too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rankwise.check.config import Config
from rankwise.check.finding import Finding
from rankwise.check.run import Checker


class Plugin:
    """One file, as flake8 hands it over.

    Args:
        tree: not used; it is how flake8 knows that the plugin is to be called once a file.
        filename: as flake8 shows it.
        lines: of the file, with their ends.
    """

    name = "rankwise"
    version = "1"
    """Of the plugin; flake8 shows it."""

    def __init__(self, tree: object, filename: str, lines: Sequence[str]) -> None:
        self._path = filename
        self._text = "".join(lines)

    def run(self) -> Iterator[tuple[int, int, str, type[Plugin]]]:
        """Line, column from 0, text and class, for each finding of the default rules.

        Ranks: local.
        """
        for finding in Checker(Config()).find({self._path: self._text}):
            if finding.rule != "RW000":  # flake8 has its own word for what cannot be parsed
                yield finding.line, finding.column - 1, f"{finding.rule} {_message(finding)}", Plugin


def _message(finding: Finding) -> str:
    """The message and the nearest step of the value's way, on one line."""
    way = f" ({finding.trail[0].text}, line {finding.trail[0].line})" if finding.trail else ""
    return " ".join(f"{finding.message}{way}".split())
