"""The `rankwise` command. Verbs: `run`."""

import sys
from collections.abc import Sequence

from rankwise import __version__

USAGE = """usage: rankwise run [torchrun options] SCRIPT [ARGUMENT ...]
       rankwise run [torchrun options] -m MODULE [ARGUMENT ...]
       rankwise --version

run   start a script on several processes of this node (or, with torchrun's --nnodes and --rdzv options, of several):
      torchrun's own launcher, which here passes SIGTERM on to the ranks, waits for them and returns their status.
      `rankwise run --help` lists torchrun's options."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status is 2 where the command cannot be understood.

    Ranks: local.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    match given:
        case ["run", *torchrun_arguments] if torchrun_arguments:
            from rankwise.launch import launch

            return launch(torchrun_arguments)
        case ["--version"]:
            print(f"rankwise {__version__}")
            return 0
        case ["-h" | "--help"]:
            print(USAGE)
            return 0
    print(USAGE, file=sys.stderr)
    if given and given[0] != "run":
        print(f"error: {given[0]!r} is no verb of rankwise; there is `run`", file=sys.stderr)
    return 2
