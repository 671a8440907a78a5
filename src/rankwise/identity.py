"""Which process of the job this is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from rankwise.errors import LaunchError
from rankwise.launchers import Facts, find_launcher
from rankwise.variables import shown

ASSUMED = "assumed"
_NOWHERE = "none"
_JOB_IDS = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID", "RAY_JOB_ID")


@dataclass(frozen=True)
class Identity:
    """The place of this process in its job, known before any process group exists."""

    rank: int
    """Place among all processes of the job."""
    local_rank: int
    """Place among the processes of this node; it picks the device, and nothing else."""
    node_rank: int
    """Place of this node among the job's."""
    world_size: int
    """Number of processes in the job."""
    local_world_size: int
    """Number of processes on this node."""
    num_nodes: int
    """Number of nodes in the job."""
    launcher: str = "single"
    """Who started this process: a name of `rankwise.launchers.LAUNCHERS`; "env" means variables set by hand."""
    hostname: str = "localhost"
    """Name of this node."""
    job_id: str | None = None
    """torchrun's or the scheduler's name for the job, None where there is none."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Field -> the variable that it came from, "assumed", or "store" once the ranks have compared what they assumed.

    "given" is a host name that `resolve` was given, "none" the source of a job id where there is none.
    """

    @property
    def is_main_process(self) -> bool:
        """True on exactly one process of the job (rank 0)."""
        return self.rank == 0

    @property
    def is_local_main_process(self) -> bool:
        """True on exactly one process of each node (local rank 0)."""
        return self.local_rank == 0

    @classmethod
    def resolve(cls, environ: Mapping[str, str], *, hostname: str | None = None) -> Identity:
        """The identity that `environ` describes; a pure function, so any recorded environment can be asked.

        Args:
            hostname: name of this node; HOSTNAME of `environ` where it is not given. In a Slurm job, Slurm's own
                name for the node comes first.
        Raises:
            LaunchError: the variables contradict each other.
        Ranks: local.
        """
        launcher, facts = find_launcher(environ)
        numbers = _complete(environ, facts)
        node, node_source = _node_name(environ, hostname)
        job_id, job_source = _job_id(environ)
        sources = {name: source for name, (_, source) in numbers.items()}
        sources["launcher"] = "TORCHELASTIC_RUN_ID" if launcher == "torchrun" else sources["rank"]
        return cls(
            **{name: value for name, (value, _) in numbers.items()},
            launcher=launcher,
            hostname=node,
            job_id=job_id,
            sources=sources | {"hostname": node_source, "job_id": job_source},
        )


def _job_id(environ: Mapping[str, str]) -> tuple[str | None, str]:
    for name in _JOB_IDS:
        if environ.get(name) and (name, environ[name]) != ("TORCHELASTIC_RUN_ID", "none"):
            return environ[name], name
    return None, _NOWHERE


def _node_name(environ: Mapping[str, str], hostname: str | None) -> tuple[str, str]:
    """In a Slurm job, Slurm's name: nodes that are emulated on one machine share the machine's."""
    name = "SLURMD_NODENAME"
    if "MPI_LOCALRANKID" in environ:
        # Hydra gives the environment of mpiexec, and with it the name of that node, to the processes of every node.
        name = "MPIR_CVAR_CH3_INTERFACE_HOSTNAME"
    if environ.get(name) and "SLURM_JOB_ID" in environ and "HOROVOD_RANK" not in environ:  # horovodrun does so too
        return environ[name], name
    if hostname:
        return hostname, "given"
    return (environ["HOSTNAME"], "HOSTNAME") if environ.get("HOSTNAME") else ("localhost", ASSUMED)


