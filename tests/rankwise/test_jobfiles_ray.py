"""The Ray Train script, run with a stand-in for Ray that keeps what it is given and calls the function once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rankwise.jobfiles import main

STAND_IN = """
import json, sys

class Kept(dict):
    def __init__(self, **given):
        super().__init__(given)

ScalingConfig = RunConfig = FailureConfig = Kept

class TorchTrainer:
    def __init__(self, function, scaling_config, run_config):
        self.function, self.given = function, {"scaling": scaling_config, "run": run_config}

    def fit(self):
        json.dump(self.given, open(sys.argv[0].replace("job.py", "given.json"), "w"))
        self.function()
"""
COMMAND = """
import json, os, sys
import beside
if __name__ == "__main__":
    json.dump({"arguments": sys.argv, "folder": os.getcwd()}, open("called.json", "w"))
    sys.exit(beside.STATUS)
"""
NASTY = ["", "it's", '"', "a\nb", "{x} {", "\\", "'''", '"""', "\u00e9\U0001f600", "--", "$(id)"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What all nodes see: the command, in a folder of its own, and Ray's stand-in."""
    package = tmp_path / "ray" / "train"
    package.mkdir(parents=True)
    for name in ("../__init__.py", "__init__.py", "torch.py"):
        (package / name).write_text(STAND_IN)
    code = tmp_path / "code"
    code.mkdir()
    (code / "train.py").write_text(COMMAND)
    (code / "beside.py").write_text("STATUS = 0\n")
    return tmp_path


def run(folder: Path, capfd: pytest.CaptureFixture[str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    assert main(["ray", *arguments]) == 0
    script = capfd.readouterr().out
    assert script.isascii()
    (folder / "job.py").write_text(script)
    return subprocess.run(
        [sys.executable, "-W", "error", folder / "job.py"],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(folder)},
    )


def noted(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_a_script_runs_in_the_folder_with_its_arguments(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = run(folder, capfd, "--", "python", "code/train.py", *NASTY)
    assert result.returncode == 0, result.stderr
    assert noted(folder / "called.json") == {"arguments": ["code/train.py", *NASTY], "folder": str(folder)}


def test_a_module_runs_from_the_folder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "train.py").write_text(COMMAND)
    (folder / "beside.py").write_text("STATUS = None\n")
    result = run(folder, capfd, "--", "/usr/bin/python3.11", "-m", "train", *NASTY)
    assert result.returncode == 0, result.stderr
    assert noted(folder / "called.json")["arguments"][1:] == NASTY


def test_workers_and_their_shares_are_asked_for(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(
        folder,
        capfd,
        "--nodes",
        "2",
        "--gpus-per-node",
        "4",
        "--cpus-per-process",
        "3",
        "--",
        "python",
        "code/train.py",
    )
    given = noted(folder / "given.json")
    shares = {"CPU": 3, "GPU": 1}
    assert given["scaling"] == {"num_workers": 8, "use_gpu": True, "resources_per_worker": shares}
    assert given["run"] == {"name": "train", "failure_config": {"max_failures": 3}}


def test_no_accelerator_is_asked_for_by_default(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(folder, capfd, "--procs-per-node", "2", "--", "python", "code/train.py")
    shares = {"CPU": 1}
    assert noted(folder / "given.json")["scaling"] == {
        "num_workers": 2,
        "use_gpu": False,
        "resources_per_worker": shares,
    }


def test_an_exit_status_of_the_command_is_a_failure_for_ray(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "code" / "beside.py").write_text("STATUS = 3\n")
    result = run(folder, capfd, "--", "python", "code/train.py")
    assert result.returncode == 1
    assert "RuntimeError: the command ended with exit status 3" in result.stderr
