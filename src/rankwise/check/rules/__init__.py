"""The rules of the checker, one module each; its docstring is what `rankwise check --explain CODE` prints."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankwise.check.finding import Severity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rankwise.check.finding import Finding
    from rankwise.check.program import Program


@dataclass(frozen=True)
class Rule:
    """What is known of a rule without importing it."""

    code: str
    name: str
    severity: Severity
    """The worst that it says; single findings may be milder."""
    default: bool
    """Whether it is on when nobody chose."""
    summary: str
    fixable: bool = False
    """Whether some of its findings carry edits."""

    @property
    def module(self) -> str:
        """The module of the rule: `check(program)` yields its findings."""
        return f"rankwise.check.rules.{self.name.replace('-', '_')}"

    def explain(self) -> str:
        """What it finds, why it hurts, an example, what to write instead, known limits; Markdown."""
        return f"# {self.code} {self.name}\n\n{(importlib.import_module(self.module).__doc__ or '').strip()}\n"

    def check(self, program: Program) -> Iterator[Finding]:
        """The findings of this rule in all files of the program."""
        found: Iterator[Finding] = importlib.import_module(self.module).check(program)
        return found


RULES: dict[str, Rule] = {
    rule.code: rule
    for rule in (
        Rule("RW101", "device-from-global-rank", "error", True, "a device is chosen by the global rank", True),
        Rule("RW102", "device-not-pinned", "warning", True, "no process picks its own accelerator"),
        Rule("RW103", "init-before-device", "info", False, "the process group starts before the device is chosen"),
        Rule("RW201", "global-work-on-local-rank", "error", True, "work for one process is done once per node"),
        Rule("RW202", "node-work-on-global-rank", "warning", False, "work for every node is done on one node"),
        Rule("RW203", "local-rank-as-global", "error", True, "a local rank stands where a global one belongs"),
        Rule("RW301", "unguarded-write", "error", True, "every rank writes the same file"),
        Rule("RW302", "unguarded-tracker", "warning", True, "every rank starts a tracker run"),
        Rule("RW303", "makedirs-race", "warning", True, "ranks race to make one folder", True),
        Rule("RW304", "read-before-write", "warning", False, "ranks read what another has yet to write"),
        Rule("RW401", "divergent-collective", "error", True, "only some ranks come to a collective"),
        Rule("RW402", "divergent-exit", "error", True, "some ranks leave before a collective"),
        Rule("RW403", "wrapped-forward-on-one-rank", "error", True, "one rank runs the wrapped model alone"),
        Rule("RW404", "sharded-state-on-one-rank", "warning", True, "one rank gathers sharded state alone"),
        Rule("RW501", "epoch-not-set", "error", True, "every epoch has the same order", True),
        Rule("RW502", "data-not-sharded", "warning", True, "every rank trains on the same batches"),
        Rule("RW503", "same-seed", "warning", False, "every rank draws the same random numbers"),
        Rule("RW601", "load-onto-one-device", "warning", True, "every rank loads onto one device", True),
        Rule("RW602", "wrapped-prefix-saved", "info", False, "saved names carry the wrapper's prefix"),
    )
}

DEFAULT_RULES: frozenset[str] = frozenset(code for code, rule in RULES.items() if rule.default)
"""Codes of the rules that are on when nobody chose."""
