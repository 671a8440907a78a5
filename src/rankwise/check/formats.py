"""What was found, as programs read it: JSON, annotations of GitHub's workflows, and SARIF (`sarif.py`)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from rankwise.check.config import OWN_CODES
from rankwise.check.finding import Finding
from rankwise.check.rules import RULES

_GITHUB_LEVELS = {"error": "error", "warning": "warning", "info": "notice"}


def rule_name(code: str) -> str:
    """The name that goes with a rule's code.

    Ranks: local.
    """
    return RULES[code].name if code in RULES else OWN_CODES[code]


def printable_path(path: str) -> str:
    """The path as text; bytes in it that are no UTF-8 are written as escapes.

    Ranks: local.
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def as_json(findings: Sequence[Finding]) -> str:
    """A list of objects, one for each finding, one to a line.

    Ranks: local.
    """
    lines = [json.dumps(_object(finding)) for finding in findings]
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


def as_github(findings: Iterable[Finding]) -> str:
    """Workflow commands, which GitHub shows at the lines of a pull request.

    Ranks: local.
    Source: "Workflow commands for GitHub Actions"; the escapes are those of `command.ts` in actions/toolkit.
    """
    return "".join(_annotation(finding) for finding in findings)


def _object(finding: Finding) -> dict[str, Any]:
    return {
        "rule": finding.rule,
        "name": rule_name(finding.rule),
        "path": printable_path(finding.path),
        "line": finding.line,
        "column": finding.column,
        "end_line": finding.end_line,
        "end_column": finding.end_column,
        "severity": finding.severity,
        "message": finding.message,
        "trail": [{"text": s.text, "path": printable_path(s.path), "line": s.line} for s in finding.trail],
        "fixable": bool(finding.edits),
    }


def _annotation(finding: Finding) -> str:
    place = {"file": printable_path(finding.path), "line": finding.line, "endLine": finding.end_line}
    if finding.end_line == finding.line:  # GitHub takes columns for one line alone
        place |= {"col": finding.column, "endColumn": finding.end_column}
    place["title"] = f"{finding.rule} {rule_name(finding.rule)}"
    properties = ",".join(f"{name}={_escape_property(str(value))}" for name, value in place.items())
    message = "\n".join([finding.message, *(f"{s.text} ({printable_path(s.path)}:{s.line})" for s in finding.trail)])
    return f"::{_GITHUB_LEVELS[finding.severity]} {properties}::{_escape_data(message)}\n"


def _escape_data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(text: str) -> str:
    return _escape_data(text).replace(":", "%3A").replace(",", "%2C")
