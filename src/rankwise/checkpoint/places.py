"""Where checkpoints lie, and the lease that the managers of one process share there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rankwise.checkpoint.lease import Lease
from rankwise.checkpoint.local import LocalFolder
from rankwise.checkpoint.remote import RemoteFolder
from rankwise.checkpoint.remote_lease import RemoteLease
from rankwise.errors import CheckpointError

Folder = LocalFolder | RemoteFolder

_LOCAL = re.compile(r"(?:file|local)://")
_BROKEN_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/[^/]")
_leases: dict[str, tuple[Lease | RemoteLease, int]] = {}
"""The leases of this process, and how many managers use each: one job may have several managers of one folder."""


def open_folder(place: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None) -> Folder:
    """The folder of checkpoints that a path or a URL names.

    Raises:
        CheckpointError: the URL cannot be opened, or a `Path` was made of one, or only URLs have a `cache_dir`.
    Ranks: local.
    """
    name = os.fspath(place)
    if "://" in name and not _LOCAL.match(name):
        return RemoteFolder(name, cache_dir)
    if not isinstance(place, str) and _BROKEN_URL.match(name):
        raise CheckpointError(f"{place!r} is a URL no more: give it as a str, a Path drops one of its slashes.")
    if cache_dir is not None:
        raise CheckpointError(
            f"cache_dir={os.fspath(cache_dir)!r} is for URLs; {name} is read where it is. Leave it out."
        )
    # Threads write there, and the program may change its current directory meanwhile.
    return LocalFolder(Path(_LOCAL.sub("", name)).absolute())


def share_lease(place: Folder, timeout_seconds: float) -> Lease | RemoteLease:
    """The lease of a folder, which other managers of this process may have already.

    Raises:
        CheckpointLeaseError: another job holds it.
        CheckpointError, OSError: the folder cannot be made or written.
    Ranks: main process only.
    """
    key = place.key
    if key in _leases:
        lease, num_users = _leases[key]
        lease.check()
    else:
        lease, num_users = place.take_lease(timeout_seconds), 0
    _leases[key] = (lease, num_users + 1)
    return lease


def give_back_lease(lease: Lease | RemoteLease) -> None:
    """Release a lease once its last manager here needs it no more.

    Ranks: main process only.
    """
    for key, (held, num_users) in list(_leases.items()):
        if held is not lease:
            continue
        if num_users > 1:
            _leases[key] = (lease, num_users - 1)
        else:
            del _leases[key]
            lease.release()
