"""Precision and recall of `rankwise check` on labelled files, as a Markdown table.

    python scripts/checker_accuracy.py MANIFEST FOLDER [--half development|held-back] [--verbose]

MANIFEST has one JSON object per line, with the labels of one file; FOLDER holds the files under the manifest's `file`.
Each file is checked alone. Repositories are in one half or the other by a hash of their name.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rankwise.check import RULES, Finding, analyze

LABELS = {
    "A1": "RW101", "A2": "RW102", "H1": "RW103", "B2": "RW201", "B1": "RW202", "L1": "RW203", "H3": "RW203",
    "C1": "RW301", "C2": "RW302", "C3": "RW303", "K1": "RW304", "D1": "RW401", "D2": "RW402", "D3": "RW403",
    "J1": "RW404", "E1": "RW501", "E2": "RW502", "I2": "RW503", "F1": "RW601", "I1": "RW602",
}  # fmt: skip
Counts = dict[str, collections.Counter[str]]


def half_of(repository: str) -> str:
    return "held-back" if int(hashlib.sha256(repository.encode()).hexdigest(), 16) % 2 else "development"


def is_hit(label: dict[str, Any], finding: Finding) -> bool:
    low, high = label.get("accept", [label["line"]] * 2)
    return LABELS[label["rule"]] == finding.rule and (
        low <= finding.line <= high or finding.line in label.get("lines", ())
    )


def is_near(label: dict[str, Any], finding: Finding) -> bool:
    return LABELS[label["rule"]] == finding.rule and abs(label["line"] - finding.line) <= 1


def score(entry: dict[str, Any], findings: tuple[Finding, ...], counts: Counts, verbose: bool) -> None:
    """Add one file to the counts."""
    searched = {LABELS[name] for name in entry["exhaustive_for"]}
    notes = []
    for label in entry["expected"]:
        hit = any(is_hit(label, finding) for finding in findings)
        rule, grade = LABELS[label["rule"]], "error" if label["severity"] == "error" else "other"
        counts[rule][f"{'found' if hit else 'missed'} {grade}"] += 1
        if not hit:
            notes.append(f"missed {rule} line {label['line']} ({label['severity']}): {label['why']}")
    for finding in findings:
        if any(is_hit(label, finding) for label in entry["expected"]):
            continue
        if any(is_near(label, finding) for label in entry["dont_care"]):
            continue
        kind = "false" if finding.rule in searched else "unscored"
        counts[finding.rule][kind] += 1
        counts[finding.rule][f"{kind} {finding.severity}"] += 1
        negative = any(is_near(label, finding) for label in entry["negatives"])
        counts[finding.rule]["negatives"] += negative
        notes.append(f"{kind}{' NEGATIVE' if negative else ''} {finding.rule} line {finding.line}: {finding.message}")
    if verbose and notes:
        print(entry["file"], *notes, sep="\n    ")


def table(counts: Counts, exhaustive: set[str]) -> Iterator[str]:
    """A row per rule; then the sums of labels and findings of severity error, of rules looked for everywhere."""
    yield "| rule | found | missed | false | listed negatives | precision | recall |"
    yield "|---|---|---|---|---|---|---|"
    total: collections.Counter[str] = collections.Counter()
    for code in sorted(counts):
        own = counts[code]
        found, missed = own["found error"] + own["found other"], own["missed error"] + own["missed other"]
        false = own["false"] if code in exhaustive else own["unscored"]
        if code in exhaustive:
            total.update(own)
        mark = "" if code in exhaustive else " (recall only)"
        precision = "" if mark else ratio(found, found + false)
        name = f"{code} {RULES[code].name}{mark}"
        cells = (name, found, missed, false, own["negatives"], precision, ratio(found, found + missed))
        yield f"| {' | '.join(map(str, cells))} |"
    found, missed, false = total["found error"], total["missed error"], total["false error"]
    cells = ("**errors, rules looked for everywhere**", found, missed, false, total["negatives"])
    yield f"| {' | '.join(map(str, cells))} | {ratio(found, found + false)} | {ratio(found, found + missed)} |"


def ratio(part: int, whole: int) -> str:
    return f"{part / whole:.2f}" if whole else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--half", choices=("development", "held-back"))
    parser.add_argument("--verbose", action="store_true", help="each miss and each false alarm")
    given = parser.parse_args()
    counts: Counts = collections.defaultdict(collections.Counter)
    exhaustive: set[str] = set()
    num_files, missing = 0, []
    for line in given.manifest.read_text().splitlines():
        entry = json.loads(line)
        if given.half and half_of(entry["repo"]) != given.half:
            continue
        path = given.folder / entry["file"]
        if not path.exists():
            missing.append(entry["file"])
            continue
        num_files += 1
        exhaustive |= {LABELS[name] for name in entry["exhaustive_for"]}
        findings = analyze({entry["path"]: path.read_bytes()}, RULES).findings
        score(entry, findings, counts, given.verbose)
    print(*table(counts, exhaustive), sep="\n")
    print(f"\n{num_files} files; {len(missing)} not at hand{': ' if missing else ''}{', '.join(missing)}")


if __name__ == "__main__":
    main()
