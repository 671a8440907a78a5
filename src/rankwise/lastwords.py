"""The end of a failed job's output: the rank that failed first, its host, device and traceback, once.

A rank that fails on its own leaves word; whoever has the last word on the console prints it: `rankwise run` where the
rank was started by it, else the main process. Every other rank keeps its traceback to its log file.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from rankwise.errors import RankFailure, text_of, without_own_frames
from rankwise.files import write_atomic
from rankwise.redact import make_redactor, redact

_ATTRIBUTE = "_rankwise_last_words"
FOLDER = "RANKWISE_LAST_WORDS"
"""The variable by which `rankwise run` tells its ranks the folder to leave word in."""

_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


def set_last_words(error: BaseException, words: str) -> None:
    """Print `words` (nothing where they are empty) in place of the error's traceback if it ends this process.

    Ranks: local.
    """
    with contextlib.suppress(AttributeError):
        setattr(error, _ATTRIBUTE, redact(words))
    if not hasattr(sys.excepthook, _ATTRIBUTE):
        # Again for every error: torch puts its own hook before this one with each process group that it makes.
        sys.excepthook = _hook_before(sys.excepthook)


def last_words(error: BaseException) -> str | None:
    """What a program that catches the error of a session should print for it: empty where others do, None: as it likes.

    Ranks: local.
    """
    words: str | None = getattr(error, _ATTRIBUTE, None)
    return words


def _hook_before(previous: _Hook) -> _Hook:
    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        words = last_words(error)
        if words is None:
            previous(kind, error, trace)
        elif words:
            print_words(words)

    setattr(hook, _ATTRIBUTE, "")
    return hook


def print_words(words: str) -> None:
    """Write to stderr with one call, so that ranks do not cut into each other, and without secrets.

    Ranks: local.
    """
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout is not None:
            sys.stdout.flush()
        sys.stderr.write(redact(words).rstrip("\n") + "\n")
        sys.stderr.flush()


def in_words(failure: RankFailure, verb: str = "failed first") -> str:
    """A failure as the last thing that a person reads.

    Ranks: local.
    """
    pid = f", pid {failure.pid}" if failure.pid else ""
    said = failure.traceback or f"{failure.error_type}: {failure.message}"
    return f"rankwise: {failure.place[:-1]}{pid}) {verb}:\n{said}"


def has_launcher(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `rankwise run` started this rank and has the last word: it speaks when the job ends, and not before.

    Ranks: local.
    """
    if not environ.get(FOLDER) or not os.path.isdir(environ[FOLDER]):
        return False
    # A failure after which the agent starts all ranks again would be told by nobody.
    return environ.get("TORCHELASTIC_RESTART_COUNT", "0") == environ.get("TORCHELASTIC_MAX_RESTARTS", "0")


def tell_launcher(failure: RankFailure, environ: Mapping[str, str] = os.environ) -> bool:
    """Leave the first failure of the job where `rankwise run` on this node finds it; the first one stays.

    Returns:
        False where it did not start this rank, or its folder cannot be written.
    Ranks: local.
    """
    if not has_launcher(environ):
        return False
    path = Path(environ[FOLDER], f"first-{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}.json")
    # Linked into place, since a rename would replace what another rank left a moment before.
    staged = path.with_suffix(f".{os.getpid()}")
    try:
        write_atomic(staged, json.dumps(asdict(failure)))
        with contextlib.suppress(FileExistsError):
            os.link(staged, path)
        staged.unlink()
    except OSError:
        return False
    return True


def tell_torchrun(error: BaseException, environ: Mapping[str, str] = os.environ) -> None:
    """Leave word where torchrun's agent looks for what ended this rank; nothing under other launchers.

    Ranks: local; only where the failure is this rank's own.
    Source: the file that torch.distributed.elastic.multiprocessing.errors.ErrorHandler writes, whose form this is.
    Not by it, since it would write the values of secrets too.
    """
    path = environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    clean = make_redactor(environ)
    trace = "".join(traceback.format_exception(type(error), error, without_own_frames(error)))
    told = {
        "message": clean(f"{type(error).__name__}: {text_of(error)}"),
        "extraInfo": {"py_callstack": clean(trace), "timestamp": str(int(time.time()))},
    }
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": told}))


def told_to_launcher(folder: str | os.PathLike[str]) -> RankFailure | None:
    """What `tell_launcher` left there, in the last of the job's restarts; None if nothing.

    Ranks: in the launcher.
    """
    with contextlib.suppress(OSError, ValueError, TypeError):
        paths = sorted(Path(folder).glob("first-*.json"), key=lambda path: int(path.stem.partition("-")[2]))
        return RankFailure(**json.loads(paths[-1].read_text())) if paths else None
    return None
