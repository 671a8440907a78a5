"""Starts what a benchmark launches, and ends all of it; also a Slurm cluster whose node names resolve."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

GRACE_SECONDS = 10.0
"""How long the other processes may still run after one has refused."""

KEPT_VARIABLES = ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "SLURM_CONF", "TMPDIR", "USER", "VIRTUAL_ENV")
MARKER = "RANKWISE_BENCH"


@dataclass(frozen=True)
class Command:
    """One process that a person (or a controller) starts, and the variables that are set for it."""

    argv: Sequence[str]
    variables: dict[str, str]
    stdin: str = ""


def start(command: Command, token: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """One command with a small environment: no launcher's variables but its own."""
    environ = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    environ |= {"OMP_NUM_THREADS": "1", MARKER: token, "BENCH_NODES": os.environ.get("BENCH_NODES", "n1,n2")}
    with tempfile.TemporaryFile() as stdin:
        stdin.write(command.stdin.encode())
        stdin.seek(0)
        return subprocess.Popen(
            command.argv, env=environ | command.variables, stdin=stdin, stdout=log, stderr=log, start_new_session=True
        )


def wait(started: list[subprocess.Popen[bytes]], folder: Path, timeout_seconds: float) -> bool:
    """True when every command has ended, or a process has refused and the others had time to; False when they hang."""
    deadline = time.monotonic() + timeout_seconds
    refused_deadline = None
    while any(process.poll() is None for process in started):
        now = time.monotonic()
        if now > deadline:
            return False
        if refused_deadline is None and any('"error"' in path.read_text() for path in folder.glob("*.json")):
            refused_deadline = now + GRACE_SECONDS
        if refused_deadline is not None and now > refused_deadline:
            return True
        time.sleep(0.1)
    return True


def end_all(token: str) -> None:
    """End every process with this run's marker, launchers first so that they clean up."""
    for sent, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        marked = [process for process in psutil.process_iter() if marker_of(process) == token]
        for process in marked:
            with contextlib.suppress(psutil.Error):
                process.send_signal(sent)
        psutil.wait_procs(marked, timeout=seconds)


def marker_of(process: psutil.Process) -> str | None:
    try:
        marker: str | None = process.environ().get(MARKER)
        return marker
    except (psutil.Error, OSError):
        return None


@contextlib.contextmanager
def slurm_cluster(script: Path | None) -> Iterator[None]:
    """A cluster of its own while the block runs, its node names resolving; without a script, what SLURM_CONF names."""
    if script is None:
        if "SLURM_CONF" in os.environ:
            os.environ["BENCH_NODES"] = ",".join(node_names())
        yield
        return
    use_private_hosts()
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        os.environ["SLURM_CONF"] = f"{folder}/slurm.conf"
        os.environ.setdefault("SLURM_CLUSTER_PORT", "18500")
        try:
            if status := subprocess.run(["bash", script, "start", folder], check=False).returncode:
                raise SystemExit(f"{script} start ended with status {status}: there is no Slurm cluster to launch on.")
            names = node_names()
            with Path("/etc/hosts").open("a") as hosts:
                hosts.write(f"127.0.0.1 {' '.join(names)}\n")
            os.environ["BENCH_NODES"] = ",".join(names)
            yield
        finally:
            pids = [int(path.read_text()) for path in Path(folder).glob("*.pid")]
            daemons = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
            subprocess.run(["bash", script, "stop", folder], check=False)
            psutil.wait_procs(daemons, timeout=10.0)


def node_names() -> list[str]:
    """The nodes of the cluster that SLURM_CONF names, in Slurm's order."""
    told = subprocess.run(["sinfo", "-h", "-N", "-o", "%N"], capture_output=True, text=True, check=False)
    if told.returncode:
        raise SystemExit(f"SLURM_CONF={os.environ['SLURM_CONF']} leads to no Slurm cluster: {told.stderr.strip()}")
    return sorted(set(told.stdout.split()))


def use_private_hosts() -> None:
    """Start this program again where /etc/hosts is a copy of its own: names added to it are nobody else's.

    A library that dials the first node by name works on a real cluster, so it has to work on this one.
    """
    if "BENCH_PRIVATE_HOSTS" in os.environ:
        return
    with tempfile.NamedTemporaryFile(prefix="hosts-", delete=False) as copy:
        copy.write(Path("/etc/hosts").read_bytes())
    Path(copy.name).chmod(0o644)
    line = 'mount --bind "$0" /etc/hosts && rm "$0" && BENCH_PRIVATE_HOSTS=1 exec "$@"'
    again = [sys.executable, *sys.argv]
    os.execvp("unshare", ["unshare", "--mount", "sh", "-c", line, copy.name, *again])
