"""The static checker: rank mistakes found in the source, which is read and never run."""

from rankwise.check.analyze import Analysis, analyze
from rankwise.check.finding import CannotParse, Edit, Finding, Step
from rankwise.check.rules import DEFAULT_RULES, RULES, Rule

__all__ = ["DEFAULT_RULES", "RULES", "Analysis", "CannotParse", "Edit", "Finding", "Rule", "Step", "analyze"]
