"""A script for Ray Train.

TorchTrainer reserves all processes at once, places them, makes their process group, and starts them anew after a lost
node. The command runs inside its workers, since a child process of theirs would have neither the group nor Ray's
handling of failures: so it has to be a Python script or module.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Sequence

_MAX_FAILURES = 3

_SCRIPT = '''\
"""Runs a command on {num_workers} workers of Ray Train.

Put this file into the folder from which the command is to run, one that all nodes see (checkpoints need such a folder
too). Start it with `ray job submit -- python FILE`, or with `python FILE` on a node of the cluster. Ray has made the
process group when the command starts: rankwise.init() uses it, a script of yours must not make a second one.
"""

import os
import runpy
import sys
from pathlib import Path

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

{target} = {name}
ARGUMENTS = {arguments}
FOLDER = str(Path(__file__).resolve().parent)


def run_command() -> None:
    os.chdir(FOLDER)
    sys.path.insert(0, {search_path})
    sys.argv = [{target}, *ARGUMENTS]
    try:
        {call}
    except SystemExit as end:
        if end.code not in (None, 0):
            raise RuntimeError(f"the command ended with exit status {{end.code}}") from end


if __name__ == "__main__":
    trainer = TorchTrainer(
        run_command,
        scaling_config=ScalingConfig(num_workers={num_workers}, use_gpu={use_gpu}, resources_per_worker={resources}),
        # Started anew this often after a failure; the command goes on from its newest checkpoint.
        run_config=RunConfig(name="{job_name}", failure_config=FailureConfig(max_failures={max_failures})),
    )
    trainer.fit()
'''


def train_script(options: argparse.Namespace, command: Sequence[str]) -> str:
    """What `ray job submit -- python` takes.

    Raises:
        ValueError: the command does not run Python.
    Ranks: local, in no job yet.
    """
    interpreter, *rest = command
    if not re.fullmatch(r"(.*/)?python3?(\.\d+)?", interpreter, re.DOTALL) or not rest:
        raise ValueError(
            f"Ray workers run Python, and {shlex.join(command)!r} is not `python SCRIPT ...` or `python -m MODULE ...`."
        )
    is_module = rest[0] == "-m" and len(rest) > 1
    if rest[0].startswith("-") and not is_module:
        raise ValueError(f"the option {rest[0]} of python cannot be passed on. Give python SCRIPT or python -m MODULE.")
    name, *arguments = rest[1:] if is_module else rest
    resources = {"CPU": options.cpus_per_process or 1} | ({"GPU": 1} if options.gpus_per_node else {})
    return _SCRIPT.format(
        num_workers=options.nodes * options.num_procs,
        target="MODULE" if is_module else "SCRIPT",
        name=ascii(name),
        arguments=ascii(arguments),
        search_path="FOLDER" if is_module else "str(Path(SCRIPT).resolve().parent)",
        call=f'runpy.{"run_module(MODULE" if is_module else "run_path(SCRIPT"}, run_name="__main__")',
        use_gpu=bool(options.gpus_per_node),
        resources=json.dumps(resources),
        job_name=options.job_name,
        max_failures=_MAX_FAILURES,
    )
