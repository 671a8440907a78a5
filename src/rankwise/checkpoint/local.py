"""A folder of checkpoints on a disk, as those who save and load see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rankwise.checkpoint import folder
from rankwise.checkpoint.lease import Lease
from rankwise.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from rankwise.errors import CheckpointError
from rankwise.files import fsync_directory, make_directory


@dataclass(frozen=True)
class Committed:
    """A step that is there, and the name of the directory that holds it."""

    step: int
    name: str


@dataclass(frozen=True)
class OpenStep:
    """A step to read.

    Attributes:
        path: local directory of its files.
        where: it lies, for a person.
        bring: called with the name of a file before that is opened; raises `CheckpointCorruptError` where it is gone
            or damaged, if it had to be fetched.
    """

    path: Path
    where: str
    manifest: Manifest
    bring: Callable[[str], None]


class LocalFolder:
    """Steps in a directory that all ranks share.

    Attributes:
        location: where they lie, for a person.
        key: the same for all names of one folder.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.location = str(directory)
        self.key = str(directory.resolve())

    def find(self) -> list[Committed]:
        """The committed steps, the newest last.

        Ranks: local; while a save runs, ranks may see different ones.
        """
        return [Committed(step, folder.step_name(step)) for step in folder.find_steps(self.directory)]

    def find_lost(self) -> list[Path]:
        """Steps that have lost their manifest, by number: none appears without one.

        Ranks: local; while a save runs, ranks may see different ones.
        """
        return [self.directory / folder.step_name(step) for step in folder.find_steps_without_manifest(self.directory)]

    def at(self, step: int) -> Committed | None:
        """What stands in the way of a save of `step`, whole or not.

        Ranks: local.
        """
        found = Committed(step, folder.step_name(step))
        return found if (self.directory / found.name).exists() else None

    def committed(self, step: int, name: str) -> Committed:
        """What an attempt becomes by its commit.

        Ranks: local.
        """
        return Committed(step, folder.step_name(step))

    def describe(self, found: Committed) -> str:
        """Where a step lies, for a person.

        Ranks: local.
        """
        return str(self.directory / found.name)

    def open(self, found: Committed) -> OpenStep:
        """A step to read.

        Raises:
            CheckpointCorruptError: its manifest is missing or damaged.
        Ranks: local.
        """
        path = self.directory / found.name
        return OpenStep(path, str(path), read_manifest(path), lambda name: None)

    def verify(self, found: Committed, rank: int = 0, world_size: int = 1, *, is_cache_enough: bool = False) -> None:
        """Read the files of a step and compare them with the manifest.

        Args:
            rank, world_size: of several ranks that share the work, each takes its part.
            is_cache_enough: means nothing here.
        Raises:
            CheckpointCorruptError: names the first file that is not what was written.
        Ranks: local.
        """
        folder.verify(self.directory / found.name, rank, world_size)

    def looks_whole(self, found: Committed) -> bool:
        """Whether every file of a step is there in its full length.

        Ranks: local.
        """
        return folder.looks_whole(self.directory / found.name)

    def read_epoch(self, found: Committed) -> int:
        """Of the lease under which a step was committed.

        Raises:
            CheckpointCorruptError: its manifest is missing or damaged.
        Ranks: local.
        """
        return read_manifest(self.directory / found.name).epoch

    def begin(self, step: int, epoch: int) -> str:
        """The name of a fresh directory to fill; what killed saves and removals left is removed first.

        Ranks: main process only, and only under the lease.
        """
        return folder.make_staging(self.directory, step).name

    def join(self, name: str) -> Path:
        """This rank's view of the directory that the main process has begun.

        Raises:
            CheckpointError: it is not seen here.
        Ranks: local.
        """
        staging = self.directory / name
        if not folder.wait_until_visible(staging):
            raise CheckpointError(
                f"{staging} was made by the main process and is not seen here after {folder.VISIBLE_SECONDS:g} s. "
                "Checkpoints need one folder that all hosts share."
            )
        return staging

    def publish(self, name: str, files: Iterable[str]) -> None:
        """Nothing: files are written where they belong.

        Ranks: local.
        """

    def commit(self, name: str, manifest: Manifest, check_lease: Callable[[], None]) -> None:
        """Make the directory the step's; see `folder.commit`.

        Ranks: main process only, after all ranks have written and synced their files.
        """
        folder.commit(self.directory / name, manifest, check_lease)

    def discard(self, name: str, *, is_committed: bool) -> None:
        """Delete what was begun, where it was not committed.

        Ranks: main process only.
        """
        folder.remove_staging(self.directory / name)

    def wait_until_visible(self, step: int) -> bool:
        """Whether a step that the main process has committed comes to be seen here.

        Raises:
            OSError: the disk refused to tell.
        Ranks: local.
        """
        return folder.wait_until_visible(self.directory / folder.step_name(step) / MANIFEST)

    def confirm(self) -> None:
        """Make the names of steps durable, where the save that made one could not.

        Raises:
            OSError: the disk refused.
        Ranks: main process only.
        """
        fsync_directory(self.directory)

    def set_aside(self, found: Committed, prefix: str) -> str:
        """Rename a step that is in the way.

        Returns:
            Where it lies now, for a person.
        Ranks: main process only.
        """
        return str(folder.move_aside(self.directory, found.step, prefix))

    def remove(self, steps: Iterable[Committed]) -> None:
        """Delete steps: each loses its name first, so that none is ever seen in part.

        Ranks: main process only.
        """
        folder.remove_steps(self.directory, [found.step for found in steps])

    def take_lease(self, timeout_seconds: float) -> Lease:
        """The lease, once nobody else holds it.

        Raises:
            CheckpointLeaseError: another job holds it.
            CheckpointError, OSError: the folder cannot be made or written.
        Ranks: main process only.
        """
        make_directory(self.directory)
        epoch = folder.highest_epoch(self.directory)
        return Lease.acquire(self.directory, timeout_seconds=timeout_seconds, minimum_epoch=epoch)
