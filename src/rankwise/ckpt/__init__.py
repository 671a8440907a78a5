"""`rankwise ckpt`: what lies in a folder of checkpoints, whether it is whole, how two steps differ; clear up, convert.

    rankwise ckpt ls RUN          rankwise ckpt verify RUN          rankwise ckpt diff RUN 1000 2000

It reads and writes files alone, in no job; docs/checkpoints.md tells what is in them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from rankwise.ckpt.options import parse_options
from rankwise.ckpt.output import drop_output, tell
from rankwise.errors import CheckpointCorruptError, CheckpointError

_MODULES = {"ls": "listing", "verify": "verifying", "diff": "differing", "prune": "pruning", "convert": "converting"}


def main(arguments: Sequence[str]) -> int:
    """Run one command.

    Returns:
        The exit status: 0 all is well, for `diff` equal; 1 something is damaged, for `diff` different; 2 it could not
        be done; 130 where Ctrl-C cuts it short.
    Ranks: local, in no job.
    """
    try:
        options = parse_options(arguments)
        # Each is imported when it is asked for: `ls` must not pay for torch.
        command = importlib.import_module(f"rankwise.ckpt.{_MODULES[options.command]}")
        status = int(command.run(options))
        sys.stdout.flush()
    except SystemExit as end:  # --help
        return int(end.code or 0)
    except BrokenPipeError:  # `| head` has seen enough
        drop_output()
        return 0
    except KeyboardInterrupt:
        drop_output()
        return 130
    except CheckpointCorruptError as error:
        tell(f"error: {error}")
        return 2 if options.command == "diff" else 1
    except (CheckpointError, ValueError) as error:
        tell(f"error: {error}")
        return 2
    except OSError as error:
        name = "" if error.filename is None else f" ({os.fspath(error.filename)!r})"
        tell(f"error: {error.strerror or error}{name}. See whether the disk and its mount are well.")
        return 2
    return status
