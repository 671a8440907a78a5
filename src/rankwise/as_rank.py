"""What `rankwise run` starts as each rank: the user's script, as `python SCRIPT` would run it.

An exception that ends the script is left for the launcher, which prints the first of the job once, when all ranks have
ended; without this each rank prints its own, and the one that matters stands somewhere in the middle.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType, TracebackType

from rankwise import lastwords
from rankwise.errors import LaunchError, RankFailure, without_own_frames
from rankwise.identity import Identity

BIND = "RANKWISE_BIND"
"""Set to 1: each rank keeps to its share of the node's cores."""


def main(arguments: Sequence[str]) -> None:
    """Run `SCRIPT [ARGUMENT ...]` or `-m MODULE [ARGUMENT ...]` as the main module of this process.

    Ranks: local.
    """
    sys.excepthook = _leave_word
    if os.environ.get(BIND) == "1":
        from rankwise import threads

        with contextlib.suppress(LaunchError):
            threads.bind_cpus(Identity.resolve(os.environ), "cpu")
    sys.orig_argv[:] = [sys.executable, *arguments]  # what was asked for, as run.json tells it
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        sys.path[0] = os.getcwd()
        runpy._run_module_as_main(arguments[1])  # type: ignore[attr-defined]
    else:
        _run_script(arguments)


def _run_script(arguments: Sequence[str]) -> None:
    path = arguments[0]
    sys.argv = list(arguments)
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    script = ModuleType("__main__")
    script.__file__ = os.path.abspath(path)
    vars(script).update(__builtins__=__builtins__, __spec__=None, __cached__=None)
    try:
        with open(path, "rb") as file:
            code = compile(file.read(), script.__file__, "exec")
    except OSError as error:
        print(f"error: cannot read {path}: {error.strerror}. Name a script, or -m and a module.", file=sys.stderr)
        sys.exit(2)
    # In place of this module, so that pickle and multiprocessing find what the script defines.
    sys.modules["__main__"] = script
    exec(code, vars(script))


def _leave_word(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print nothing where the launcher will: of the first failure on this node that no session has told of."""
    if issubclass(kind, KeyboardInterrupt) or not lastwords.has_launcher():
        _print(kind, error)
        return
    identity = Identity.resolve(os.environ)
    failure = RankFailure.of(error, rank=identity.rank, host=os.uname().nodename, pid=os.getpid())
    if not lastwords.tell_launcher(failure):
        _print(kind, error)


def _print(kind: type[BaseException], error: BaseException) -> None:
    shown = error.with_traceback(without_own_frames(error))
    lastwords.print_words("".join(traceback.format_exception(kind, shown, shown.__traceback__)))


if __name__ == "__main__":
    main(sys.argv[1:])
