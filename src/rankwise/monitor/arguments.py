"""What a Monitor may be given."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from rankwise.errors import RankwiseError

_MAX_EVERY_SECONDS = 3600.0
_NUM_PORTS = 2**16


def check_arguments(**given: Any) -> None:
    """Refuse a value that cannot be used.

    Raises:
        RankwiseError: names the value and what is needed.
    Ranks: local.
    """
    for name, value in given.items():
        is_good, needed = _WANTED[name]
        if not is_good(value):
            raise RankwiseError(f"{name} is {value!r}; give {needed}.")


def step_number(given: Any) -> int:
    """The number of a step as Python's own: integers of numpy and torch too.

    Raises:
        RankwiseError: it is none.
    Ranks: local.
    """
    try:
        number = operator.index(given)
    except (TypeError, RuntimeError):
        number = -1
    if number < 0:
        raise RankwiseError(f"the step is {given!r}; give its number, 0 or more, or None for the one after the last.")
    return number


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


_WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (lambda value: _whole(value, 0), "the number of a step, 0 or more"),
    "every_seconds": (
        lambda value: _seconds(value) and value <= _MAX_EVERY_SECONDS,
        f"more than 0 seconds, and {_MAX_EVERY_SECONDS:g} at most",
    ),
    "straggler_steps": (
        lambda value: value is None or _whole(value, 1),
        "a number of steps, 1 or more, or None to compare no ranks",
    ),
    "hang_timeout_seconds": (
        lambda value: value is None or _seconds(value),
        "more than 0 seconds, or None to learn it from the run's own steps",
    ),
    "on_hang": (lambda value: value in ("tell", "end"), '"tell" or "end"'),
    "prometheus_port": (
        lambda value: value is None or (_whole(value, 1) and value < _NUM_PORTS),
        f"a port in 1..{_NUM_PORTS - 1}, or None to serve nothing",
    ),
}
