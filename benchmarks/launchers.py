"""Which library knows its ranks under which launcher: each is really launched and its belief compared with the truth.

    python benchmarks/launchers.py --slurm-cluster SCRIPT

The truth is what the launch command implies. A cell is "right", "WRONG" (a process believed something else, and went
on), "refused" (an error said so), "hung" (no end within the timeout) or "not here" (launcher or library is missing).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import processes
from processes import Command
from rich.console import Console
from rich.table import Table

LIBRARIES = {
    "whoami": ("rankwise whoami", ("rankwise",)),
    "init": ("rankwise.init", ("rankwise", "torch")),
    "accelerate": ("accelerate", ("accelerate",)),
    "fabric": ("fabric", ("lightning_fabric",)),
    "fabric-mpi4py": ("fabric, mpi4py", ("lightning_fabric", "mpi4py")),
}
"""Option value -> its column's title, and what must be importable."""


@dataclass(frozen=True)
class Case:
    """One way to launch, and where it puts its processes."""

    name: str
    tools: tuple[str, ...]
    start: Callable[[list[str]], list[Command]]
    """The commands that run a Python command line under this launcher."""
    nodes: tuple[tuple[int, ...], ...] = ((0,),)
    """The ranks on each node, in the order of their local ranks."""
    told: tuple[str, ...] = ()
    """What else Fabric's documentation asks for here."""

    def truth(self) -> list[tuple[int, ...]]:
        """node, rank, local_rank, node_rank, world_size, num_nodes of every process."""
        size = sum(map(len, self.nodes))
        return sorted(
            (node, rank, local_rank, node, size, len(self.nodes))
            for node, ranks in enumerate(self.nodes)
            for local_rank, rank in enumerate(ranks)
        )

    def worker(self, library: str, folder: Path) -> list[str]:
        """The command line of every process; devices are those of the fullest node."""
        devices = max(map(len, self.nodes))
        belief = Path(__file__).with_name("belief.py")
        return [sys.executable, str(belief), library, str(folder), str(devices), str(len(self.nodes)), *self.told]


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def agents(worker: list[str], num_nodes: int) -> list[Command]:
    """One torchrun per node, started by hand."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--nnodes", str(num_nodes)]
    meeting = ["--master-addr=127.0.0.1", "--master-port", free_port()]
    return [
        Command([*agent, *meeting, "--node-rank", str(node), *worker[1:]], {"BENCH_NODE": str(node)})
        for node in range(num_nodes)
    ]


def torchrun_in_srun(worker: list[str]) -> list[Command]:
    """One torchrun per node, started by srun; the node's number is known only there."""
    meeting = ["--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1", "--master-port", free_port()]
    line = f'exec {sys.executable} -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"'
    return [Command(["srun", "-N2", "--ntasks-per-node=1", "sh", "-c", line, "sh", *meeting, *worker[1:]], {})]


def srun(*options: str) -> Callable[[list[str]], list[Command]]:
    return lambda worker: [Command(["srun", *options, *worker], {})]


def salloc_shell(worker: list[str]) -> list[Command]:
    """The user's shell, as salloc opens it; the line is typed into it."""
    shell = {"SHELL": shutil.which("bash") or "/bin/sh"}
    return [Command(["salloc", "-Q", "-N2", "--ntasks-per-node=2"], shell, stdin=" ".join(worker) + "\n")]


def sbatch_script(worker: list[str]) -> list[Command]:
    script = "#!/bin/sh\n" + " ".join(worker) + "\n"
    options = ["--wait", "--job-name=train", "-N2", "--ntasks-per-node=2", "--output=/dev/null"]
    return [Command(["sbatch", *options], {}, stdin=script)]


def mpirun(tool: str, with_address: bool) -> Callable[[list[str]], list[Command]]:
    """Three processes of one MPI; mpi4py is told which one, for its wheel finds only one where there are two."""
    root = ["--allow-run-as-root", "--oversubscribe"] if tool == "mpirun.openmpi" else []
    abi = {"MPI4PY_MPIABI": tool.removeprefix("mpirun.")}

    def start(worker: list[str]) -> list[Command]:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} if with_address else {}
        return [Command([tool, *root, "-n", "3", *worker], abi | address)]

    return start


