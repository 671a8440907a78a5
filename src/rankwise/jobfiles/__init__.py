"""`rankwise env`: a ready job file for a command, on stdout. Each module here says why its file looks as it does."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from rankwise.jobfiles.kubernetes import manifest
from rankwise.jobfiles.ray import train_script
from rankwise.jobfiles.slurm import sbatch_script

_NAME = r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?"
_TIME = r"\d{1,6}(:\d{1,2}){0,2}|\d{1,4}-\d{1,2}(:\d{1,2}){0,2}"

_EPILOG = """the command follows after --, as on a shell's line:
  rankwise env slurm --nodes 2 --gpus-per-node 8 --time 1-00:00:00 -- python train.py --lr 3e-4 > train.sbatch
  rankwise env kubernetes --nodes 2 --gpus-per-node 8 --image IMAGE -- python train.py | kubectl apply -f -
  rankwise env ray --nodes 2 --gpus-per-node 8 -- python train.py > job.py; ray job submit -- python /shared/job.py"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. See {self.prog} --help.")


def main(arguments: Sequence[str]) -> int:
    """Print the job file; the exit status is 2, with one message, where it cannot be made.

    Ranks: local, in no job yet.
    """
    given = list(arguments)
    split = given.index("--") if "--" in given else len(given)
    try:
        options, unknown = _parser().parse_known_args(given[:split])
        if unknown:
            raise ValueError(_not_understood(options.kind, unknown, is_split="--" in given))
        text = _job_file(options, given[split + 1 :])
    except SystemExit as end:  # --help
        return int(end.code or 0)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()
    return 0


def _not_understood(kind: str, unknown: Sequence[str], *, is_split: bool) -> str:
    told = f"unrecognized arguments: {' '.join(unknown)}."
    if not is_split:
        told += f" Give the command after --: rankwise env {kind} ... -- python train.py."
    return f"{told} See rankwise env {kind} --help."


def _job_file(options: argparse.Namespace, command: list[str]) -> str:
    if not command or not command[0] or command[0].startswith("-"):
        raise ValueError(f"no command. Give it after --: rankwise env {options.kind} ... -- python train.py")
    for argument in command:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise ValueError(f"{argument!r} in the command is not UTF-8. Rename it, or set it inside the script.")
    options.num_procs = options.procs_per_node or options.gpus_per_node or 1
    if options.gpus_per_node and options.num_procs > options.gpus_per_node:
        raise ValueError(
            f"--procs-per-node {options.num_procs} is more than --gpus-per-node {options.gpus_per_node}. "
            "Each process computes on a GPU of its own: give at most as many processes."
        )
    match options.kind:
        case "slurm":
            return sbatch_script(options, command)
        case "kubernetes":
            return manifest(options, command)
    return train_script(options, command)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rankwise env",
        description="Print a ready job file for a command.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="slurm|kubernetes|ray")
    slurm, kubernetes, _ = (_add_kind(kinds, kind) for kind in ("slurm", "kubernetes", "ray"))
    slurm.add_argument(
        "--time", type=_matching(_TIME, "a time such as 30, 12:00:00 or 2-00:00:00"), metavar="D-HH:MM:SS"
    )
    slurm.add_argument("--partition", type=_matching(r"[\w.,-]{1,200}", "the name of a partition"))
    slurm.add_argument(
        "--until-done",
        action="store_true",
        help="go back into the queue when the time is up; for a command that goes on from its checkpoint",
    )
    image = _matching(r"[\w./:@-]{1,500}", "the name of an image")
    kubernetes.add_argument("--image", required=True, type=image, help="has the command, and rankwise, installed")
    kubernetes.add_argument(
        "--plain", action="store_true", help="an Indexed Job, where there is no PyTorchJob operator"
    )
    kubernetes.add_argument(
        "--claim", type=_claim, metavar="CLAIM:PATH", help="a shared volume, for data and checkpoints"
    )
    kubernetes.add_argument("--shm-gib", type=_count, default=16, metavar="GIB", help="size of /dev/shm (default: 16)")
    return parser


def _add_kind(kinds: Any, kind: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(kind, allow_abbrev=False)
    parser.add_argument("--nodes", type=_count, default=1, metavar="N", help="default: 1")
    parser.add_argument("--gpus-per-node", type=_count, metavar="N", help="default: none")
    parser.add_argument("--procs-per-node", type=_count, metavar="N", help="default: one for each GPU, or one")
    parser.add_argument("--cpus-per-process", type=_count, metavar="N", help="cores; default: what the cluster gives")
    name = _matching(_NAME, "a name of at most 40 lower-case letters, digits and inner hyphens")
    parser.add_argument("--job-name", type=name, default="train", metavar="NAME", help="default: train")
    return parser


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _matching(pattern: str, wanted: str) -> Any:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return text

    return check


def _claim(text: str) -> tuple[str, str]:
    claim, _, path = text.partition(":")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", claim, re.ASCII) or not path.startswith("/") or ":" in path:
        raise argparse.ArgumentTypeError(f"{text!r} is not CLAIM:PATH with an absolute path")
    return claim, path
