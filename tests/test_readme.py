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
    command = [sys.executable, *start, str(script)]
    # As it stands, once more as it stands, and prolonged.
    for num_steps, said in ((100, "from step 0 to 100"), (100, "from step 100 to 100"), (150, "from step 100 to 150")):
        script.write_text(example().replace("num_steps = 100", f"num_steps = {num_steps}"))
        result = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count(said) == 1
        assert "WARNING" not in result.stderr
    checkpoints = tmp_path / "runs" / "mine" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-00000100", "step-00000150"]


def test_commands_and_files_that_the_readme_names_exist() -> None:
    text = README.read_text()
    root = README.parent
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (root / link).exists(), link
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert f"{target}:" in (root / "Makefile").read_text()
