"""The `rankwise` command: `run`, `whoami`, `doctor`, `check`, `logs`, `top`, `report`, `ckpt`, `env`."""

import gc
import importlib
import sys
from collections.abc import Sequence

USAGE = """usage: rankwise VERB ...

run      start a script on several processes of this node (or, with torchrun's --nnodes and --rdzv options, of several):
         torchrun's own launcher, which here passes SIGTERM on to the ranks, waits for them, and says at the end which
         rank failed first and why.  rankwise run [torchrun options] SCRIPT [ARGUMENT ...] | -m MODULE [ARGUMENT ...]
whoami   what this process is, and which variable says so; run it under your launcher:  srun rankwise whoami
doctor   look for trouble before the job starts, on all ranks together:  srun rankwise doctor
check    find rank mistakes in training code, which is read and never run:  rankwise check src
logs     the records of all ranks by time, equal lines as one:  rankwise logs RUN --level warning --follow
top      what every rank does now, a live table:  rankwise top RUN [--once | --json]
report   a run as one HTML file: losses, step times, phases, devices, stragglers, hangs:  rankwise report RUN -o FILE
ckpt     look at checkpoints, verify, compare, prune, convert them:  rankwise ckpt ls|verify|diff|prune|convert RUN
env      print a ready job file for a command:  rankwise env slurm|kubernetes|ray [options] -- COMMAND

rankwise VERB --help tells a verb's options; rankwise --version the version."""

_VERBS = {
    "run": "launch",
    "whoami": "whoami",
    "doctor": "doctor",
    "check": "check.cli",
    "logs": "logreader",
    "top": "top",
    "report": "report",
    "ckpt": "ckpt",
    "env": "jobfiles",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status is 2 where the command cannot be understood.

    Ranks: local.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    match given:
        case [verb, *rest] if verb in _VERBS:
            is_process = arguments is None
            if is_process and verb == "check":
                gc.disable()  # its syntax trees live to the end, and switching it on again would look through them all
            # Each verb is imported when it is asked for: `whoami` must not pay for torch.
            status = int(importlib.import_module(f"rankwise.{_VERBS[verb]}").main(rest))
            if is_process:
                gc.freeze()  # what is left goes with the process
            return status
        case ["--version"]:
            # Looking the version up takes as long as checking a file.
            from rankwise import __version__

            print(f"rankwise {__version__}")
            return 0
        case ["-h" | "--help"]:
            print(USAGE)
            return 0
    print(USAGE, file=sys.stderr)
    if given:
        print(f"error: {given[0]!r} is no verb of rankwise; there are {', '.join(_VERBS)}", file=sys.stderr)
    return 2
