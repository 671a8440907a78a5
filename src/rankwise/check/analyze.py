"""From sources to findings, without running or importing any of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from rankwise.check.explore import explore
from rankwise.check.finding import CannotParse, Finding
from rankwise.check.rules import DEFAULT_RULES, RULES


@dataclass(frozen=True)
class Analysis:
    """What was found in the sources given together."""

    findings: tuple[Finding, ...]
    """By path, line, column and rule."""
    cannot_parse: tuple[CannotParse, ...]


def analyze(sources: Mapping[str, str | bytes], enabled: Collection[str] = DEFAULT_RULES) -> Analysis:
    """The findings of the enabled rules in all sources, with values followed from file to file.

    Args:
        sources: path -> content; bytes are decoded as Python does (BOM, coding line, else UTF-8). The path, relative
            or not, also says by which name other files import this one.
        enabled: codes of rules.
    Raises:
        KeyError: a code is no rule's.
    """
    unknown = set(enabled) - RULES.keys()
    if unknown:
        raise KeyError(f"{min(unknown)} is no rule; there are {', '.join(RULES)}")
    program = explore(sources)
    program.parse_rest()
    found = {finding for code in sorted(enabled) for finding in RULES[code].check(program) if finding.rule == code}
    ordered = sorted(found, key=lambda one: (one.path, one.line, one.column, one.rule, one.message))
    return Analysis(
        tuple(ordered), tuple(program.cannot_parse[path] for path in sources if path in program.cannot_parse)
    )
