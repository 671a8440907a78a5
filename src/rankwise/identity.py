"""Which process of the job this is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rankwise.launchers import ASSUMED, find_placement


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
    """Who started this process: "torchrun", "env" (its variables set by hand) or "single"."""
    hostname: str = "localhost"
    """Name of this node."""
    job_id: str | None = None
    """The launcher's name for the job, None where it gives none."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Field -> the variable that it came from, or "assumed"."""

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
            hostname: name of this node; HOSTNAME of `environ` where it is not given.
        Raises:
            LaunchError: the variables contradict each other.
        Ranks: local.
        """
        place = find_placement(environ)
        host_source = "given" if hostname else "HOSTNAME" if environ.get("HOSTNAME") else ASSUMED
        return cls(
            rank=place.rank,
            local_rank=place.local_rank,
            node_rank=place.node_rank,
            world_size=place.world_size,
            local_world_size=place.local_world_size,
            num_nodes=place.num_nodes,
            launcher=place.launcher,
            hostname=hostname or environ.get("HOSTNAME") or "localhost",
            job_id=place.job_id,
            sources=place.sources | {"hostname": host_source, "launcher": place.launcher},
        )
