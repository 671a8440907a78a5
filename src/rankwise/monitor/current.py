"""The open Monitor, for code that is not handed it; without one everything here does nothing. No torch."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from types import TracebackType

    from rankwise.monitor.monitor import Monitor

P = ParamSpec("P")
T = TypeVar("T")

_open: Monitor | None = None


class AnyPhase:
    """One phase of whatever Monitor is open when it begins; holds nothing, so one serves for all times."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        if _open is not None:
            _open.timeline.enter(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _open is not None:
            _open.timeline.leave(self._name)

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        """The function, every call of it in this phase."""

        @functools.wraps(function)
        def in_phase(*args: P.args, **kwargs: P.kwargs) -> T:
            with self:
                return function(*args, **kwargs)

        return in_phase


_phases: dict[str, AnyPhase] = {}


def phase(name: str) -> AnyPhase:
    """What runs in the `with` block, or in the decorated function, counts as this phase of the step.

    Ranks: local; as `Monitor.phase`.
    """
    found = _phases.get(name)
    if found is None:
        found = _phases[name] = AnyPhase(name)
    return found


def step(number: int | None = None) -> None:
    """The step is over.

    Ranks: local; as `Monitor.step`.
    """
    if _open is not None:
        _open.step(number)


def watch(*modules: Any) -> None:
    """Measure how long the training waits for the gradients of other ranks.

    Ranks: local; as `Monitor.watch`.
    """
    if _open is not None:
        _open.watch(*modules)


def log(step: int, values: Mapping[str, Any]) -> None:
    """Keep losses or other numbers of a step.

    Ranks: every rank may call, the main process writes; as `Monitor.log`.
    """
    if _open is not None:
        _open.log(step, values)


def get_open() -> Monitor | None:
    """The Monitor that is open in this process.

    Ranks: local.
    """
    return _open


def set_open(monitor: Monitor | None) -> None:
    """Let the functions here act on this Monitor.

    Ranks: local.
    """
    global _open
    _open = monitor


def _after_fork_in_child() -> None:
    # A data loader's worker: the phases, and the accelerator's events, are its parent's.
    set_open(None)


os.register_at_fork(after_in_child=_after_fork_in_child)
