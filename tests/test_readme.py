"""What the README shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def example() -> str:
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", README.read_text(), flags=re.DOTALL)
    return code


@pytest.mark.parametrize("start", [[], ["-m", "rankwise", "run", "--nproc-per-node", "2"]])
def test_the_first_example_trains_saves_and_goes_on(start: list[str], tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(example())
    command = [sys.executable, *start, str(script)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path, check=False)
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("step 100: loss") == 1
    script.write_text(example().replace("num_steps, step = 100", "num_steps, step = 150"))
    second = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path, check=False)
    assert second.returncode == 0, second.stderr
    checkpoints = tmp_path / "runs" / "mine" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000100", "step-00000150"]


def test_commands_and_files_that_the_readme_names_exist() -> None:
    text = README.read_text()
    root = README.parent
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (root / link).exists(), link
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert f"{target}:" in (root / "Makefile").read_text()
