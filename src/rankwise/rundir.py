"""`run.json`: who runs in a run directory, from which code, and where each rank is."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rankwise import collectives, logs
from rankwise.device import device_uuid
from rankwise.errors import RankwiseError
from rankwise.files import write_atomic
from rankwise.identity import Identity
from rankwise.parent import is_alive, launcher_token

RUN_FORMAT = 1
"""Version of the layout of run.json."""


class RunFile:
    """The `run.json` of one session."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "run.json"
        self._content: dict[str, Any] | None = None

    def require_free(self, identity: Identity) -> None:
        """Raise if another job is at work in the directory, as far as can be seen from this host.

        Two jobs would write the same log files. What a job of another host does is not seen here; the lease of its
        checkpoints tells then.

        Raises:
            RankwiseError: names the job that is there.
        Ranks: local.
        """
        try:
            content = json.loads(self._path.read_bytes())
            row = content["ranks"][identity.rank]
            process, started = str(row["process"]), content["started"]
            is_busy = not content.get("ended") and process != launcher_token() and is_alive(process)
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            return
        if is_busy:
            raise RankwiseError(
                f"{self._path.parent} is written by another job: rank {identity.rank}, pid {row.get('pid')} on host "
                f"{row.get('host')}, since {started}. Wait for it or end it, or give this one a directory of its own."
            )

    def write(self, identity: Identity, device: torch.device) -> None:
        """Write it: what runs, from which code, and where each rank is. No values of the environment.

        Raises:
            RankwiseError: it cannot be written; on every rank.
        Ranks: every rank must call.
        """
        ranks = collectives.gather_objects(
            {
                "rank": identity.rank,
                "local_rank": identity.local_rank,
                "node_rank": identity.node_rank,
                "host": identity.hostname,
                "pid": os.getpid(),
                "process": launcher_token(),
                "device": str(device),
                "device_name": _device_name(device),
                "device_uuid": device_uuid(device),
            }
        )

        def write() -> None:
            from rankwise import __version__

            self._content = {
                "format": RUN_FORMAT,
                "started": _now(),
                "versions": {
                    "rankwise": __version__,
                    "torch": str(torch.__version__),
                    "python": platform.python_version(),
                },
                "command": logs.redact_command(sys.orig_argv),
                "git_revision": _git_revision(),
                "launcher": identity.launcher,
                "job_id": identity.job_id,
                "world_size": identity.world_size,
                "num_nodes": identity.num_nodes,
                "ranks": ranks,
            }
            try:
                self._store()
            except OSError as error:
                raise cannot_write(error) from error

        collectives.on_main_process(write)

    def end(self) -> None:
        """Say in it that the session has ended; never raises.

        Ranks: local; only the main process, which wrote it, does something.
        """
        if self._content is not None:
            self._content["ended"] = _now()
            with contextlib.suppress(OSError):
                self._store()

    def _store(self) -> None:
        write_atomic(self._path, json.dumps(self._content, indent=1) + "\n")


def cannot_write(error: OSError) -> RankwiseError:
    """What the disk refused, for a person.

    Ranks: local.
    """
    return RankwiseError(
        f"cannot write {error.filename or 'the run directory'}: {error.strerror or error}. "
        "Choose a run directory that this process can write, on a disk with room."
    )


def _device_name(device: torch.device) -> str | None:
    """The product that `device` is, None for the CPU and where torch does not know it."""
    if device.type == "cpu":
        return None
    try:
        return str(torch.get_device_module(device).get_device_name(device))
    except (AttributeError, AssertionError, RuntimeError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_revision() -> str | None:
    """The commit of the code that runs, None where it lies in no repository."""
    script = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path()
    folder = script.parent if script.is_file() else Path.cwd()
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip() or None
    return None
