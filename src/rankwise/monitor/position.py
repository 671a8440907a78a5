"""Where the training thread is, for whoever watches it from another thread."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """Where the training thread of a rank was at its last sign of progress.

    Signs of progress are a finished step, and the beginning and end of a phase or of one of our collectives.
    """

    step: int
    """The last step that was finished, 0 before the first."""
    phase: str | None
    """The innermost phase that it is in, None outside; `communication` where it waits for other ranks."""
    since: float
    """When the last sign of progress came, by `time.monotonic()`."""
    number: int
    """How many signs of progress there have been."""
    collective: str | None = None
    """What it waits in together with other ranks, None where it does not."""
