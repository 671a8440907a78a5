"""Asking a driver for many readings, each on its own: one that fails takes no other with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

GIB = 2**30
"""Bytes."""

Way = Callable[[], Mapping[str, Any]]
"""Asks the driver once and gives what it told by the names of `DEVICE_READINGS`; a value of None is none."""


class Failure(Enum):
    """What an error of a driver means for the question that met it."""

    NEVER = "the device, the driver or our rights do not allow it: not asked again"
    NOT_NOW = "asked again next time"
    LOST = "the device is gone: nothing else needs to be asked this time"


class Readings:
    """What one device tells.

    Args:
        questions: each with the ways to ask it, the best first; the next is taken where one fails for good.
        judge: what an error means.
    Attributes:
        lost: what the driver said when it had lost the device, None before.
    """

    def __init__(self, questions: Iterable[Sequence[Way]], judge: Callable[[Exception], Failure]) -> None:
        self._questions = [list(ways) for ways in questions]
        self._judge = judge
        self.lost: str | None = None

    def read(self) -> dict[str, Any]:
        """Everything that the driver tells now; never raises.

        Ranks: local.
        """
        told: dict[str, Any] = {}
        for ways in self._questions:
            while ways:
                try:
                    told |= {name: value for name, value in ways[0]().items() if value is not None}
                    break
                except Exception as error:
                    failure = self._judge(error)
                    if failure is Failure.LOST:
                        self.lost = str(error) or type(error).__name__
                        return told
                    if failure is Failure.NOT_NOW:
                        break
                    del ways[0]
        return told


@dataclass(frozen=True)
class Driver:
    """One device as its vendor's library knows it."""

    name: str | None
    """The product."""
    uuid: str | None
    """As `rankwise.device.device_uuid` writes it."""
    readings: Readings
    close: Callable[[], None]
    """Lets go of the library."""
