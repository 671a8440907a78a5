"""An engine of a few lines, so that the tool around it is tested without the rules."""

import re
from collections.abc import Collection, Mapping

import pytest

from rankwise.check.analyze import Analysis
from rankwise.check.finding import CannotParse, Edit, Finding, Severity, Step

SET_DEVICE = re.compile(r"set_device\((rank)\)")
MAKE = re.compile(r"makedirs\(path(\))")


def toy_analyze(sources: Mapping[str, str | bytes], enabled: Collection[str]) -> Analysis:
    """RW101 for `set_device(rank)`, RW303 for `makedirs(path)`, RW103 (info) for `init_process_group`; all fixable."""
    findings, unparsed = [], []
    for path, text in sources.items():
        assert isinstance(text, str)
        try:
            compile(text, path, "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            unparsed.append(CannotParse(path, getattr(error, "lineno", None) or 1, "not Python"))
            continue
        for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
            for match in SET_DEVICE.finditer(line):
                edit = Edit(number, match.start(1), number, match.end(1), "local_rank")
                trail = (Step("rank <- dist.get_rank()", path, 1), Step("rank of the job", "other.py", 7))
                findings.append(finding_at("RW101", path, number, match.span(1), "error", trail, edit))
            for match in MAKE.finditer(line):
                edit = Edit(number, match.start(1), number, match.start(1), ", exist_ok=True")
                findings.append(finding_at("RW303", path, number, match.span(), "warning", (), edit))
            for match in re.finditer("init_process_group", line):
                findings.append(finding_at("RW103", path, number, match.span(), "info"))
    return Analysis(tuple(finding for finding in findings if finding.rule in enabled), tuple(unparsed))


def finding_at(
    rule: str,
    path: str,
    line: int,
    span: tuple[int, int],
    severity: Severity = "error",
    trail: tuple[Step, ...] = (),
    *edits: Edit,
) -> Finding:
    """A finding on one line; `span` counts from 0."""
    return Finding(rule, path, line, span[0] + 1, line, span[1] + 1, severity, f"what {rule} says", trail, edits)


@pytest.fixture
def toy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool runs with `toy_analyze` in place of the engine."""
    monkeypatch.setattr("rankwise.check.run.analyze", toy_analyze)
