"""Which step to load: the newest, or the one that was asked for, and what is said of those that are damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rankwise import logs
from rankwise.checkpoint.folder import step_name
from rankwise.checkpoint.local import Committed, LocalFolder
from rankwise.checkpoint.manifest import MANIFEST
from rankwise.checkpoint.remote import RemoteFolder
from rankwise.errors import CheckpointCorruptError, CheckpointNotFoundError

_logger = logs.get_logger(__name__)


def find_candidates(folder: LocalFolder | RemoteFolder, step: int | Literal["latest"]) -> list[Committed]:
    """The steps to try, in this order; none where "latest" was asked for and nothing is there.

    Raises:
        CheckpointNotFoundError: there is no such step.
        CheckpointCorruptError: its manifest is gone; for "latest", that of every step there is.
    Ranks: local.
    """
    if step != "latest" and type(step) is not int:
        raise CheckpointNotFoundError(f"a step is a whole number or 'latest', not {step!r}.")
    steps = folder.find()
    lost = folder.find_lost() if isinstance(folder, LocalFolder) else []
    if step == "latest":
        if lost and not steps:
            raise _is_lost(lost[-1])
        for path in lost:
            say_passed_over(_is_lost(path))
        return steps[::-1]
    asked = [found for found in steps if found.step == step]
    for path in lost:
        if path.name == step_name(step):
            raise _is_lost(path)
    if not asked:
        there = ", ".join(str(found.step) for found in steps[-8:]) or "none"
        raise CheckpointNotFoundError(f"there is no step {step} in {folder.location}. There is: {there}.")
    return asked


def _is_lost(step_directory: Path) -> CheckpointCorruptError:
    return CheckpointCorruptError(
        f"{step_directory / MANIFEST} is missing, and with it what tells whether the step is whole. Load another step "
        "(step=NUMBER), or move this one away."
    )


def say_passed_over(error: CheckpointCorruptError) -> None:
    """Say loudly that a damaged step is not the one that is used.

    Ranks: main process only is heard.
    """
    _logger.error("%s Going on to an older step: what came after it is lost.", error, ranks="main")
