"""What those who find a hang have a watchdog do with it."""

from __future__ import annotations

from typing import Protocol

from rankwise.monitor.testimony import Order
from rankwise.session import Session
from rankwise.telemetry import Event

TOPIC = "watchdog"
"""Under which the ranks talk of it."""


class Voice(Protocol):
    """A `Watchdog`, as the judge and the stand-in see it."""

    @property
    def session(self) -> Session: ...
    @property
    def silence_seconds(self) -> float: ...
    @property
    def ends(self) -> bool: ...
    def declare(self, event: Event, order: Order, *, say: bool) -> None: ...
    def tell(self, event: Event) -> None: ...
    def over(self) -> None: ...
