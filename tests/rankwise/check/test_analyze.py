import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.check import DEFAULT_RULES, RULES, analyze

ROOT = Path(__file__).parents[3]
HEADINGS = ("## What it finds", "## Why it hurts", "## Example", "## Instead", "## Known limits")


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(KeyError, match="RW999 is no rule"):
        analyze({}, {"RW999"})


def test_findings_stand_in_order_each_once() -> None:
    text = "import torch, os\nr = int(os.environ['RANK'])\ntorch.cuda.set_device(r)\ntorch.cuda.set_device(r)\n"
    findings = analyze({"b.py": text, "a.py": text}).findings
    assert [(one.path, one.line) for one in findings] == [("a.py", 3), ("a.py", 4), ("b.py", 3), ("b.py", 4)]


@pytest.mark.parametrize("code", RULES)
def test_every_rule_explains_itself_and_its_page_says_the_same(code: str) -> None:
    text = RULES[code].explain()
    places = [text.index(heading) for heading in HEADINGS]
    assert places == sorted(places)
    assert (ROOT / "docs/rules" / f"{code}.md").read_text() == text


def test_the_rules_off_by_default_are_the_doubtful_ones() -> None:
    assert RULES.keys() - DEFAULT_RULES == {"RW103", "RW202", "RW304", "RW503", "RW602"}


def test_the_checker_needs_no_torch() -> None:
    code = "import sys, rankwise.check as c; c.analyze({'a.py': 'x = 1'}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_our_own_tree_is_clean() -> None:
    sources = {str(path.relative_to(ROOT)): path.read_bytes() for path in sorted((ROOT / "src").rglob("*.py"))}
    analysis = analyze(sources)
    assert analysis.cannot_parse == ()
    assert analysis.findings == ()
