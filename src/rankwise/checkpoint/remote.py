"""A folder of checkpoints behind a URL of fsspec: an object store, where nothing can be renamed.

step-00000010-00000007-1f0c.../   a directory for every attempt: its step, its lease's epoch, and a nonce
    __0_0.distcp, ...             put there by the ranks that wrote them
    manifest.json                 put last: with it the step is committed
    .aside                        such a step is not listed: it was in the way of a later one, or was never finished
lease-00000007.json               one object for each taking of the lease

Ranks write to a local directory first and upload from there, and read what they have fetched to one.

What holds where an object appears whole and listings tell the truth at once (S3, Google Cloud Storage, Azure): a step
is whole or not there; no committed object is ever written again, because every attempt has names of its own; of two
jobs that take the lease at once, one gets it where the store can refuse to replace an object. Where it cannot, both may
hold it until the next `check`: they commit side by side, and loading prefers the higher epoch.

What does not hold elsewhere (SFTP, FTP): a save killed while the manifest is written leaves a step that is listed,
found damaged by every load, and passed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from rankwise.checkpoint import folder
from rankwise.checkpoint.fetched import Fetched
from rankwise.checkpoint.local import Committed, OpenStep
from rankwise.checkpoint.manifest import MANIFEST, Manifest, encode_manifest
from rankwise.checkpoint.objects import Objects
from rankwise.checkpoint.remote_lease import RemoteLease
from rankwise.errors import CheckpointCorruptError, CheckpointError

ASIDE = ".aside"

_ATTEMPT = re.compile(r"step-([0-9]{8,})-([0-9]{8,})-([0-9a-f]{32})")


class RemoteFolder:
    """Steps behind a URL; as `LocalFolder`.

    Args:
        url: see `Objects`.
        cache_dir: local folder of what is on its way, and of what was fetched: that is not fetched again, by this or
            another process. None takes one of this process alone, removed with it.
    Raises:
        CheckpointError: the URL cannot be opened, or the folder not be made.
    Ranks: local.
    """

    def __init__(self, url: str, cache_dir: str | os.PathLike[str] | None = None) -> None:
        self._objects = Objects(url)
        self.location = self.key = self._objects.location
        # One folder may serve several URLs.
        parent = None if cache_dir is None else Path(cache_dir) / hashlib.sha256(url.encode()).hexdigest()[:16]
        self._fetched = Fetched(self._objects, parent)
        self._saving = self._fetched.directory / "saving"
        self._listing: dict[str, dict[str, int]] = {}

    def find(self) -> list[Committed]:
        """The committed steps, the newest last: by epoch, then by number; of each the newest attempt.

        Raises:
            CheckpointError: the store does not answer.
        Ranks: local; while a save runs, ranks may see different ones.
        """
        listing = self._list()
        whole = sorted(
            ((_epoch(name), _step(name), name) for name, files in listing.items() if _is_listed(files)),
        )
        newest = {step: name for _, step, name in whole}
        return [Committed(step, name) for _, step, name in whole if newest[step] == name]

    def at(self, step: int) -> Committed | None:
        """What a save of `step` would come after.

        Ranks: local.
        """
        return next((found for found in self.find() if found.step == step), None)

    def committed(self, step: int, name: str) -> Committed:
        """What an attempt becomes by its commit.

        Ranks: local.
        """
        return Committed(step, name)

    def describe(self, found: Committed) -> str:
        """Where a step lies, for a person.

        Ranks: local.
        """
        return f"{self.location}/{found.name}"

    def open(self, found: Committed) -> OpenStep:
        """A step whose files are fetched when they are asked for, and compared with their checksums.

        Raises:
            CheckpointCorruptError: its manifest is gone or damaged.
            CheckpointError: the store does not answer.
        Ranks: local.
        """
        manifest = self._fetched.read_manifest(found.name)
        return OpenStep(
            self._fetched.path(found.name),
            self.describe(found),
            manifest,
            lambda name: self._fetched.bring(found.name, manifest, name),
        )

    def verify(self, found: Committed, rank: int = 0, world_size: int = 1, *, is_cache_enough: bool = False) -> None:
        """Fetch the files of a step and compare them with its manifest.

        Args:
            rank, world_size: of several ranks that share the work, each takes its part.
            is_cache_enough: content with files that were fetched before, where they are what was written.
        Raises:
            CheckpointCorruptError: names the first file that is not what was written, twice in a row.
            CheckpointError: the store does not answer.
        Ranks: local.
        """
        step = self.open(found)
        for name in folder.share_of_files(step.manifest, rank, world_size):
            if not is_cache_enough:
                self._fetched.drop(found.name, name)
            step.bring(name)

    def looks_whole(self, found: Committed) -> bool:
        """Whether every object of a step was there in its full length when steps were last looked for.

        Ranks: local.
        """
        try:
            manifest = self._fetched.read_manifest(found.name, is_known_enough=True)
        except CheckpointCorruptError:
            return False
        sizes = self._listing.get(found.name, {})
        return all(sizes.get(name) == record.num_bytes for name, record in manifest.files.items())

    def read_epoch(self, found: Committed) -> int:
        """Of the lease under which a step was committed.

        Ranks: local.
        """
        return _epoch(found.name)

    def begin(self, step: int, epoch: int) -> str:
        """A name for an attempt at a step; of killed saves of earlier jobs, what they left is removed.

        Raises:
            CheckpointError: the store does not answer.
        Ranks: main process only, and only under the lease.
        """
        for name, files in self._list().items():
            if MANIFEST not in files and _epoch(name) < epoch:
                self._bury(name, files, is_safe=_epoch(name) < epoch - 1)
        return f"{folder.step_name(step)}-{epoch:08d}-{uuid.uuid4().hex}"

    def join(self, name: str) -> Path:
        """This rank's local directory for the files of an attempt.

        Raises:
            OSError: the disk refused.
        Ranks: local.
        """
        self._saving.mkdir(exist_ok=True)
        for leftover in self._saving.iterdir():
            match = _ATTEMPT.fullmatch(leftover.name)
            if match is None or int(match[2]) < _epoch(name):
                shutil.rmtree(leftover, ignore_errors=True)
        directory = self._saving / name
        directory.mkdir(exist_ok=True)
        return directory

    def publish(self, name: str, files: Iterable[str]) -> None:
        """Put files of the attempt's local directory behind the URL; then they are removed here.

        Raises:
            CheckpointError: the store did not take them.
        Ranks: local.
        """
        for file in files:
            local = self._saving / name / file
            self._objects.upload(local, f"{name}/{file}")
            local.unlink()

    def commit(self, name: str, manifest: Manifest, check_lease: Callable[[], None]) -> None:
        """Put the manifest, after all else is there in its full length.

        Raises:
            CheckpointLeaseError: from `check_lease`; there is no such step.
            CheckpointError: an object is missing, or the store did not take the manifest.
        Ranks: main process only, after every rank has published.
        """
        sizes = self._objects.sizes(f"{name}/")
        for file, record in manifest.files.items():
            size = sizes.get(f"{name}/{file}")
            if size != record.num_bytes:
                there = "does not have" if size is None else f"has {size} bytes of"
                raise CheckpointError(
                    f"{self.location} {there} {name}/{file}, of which a rank has put {record.num_bytes} bytes. "
                    "Have all ranks write to one store: memory:// and file:// are each process's or host's own."
                )
        content = encode_manifest(manifest)
        check_lease()
        try:
            self._objects.write(f"{name}/{MANIFEST}", content)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}. If it was the answer alone that was lost, the step is there and whole all the same"
            ) from error

    def discard(self, name: str, *, is_committed: bool) -> None:
        """Drop what is local of an attempt, and where it was not committed, as far as possible, what is remote.

        Ranks: main process only.
        """
        shutil.rmtree(self._saving / name, ignore_errors=True)
        if not is_committed:
            with contextlib.suppress(CheckpointError):
                self._objects.remove([f"{name}/{MANIFEST}"], 0.0)
                self._objects.remove_below(name, 0.0)

    def wait_until_visible(self, step: int) -> bool:
        """Whether a step that the main process has committed is seen here: stores tell all the same.

        Ranks: local.
        """
        return True

    def confirm(self) -> None:
        """Nothing: what a store has taken is durable.

        Ranks: local.
        """

    def set_aside(self, found: Committed, prefix: str) -> str:
        """Have a step listed no more; its files stay.

        Returns:
            Where it lies, for a person.
        Ranks: main process only.
        """
        self._objects.write(f"{found.name}/{ASIDE}", prefix.encode())
        return self.describe(found)

    def remove(self, steps: Iterable[Committed]) -> None:
        """Delete steps with all earlier attempts at them, the manifest first, so that none is ever seen in part.

        Ranks: main process only.
        """
        highest = {found.step: found.name for found in steps}
        for name, files in self._list().items():
            last = highest.get(_step(name))
            if last is not None and MANIFEST in files and _epoch(name) <= _epoch(last):
                self._objects.remove([f"{name}/{MANIFEST}"])
                self._objects.remove_below(name)
                self._fetched.forget(name)

    def take_lease(self, timeout_seconds: float) -> RemoteLease:
        """The lease, once nobody else holds it.

        Raises:
            CheckpointLeaseError: another job holds it.
            CheckpointError: the store does not answer.
        Ranks: main process only.
        """
        epochs = [_epoch(name) for name in self._list()]
        return RemoteLease.acquire(self._objects, timeout_seconds=timeout_seconds, minimum_epoch=max(epochs, default=0))

    def _list(self) -> dict[str, dict[str, int]]:
        """The objects of every attempt, with their sizes."""
        listing: dict[str, dict[str, int]] = {}
        for path, size in self._objects.sizes("step-").items():
            name, _, file = path.partition("/")
            if _ATTEMPT.fullmatch(name):
                listing.setdefault(name, {})[file] = size
        self._fetched.keep(listing)
        self._listing = listing
        return listing

    def _bury(self, name: str, files: Iterable[str], *, is_safe: bool) -> None:
        """Remove an attempt of a job that is gone, or stalled: what that one may still put is then never listed."""
        with contextlib.suppress(CheckpointError):
            if is_safe:
                self._objects.remove_below(name)
                return
            self._objects.write(f"{name}/{ASIDE}", folder.TRASH.encode())
            self._objects.remove(f"{name}/{file}" for file in files if file != ASIDE)


def _is_listed(files: Iterable[str]) -> bool:
    return MANIFEST in files and ASIDE not in files


def _step(name: str) -> int:
    return int(name.split("-")[1])


def _epoch(name: str) -> int:
    return int(name.split("-")[2])
