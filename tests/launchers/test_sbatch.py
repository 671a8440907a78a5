"""Job files of `rankwise env slurm`, really submitted."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankwise.jobfiles import main

# A run that answers SIGTERM, and says so, as one that asks `agree_to_stop` does.
STOPS_IN_ORDER = """
trap 'touch "stopped-$SLURM_PROCID"; exit 0' TERM
touch "ready-$SLURM_PROCID"
for _ in $(seq 600); do sleep 0.1; done
exit 5
"""


def wait_for(folder: Path, pattern: str, num_files: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob(pattern))) < num_files:
        assert time.monotonic() < deadline, f"{pattern}: {[path.name for path in folder.iterdir()]}"
        time.sleep(0.05)


def job_file(folder: Path, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["slurm", *arguments]) == 0
    path = folder / "job.sbatch"
    path.write_text(capfd.readouterr().out)
    return str(path)


def in_cluster(slurm_conf: Path, folder: Path, *command: str) -> str:
    """What a command says in a shell of the cluster's login node."""
    environ = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "SLURM_CONF": str(slurm_conf)}
    done = subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.returncode} {done.stdout} {done.stderr}"
    return done.stdout


def test_a_submitted_job_has_every_rank_in_its_place(
    slurm_conf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--nodes", "2", "--procs-per-node", "2", "--cpus-per-process", "1", "--time", "5", "--job-name", "who")
    path = job_file(tmp_path, capfd, *options, "--", sys.executable, "-m", "rankwise", "whoami", "--json")
    job_id = in_cluster(slurm_conf, tmp_path, "sbatch", "--parsable", "--wait", path).strip()
    rows = [json.loads(line) for line in (tmp_path / f"who-{job_id}.out").read_text().splitlines()]
    places = sorted((row["rank"], row["local_rank"], row["node_rank"], row["hostname"]) for row in rows)
    assert places == [(0, 0, 0, "n1"), (1, 1, 0, "n1"), (2, 0, 1, "n2"), (3, 1, 1, "n2")]
    assert {(row["launcher"], row["world_size"], row["job_id"]) for row in rows} == {("slurm", 4, job_id)}


def test_a_job_whose_time_is_up_stops_in_order_and_goes_back_into_the_queue(
    slurm_conf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = job_file(tmp_path, capfd, "--nodes", "2", "--until-done", "--", "bash", "-c", STOPS_IN_ORDER)
    job_id = in_cluster(slurm_conf, tmp_path, "sbatch", "--parsable", path).strip()
    try:
        wait_for(tmp_path, "ready-*", 2)
        # What Slurm itself does when the time is nearly up; a limit is a minute at least.
        in_cluster(slurm_conf, tmp_path, "scancel", "--batch", "--signal=USR1", job_id)
        wait_for(tmp_path, "stopped-*", 2)
        deadline = time.monotonic() + 60
        while "Restarts=1" not in (shown := in_cluster(slurm_conf, tmp_path, "scontrol", "show", "job", job_id)):
            assert time.monotonic() < deadline, shown
            time.sleep(0.2)
    finally:
        in_cluster(slurm_conf, tmp_path, "scancel", job_id)
