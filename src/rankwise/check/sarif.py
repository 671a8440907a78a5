"""What was found, in SARIF 2.1.0, the form that code scanning services take.

Source: OASIS, Static Analysis Results Interchange Format (SARIF) Version 2.1.0.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rankwise.check.config import OWN_CODES
from rankwise.check.finding import Edit, Finding
from rankwise.check.formats import rule_name
from rankwise.check.rules import RULES

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {"error": "error", "warning": "warning", "info": "note"}


def as_sarif(findings: Sequence[Finding], code: Callable[[str, int], str]) -> str:
    """One log with one run.

    Args:
        code: the text of a line of a file, as the findings name it.
    Ranks: local.
    """
    codes = [*RULES, *OWN_CODES]
    seen: Counter[str] = Counter()
    results = []
    for finding in findings:
        key = "\0".join((finding.rule, finding.path, " ".join(code(finding.path, finding.line).split())))
        seen[key] += 1
        fingerprint = hashlib.sha256(f"{key}\0{seen[key]}".encode("utf-8", "backslashreplace")).hexdigest()
        results.append(_result(finding, codes.index(finding.rule), fingerprint))
    run = {
        "tool": {"driver": {"name": "rankwise", "version": _version(), "rules": [_rule(code) for code in codes]}},
        "columnKind": "unicodeCodePoints",
        "results": results,
    }
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1) + "\n"


def _rule(code: str) -> dict[str, Any]:
    described: dict[str, Any] = {"id": code, "name": rule_name(code)}
    if code not in RULES:
        return described | {"defaultConfiguration": {"level": "error" if code == "RW000" else "warning"}}
    rule = RULES[code]
    explained = rule.explain()
    return described | {
        "shortDescription": {"text": rule.summary},
        "help": {"text": explained, "markdown": explained},
        "defaultConfiguration": {"level": _LEVELS[rule.severity], "enabled": rule.default},
    }


def _result(finding: Finding, rule_index: int, fingerprint: str) -> dict[str, Any]:
    region = {
        "startLine": finding.line,
        "startColumn": finding.column,
        "endLine": finding.end_line,
        "endColumn": finding.end_column,
    }
    result: dict[str, Any] = {
        "ruleId": finding.rule,
        "ruleIndex": rule_index,
        "level": _LEVELS[finding.severity],
        "message": {"text": finding.message},
        "locations": [{"physicalLocation": _location(finding.path, region)}],
        "partialFingerprints": {"rankwiseCode/v1": fingerprint},
    }
    if finding.trail:
        # A code flow goes from the source of a value to its use; the trail goes back.
        steps = [
            {"location": {"physicalLocation": _location(s.path, {"startLine": s.line}), "message": {"text": s.text}}}
            for s in reversed(finding.trail)
        ]
        result["codeFlows"] = [{"threadFlows": [{"locations": steps}]}]
    if finding.edits:
        replacements = [_replacement(edit) for edit in finding.edits]
        change = {"artifactLocation": {"uri": _uri(finding.path)}, "replacements": replacements}
        result["fixes"] = [{"artifactChanges": [change]}]
    return result


def _replacement(edit: Edit) -> dict[str, Any]:
    region = {
        "startLine": edit.line,
        "startColumn": edit.column + 1,
        "endLine": edit.end_line,
        "endColumn": edit.end_column + 1,
    }
    return {"deletedRegion": region, "insertedContent": {"text": edit.replacement}}


def _location(path: str, region: dict[str, int]) -> dict[str, Any]:
    return {"artifactLocation": {"uri": _uri(path)}, "region": region}


def _uri(path: str) -> str:
    from urllib.parse import quote

    quoted = quote(os.fsencode(path))
    return f"file://{quoted}" if os.path.isabs(path) else quoted


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rankwise")
    except PackageNotFoundError:  # run from its sources
        return "0"
