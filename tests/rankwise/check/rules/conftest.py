"""Sources whose lines say what the checker has to find there."""

import re
from collections.abc import Callable
from textwrap import dedent

import pytest

from rankwise.check import analyze

MARK = re.compile(r"#! (RW\d+)")


@pytest.fixture
def expect() -> Callable[..., None]:
    """Asserts that a rule finds the lines marked "#! RW101" and no other, in one source or in several by path."""

    def compare(rule: str, source: str | None = None, **others: str) -> None:
        texts = {f"{name}.py": dedent(text) for name, text in others.items()}
        if source is not None:
            texts["train.py"] = dedent(source)
        analysis = analyze(texts, {rule})
        assert not analysis.cannot_parse
        wanted = {
            (path, number)
            for path, text in texts.items()
            for number, line in enumerate(text.splitlines(), 1)
            if rule in MARK.findall(line)
        }
        assert {(one.path, one.line) for one in analysis.findings} == wanted

    return compare
