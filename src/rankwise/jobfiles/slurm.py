"""An sbatch script.

One task per process, started by `srun`: every process has its place from Slurm itself, its output and its end are
Slurm's to handle, and no torchrun stands between a signal and the run. The ranks meet on the first node of the list, so
nothing else is set.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

STOP_SECONDS = 120
"""How long before the end of its time a run is asked to stop."""

_RUN = """\
# The steps get SIGTERM {seconds} s before the time is up: a run that asks session.agree_to_stop() saves and ends.
{srun}
"""

_RUN_UNTIL_DONE = """\
# This shell is told {seconds} s before the time is up. It passes SIGTERM on to the run, which saves and ends, and the
# job goes back into the queue. After a run that ends before that, or fails, it does not.
time_is_up=""
trap 'time_is_up=yes; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1
{srun} &
run=$!
wait "$run" && status=0 || status=$?
if [ -n "$time_is_up" ]; then # the signal may have ended that wait, and not the run
    wait "$run" && status=0 || status=$?
    if [ "$status" -eq 0 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
"""


def sbatch_script(options: argparse.Namespace, command: Sequence[str]) -> str:
    """What `sbatch` takes.

    Ranks: local, in no job yet.
    """
    told = "B:USR1" if options.until_done else "TERM"
    settings = {
        "job-name": options.job_name,
        "output": "%x-%j.out",
        "open-mode": "append",
        "nodes": options.nodes,
        "ntasks-per-node": options.num_procs,
        "cpus-per-task": options.cpus_per_process,
        # Not --gpus-per-task: processes that see all GPUs of their node can copy between them directly.
        "gpus-per-node": options.gpus_per_node,
        "partition": options.partition,
        "time": options.time,
        "signal": f"{told}@{STOP_SECONDS}",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in settings.items() if value is not None]
    srun = ["srun", "--kill-on-bad-exit=1"]
    if options.cpus_per_process:
        srun.append(f"--cpus-per-task={options.cpus_per_process}")  # srun does not take it over from sbatch
    body = _RUN_UNTIL_DONE if options.until_done else _RUN
    run = body.format(srun=f"{shlex.join(srun)} {shlex.join(command)}", seconds=STOP_SECONDS)
    # A failed node, or another job's preemption, puts the job back into the queue; its log goes on in the same file.
    return "\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue", "", "set -u", "", run])
