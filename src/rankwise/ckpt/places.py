"""Where checkpoints lie: from what stands on the command line to the directories of steps."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from rankwise.checkpoint import folder
from rankwise.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from rankwise.errors import CheckpointCorruptError, CheckpointNotFoundError

LEFTOVERS = {
    folder.STAGING: "a save that is under way or was killed",
    folder.TRASH: "a removal that is under way or was killed",
    folder.BROKEN: "a damaged step, moved aside by a save",
    folder.STALE: "a step of an earlier job, moved aside by a save",
}
"""What a directory is, by how its name begins."""

_STEP = re.compile(r"step-([0-9]{8,})")
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Place:
    """A folder of checkpoints, or one step.

    Attributes:
        folder: of checkpoints; None where one step's directory was named.
        steps: the directories of steps, the newest last; those without a manifest come first.
    """

    folder: Path | None
    steps: tuple[Path, ...]

    def newest(self) -> Path:
        """The newest step.

        Raises:
            CheckpointNotFoundError: there is none.
        """
        if not self.steps:
            raise CheckpointNotFoundError(f"there is no checkpoint in {self.folder}.")
        return self.steps[-1]

    def step(self, number: int) -> Path:
        """The directory of one step.

        Raises:
            CheckpointNotFoundError: there is no such step.
        """
        for path in self.steps:
            if step_number(path) == number:
                return path
        there = ", ".join(str(step_number(path)) for path in self.steps[-8:]) or "none"
        where = self.folder or "what was named"
        raise CheckpointNotFoundError(f"there is no step {number} in {where}. There is: {there}.")


def find_place(text: str) -> Place:
    """What a RUN on the command line stands for; a run that has no checkpoints yet has no steps.

    Raises:
        CheckpointNotFoundError: there is no such directory.
        OSError: it cannot be read.
    Ranks: local.
    """
    path = Path(text)
    if not path.is_dir():
        raise CheckpointNotFoundError(
            f"there is no folder {text!r}. Give a run folder, a folder of checkpoints, or the directory of a step."
        )
    if step_number(path) is not None or (path / MANIFEST).is_file():
        return Place(None, (path,))
    if (path / _CHECKPOINTS).is_dir():
        path = path / _CHECKPOINTS
    return Place(path, tuple(_find_steps(path)))


def step_number(path: Path) -> int | None:
    """The step that a directory's name says; None where it says none.

    Ranks: local.
    """
    match = _STEP.fullmatch(path.name or path.resolve().name)
    return int(match[1]) if match else None


def load_manifest(step_directory: Path) -> Manifest:
    """What the directory of a step must hold.

    Raises:
        CheckpointCorruptError: the manifest is missing, damaged, or of another format.
    Ranks: local.
    """
    # Whatever else bears the name, a pipe say, must not hold us up.
    if not (step_directory / MANIFEST).is_file():
        raise CheckpointCorruptError(f"{step_directory / MANIFEST} is missing.")
    return read_manifest(step_directory)


def find_leftovers(directory: Path) -> list[Path]:
    """What killed saves and removals left behind, and what was moved aside, by name.

    Ranks: local.
    """
    names = sorted(name for name in os.listdir(directory) if name.startswith(tuple(LEFTOVERS)))
    return [directory / name for name in names]


def kind_of(leftover: Path) -> str:
    """How the name of a leftover begins.

    Ranks: local.
    """
    return next(prefix for prefix in LEFTOVERS if leftover.name.startswith(prefix))


def _find_steps(directory: Path) -> list[Path]:
    names = sorted(name for name in os.listdir(directory) if _STEP.fullmatch(name) and (directory / name).is_dir())
    committed = [directory / folder.step_name(step) for step in folder.find_steps(directory)]
    # A step appears with its manifest: where that is missing, it was lost.
    return [directory / name for name in names if directory / name not in committed] + committed
