"""Real launchers on one machine: a Slurm cluster, two hosts in namespaces, and a clean way to start commands.

What is started is ended for certain: cluster and hosts end as soon as the process that runs the tests is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest

KEPT_VARIABLES = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "LOGNAME", "PATH", "TMPDIR", "USER")
HOSTS = {"host-a": "10.213.77.1", "host-b": "10.213.77.2"}

Row = dict[str, Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave time for a busy machine: a launch is seconds of work."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(300))


def missing(reason: str) -> NoReturn:
    """Skip the test; where everything has to be there, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (nothing may be missing where CI=true)")
    pytest.skip(reason)


def require_tools(*tools: str) -> None:
    absent = [tool for tool in tools if shutil.which(tool) is None]
    if absent:
        missing(f"no {', '.join(absent)} here")


def find_free_port(*offsets: int) -> int:
    """A port that is free, as are those at `offsets` from it; below the range that the system hands out itself."""
    for _ in range(200):
        port = random.randrange(20000, 32000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for offset in (0, *offsets):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port + offset))
            return port
    raise AssertionError("no free ports")


@dataclass
class Launched:
    """A command that has ended."""

    status: int
    stdout: str
    stderr: str
    seconds: float

    def __str__(self) -> str:
        return f"exit status {self.status} after {self.seconds:.1f} s\n{self.stdout}\n{self.stderr}"

    @property
    def rows(self) -> list[Row]:
        """The JSON object of every line that was printed, in the order of ranks."""
        assert self.status == 0, str(self)
        return sorted((json.loads(line) for line in self.stdout.splitlines()), key=lambda row: row["rank"])

    @property
    def told(self) -> Row:
        """The JSON object that a rank printed before it failed."""
        assert (self.status, self.stdout.count("\n")) == (1, 1), str(self)
        return json.loads(self.stdout)

    def assert_places(
        self,
        nodes: Sequence[Sequence[int]],
        *,
        launcher: str,
        hostnames: Sequence[str],
        job_id: str | None,
        devices: Sequence[str | None] | None = None,
    ) -> None:
        """Compare every field that `whoami` told, but for the sources, with what the launch implies.

        Args:
            nodes: the ranks of each node, in the order of local ranks.
            hostnames: of the nodes.
            devices: in the order of local ranks; by default none is known.
        """
        expected = [
            {
                "rank": rank,
                "local_rank": local_rank,
                "node_rank": node_rank,
                "world_size": sum(map(len, nodes)),
                "local_world_size": len(ranks),
                "num_nodes": len(nodes),
                "launcher": launcher,
                "hostname": hostnames[node_rank],
                "job_id": job_id,
                "is_main_process": rank == 0,
                "is_local_main_process": local_rank == 0,
                "device": devices[local_rank] if devices else None,
            }
            for node_rank, ranks in enumerate(nodes)
            for local_rank, rank in enumerate(ranks)
        ]
        told = [{name: value for name, value in row.items() if name != "sources"} for row in self.rows]
        assert told == sorted(expected, key=lambda row: row["rank"])


@dataclass
class Running:
    """A command that runs."""

    process: subprocess.Popen[str]
    started: float

    def ended(self, timeout_seconds: float = 100.0) -> Launched:
        """Wait for its end; one that does not come fails the test."""
        try:
            stdout, stderr = self.process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            stdout, stderr = self.end()
            pytest.fail(f"{self.process.args} did not end within {timeout_seconds:g} s\n{stdout}\n{stderr}")
        return Launched(self.process.returncode, stdout, stderr, time.monotonic() - self.started)

    def end(self) -> tuple[str, str]:
        """End it with all it started, first politely: launchers then end what runs on other nodes."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.communicate(timeout=10)
        return "", "its output stays open"


@dataclass
class Launch:
    """Starts commands in an environment without any launcher's variables, and in the end ends those that are left."""

    environ: dict[str, str]
    prefix: tuple[str, ...] = ()
    running: list[Running] = field(default_factory=list)

    python = (sys.executable,)
    whoami = (sys.executable, "-W", "error", "-m", "rankwise", "whoami", "--json")
    torchrun = (sys.executable, "-m", "torch.distributed.run")
    whoami_module = ("-m", "rankwise", "whoami", "--json")
    """What follows torchrun's options."""

    def start(self, *command: str | Path, **environ: str) -> Running:
        """Start a command; `environ` is added to its environment."""
        process = subprocess.Popen(
            [*self.prefix, *map(str, command)],
            env=self.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.running.append(Running(process, time.monotonic()))
        return self.running[-1]

    def __call__(self, *command: str | Path, **environ: str) -> Launched:
        """Run a command to its end."""
        return self.start(*command, **environ).ended()

    def on(self, host_pid: int) -> Launch:
        """The same for commands on a host of `host_pids`."""
        enter = ("nsenter", "--target", str(host_pid), "--net", "--uts", "--ipc", "--pid", "--mount")
        return Launch(self.environ, enter, self.running)

    @staticmethod
    def program(name: str) -> Path:
        """One of the small scripts that ranks run."""
        return Path(__file__).parent / "programs" / name

    @staticmethod
    def free_port() -> str:
        return str(find_free_port())

    def end_all(self) -> None:
        for running in self.running:
            if running.process.poll() is None:
                running.end()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.process.pid, signal.SIGKILL)
            running.process.stdout.close()
            running.process.stderr.close()


