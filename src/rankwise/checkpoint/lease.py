"""One job writes in a folder of checkpoints: the lease that it holds there.

Every taking of the lease has a number, its epoch, and a file `lease-00000007.json`, made whole under another name and
linked to that name, which only one process can do. The highest epoch is the holder. Its process writes a counter into
its file every few seconds; a folder whose highest epoch is released or dead is taken with the next number.

What holds wherever link(2), or open(2) with O_EXCL, succeeds for one process only (NFS since version 3, Lustre, GPFS,
local disks); no flock is used, and clocks of two hosts are never compared:
- Of all that race for an epoch, one gets it. A reply lost on the way is recognized by the nonce in the file.
- On one host (same boot, same process id namespace) a dead holder is replaced at once and a living one, stopped or
  not, never: the start time of its process tells them apart.
- Of a holder that cannot be seen from here only silence tells: its counter stands still for the whole timeout, on our
  clock, and time in which we ourselves stood still does not count.
- `Lease.check` lists the folder anew: opening a directory asks the NFS server unless it is mounted with `nocto`.
- The counter is written through a descriptor, never by name: a job that stalled and comes back cannot bring a
  removed file back nor write into the file of another.

What does not hold: a holder cut off for longer than the timeout loses the lease though it lives. It is told at its
next `check`, but one stalled between `check` and the rename that commits may still make the directory of its own step
appear. It never replaces one that is there (the rename fails), and as commits carry the epoch, loading prefers the
step of the highest. Nothing holds on mounts that cache listings (`nocto`, some object store mounts), nor for jobs
between whose starts somebody removed lease files by hand: `check` then finds out, as soon as it can see it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from rankwise.checkpoint.holder import (
    MAX_HEARTBEAT_SECONDS,
    Holder,
    encode,
    find_epochs,
    lease_name,
    read_highest,
    staged_epoch,
    utc_now,
)
from rankwise.errors import CheckpointError, CheckpointLeaseError
from rankwise.files import fsync_directory
from rankwise.logs import get_logger

_logger = get_logger(__name__)

_MAX_POLL_SECONDS = 0.5
_RELEASE_SECONDS = 5.0
_NUM_ATTEMPTS = 100
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
_ADVICE = {
    errno.ENOENT: "Make the folder first; where it should be there, see whether its file system is mounted.",
    errno.ENOTDIR: "Name a folder.",
    errno.EACCES: "Give this user the right to write there, or name another folder.",
    errno.EPERM: "Give this user the right to write there, or name another folder.",
    errno.EROFS: "Its file system is mounted read-only: have it mounted for writing, or name another folder.",
    errno.ENOSPC: "Free some space (rankwise ckpt prune), or name a folder on another disk.",
    errno.EDQUOT: "Free some of this user's quota (rankwise ckpt prune), or name another folder.",
}
# The size of the file stays, so its data alone need be durable: on a busy disk a full fsync takes seconds.
_sync = getattr(os, "fdatasync", os.fsync)


class Lease:
    """The right to commit steps in one folder, from `Lease.acquire` to `release`, or to the end of the process."""

    epoch: int
    """Higher than that of every holder before; commits carry it."""

    def __init__(self, directory: Path, epoch: int, nonce: str, descriptor: int, holder: Holder) -> None:
        self.directory = directory
        self.epoch = epoch
        self._nonce = nonce
        self._descriptor = descriptor
        self._holder = holder
        self._pid = os.getpid()
        self._closing = threading.Event()
        # A daemon: a disk that hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._keep, name="rankwise-lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        directory: str | os.PathLike[str],
        *,
        timeout_seconds: float = 60.0,
        heartbeat_seconds: float = 5.0,
        job: str | None = None,
        minimum_epoch: int = 0,
    ) -> Lease:
        """The lease of a folder, once nobody else holds it.

        A holder that lives is not waited for. One on another host is watched until its counter moves, or for the
        timeout (three of its own heartbeats where that is longer).

        Args:
            directory: must exist.
            timeout_seconds: how long the counter of another host's holder has to stand still to be judged dead.
            job: name or number of this job, for those who are refused.
            minimum_epoch: highest epoch in the steps that are there; the lease's is higher.
        Raises:
            ValueError: timeout_seconds is less than two heartbeats, or a heartbeat is not in (0, 60] s.
            CheckpointLeaseError: another job holds it; the message names it.
            CheckpointError: the folder cannot be read or written.
        Ranks: main process only.
        """
        if not 0 < heartbeat_seconds <= MAX_HEARTBEAT_SECONDS:
            raise ValueError(f"heartbeat_seconds={heartbeat_seconds} is not in (0, {MAX_HEARTBEAT_SECONDS:g}].")
        if not timeout_seconds >= 2 * heartbeat_seconds:
            raise ValueError(
                f"timeout_seconds={timeout_seconds} is less than two heartbeats of {heartbeat_seconds} s: a living "
                f"job would be judged dead. Give at least {2 * heartbeat_seconds}."
            )
        folder, nonce = Path(directory), uuid.uuid4().hex
        with _explained(folder, "take the lease of"):
            for _ in range(_NUM_ATTEMPTS):
                last = wait_until_free(folder, lambda: read_highest(folder), timeout_seconds)
                epoch = max(last, minimum_epoch) + 1
                holder = Holder.of_this_process(epoch, nonce, job, heartbeat_seconds, utc_now())
                descriptor = _take(folder, holder)
                if descriptor is not None:
                    _remove_older(folder, epoch)
                    return cls(folder, epoch, nonce, descriptor, holder)
        raise CheckpointLeaseError(
            f"The lease of {folder} was taken by others {_NUM_ATTEMPTS} times in a row, just before this job. "
            "See which jobs are started there, or give this one a folder of its own."
        )

    def check(self) -> None:
        """Nothing, where this job still holds the lease: to be called right before each commit.

        Raises:
            CheckpointLeaseError: another job has taken the lease, or it was released, or its file is gone.
            CheckpointError: the folder cannot be read.
        Ranks: main process only.
        """
        if self._closing.is_set():
            raise CheckpointLeaseError(f"The lease of {self.directory} (epoch {self.epoch}) was released by this job.")
        self._check_file()

    def release(self) -> None:
        """Give the lease up; the file stays, so that no epoch is used twice.

        Never raises, and waits a few seconds at most: where the disk hangs, the next job sees that this process ended.
        Again, or in a fork of the holder, it does nothing.

        Ranks: main process only.
        """
        if os.getpid() != self._pid or self._closing.is_set():
            return
        self._closing.set()
        self._thread.join(_RELEASE_SECONDS)
        if self._thread.is_alive():
            _logger.warning("the lease of %s is not released yet: its disk has not answered for 5 s", self.directory)

    def _check_file(self) -> None:
        with _explained(self.directory, "check the lease of"):
            found = read_highest(self.directory)
        holder = found[0] if found else None
        if holder is not None and (holder.epoch, holder.nonce) == (self.epoch, self._nonce):
            return
        if holder is not None and holder.epoch > self.epoch:
            raise CheckpointLeaseError(
                f"The lease of {self.directory} (epoch {self.epoch}) was lost to {holder}: this job had not been heard "
                "of for too long. Nothing more is committed here. End one of the two jobs; where both should go on, "
                "give this one a folder of its own."
            )
        raise CheckpointLeaseError(
            f"{self.directory / lease_name(self.epoch)}, the lease of this job, was removed or overwritten, so another "
            "job may write there. Nothing more is committed here. Start the job again, and leave lease files alone."
        )

    def _keep(self) -> None:
        """Write the counter until the lease is released or lost. All writes are of this thread: no lock to wait for."""
        num_beats, is_told = 0, False
        while not self._closing.wait(self._holder.heartbeat_seconds):
            num_beats += 1
            try:
                # Told here, and not at a save that may be an hour away.
                self._check_file()
                self._write(num_beats)
            except CheckpointLeaseError as error:
                _logger.error("%s", error)
                os.close(self._descriptor)
                return
            except (CheckpointError, OSError) as error:
                if not is_told:
                    _logger.error(
                        "the heartbeat of the lease of %s fails (%s); if that lasts, a job of another host may take it",
                        self.directory,
                        error,
                    )
                is_told = True
        try:
            self._write(num_beats, is_released=True)
        except OSError as error:
            _logger.warning("the lease of %s could not be marked as released (%s)", self.directory, error)
        os.close(self._descriptor)

    def _write(self, num_beats: int, *, is_released: bool = False) -> None:
        os.pwrite(self._descriptor, encode(self._holder, num_beats, is_released=is_released), 0)
        # NFS keeps what was written on this host until it is told to send it.
        _sync(self._descriptor)


def read_holder(directory: str | os.PathLike[str]) -> Holder | None:
    """Who holds the lease of a folder, or held it last; None where nobody ever did.

    Raises:
        CheckpointError: the folder cannot be read.
    Ranks: local.
    """
    folder = Path(directory)
    with _explained(folder, "read the lease of"):
        try:
            found = read_highest(folder)
        except FileNotFoundError:
            return None
    return found[0] if found else None


def wait_until_free(place: object, read: Callable[[], tuple[Holder, bytes] | None], timeout_seconds: float) -> int:
    """The epoch of the last holder of the lease of `place`, whom `read` gives with the file, once that one is gone.

    Raises:
        CheckpointLeaseError: it is held.
    Ranks: main process only.
    """
    poll_seconds = min(_MAX_POLL_SECONDS, timeout_seconds / 10)
    watched, content, quiet_seconds, last = None, b"", 0.0, time.monotonic()
    while True:
        found = read()
        if found is None:
            return 0
        holder, raw = found
        if holder.released or holder.alive is False:
            if not holder.released:
                _logger.info("the lease of %s is taken over from %s, whose process is gone", place, holder)
            return holder.epoch
        now = time.monotonic()
        if holder.alive:
            raise _refusal(place, holder)
        if (holder.epoch, holder.nonce) != watched:
            watched, content, quiet_seconds = (holder.epoch, holder.nonce), raw, 0.0
            needed_seconds = max(timeout_seconds, 3 * holder.heartbeat_seconds)
            _logger.info("watching for up to %g s whether %s still writes in %s", needed_seconds, holder, place)
        elif raw != content:
            raise _refusal(place, holder)
        else:
            # Where this process or its disk stood still, the holder's counter may have moved without our seeing it.
            quiet_seconds += min(now - last, 2 * poll_seconds)
        if quiet_seconds >= needed_seconds:
            _logger.warning("the lease of %s is taken over from %s, silent for %g s", place, holder, quiet_seconds)
            return holder.epoch
        last = now
        time.sleep(poll_seconds)


def _take(directory: Path, holder: Holder) -> int | None:
    """A descriptor of the file of that epoch, if this process is the one that made it; None if it was late."""
    target, content = directory / lease_name(holder.epoch), encode(holder, 0)
    staged = directory / f".{lease_name(holder.epoch)}.{holder.nonce}"
    _create(staged, content)
    try:
        os.link(staged, target)
    except OSError as error:
        # Where the reply to a link that succeeded was lost, it is repeated and fails: then what is there is ours.
        if not _is_own(target, holder):
            if error.errno in (errno.EEXIST, errno.ENOENT, errno.ESTALE):
                return None
            if error.errno not in _NO_LINKS:
                raise
            with contextlib.suppress(FileExistsError):
                _create(target, content)
    finally:
        with contextlib.suppress(OSError):
            staged.unlink()
    try:
        # One that stalled before the link may have taken an epoch that others had and removed long ago.
        if max(find_epochs(directory), default=0) == holder.epoch and _is_own(target, holder):
            fsync_directory(directory)
            return os.open(target, os.O_RDWR | os.O_CLOEXEC)
    except BaseException:
        _remove_own(target, holder)
        raise
    _remove_own(target, holder)
    return None


def _create(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            os.write(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def _is_own(target: Path, holder: Holder) -> bool:
    try:
        return target.read_bytes() == encode(holder, 0)
    except OSError:
        return False


def _remove_own(target: Path, holder: Holder) -> None:
    if _is_own(target, holder):
        with contextlib.suppress(OSError):
            target.unlink()


def _remove_older(directory: Path, epoch: int) -> None:
    """Remove files that nobody needs; the last holder's stays, for a person who asks what happened."""
    with contextlib.suppress(OSError):
        names = [lease_name(other) for other in find_epochs(directory) if other < epoch - 1]
        # A job that is about to link one of these comes too late in any case.
        names += [name for name in os.listdir(directory) if (staged_epoch(name) or epoch + 1) <= epoch]
        for name in names:
            with contextlib.suppress(OSError):
                (directory / name).unlink()


def _refusal(place: object, holder: Holder) -> CheckpointLeaseError:
    who = "this very process" if holder.alive and holder.pid == os.getpid() else "another job"
    advice = "Close the first before making a second." if who == "this very process" else "Wait for it or end it."
    return CheckpointLeaseError(
        f"{place} is written by {who}: {holder}. {advice} Two jobs in one folder would overwrite each other: "
        "where both should run, give this one a folder of its own."
    )


@contextlib.contextmanager
def _explained(directory: Path, act: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "See whether the disk and its mount are well.")
        raise CheckpointError(f"Could not {act} {directory}: {error.strerror or error}. {advice}") from error
