"""Loggers whose calls say which ranks they are for."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import MutableMapping, Sequence
from typing import Any, Literal

from rankwise.errors import LaunchError
from rankwise.identity import Identity
from rankwise.logs import state
from rankwise.logs.record import SHOWN, render

Ranks = Literal["main", "all"] | Sequence[int]

MAX_SAID_ONCE = 10_000
"""Records made with `once=` that are remembered; a program may make them of ever new words."""
said_once: dict[int, object] = {}
"""Their hashes, the oldest first, for the words may be long."""
_guess: tuple[str | None, int] | None = None


class RankLogger(logging.LoggerAdapter[logging.Logger]):
    """A stdlib logger whose calls take `ranks=` and `once=` too.

    ranks: which ranks make the record. "all" (the default) writes it to every calling rank's file and shows the
        main process's INFO and every rank's WARNING; "main" makes it on the main process alone; a list of ranks
        makes it there and shows it, labelled.
    once: drop the record when this process has already made an equal one; the last 10,000 are remembered.

    Raises:
        ValueError: by a call whose `ranks=` is none of these.
    Ranks: local; a call never waits for another rank.
    """

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger, {})
        # Bound here: a call that makes no record should cost next to nothing.
        self._is_enabled = logger.isEnabledFor

    def log(  # type: ignore[override]
        self,
        level: int,
        msg: object,
        *args: object,
        ranks: Ranks = "all",
        once: bool = False,
        stacklevel: int = 1,
        **kwargs: Any,
    ) -> None:
        """Make one record, where and when `ranks` and `once` allow it."""
        if self._is_enabled(level) and (ranks == "all" or _is_among(ranks)):
            if not isinstance(ranks, str):
                kwargs["extra"] = {**(kwargs.get("extra") or {}), **SHOWN}
            if not once or self._is_new(level, msg, args):
                # Our frame would otherwise be named as the place of the call.
                self.logger._log(level, msg, args, stacklevel=stacklevel + 1, **kwargs)

    def info(self, msg: object, *args: object, ranks: Ranks = "all", **kwargs: Any) -> None:  # type: ignore[override]
        """`log` at INFO; not by way of it, since this is what stands in training loops."""
        if self._is_enabled(logging.INFO) and (ranks == "all" or _is_among(ranks)):
            kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
            if ranks == "all" and "once" not in kwargs:
                self.logger._log(logging.INFO, msg, args, **kwargs)
            else:
                self.log(logging.INFO, msg, *args, ranks=ranks, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Leave message and arguments as they are."""
        return msg, kwargs

    def _is_new(self, level: int, msg: object, args: tuple[object, ...]) -> bool:
        mark = object()
        # One step, so that of two threads that come together one is the first.
        if said_once.setdefault(hash((self.logger.name, level, render(msg, args))), mark) is not mark:
            return False
        if len(said_once) > MAX_SAID_ONCE:
            with contextlib.suppress(StopIteration, RuntimeError):  # another thread was faster
                said_once.pop(next(iter(said_once)), None)
        return True


def get_logger(name: str) -> RankLogger:
    """A logger that knows ranks; use it as any stdlib logger, before, during and after a session.

    Ranks: local.
    """
    return RankLogger(logging.getLogger(name))


def _is_among(ranks: Ranks) -> bool:
    rank = state.rank
    if rank is None:
        rank = current_rank()
    if ranks == "main":
        return rank == 0
    try:
        return rank in ranks
    except TypeError:
        raise ValueError(
            f'ranks={ranks!r} names no ranks. Give "main", "all", or a list of ranks such as [0, 3].'
        ) from None


def current_rank() -> int:
    """The session's rank; without a session the one that the environment names.

    Ranks: local.
    """
    global _guess
    if state.rank is not None:
        return state.rank
    # A process that was started without variables may set RANK itself, after its first record.
    variable = os.environ.get("RANK")
    if _guess is None or _guess[0] != variable:
        try:
            rank = Identity.resolve(os.environ).rank
        except LaunchError:
            rank = 0  # a log call is no place to say so
        _guess = (variable, rank)
    return _guess[1]