@pytest.fixture
def require() -> Callable[..., None]:
    """Takes the names of commands; the test goes on only where all of them are installed."""
    return require_tools


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Starts commands as from a fresh login, whatever the tests themselves were started by."""
    environ = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    launch = Launch(environ | {"OMP_NUM_THREADS": "1"})
    yield launch
    launch.end_all()


@contextlib.contextmanager
def guarded(cleanup: str) -> Iterator[None]:
    """Run a shell script at the end of the block, or as soon as this process is gone, however it went."""
    guard = subprocess.Popen(["bash", "-c", f"read -r _; {cleanup}"], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        guard.stdin.close()
        guard.wait(60)


@pytest.fixture(scope="session")
def slurm_conf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The configuration of a running Slurm cluster of two nodes, n1 and n2."""
    require_tools("bash", "srun", "slurmctld", "slurmd", "munged")
    if os.geteuid() != 0:
        missing("starting a Slurm cluster needs root")
    try:
        script = request.getfixturevalue("shared_dir") / "launchers" / "slurm-cluster"
    except pytest.skip.Exception as skipped:
        missing(str(skipped))
    if not script.exists():
        missing("no launchers/slurm-cluster in the folder of reference data")
    folder = tmp_path_factory.mktemp("slurm")
    had_munge = subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0
    with guarded(_end_of_cluster(script, folder, munge_too=not had_munge)):
        started = subprocess.run(
            ["bash", script, "start", folder],
            env=os.environ | {"SLURM_CLUSTER_PORT": str(find_free_port(4, 5)), "PATH": _with_quick_scheduler(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert started.returncode == 0, started.stdout
        yield folder / "slurm.conf"


def _with_quick_scheduler(folder: Path) -> str:
    """PATH with a slurmctld that looks every second for heterogeneous jobs to start, instead of every 30."""
    controller = folder / "bin" / "slurmctld"
    controller.parent.mkdir()
    add = 'echo SchedulerParameters=bf_interval=1 >>"$SLURM_CONF"'
    controller.write_text(f'#!/bin/sh\n{add}\nexec {shutil.which("slurmctld")} "$@"\n')
    controller.chmod(0o755)
    return f"{controller.parent}{os.pathsep}{os.environ['PATH']}"


def _end_of_cluster(script: Path, folder: Path, *, munge_too: bool) -> str:
    where = shlex.quote(str(folder))
    own = 'case "$(readlink $entry/cwd) $(cat $entry/comm)" in ' + where + '" slurm"*) '
    lines = [
        f"export SLURM_CONF={where}/slurm.conf",
        # Jobs first: a node that ends leaves the processes of its steps running.
        "timeout 10 scancel --full --signal=KILL --user=root",
        'for _ in $(seq 20); do [ -z "$(timeout 5 squeue --noheader)" ] && break; sleep 0.25; done',
        f"bash {shlex.quote(str(script))} stop {where}",
        "sleep 1",
        # A step that cannot tell a controller of its end would try for ever. The daemons work in the folder.
        f"for entry in /proc/[0-9]*; do {own} kill -KILL ${{entry#/proc/}} ;; esac; done",
    ]
    if munge_too:
        lines.append("kill $(cat /run/munge/munged.pid)")
    return f"{{ {'; '.join(lines)}; }} >/dev/null 2>&1"


@pytest.fixture
def slurm(launch: Launch, slurm_conf: Path) -> Launch:
    """Starts commands in a shell of the cluster's login node."""
    launch.environ["SLURM_CONF"] = str(slurm_conf)
    return launch


@pytest.fixture(scope="session")
def host_pids(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """Name -> first process of two hosts joined by a wire, each with a network, name and processes of its own."""
    require_tools("bash", "ip", "mount", "nsenter", "unshare")
    names = tmp_path_factory.mktemp("hosts") / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in HOSTS.items()))
    namespaces = ("--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
    with contextlib.ExitStack() as stack:
        pids = {}
        for name in HOSTS:
            # The first process of a host reads until this process is gone; with it the kernel ends all others there.
            begin = f"hostname {name} && mount --bind {shlex.quote(str(names))} /etc/hosts && ip link set lo up"
            holder = subprocess.Popen(
                ["unshare", *namespaces, "bash", "-c", f"{begin} && echo ready && exec cat"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(holder)  # closes its pipes and waits for it
            if holder.stdout.readline() != "ready\n":
                missing(f"hosts cannot be made here: {holder.stderr.read().strip()}")
            pids[name] = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text())
        first, second = pids.values()
        _in_network(first, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", str(second))
        for name, pid in pids.items():
            _in_network(pid, "address", "add", f"{HOSTS[name]}/24", "dev", "wire")
            _in_network(pid, "link", "set", "wire", "up")
        yield pids


def _in_network(host_pid: int, *arguments: str) -> None:
    command = ["nsenter", "--target", str(host_pid), "--net", "ip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        missing(f"hosts cannot be joined here: {' '.join(command)}: {done.stderr.strip()}")


@pytest.fixture
def hosts(launch: Launch, host_pids: dict[str, int]) -> dict[str, Launch]:
    """Starts commands on "host-a" and on "host-b"."""
    return {name: launch.on(pid) for name, pid in host_pids.items()}
