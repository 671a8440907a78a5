"""The lease of a folder behind a URL: as `Lease`, by objects of which each holder writes its own alone."""

from __future__ import annotations

import os
import re
import threading
import uuid

from rankwise import logs
from rankwise.checkpoint.holder import Holder, decode, encode, lease_name, utc_now
from rankwise.checkpoint.lease import wait_until_free
from rankwise.checkpoint.objects import Objects
from rankwise.errors import CheckpointError, CheckpointLeaseError

HEARTBEAT_SECONDS = 10.0

_RELEASE_SECONDS = 5.0
_NUM_ATTEMPTS = 20
_NAME = re.compile(r"lease-([0-9]{8,})\.json")
_logger = logs.get_logger(__name__)


class RemoteLease:
    """The right to commit steps behind one URL, from `acquire` to `release`, or to the end of the process."""

    epoch: int
    """Higher than that of every holder before; the names of attempts carry it."""

    def __init__(self, objects: Objects, epoch: int, nonce: str, holder: Holder) -> None:
        self.epoch = epoch
        self._objects = objects
        self._nonce = nonce
        self._holder = holder
        self._pid = os.getpid()
        self._closing = threading.Event()
        # A daemon: a store that hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._keep, name="rankwise-lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, objects: Objects, *, timeout_seconds: float, minimum_epoch: int) -> RemoteLease:
        """The lease, once nobody else holds it; see `Lease.acquire`.

        Raises:
            CheckpointLeaseError: another job holds it; the message names it.
            CheckpointError: the store does not answer.
        Ranks: main process only.
        """
        nonce = uuid.uuid4().hex
        for _ in range(_NUM_ATTEMPTS):
            last = wait_until_free(objects.location, lambda: _read_highest(objects), timeout_seconds)
            epoch = max(last, minimum_epoch) + 1
            holder = Holder.of_this_process(epoch, nonce, None, HEARTBEAT_SECONDS, utc_now())
            if not objects.create(lease_name(epoch), encode(holder, 0)):
                continue
            highest = _read_highest(objects)
            if highest is not None and (highest[0].epoch, highest[0].nonce) == (epoch, nonce):
                objects.remove(lease_name(other) for other in _find_epochs(objects) if other < epoch - 1)
                return cls(objects, epoch, nonce, holder)
        raise CheckpointLeaseError(
            f"The lease of {objects.location} was taken by others {_NUM_ATTEMPTS} times in a row, just before this "
            "job. See which jobs are started there, or give this one a folder of its own."
        )

    def check(self) -> None:
        """Nothing, where this job still holds the lease: to be called right before each commit.

        Raises:
            CheckpointLeaseError: another job has taken the lease, or it was released, or its object is gone.
            CheckpointError: the store does not answer.
        Ranks: main process only.
        """
        where = self._objects.location
        if self._closing.is_set():
            raise CheckpointLeaseError(f"The lease of {where} (epoch {self.epoch}) was released by this job.")
        found = _read_highest(self._objects)
        if found is None or found[0].epoch < self.epoch:
            raise CheckpointLeaseError(
                f"{where}/{lease_name(self.epoch)}, the lease of this job, was removed, so another job may write "
                "there. Nothing more is committed here. Start the job again, and leave lease files alone."
            )
        if (found[0].epoch, found[0].nonce) != (self.epoch, self._nonce):
            raise CheckpointLeaseError(
                f"The lease of {where} (epoch {self.epoch}) was lost to {found[0]}: this job had not been heard of for "
                "too long. Nothing more is committed here. End one of the two jobs; where both should go on, give "
                "this one a folder of its own."
            )

    def release(self) -> None:
        """Give the lease up; its object stays, so that no epoch is used twice.

        Never raises, and waits a few seconds at most. Again, or in a fork of the holder, it does nothing.

        Ranks: main process only.
        """
        if os.getpid() != self._pid or self._closing.is_set():
            return
        self._closing.set()
        self._thread.join(_RELEASE_SECONDS)
        if self._thread.is_alive():
            _logger.warning(
                "the lease of %s is not released yet: its store has not answered for %g s",
                self._objects.location,
                _RELEASE_SECONDS,
            )

    def _keep(self) -> None:
        """Write the counter until the lease is released or lost."""
        num_beats, is_told = 0, False
        while not self._closing.wait(HEARTBEAT_SECONDS):
            num_beats += 1
            try:
                self.check()
                self._write(num_beats)
            except CheckpointLeaseError as error:
                if not self._closing.is_set():
                    _logger.error("%s", error)
                    return
            except CheckpointError as error:
                if not is_told:
                    _logger.error("the heartbeat of the lease fails, so another host's job may take it: %s", error)
                is_told = True
        try:
            self._write(num_beats, is_released=True)
        except CheckpointError as error:
            _logger.warning("the lease could not be marked as released: %s", error)

    def _write(self, num_beats: int, *, is_released: bool = False) -> None:
        content = encode(self._holder, num_beats, is_released=is_released)
        # The next beat comes soon enough, and trying for long would hold up the release.
        self._objects.write(lease_name(self.epoch), content, give_up_seconds=0.0)


def _find_epochs(objects: Objects) -> list[int]:
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, objects.names()) if match)


def _read_highest(objects: Objects) -> tuple[Holder, bytes] | None:
    """The holder of the highest epoch and its object; None where there is none."""
    for _ in range(3):  # a listing may be older than an object that it names
        epochs = _find_epochs(objects)
        if not epochs:
            return None
        try:
            raw = objects.read(lease_name(epochs[-1]))
        except FileNotFoundError:
            continue
        return decode(epochs[-1], raw), raw
    return Holder(epochs[-1]), b""
