"""What `rankwise ckpt` can be asked for, and how it is written on a command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

_EPILOG = """RUN is a run folder, a folder of checkpoints, or the directory of one step.

examples:
  rankwise ckpt ls runs/mine                               what is there, who writes there, what was left behind
  rankwise ckpt verify runs/mine --step 2000               read all of it, and compare it with its checksums
  rankwise ckpt diff runs/mine 1000 2000                   what has changed, the largest change first
  rankwise ckpt diff runs/a runs/b                         the newest steps of two runs
  rankwise ckpt prune runs/mine --keep-last 3 --keep-every 10000 --dry-run
  rankwise ckpt convert runs/mine model.safetensors --to safetensors --item model
  rankwise ckpt convert DIRECTORY model.pt --from dcp --to torch     what torch.distributed.checkpoint has written

Exit status: 0 all is well (diff: equal), 1 something is damaged (diff: different), 2 it could not be done."""

_TARGETS = ("safetensors", "torch", "dcp")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removesuffix('.')}. See {self.prog} --help.")


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The command and its options, by the names that `--help` shows.

    Raises:
        ValueError: they cannot be understood; the message is for the user.
        SystemExit: --help was asked for, and printed.
    Ranks: local.
    """
    options = _parser().parse_args(list(arguments))
    if options.command == "diff" and len(options.places) not in (2, 3):
        raise ValueError("diff takes two paths, or a RUN and two steps. See rankwise ckpt diff --help.")
    if options.command == "diff" and len(options.places) == 3:
        try:
            options.places[1:] = [_step(text) for text in options.places[1:]]
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{error}. Three arguments of diff are a RUN and two steps.") from error
    if options.command == "convert" and options.source == "dcp" and options.step is not None:
        raise ValueError("--step goes with a RUN of rankwise's own; a directory of DCP holds one state.")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rankwise ckpt",
        description="Look at checkpoints, compare, clear up and convert them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="ls|verify|diff|prune|convert")
    _add(commands, "ls", "List the steps, what was left behind, and who writes there.", run=True, json=True)
    verify = _add(commands, "verify", "Read every file and compare it with its checksum.", run=True, json=True)
    verify.add_argument("--step", type=_step, metavar="N", help="this step alone")
    diff = _add(commands, "diff", "Compare two steps: tensors, the largest change first, and plain values.", json=True)
    diff.add_argument("places", nargs="+", metavar="A B", help="two paths (of a RUN the newest step), or RUN STEP STEP")
    diff.add_argument("--limit", type=_count, default=20, metavar="N", help="lines of each kind (default: 20)")
    prune = _add(commands, "prune", "Remove old steps, and what killed saves left behind.", run=True)
    prune.add_argument("--keep-last", type=_positive, metavar="N", help="keep the N newest whole steps (default: all)")
    prune.add_argument("--keep-every", type=_positive, metavar="M", help="besides, keep the multiples of M")
    prune.add_argument(
        "--broken", action="store_true", help="remove damaged steps too, and those set aside (.broken-*, .stale-*)"
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    convert = _add(commands, "convert", "Write a step, or one item of it, in another format.", run=True)
    convert.add_argument("destination", metavar="DEST", help="a new file, with --to dcp a new directory")
    convert.add_argument("--to", choices=_TARGETS, required=True, help="what to write")
    convert.add_argument("--from", choices=["rankwise", "dcp"], default="rankwise", dest="source", help="what RUN is")
    convert.add_argument("--item", metavar="NAME", help="this item alone (default: all)")
    convert.add_argument("--step", type=_step, metavar="N", help="of this step (default: the newest)")
    return parser


def _add(commands: Any, name: str, description: str, *, run: bool = False, json: bool = False) -> Any:
    parser = commands.add_parser(name, description=description, allow_abbrev=False)
    if run:
        parser.add_argument("run", metavar="RUN", help="a run, a folder of checkpoints, or a step's directory")
    if json:
        parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def _step(text: str) -> int:
    return _number(text, "the number of a step", 0)


def _count(text: str) -> int:
    return _number(text, "a number from 0 on", 0)


def _positive(text: str) -> int:
    return _number(text, "a number from 1 on", 1)


def _number(text: str, wanted: str, least: int) -> int:
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return int(text)
