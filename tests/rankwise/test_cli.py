"""The `rankwise` command's own words."""

import subprocess
import sys

import pytest

from rankwise import __version__
from rankwise.cli import main


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rankwise {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["run"], ["walk"]])
def test_what_is_not_understood_gives_usage_and_status_two(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "usage: rankwise " in captured.err
    assert captured.out == ""


def test_help_needs_no_torch() -> None:
    code = "import sys; from rankwise.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "torchrun" in result.stdout
