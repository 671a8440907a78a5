"""A file of findings that are known and not reported again, found by their code: lines may move.

A finding is known by its file, its rule and the text of its line, blanks aside, and as often as it was there.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable

from rankwise.check.config import ConfigError
from rankwise.check.finding import Finding

_VERSION = 1
_Key = tuple[str, str, str]
"""Path relative to the file's folder, rule, code."""

Code = Callable[[str, int], str]
"""The text of a line of a file, as the findings name it."""


class Baseline:
    """The findings that are known.

    Args:
        path: the file that they are written in.
    """

    def __init__(self, path: str, known: Counter[_Key] | None = None) -> None:
        self._folder = os.path.dirname(os.path.abspath(path))
        self._known: Counter[_Key] = Counter() if known is None else known

    def drop_known(self, findings: Iterable[Finding], code: Code) -> list[Finding]:
        """The findings that are new, in their order. Of equal ones the first are taken for the known ones."""
        left = Counter(self._known)
        new = []
        for finding in findings:
            key = self.key(finding, code)
            if left[key] > 0:
                left[key] -= 1
            else:
                new.append(finding)
        return new

    def num_gone(self, findings: Iterable[Finding], checked: Iterable[str], code: Code) -> int:
        """How many known findings of the checked files are no longer there."""
        paths = {self._relative(path) for path in checked}
        gone = self._known - Counter(self.key(finding, code) for finding in findings)
        return sum(count for (path, _, _), count in gone.items() if path in paths)

    def key(self, finding: Finding, code: Code) -> _Key:
        """What a finding is known by."""
        text = " ".join(code(finding.path, finding.line).split())
        return self._relative(finding.path), finding.rule, text

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self._folder).replace(os.sep, "/")


def read_baseline(path: str) -> Baseline:
    """The baseline in the file.

    Raises:
        ConfigError: it cannot be read or is none.
    Ranks: local.
    """
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
        if document["version"] != _VERSION:
            raise ConfigError(
                f"{path} is a baseline of version {document['version']!r}; this rankwise reads {_VERSION}"
            )
        known: Counter[_Key] = Counter()
        for entry in document["findings"]:
            key = (entry["path"], entry["rule"], entry["code"])
            if not all(isinstance(part, str) for part in key) or type(entry["count"]) is not int:
                raise TypeError("an entry is of another form")
            known[key] += entry["count"]
    except OSError as error:
        raise ConfigError(
            f"the baseline {path} cannot be read: {error.strerror}. Make it with --write-baseline {path}"
        ) from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path} is no baseline ({type(error).__name__}: {error}). Make it anew with --write-baseline {path}"
        ) from error
    return Baseline(path, known)


def write_baseline(path: str, findings: Iterable[Finding], code: Code) -> None:
    """Write the findings as known ones.

    Raises:
        ConfigError: the file cannot be written.
    Ranks: local.
    """
    from rankwise.files import write_atomic  # with pathlib, which a mere check does without

    base = Baseline(path)
    counts = Counter(base.key(finding, code) for finding in findings)
    entries = [
        {"path": name, "rule": rule, "code": text, "count": counts[name, rule, text]}
        for name, rule, text in sorted(counts)
    ]
    content = json.dumps({"version": _VERSION, "findings": entries}, indent=1) + "\n"
    try:
        write_atomic(os.path.realpath(path), content)
    except OSError as error:
        raise ConfigError(f"the baseline {path} cannot be written: {error.strerror}") from error
