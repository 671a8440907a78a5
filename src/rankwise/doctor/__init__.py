"""`rankwise doctor`: looks for trouble before the job starts, on all ranks together.

    srun rankwise doctor          torchrun --nproc-per-node 8 -m rankwise doctor

Every rank runs the same command; the main process prints what was found.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from rankwise.errors import LaunchError
from rankwise.identity import Identity

TIMEOUT_SECONDS = 30.0


def main(arguments: Sequence[str]) -> int:
    """Examine this job.

    Returns:
        The exit status, the same on every rank that could talk to the others: 0 where nothing fails, with warnings
        or without, 1 where something does, 2 where the environment contradicts itself or an option is not understood.
    Ranks: every rank must call.
    """
    try:
        options = _parser().parse_args(list(arguments))
    except SystemExit as end:  # argparse has said why
        return int(end.code or 0)
    try:
        identity = Identity.resolve(os.environ, hostname=socket.gethostname())
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # What torch's C++ says of a rank that does not come is fifty lines of stack; the table says it in one.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        from rankwise.doctor.examine import examine
    except (ImportError, OSError) as error:  # OSError: a library of torch that does not load
        print(f"error: torch cannot be imported on {identity.hostname}: {error}. Install it.", file=sys.stderr)
        return 2
    directory = Path(os.path.abspath(options.dir.expanduser()))
    return examine(identity, directory, timeout_seconds=options.timeout, as_json=options.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rankwise doctor",
        description="Look for trouble before the job starts, on all ranks together: start it as you start the job.",
        epilog="Exit status on every rank: 0 no check fails, 1 some do, 2 contradictory environment.",
        allow_abbrev=False,
    )
    parser.add_argument("--dir", type=Path, default=Path(), help="where the run will write (default: here)")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        help="how long to wait for the other ranks, at the start and in every step (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0 and up to 86400")
    return seconds
