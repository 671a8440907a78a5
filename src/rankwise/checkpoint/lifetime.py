"""How a manager waits for its saves with the other ranks, tells of the disk, and ends with its program."""

from __future__ import annotations

import atexit
import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from typing import ParamSpec, TypeVar

from rankwise import collectives, logs
from rankwise.errors import CheckpointError
from rankwise.group import at_session_end
from rankwise.waiting import FIRST_FAILURE_SECONDS, link

P = ParamSpec("P")
T = TypeVar("T")

SLOW_SECONDS = 60.0
"""After how long a wait for a save is told, again and again."""

_logger = logs.get_logger(__name__)


def wait_with_others(future: Future[None]) -> None:
    """Wait for a save; where another rank fails first, that is what is raised.

    Raises:
        CheckpointError: the save failed; on every rank.
        RankFailedError: another rank failed first.
    Ranks: every rank must call.
    """
    begin, num_told = time.monotonic(), 0
    while True:
        if not wait_for_futures([future], 0.1).done:
            link().raise_first_failure()
            if time.monotonic() - begin > (num_told + 1) * SLOW_SECONDS:
                num_told += 1
                _logger.warning("training has waited %d s for a checkpoint to be written", time.monotonic() - begin)
            continue
        try:
            return future.result()
        except CheckpointError as error:
            if "lost each other" in str(error):
                link().raise_first_failure(within_seconds=FIRST_FAILURE_SECONDS)
            raise
        finally:
            del future  # or the error would hold itself


def at_end(end: Callable[[bool], None], *, before_threads: bool) -> Callable[[], None]:
    """Have `end(failed)` called with the end of the session, or of the program; returns what takes that back.

    Until then it lives, and what it belongs to: the program may have dropped that while a save is under way.

    Args:
        before_threads: what ends needs threads that Python ends before `atexit` is asked.
    Ranks: local.
    """

    is_ended = False

    def end_with_program() -> None:
        nonlocal is_ended
        if is_ended:
            return
        is_ended = True
        # Set where an uncaught exception ends a script; at a prompt it tells of some earlier one.
        end(getattr(sys, "last_value", None) is not None and not hasattr(sys, "ps1"))

    forget = at_session_end(end)
    atexit.register(end_with_program)
    if before_threads:
        # There is no public way to be asked then.
        getattr(threading, "_register_atexit", atexit.register)(end_with_program)

    def take_back() -> None:
        nonlocal is_ended
        is_ended = True
        forget()
        atexit.unregister(end_with_program)

    return take_back


def on_main(what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`on_main_process`; what the disk refuses is a `CheckpointError` on every rank, which begins with `what`.

    Raises:
        CheckpointError: the disk refused.
    Ranks: every rank must call.
    """

    @functools.wraps(function)  # its name stands in what is told of ranks that do not come
    def attempt() -> T:
        try:
            return function(*args, **kwargs)
        except OSError as error:
            raise CheckpointError(f"{what}, because the disk refused on the main process: {error}") from error

    return collectives.on_main_process(attempt)


@contextlib.contextmanager
def told_of_disk(what: str) -> Iterator[None]:
    """What the disk refuses is a `CheckpointError` that begins with `what`.

    Ranks: local.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}, because the disk refused: {error}") from error
