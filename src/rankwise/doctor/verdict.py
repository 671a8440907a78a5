"""What a check says: pass, warn or fail, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["pass", "warn", "fail"]

ALONE = "one process: nothing to compare"
_WORSE: tuple[Status, ...] = ("pass", "warn", "fail")


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    status: Status
    message: str
    """What was found, in one line."""
    advice: str | None = None
    """What to do, None where there is nothing to do."""
    rows: Sequence[Mapping[str, Any]] | None = None
    """A row per rank or host, where the check has some to show."""

    def as_json(self) -> dict[str, Any]:
        """The check as the JSON object of `rankwise doctor --json`.

        Ranks: local.
        """
        said: dict[str, Any] = {"name": self.name, "status": self.status, "message": self.message}
        said["advice"] = self.advice
        return said if self.rows is None else said | {"rows": list(self.rows)}


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    status: Status
    message: str
    advice: str


def judge(
    name: str, findings: Iterable[Finding], otherwise: str, rows: Sequence[Mapping[str, Any]] | None = None
) -> Check:
    """One check out of what was found, the worst first; a pass that says `otherwise` where nothing was.

    Ranks: local.
    """
    ordered = sorted(findings, key=lambda finding: _WORSE.index(finding.status), reverse=True)
    if not ordered:
        return Check(name, "pass", otherwise, None, rows)
    advice = " ".join(dict.fromkeys(finding.advice for finding in ordered if finding.advice))
    message = "; ".join(finding.message.rstrip(".") for finding in ordered)
    return Check(name, ordered[0].status, message, advice or None, rows)