def pytorch_job(worker: list[str]) -> list[Command]:
    """Two pods of one process each, with the variables that Kubeflow's training operator sets."""
    port = free_port()
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "KUBERNETES_SERVICE_HOST": "10.96.0.1"}
    job |= {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    return [Command(worker, job | {"RANK": rank, "PET_NODE_RANK": rank, "BENCH_NODE": rank}) for rank in "01"]


def pytorch_job_with_names(worker: list[str]) -> list[Command]:
    """As above, each pod with a host name of its own."""
    pod = ["unshare", "--uts", "sh", "-c", 'hostname "train-worker-$RANK" && exec "$@"', "sh"]
    return [Command([*pod, *command.argv], command.variables) for command in pytorch_job(worker)]


def pytorch_job_on_host_network(worker: list[str]) -> list[Command]:
    """As above, both on one host and with its name; their processes do not see each other."""
    pod = ["unshare", "--pid", "--fork", "--kill-child"]
    return [Command([*pod, *command.argv], command.variables) for command in pytorch_job(worker)]


BLOCK, UNEVEN, CYCLIC, THREE = ((0, 1), (2, 3)), ((0, 1), (2,)), ((0, 2), (1, 3)), ((0, 1, 2),)
CASES = (
    Case("single process", (), lambda worker: [Command(worker, {})]),
    Case("torchrun, 1 node x 2", (), lambda worker: agents(worker, 1), ((0, 1),)),
    Case("torchrun, 2 agents x 2", (), lambda worker: agents(worker, 2), BLOCK),
    Case("torchrun inside srun -N2", ("srun",), torchrun_in_srun, BLOCK),
    Case("srun -N2 --ntasks-per-node=2", ("srun",), srun("-N2", "--ntasks-per-node=2"), BLOCK),
    Case("srun -N2 -n3", ("srun",), srun("-N2", "-n3"), UNEVEN),
    Case("srun -N2 --ntasks-per-node=2 -m cyclic", ("srun",), srun("-N2", "--ntasks-per-node=2", "-mcyclic"), CYCLIC),
    Case("python in an salloc shell", ("salloc",), salloc_shell),
    Case("python in an sbatch script", ("sbatch",), sbatch_script),
    Case("Open MPI -n 3", ("mpirun.openmpi",), mpirun("mpirun.openmpi", False), THREE),
    Case("Open MPI -n 3, MASTER_ADDR set", ("mpirun.openmpi",), mpirun("mpirun.openmpi", True), THREE),
    Case("MPICH -n 3", ("mpirun.mpich",), mpirun("mpirun.mpich", False), THREE),
    Case("MPICH -n 3, MASTER_ADDR set", ("mpirun.mpich",), mpirun("mpirun.mpich", True), THREE),
    Case("PyTorchJob, 2 pods", ("unshare", "hostname"), pytorch_job_with_names, ((0,), (1,)), told=("kubeflow",)),
    Case(
        "PyTorchJob, 2 pods on the host's network",
        ("unshare",),
        pytorch_job_on_host_network,
        ((0,), (1,)),
        told=("kubeflow",),
    ),
)


@dataclass(frozen=True)
class Verdict:
    """What became of one library under one launcher; `detail` says what it did instead of being right."""

    word: str
    detail: str = ""


def missing(case: Case, library: str) -> str | None:
    """What is not here, None where the case can run."""
    for module in LIBRARIES[library][1]:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    for tool in case.tools:
        if shutil.which(tool) is None:
            return f"no {tool}"
    if "unshare" in case.tools and os.geteuid() != 0:
        return "host names of their own need root"
    if {"srun", "salloc", "sbatch"} & set(case.tools) and "SLURM_CONF" not in os.environ:
        return "no Slurm cluster: set SLURM_CONF, or name one with --slurm-cluster"
    return None


def run(case: Case, library: str, timeout_seconds: float) -> Verdict:
    """Launch it, wait for every process's word, and judge; nothing that it started stays."""
    if (lack := missing(case, library)) is not None:
        return Verdict("not here", lack)
    token = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="launchers-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        log = stack.enter_context((folder / "log").open("wb"))
        stack.callback(processes.end_all, token)
        started = [processes.start(command, token, log) for command in case.start(case.worker(library, folder))]
        in_time = processes.wait(started, folder, timeout_seconds)
        failed = any(process.poll() for process in started)
        processes.end_all(token)
        words = [json.loads(path.read_text()) for path in folder.glob("*.json")]
        return judge(case, words, in_time, failed, (folder / "log").read_text(errors="replace"))


def judge(case: Case, words: list[dict[str, Any]], in_time: bool, failed: bool, log: str) -> Verdict:
    """Every place of the truth must be claimed once, by a process on its node."""
    truth = case.truth()
    beliefs = [word["belief"] | {"node": word["node"]} for word in words if "belief" in word]
    errors = [word["error"] for word in sorted(words, key=lambda word: word["time"]) if "error" in word]
    through = f"{len(beliefs)} of {len(truth)} processes came through"
    if wrong := [belief for belief in beliefs if claim(case, belief) not in truth]:
        return Verdict("WRONG", told(wrong))
    if len({claim(case, belief) for belief in beliefs}) < len(beliefs):
        return Verdict("WRONG", told(beliefs))
    if errors:
        return Verdict("refused", errors[0])
    if not in_time:
        return Verdict("hung", through)
    if failed or len(beliefs) < len(truth):
        last = ([line for line in log.splitlines() if line.strip()] or ["nothing on its output"])[-1]
        return Verdict("failed", f"{through}; {last.strip()}")
    return Verdict("right")


def claim(case: Case, belief: dict[str, int | None]) -> tuple[int | None, ...]:
    """A belief in the form of the truth; what a library does not say counts as right."""
    node_rank = belief["node"] if belief["node_rank"] is None else belief["node_rank"]
    num_nodes = len(case.nodes) if belief["num_nodes"] is None else belief["num_nodes"]
    place = (belief["node"], belief["rank"], belief["local_rank"])
    return (*place, node_rank, belief["world_size"], num_nodes)


def told(beliefs: list[dict[str, int | None]]) -> str:
    """The beliefs in short, equal ones counted: "4 x rank 0 of 1, local rank 0"."""
    counts = Counter(
        f"rank {belief['rank']} of {belief['world_size']}"
        + "".join(
            f", {name.replace('_', ' ')} {belief[name]}"
            for name in ("local_rank", "node_rank", "num_nodes")
            if belief[name] is not None
        )
        for belief in beliefs
    )
    return "; ".join(f"{count} x {text}" for text, count in sorted(counts.items()))


def versions() -> dict[str, str]:
    """What the verdicts are about; only what is here."""
    found = {"python": platform.python_version()}
    for package in ("torch", "rankwise", "accelerate", "lightning-fabric", "mpi4py"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    for name, command in {"Slurm": "srun", "Open MPI": "mpirun.openmpi", "MPICH": "mpirun.mpich"}.items():
        if shutil.which(command):
            said = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
            numbers = [word for word in said.stdout.split() if word[0].isdigit() and "." in word]
            # srun says nothing without a configuration.
            found |= {name: numbers[0]} if numbers else {}
    return found


Verdicts = dict[str, dict[str, Verdict]]
"""Case -> library -> verdict."""


def print_table(verdicts: Verdicts, libraries: list[str]) -> None:
    """The matrix, the totals under it, and what stands behind every cell that is not right."""
    table = Table(box=None, pad_edge=False, show_footer=True)
    table.add_column("launched by", footer="right / WRONG / others")
    notes: list[str] = []
    for library in libraries:
        words = Counter(row[library].word for row in verdicts.values())
        others = words.total() - words["right"] - words["WRONG"] - words["not here"]
        table.add_column(LIBRARIES[library][0], footer=f"{words['right']} / {words['WRONG']} / {others}")
    for name, row in verdicts.items():
        cells = []
        for library in libraries:
            verdict = row[library]
            note = f"{verdict.word}: {verdict.detail}"
            if verdict.detail and note not in notes:
                notes.append(note)
            cells.append(f"{verdict.word} [{notes.index(note) + 1}]" if verdict.detail else verdict.word)
        table.add_row(name, *cells)
    console = Console(width=140, highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    for number, note in enumerate(notes, 1):
        console.print(f"[{number}] {note}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The same launches for several libraries; who knows its ranks?")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), metavar="LIBRARY")
    parser.add_argument("--launchers", nargs="+", default=[""], metavar="PART", help="part of a name in the table")
    parser.add_argument("--slurm-cluster", type=Path, metavar="SCRIPT", help="run with 'start DIR' and 'stop DIR'")
    parser.add_argument("--timeout-seconds", type=float, default=60.0, help="after these a launch counts as hung")
    parser.add_argument("--json", action="store_true", help="one object instead of the table")
    parsed = parser.parse_args(arguments)
    parsed.cases = [case for case in CASES if any(part.lower() in case.name.lower() for part in parsed.launchers)]
    if not parsed.cases:
        parser.error(f"no launcher has {parsed.launchers} in its name; there are: {', '.join(c.name for c in CASES)}")
    if parsed.slurm_cluster and not parsed.slurm_cluster.is_file():
        parser.error(f"--slurm-cluster {parsed.slurm_cluster} is no file")
    if parsed.slurm_cluster and (os.geteuid() != 0 or not shutil.which("unshare")):
        parser.error("--slurm-cluster needs root and unshare; without them set SLURM_CONF of a running cluster")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 where rankwise was tried and is not right."""
    options = parse(arguments)
    # So that what was started ends also when this is asked to.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    verdicts: Verdicts = {}
    with processes.slurm_cluster(options.slurm_cluster):
        about = versions()
        for case in options.cases:
            verdicts[case.name] = {}
            for library in options.libraries:
                verdict = verdicts[case.name][library] = run(case, library, options.timeout_seconds)
                print(f"{case.name} | {LIBRARIES[library][0]}: {verdict.word} {verdict.detail}", file=sys.stderr)
    if options.json:
        rows = [{"launcher": n, "verdicts": {k: asdict(v) for k, v in row.items()}} for n, row in verdicts.items()]
        print(json.dumps({"versions": about, "timeout_seconds": options.timeout_seconds, "cases": rows}, indent=2))
    else:
        print_table(verdicts, options.libraries)
        print("\n" + ", ".join(f"{name} {version}" for name, version in about.items()))
    ours = [row[library].word for row in verdicts.values() for library in ("whoami", "init") if library in row]
    return int(any(word not in ("right", "not here") for word in ours))


if __name__ == "__main__":
    sys.exit(main())
