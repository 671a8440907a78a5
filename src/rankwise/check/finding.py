"""What the checker says: findings, the way a value took to get there, and edits that mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""The worst first."""


@dataclass(frozen=True)
class Step:
    """One step of the way that a value or a guard took, the last one first: "rank <- dist.get_rank()"."""

    text: str
    path: str
    line: int
    """1-based."""


@dataclass(frozen=True)
class Edit:
    """A piece of the source to replace: everything from the first place up to, not including, the second.

    Two equal places insert. Lines are 1-based. Columns are 0-based and count characters of the line, not bytes.
    Edits of one finding do not overlap; those of two findings may, or may be equal.
    """

    line: int
    column: int
    end_line: int
    end_column: int
    replacement: str


@dataclass(frozen=True)
class Finding:
    """One mistake, at one place.

    Lines and columns are 1-based, columns count characters; the end is one past the last character.
    """

    rule: str
    """Its code, "RW101"."""
    path: str
    """The key of the file in what was given to `analyze`."""
    line: int
    column: int
    end_line: int
    end_column: int
    severity: Severity
    message: str
    trail: tuple[Step, ...] = ()
    edits: tuple[Edit, ...] = ()
    """All of them together mend it; empty where no safe way is known."""


@dataclass(frozen=True)
class CannotParse:
    """A file that could not be read as Python of the running version."""

    path: str
    line: int
    """1-based; 1 where no line is to blame."""
    message: str
