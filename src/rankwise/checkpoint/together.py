"""What the ranks of a save say to each other in the background, in a group of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch.distributed as dist

from rankwise import collectives
from rankwise.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointLeaseError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    RankFailure,
)
from rankwise.waiting import LOST_CONNECTION

T = TypeVar("T")

KINDS: dict[str, type[CheckpointError]] = {
    kind.__name__: kind
    for kind in (
        CheckpointNotFoundError,
        CheckpointCorruptError,
        CheckpointMismatchError,
        CheckpointLeaseError,
        CheckpointError,
    )
}


def rank_and_world_size() -> tuple[int, int]:
    """This process's place in the default group; (0, 1) without one.

    Ranks: local.
    """
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@dataclass
class _Outcome(Generic[T]):
    value: T | None = None
    kind: str = ""
    message: str = ""


class Assembly:
    """All ranks, in a group where nothing of the training comes between.

    Args:
        group: over the CPU; None for a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.world_size = rank_and_world_size()

    def on_main(self, what: str, function: Callable[[], T]) -> T:
        """What `function` returns on the main process, on every rank.

        Raises:
            CheckpointError: the function failed, or the ranks lost each other; begins with `what`.
        Ranks: every rank must call.
        """
        outcome: _Outcome[T] = _Outcome()
        cause: Exception | None = None
        if self.rank == 0:
            try:
                outcome.value = function()
            except Exception as error:
                cause = error
                outcome.kind, outcome.message = kind_name(error), _say(what, error)
        if self.group is not None:
            boxes = [outcome]
            self._talk(what, lambda: dist.broadcast_object_list(boxes, src=0, group=self.group))
            outcome = boxes[0]
        try:
            if outcome.kind:
                raise together(KINDS[outcome.kind](outcome.message)) from cause
        finally:
            del cause  # or its traceback would hold itself, and with it the group and its threads
        return cast(T, outcome.value)

    def gather(self, what: str, obj: T) -> list[T]:
        """The objects of all ranks, on the main process; empty on the others.

        Raises:
            CheckpointError: the ranks lost each other.
        Ranks: every rank must call.
        """
        if self.group is None:
            return [obj]
        rows: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        self._talk(what, lambda: dist.gather_object(obj, rows, dst=0, group=self.group))
        return rows or []

    def _talk(self, what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{what}, because the ranks lost each other: {error}") from error


def together(error: CheckpointError) -> CheckpointError:
    """The error, marked as one that every rank raises.

    Ranks: local.
    """
    error.on_every_rank = True
    return error


def kind_name(error: Exception) -> str:
    """By what name an error travels: a class that a library or a user made may not pickle.

    Ranks: local.
    """
    return next((kind.__name__ for kind in type(error).__mro__ if kind in KINDS.values()), CheckpointError.__name__)


def tell(what: str, failures: list[RankFailure], world_size: int) -> str:
    """One message of what ranks told.

    Ranks: local.
    """
    # A rank that waited in vain for another only suffers from what that one tells.
    first = min(failures, key=lambda failure: any(words in failure.message for words in LOST_CONNECTION))
    # A failure without traceback is one of ours, whose message says enough.
    cause = f"{first.error_type}: {first.message}" if first.traceback else first.message
    if len(failures) == world_size and all(failure.message == first.message for failure in failures):
        return f"{what}: {cause}"
    return f"{what}, because of rank {first.rank} ({first.host}): {cause}"


def _say(what: str, error: Exception) -> str:
    if isinstance(error, CheckpointError):
        text = str(error)
        return text if text.startswith(what) else f"{what}: {text}"
    if isinstance(error, OSError):
        return f"{what}, because the disk refused on the main process: {error}"
    return tell(what, [collectives.describe(error)], rank_and_world_size()[1])
