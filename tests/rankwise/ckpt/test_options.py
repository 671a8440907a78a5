"""The command line of `rankwise ckpt`, also as the documentation writes it."""

import re
import shlex
from pathlib import Path

import pytest

from rankwise.ckpt.options import parse_options

ROOT = Path(__file__).parents[3]


def lines_of(page: str) -> list[str]:
    return re.findall(r"^ *rankwise ckpt (.*)", (ROOT / page).read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "docs/checkpoints.md", "src/rankwise/ckpt/options.py"])
def test_every_command_of_the_documentation_is_understood(page: str) -> None:
    lines = lines_of(page)
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line.partition("   ")[0], comments=True)
        assert parse_options(words).command == words[0]


def test_three_arguments_of_diff_are_a_run_and_two_steps() -> None:
    assert parse_options(["diff", "RUN", "1000", "2000"]).places == ["RUN", 1000, 2000]
    assert parse_options(["diff", "1000", "2000"]).places == ["1000", "2000"]


def test_options_are_not_guessed_from_their_beginnings() -> None:
    with pytest.raises(ValueError, match="unrecognized arguments: --keep-l 1"):
        parse_options(["prune", "RUN", "--keep-l", "1"])