def _complete(environ: Mapping[str, str], facts: Facts) -> Facts:
    """All six numbers: what the launcher left out is assumed so that it fits what it said.

    The ranks compare what they assumed once they can talk; here only contradictions are refused.
    """
    known = {name: value for name, (value, _) in facts.items()} or {"rank": 0, "world_size": 1}
    rules = _Rules(environ, facts)
    rules.require_possible(known)
    rank, world_size = known["rank"], known["world_size"]
    local_world_size = known.get("local_world_size") or _likely_local_size(known)
    num_nodes = known.get("num_nodes") or max(-(-world_size // local_world_size), known.get("node_rank", 0) + 1)
    numbers = {
        "rank": rank,
        "local_rank": known.get("local_rank", rank % local_world_size),
        "node_rank": known.get("node_rank", min(rank // local_world_size, num_nodes - 1)),
        "world_size": world_size,
        "local_world_size": local_world_size,
        "num_nodes": num_nodes,
    }
    rules.require_fitting(numbers)
    # Where all processes are known to be on one node, the rest follows.
    unsaid = facts["local_world_size"][1] if known.get("local_world_size") == world_size else ASSUMED
    return {
        name: facts.get(name, (value, unsaid if name in ("num_nodes", "node_rank") else ASSUMED))
        for name, value in numbers.items()
    }


def _likely_local_size(known: Mapping[str, int]) -> int:
    """Nodes of one size, as large as what is known allows; 1 where nothing tells of the node."""
    rank, world_size = known["rank"], known["world_size"]
    least = known.get("local_rank", 0) + 1
    most = world_size - max(known.get("num_nodes", 1) - 1, known.get("node_rank", 0))
    if "num_nodes" in known:
        likely = -(-world_size // known["num_nodes"])
    elif "local_rank" in known and rank >= known["local_rank"]:
        # Ranks in blocks: the size divides the world, and the rank by it leaves the local rank.
        likely = math.gcd(rank - known["local_rank"], world_size)
    else:
        likely = least
    return max(least, min(likely, most))


@dataclass(frozen=True)
class _Rules:
    """Refuses numbers that cannot be, naming the variables that they came from."""

    environ: Mapping[str, str]
    facts: Facts

    def require_possible(self, known: Mapping[str, int]) -> None:
        """Each given number by itself, against the world size."""
        world_size = known["world_size"]
        self._below("rank", known["rank"], "world_size", world_size)
        self._below("local_rank", known.get("local_rank", 0), "world_size", world_size)
        for name in ("local_world_size", "num_nodes"):
            holds = 1 <= known.get(name, 1) <= world_size
            self._check(holds, (name, "world_size"), f"must lie in 1..{world_size}")

    def require_fitting(self, numbers: Mapping[str, int]) -> None:
        """All numbers together; what was assumed fits if anything does."""
        world_size, local_world_size, num_nodes = (
            numbers[name] for name in ("world_size", "local_world_size", "num_nodes")
        )
        self._below("local_rank", numbers["local_rank"], "local_world_size", local_world_size)
        self._below("node_rank", numbers["node_rank"], "num_nodes", num_nodes)
        nodes = "num_nodes" if "num_nodes" in self.facts else "node_rank"
        processes = "local_world_size" if "local_world_size" in self.facts else "local_rank"
        fields = (nodes, processes, "world_size")
        has_room = local_world_size + num_nodes - 1 <= world_size
        self._check(has_room, fields, f"needs {num_nodes} nodes, and each holds at least one process")
        is_full = num_nodes > 1 or local_world_size == world_size
        self._check(is_full, fields, f"says one node, which must hold all {world_size} processes")

    def _below(self, name: str, value: int, limit_name: str, limit: int) -> None:
        rule = f"must lie in 0..{limit - 1}" if limit else f"has no place where {self._variable(limit_name)} is 0"
        self._check(value < limit, (name, limit_name), rule)

    def _check(self, holds: bool, fields: tuple[str, ...], rule: str) -> None:
        if holds:
            return
        variables = [self.facts[name][1] for name in fields if name in self.facts]
        subject = self._variable(fields[0]) if fields[0] in self.facts else "this"
        raise LaunchError(f"{shown(self.environ, *variables)}: {subject} {rule}. Set them right, or unset them.")

    def _variable(self, name: str) -> str:
        return self.facts[name][1] if name in self.facts else name
