"""`rankwise env`: what it takes, and what it refuses."""

import subprocess
import sys

import pytest

from rankwise.jobfiles import main

IMAGE = ["--image", "example.org/team/train:1.2"]


@pytest.mark.parametrize("kind", [["slurm"], ["kubernetes", *IMAGE], ["ray"]])
def test_a_job_file_needs_no_more_than_the_command(kind: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*kind, "--", "python", "train.py"]) == 0
    captured = capfd.readouterr()
    assert "train.py" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "slurm|kubernetes|ray"),
        (["pbs", "--", "x"], "invalid choice: 'pbs'"),
        (["slurm"], "no command. Give it after --"),
        (["slurm", "--"], "no command. Give it after --"),
        (["slurm", "--", ""], "no command. Give it after --"),
        (["slurm", "--", "--nodes"], "no command. Give it after --"),
        (["slurm", "python", "train.py"], "unrecognized arguments: python train.py. Give the command after --"),
        (["slurm", "--nodes", "0", "--", "x"], "--nodes: '0' is not a number from 1 on"),
        (["slurm", "--nodes", "two", "--", "x"], "--nodes: 'two' is not a number from 1 on"),
        (["slurm", "--nodes", "9" * 5000, "--", "x"], "is not a number from 1 on"),
        (["slurm", "--node", "2", "--", "x"], "unrecognized arguments: --node 2. See rankwise env slurm --help."),
        (["ray", "--walltime=3", "--", "x"], "unrecognized arguments: --walltime=3. See rankwise env ray --help."),
        (["slurm", "--time", "tomorrow", "--", "x"], "'tomorrow' is not a time such as"),
        (["slurm", "--partition", "main\n#SBATCH --nodes=9", "--", "x"], "is not the name of a partition"),
        (["slurm", "--job-name", "a b", "--", "x"], "'a b' is not a name of at most 40"),
        (["slurm", "--gpus-per-node", "2", "--procs-per-node", "4", "--", "x"], "--procs-per-node 4 is more than"),
        (["kubernetes", "--", "x"], "required: --image"),
        (["kubernetes", "--image", "a\nb", "--", "x"], "is not the name of an image"),
        (["kubernetes", *IMAGE, "--claim", "data", "--", "x"], "'data' is not CLAIM:PATH"),
        (["ray", "--", "bash", "train.sh"], "'bash train.sh' is not `python SCRIPT ...`"),
        (["ray", "--", "python"], "'python' is not `python SCRIPT ...`"),
        (["ray", "--", "python", "-m"], "the option -m of python cannot be passed on"),
        (["ray", "--", "python", "-u", "train.py"], "the option -u of python cannot be passed on"),
        (["slurm", "--", "python", "caf\udce9.py"], "is not UTF-8"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_status_two(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


@pytest.mark.parametrize("arguments", [["--help"], ["slurm", "--help"], ["kubernetes", "-h"], ["ray", "-h"]])
def test_help_is_status_zero(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "usage: rankwise env" in capfd.readouterr().out


def test_options_of_the_command_are_not_taken_for_ours(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", "--nodes", "2", "--", "python", "train.py", "--nodes", "7", "--", "--help"]) == 0
    out = capfd.readouterr().out
    assert "#SBATCH --nodes=2\n" in out
    assert "python train.py --nodes 7 -- --help\n" in out


def test_the_verb_needs_no_torch() -> None:
    code = (
        "import sys; from rankwise.cli import main; status = main(['env', 'slurm', '--', 'x']); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("#!/bin/bash\n")
