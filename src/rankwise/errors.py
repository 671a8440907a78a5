"""What rankwise raises.

RankwiseError                       root of everything that rankwise raises on purpose
+-- LaunchError (ValueError)        the environment contradicts itself
+-- DeviceError                     no device for this rank
+-- StoppedError                    asked to stop before all ranks had started
+-- MissingRanksError               ranks did not come to something in time
+-- RankFailedError                 one or more ranks failed inside something done together
+-- CheckpointError                 a checkpoint could not be saved or loaded
    +-- CheckpointNotFoundError     there is no such step or item
    +-- CheckpointCorruptError      a file is not what was written
    +-- CheckpointMismatchError     whole, but made for something else
    +-- CheckpointLeaseError        another job writes in the same folder
"""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass
from types import TracebackType

from rankwise.redact import make_redactor

LOST = "RankLost"
"""The `error_type` of a rank that ended without a word."""

_OWN_FOLDER = os.path.dirname(__file__) + os.sep


class RankwiseError(Exception):
    """Root of everything that rankwise raises on purpose; its message is written for the user."""

    on_every_rank: bool = False
    """True when every rank raises this same error together: then the main process alone need print it."""


class LaunchError(RankwiseError, ValueError):
    """The environment of this process contradicts itself or lacks something."""


class DeviceError(RankwiseError):
    """There is no device for this rank."""


class StoppedError(RankwiseError):
    """This rank was asked to stop before all ranks had started: nothing was done that could be lost."""


class MissingRanksError(RankwiseError):
    """Ranks did not come to something that all do together within its time; the message names them."""

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message, ranks)
        self.ranks = ranks

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class RankFailure:
    """What went wrong on one rank."""

    rank: int
    host: str
    error_type: str
    message: str
    traceback: str = ""
    """Empty for errors of ours: their message says what the user needs."""
    device: str = ""
    """Where it computed; empty where it had no device yet."""
    pid: int | None = None

    @classmethod
    def of(cls, error: BaseException, *, rank: int, host: str, device: str = "", pid: int | None = None) -> RankFailure:
        """The failure of `rank`, described so that it can travel to the others, be printed and stand in a file.

        Values of variables that are named like secrets are left out of it.
        """
        clean = make_redactor(os.environ)
        known = isinstance(error, RankwiseError)
        lines = [] if known else traceback.format_exception(type(error), error, without_own_frames(error))
        return cls(rank, host, type(error).__name__, clean(text_of(error)), clean("".join(lines)), device, pid)

    @property
    def is_loss(self) -> bool:
        """Whether the rank ended without a word of its own."""
        return self.error_type == LOST

    @property
    def place(self) -> str:
        """The rank, its host and its device, for a message."""
        return f"rank {self.rank} ({', '.join(filter(None, (self.host, self.device)))})"

    def __str__(self) -> str:
        said = f"{self.error_type}: {self.message}" if self.message else self.error_type
        return f"{said}\n{self.traceback.rstrip()}" if self.traceback else said


def without_own_frames(error: BaseException) -> TracebackType | None:
    """The traceback of an error without our frames at its start: the `with` block's, `rankwise run`'s.

    Ranks: local.
    """
    trace = error.__traceback__
    own = (_OWN_FOLDER, "<frozen runpy>")
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename.startswith(own):
        trace = trace.tb_next
    return trace


def text_of(error: BaseException) -> str:
    """The message of an error, also of one that cannot say it.

    Ranks: local.
    """
    try:
        return str(error)
    except Exception as trouble:
        return f"<no text: {type(trouble).__name__} in its __str__>"


class RankFailedError(RankwiseError):
    """One or more ranks failed inside something that all ranks do together.

    Args:
        failures: at least one, the one to show first in front.
        verb: how the message says it: "failed", or "failed first" where others failed in consequence.
    """

    def __init__(self, failures: tuple[RankFailure, ...], verb: str = "failed") -> None:
        super().__init__(failures, verb)
        self.failures = failures
        self.verb = verb

    def __str__(self) -> str:
        first, *others = self.failures
        text = f"{first.place} {self.verb}: {first}"
        if not others:
            return text
        ranks = ", ".join(str(failure.rank) for failure in others[:8])
        return f"{text}\n(also failed: {len(others)} more, rank {ranks}{', ...' if len(others) > 8 else ''})"


class CheckpointError(RankwiseError):
    """A checkpoint could not be saved or loaded."""


class CheckpointNotFoundError(CheckpointError):
    """There is no such step, or no such item in it."""


class CheckpointCorruptError(CheckpointError):
    """A file of the checkpoint is missing or is not what was written."""


class CheckpointMismatchError(CheckpointError):
    """The checkpoint is whole, but made for something else than it is loaded into."""


class CheckpointLeaseError(CheckpointError):
    """Another job writes, or has begun to write, where this one wants to: nothing of this one's save was kept."""
