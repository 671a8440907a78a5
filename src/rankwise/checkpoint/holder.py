"""The file of a lease, and what can be said of the process that wrote it."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rankwise.parent import is_alive, launcher_token

FORMAT = 1
# One block of most disks. The size never changes and the counter stands at a fixed place, so a reader that meets half
# of a write sees a wrong count and nothing worse.
_NUM_BYTES = 4096
_MAX_JOB_CHARACTERS = 200
MAX_HEARTBEAT_SECONDS = 60.0
_NAME = re.compile(r"lease-([0-9]{8,})\.json")
_STAGED_NAME = re.compile(r"\.lease-([0-9]{8,})\.json\.[0-9a-f]+")


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, or held it, as its file says; of a damaged file only the epoch is known."""

    epoch: int
    host: str | None = None
    pid: int | None = None
    job: str | None = None
    started: str | None = None
    """When the lease was taken, by the holder's clock, in UTC."""
    heartbeat: int = 0
    """A count of the holder's writes; that it changes is a sign of life, its value says nothing."""
    released: bool = False
    alive: bool | None = None
    """Whether its process lives; None where that cannot be seen from here, as of a process of another host."""
    heartbeat_seconds: float = 0.0
    nonce: str | None = None
    process: str | None = None
    """Host, boot, process id namespace, process id and start time: one process for good."""

    @classmethod
    def of_this_process(cls, epoch: int, nonce: str, job: str | None, heartbeat_seconds: float, started: str) -> Holder:
        """The holder that this process becomes.

        Ranks: local.
        """
        return cls(
            epoch,
            host=socket.gethostname(),
            pid=os.getpid(),
            job=None if job is None else "".join(c if c.isprintable() else "?" for c in job[:_MAX_JOB_CHARACTERS]),
            started=started,
            alive=True,
            heartbeat_seconds=heartbeat_seconds,
            nonce=nonce,
            process=launcher_token(),
        )

    def __str__(self) -> str:
        if self.nonce is None:
            return f"an unknown holder ({lease_name(self.epoch)} cannot be read)"
        job = "" if self.job is None else f"job {self.job}, "
        started = (self.started or "").replace("T", " ").replace("Z", " UTC")
        return f"{job}pid {self.pid} on host {self.host}, since {started} (lease epoch {self.epoch})"


def lease_name(epoch: int) -> str:
    """The name of the file of an epoch.

    Ranks: local.
    """
    return f"lease-{epoch:08d}.json"


def utc_now() -> str:
    """The time, as it stands in the file of a holder.

    Ranks: local.
    """
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def staged_epoch(name: str) -> int | None:
    """The epoch that a file of this name was made for, where it is one not yet linked to its epoch's name.

    Ranks: local.
    """
    match = _STAGED_NAME.fullmatch(name)
    return int(match[1]) if match else None


def find_epochs(directory: Path) -> list[int]:
    """The epochs of which there are files, ascending.

    Ranks: local.
    """
    matches = (_NAME.fullmatch(name) for name in os.listdir(directory))
    return sorted(int(match[1]) for match in matches if match)


def read_highest(directory: Path) -> tuple[Holder, bytes] | None:
    """The holder of the highest epoch and the bytes of its file; None where there is no lease file.

    Raises:
        OSError: the folder or the file cannot be read.
    Ranks: local.
    """
    raw, epoch = b"", 0
    for _ in range(3):  # a listing may be older than the file that it names
        epochs = find_epochs(directory)
        if not epochs:
            return None
        epoch = epochs[-1]
        try:
            raw = _read(directory / lease_name(epoch))
            break
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE, errno.EISDIR):
                raise
    return decode(epoch, raw), raw


def encode(holder: Holder, heartbeat: int, *, is_released: bool = False) -> bytes:
    """The file of a holder, always of the same size and with all but the last two values at the same place.

    Ranks: local.
    """
    fixed = {
        "format": FORMAT,
        "epoch": holder.epoch,
        "host": holder.host,
        "pid": holder.pid,
        "job": holder.job,
        "started": holder.started,
        "heartbeat_seconds": holder.heartbeat_seconds,
        "nonce": holder.nonce,
        "process": holder.process,
    }
    released = json.dumps(is_released)
    text = f'{json.dumps(fixed)[:-1]}, "heartbeat": "{heartbeat:012d}", "released": {released}}}'
    return text.ljust(_NUM_BYTES - 1).encode() + b"\n"


def decode(epoch: int, raw: bytes) -> Holder:
    """The holder that a file names; one of whom only the epoch is known where the file is not whole.

    Ranks: local.
    """
    try:
        record = json.loads(raw)
        if record["format"] != FORMAT or record["epoch"] != epoch:
            return Holder(epoch)
        holder = Holder(
            epoch,
            host=_text(record["host"]),
            pid=_count(record["pid"]),
            job=None if record["job"] is None else _text(record["job"]),
            started=_text(record["started"]),
            heartbeat=int(_text(record["heartbeat"])),
            released=record["released"] is True,
            alive=is_alive(_text(record["process"])),
            heartbeat_seconds=float(record["heartbeat_seconds"]),
            nonce=_text(record["nonce"]),
            process=record["process"],
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return Holder(epoch)
    return holder if 0 < holder.heartbeat_seconds <= MAX_HEARTBEAT_SECONDS else Holder(epoch)


def _read(path: Path) -> bytes:
    # Not blocking: whatever bears the name, a pipe say, must not hold us up.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(descriptor, _NUM_BYTES)
    finally:
        os.close(descriptor)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(value)
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(value)
    return value
