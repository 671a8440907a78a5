"""Local copies of the files of steps that lie behind a URL, each compared with its checksum before it is used."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import uuid
import weakref
from collections.abc import Container, Iterator
from pathlib import Path

from rankwise.checkpoint.folder import file_record, require_same
from rankwise.checkpoint.manifest import MANIFEST, FileRecord, Manifest, read_manifest
from rankwise.checkpoint.objects import Objects
from rankwise.errors import CheckpointCorruptError, CheckpointError
from rankwise.files import make_directory

OLD_SECONDS = 3600.0
"""Copies of steps that are gone are removed after this time."""

_NUM_FETCHES = 2
"""What came damaged may have been damaged on the way."""


class Fetched:
    """A folder of copies, by the name of the attempt that they are of.

    Args:
        objects: where the files lie.
        directory: may be shared with other processes; None takes one of this process alone, removed with it.
    Raises:
        CheckpointError: the folder cannot be made.
    Ranks: local.
    """

    def __init__(self, objects: Objects, directory: Path | None) -> None:
        self._objects = objects
        self._manifests: dict[str, Manifest] = {}
        self._compared: set[Path] = set()
        try:
            if directory is None:
                directory = Path(tempfile.mkdtemp(prefix="rankwise-checkpoints-"))
                weakref.finalize(self, _remove_own, directory, os.getpid())
            self.directory = directory.absolute()
            make_directory(self.directory)
        except OSError as error:
            raise CheckpointError(
                f"no folder can be made for what comes from {objects.location}: {error}. Give another cache_dir."
            ) from error

    def path(self, attempt: str) -> Path:
        """Where the copies of an attempt lie, in a directory with the name of its step.

        Ranks: local.
        """
        return self.directory / attempt / attempt.rsplit("-", 2)[0]

    def read_manifest(self, attempt: str, *, is_known_enough: bool = False) -> Manifest:
        """The manifest of a step, fetched anew.

        Args:
            is_known_enough: content with one that was fetched before: they never change.
        Raises:
            CheckpointCorruptError: it is gone or damaged.
            CheckpointError: the store does not answer.
        Ranks: local.
        """
        if is_known_enough and attempt in self._manifests:
            return self._manifests[attempt]
        directory, where = self.path(attempt), f"{self._objects.location}/{attempt}"
        failure = ""
        with _explained(where):
            directory.mkdir(parents=True, exist_ok=True)
            for _ in range(_NUM_FETCHES):
                try:
                    content = self._objects.read(f"{attempt}/{MANIFEST}")
                except FileNotFoundError:
                    raise CheckpointCorruptError(f"{where}/{MANIFEST} is not there any more.") from None
                with _replacing(directory / MANIFEST) as staged:
                    staged.write_bytes(content)
                try:
                    self._manifests[attempt] = read_manifest(directory)
                    return self._manifests[attempt]
                except CheckpointCorruptError as error:
                    failure = str(error).replace(str(directory), where)
        raise CheckpointCorruptError(failure)

    def bring(self, attempt: str, manifest: Manifest, name: str) -> None:
        """Have a local copy of a file that is what the manifest says.

        Raises:
            CheckpointCorruptError: it is gone, or damaged each time it was fetched.
            CheckpointError: the store does not answer, or the local disk refused.
        Ranks: local.
        """
        target, where = self.path(attempt) / name, f"{self._objects.location}/{attempt}/{name}"
        if name not in manifest.files or target in self._compared:
            return
        expected = manifest.files[name]
        with _explained(where), _alone(target):
            found = _record(target)  # of an earlier process, or of another rank that was faster
            for _ in range(_NUM_FETCHES):
                if found == expected:
                    break
                try:
                    with _replacing(target) as staged:
                        self._objects.download(f"{attempt}/{name}", staged, expected.num_bytes)
                except FileNotFoundError:
                    raise CheckpointCorruptError(f"{where} is not there any more.") from None
                found = file_record(target)
            require_same(where, found or FileRecord(0, ""), expected)
        self._compared.add(target)

    def drop(self, attempt: str, name: str) -> None:
        """Have a file fetched anew when it is asked for.

        Ranks: local.
        """
        target = self.path(attempt) / name
        self._compared.discard(target)
        with contextlib.suppress(OSError):
            target.unlink()

    def keep(self, attempts: Container[str]) -> None:
        """Remove old copies of all attempts but these.

        Ranks: local.
        """
        for directory in self.directory.glob("step-*"):
            with contextlib.suppress(OSError):
                # A new one may be of a step that was committed after those were listed.
                if directory.name not in attempts and time.time() - directory.stat().st_mtime > OLD_SECONDS:
                    self.forget(directory.name)

    def forget(self, attempt: str) -> None:
        """Remove the copies of an attempt.

        Ranks: local.
        """
        directory = self.directory / attempt
        self._compared = {path for path in self._compared if directory not in path.parents}
        shutil.rmtree(directory, ignore_errors=True)


def _record(path: Path) -> FileRecord | None:
    try:
        return file_record(path)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{where} cannot be stored here: {error}. Give a cache_dir on a disk with room."
        ) from error


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `target`: other processes may be reading that."""
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield staged
        os.replace(staged, target)
    finally:
        staged.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Of the ranks that share a folder, one fetches a file while the others wait; without locks there, all do."""
    with open(target.with_name(f".{target.name}.lock"), "ab") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_own(directory: Path, pid: int) -> None:
    # A fork of this process has no say.
    if os.getpid() == pid:
        shutil.rmtree(directory, ignore_errors=True)
