"""The sbatch script: settings that sbatch reads, and a command that arrives as it was given."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankwise.jobfiles import main

WORD = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)


def settings_of(script: str) -> dict[str, str]:
    """What sbatch reads: the comments before the first command."""
    head = re.split(r"^(?!#|$)", script, maxsplit=1, flags=re.MULTILINE)[0]
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", head, flags=re.MULTILINE))


def script_of(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["slurm", *arguments]) == 0
    return capfd.readouterr().out


def run(script: str, folder: Path, srun: str, **environ: str) -> "subprocess.CompletedProcess[bytes]":
    """Run the script with `srun` (and what else of Slurm's it calls) replaced."""
    for name, body in {"srun": srun, "scontrol": 'echo "scontrol $*"', "scancel": 'echo "scancel $*"'}.items():
        tool = folder / name
        if not tool.exists() or tool.read_text() != f"#!/bin/bash\n{body}\n":
            tool.write_text(f"#!/bin/bash\n{body}\n")
            tool.chmod(0o755)
    path = folder / "job.sh"
    path.write_bytes(script.encode())
    environ = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "41", **environ}
    return subprocess.run(["bash", path], capture_output=True, env=environ, timeout=60, check=False)


def test_every_option_becomes_a_setting(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "2", "--gpus-per-node", "8", "--cpus-per-process", "12", "--time", "1-12:00:00"]
    script = script_of(capfd, *options, "--partition", "big,small", "--job-name", "vae", "--", "python", "train.py")
    assert settings_of(script) == {
        "job-name": "vae",
        "output": "%x-%j.out",
        "open-mode": "append",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "12",
        "partition": "big,small",
        "time": "1-12:00:00",
        "signal": "TERM@120",
        "requeue": "",
    }
    assert script.endswith("\nsrun --kill-on-bad-exit=1 --cpus-per-task=12 python train.py\n")


def test_what_is_not_asked_for_is_left_to_the_cluster(capfd: pytest.CaptureFixture[str]) -> None:
    found = settings_of(script_of(capfd, "--", "x"))
    assert found["ntasks-per-node"] == "1"
    assert found.keys().isdisjoint({"gpus-per-node", "cpus-per-task", "partition", "time"})


@pytest.mark.parametrize("until_done", [[], ["--until-done"]])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=st.lists(WORD, max_size=4))
def test_any_command_arrives_as_it_was_given(
    until_done: list[str], arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["python", *arguments, "it's $HOME `id` $(id) \\\n#SBATCH --nodes=9\n; exit 7"]
    script = script_of(capfd, *until_done, "--", *command)
    assert settings_of(script)["nodes"] == "1"
    result = run(script, tmp_path, "printf '%s\\0' \"$@\"")
    assert result.stdout.decode().split("\0")[:-1] == ["--kill-on-bad-exit=1", *command]
    assert result.returncode == 0


@pytest.mark.parametrize("until_done", [[], ["--until-done"]])
def test_the_status_of_the_run_is_that_of_the_job(
    until_done: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = run(script_of(capfd, *until_done, "--", "x"), tmp_path, "exit 7")
    assert (result.returncode, result.stdout) == (7, b"")


@pytest.mark.parametrize(("status", "goes_back"), [(0, True), (143, False)])
def test_when_time_is_up_a_run_that_stops_in_order_goes_back_into_the_queue(
    status: int, goes_back: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = script_of(capfd, "--until-done", "--", "x")
    # Tells the shell that its time is up, and ends once the shell has passed that on.
    srun = f'kill -USR1 "$PPID"; until [ -s "$SAID" ]; do sleep 0.05; done; exit {status}'
    said = tmp_path / "said"
    script = script.replace(
        'scancel --signal=TERM "$SLURM_JOB_ID"', 'scancel --signal=TERM "$SLURM_JOB_ID" | tee "$SAID"'
    )
    result = run(script, tmp_path, srun, SAID=str(said))
    assert result.returncode == status, result.stderr
    lines = ["scancel --signal=TERM 41", *(["scontrol requeue 41"] if goes_back else [])]
    assert result.stdout.decode().splitlines() == lines


def test_the_shell_and_not_the_run_is_told_where_it_has_to_answer(capfd: pytest.CaptureFixture[str]) -> None:
    assert settings_of(script_of(capfd, "--until-done", "--", "x"))["signal"] == "B:USR1@120"
