"""What was found, for people: the place, the code with a mark under it, and the way of the value."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from rankwise.check.finding import SEVERITIES, Finding
from rankwise.check.formats import printable_path, rule_name

_MAX_COLUMNS = 140
"""Longer lines are cut around the mark: a program wrote them, or nobody would read them."""
_COLORS = {"error": "31", "warning": "33", "info": "36"}


def as_text(findings: Sequence[Finding], code: Callable[[str, int], str], *, is_colored: bool) -> str:
    """Some lines for each finding.

    Args:
        code: the text of a line of a file, as the findings name it.
    Ranks: local.
    """
    return "".join(_finding(finding, code, is_colored) + "\n" for finding in findings)


def summary(findings: Sequence[Finding], num_files: int, num_known: int = 0) -> str:
    """One line on how much was found.

    Ranks: local.
    """
    known = f" ({num_known} known from the baseline)" if num_known else ""
    if not findings:
        return f"Nothing found in {count(num_files, 'file')}{known}."
    by_severity = Counter(finding.severity for finding in findings)
    told = ", ".join(count(by_severity[s], "note" if s == "info" else s) for s in SEVERITIES if by_severity[s])
    with_findings = len({finding.path for finding in findings})
    num_fixable = sum(1 for finding in findings if finding.edits)
    fixable = f" --fix mends {num_fixable} of them." if num_fixable else ""
    return f"Found {told} in {with_findings} of {count(num_files, 'file')}{known}.{fixable}"


def visible(text: str) -> str:
    """The text with its control characters written as escapes: a source must not steer the terminal.

    Ranks: local.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def count(number: int, noun: str) -> str:
    """The number with its noun, in the plural where it is not one.

    Ranks: local.
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _finding(finding: Finding, code: Callable[[str, int], str], is_colored: bool) -> str:
    def paint(text: str, color: str) -> str:
        return f"\033[{color}m{text}\033[0m" if is_colored else text

    place = f"{visible(printable_path(finding.path))}:{finding.line}:{finding.column}"
    head = paint(f"{finding.rule} {finding.severity}", "1;" + _COLORS[finding.severity])
    lines = [f"{paint(place, '1')}: {head}: {visible(finding.message)} [{rule_name(finding.rule)}]"]
    content = code(finding.path, finding.line)
    if content.strip():
        number = str(finding.line)
        shown, mark = _excerpt(content, finding)
        margin = " " * len(number)
        lines += [f"  {margin} |", f"  {number} | {shown}", f"  {margin} | {paint(mark, _COLORS[finding.severity])}"]
    for step in finding.trail:
        where = f"line {step.line}" if step.path == finding.path else f"{printable_path(step.path)} line {step.line}"
        lines.append(f"    = {visible(step.text)}  {visible(where)}")
    if finding.edits:
        lines.append("    = --fix mends this")
    return "\n".join(lines) + "\n"


def _excerpt(content: str, finding: Finding) -> tuple[str, str]:
    """The line and the marks under it, as wide in a terminal as the code above them."""
    start = min(finding.column - 1, len(content))
    end = finding.end_column - 1 if finding.end_line == finding.line else len(content.rstrip())
    end = max(start + 1, min(end, len(content)))
    indent = len(content) - len(content.lstrip())
    first = min(indent, start)  # what stands before it is the same for all
    cut_left = cut_right = ""
    last = len(content.rstrip())
    if last - first > _MAX_COLUMNS:
        if start - first > _MAX_COLUMNS // 2:
            first, cut_left = start - _MAX_COLUMNS // 4, ".. "
        if last - first > _MAX_COLUMNS:
            last, cut_right = first + _MAX_COLUMNS, " .."
    shown = cut_left + _flat(content[first:last]) + cut_right
    before = len(cut_left) + _width(_flat(content[first:start]))
    marked = _width(_flat(content[start : min(end, max(last, start + 1))]))
    return shown, " " * before + "^" * max(1, marked)


def _flat(text: str) -> str:
    return visible(text.replace("\t", "    "))


def _width(text: str) -> int:
    """Cells of a terminal: Chinese and Japanese characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
