"""Who started this process: one short function per launcher, asked in the order of `LAUNCHERS`.

Each function takes the environment and returns `Placement` when its launcher is at work, None when it is not,
and raises `LaunchError` when the launcher's variables contradict each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rankwise.errors import LaunchError

ASSUMED = "assumed"
_MAX_DIGITS = 9
_PLACE_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")


@dataclass(frozen=True)
class Placement:
    """Where a launcher put this process, and which variable said so."""

    launcher: str
    rank: int
    local_rank: int
    node_rank: int
    world_size: int
    local_world_size: int
    num_nodes: int
    job_id: str | None
    sources: dict[str, str]


def torchrun(environ: Mapping[str, str]) -> Placement | None:
    """Every variable is set by the elastic agent, so a missing one is an error."""
    if "TORCHELASTIC_RUN_ID" not in environ:
        return None
    missing = [name for name in _PLACE_VARIABLES if name not in environ]
    if missing:
        raise LaunchError(
            f"TORCHELASTIC_RUN_ID is set, but {', '.join(missing)} is not. torchrun sets all of them: "
            "start through torchrun, or unset TORCHELASTIC_RUN_ID."
        )
    run_id = environ["TORCHELASTIC_RUN_ID"]
    job_id = run_id if run_id and run_id != "none" else None
    return _place(environ, "torchrun", job_id, "TORCHELASTIC_RUN_ID")


def by_hand(environ: Mapping[str, str]) -> Placement | None:
    """torchrun's variables without torchrun: set in a shell script or by a small launcher of one's own."""
    if not any(name in environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        return None
    if set(environ).isdisjoint({"RANK", "LOCAL_RANK"}) and _number(environ, "WORLD_SIZE") == 1:
        return None
    for name in ("RANK", "WORLD_SIZE"):
        if name not in environ:
            seen = _shown(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK")
            raise LaunchError(f"{seen} but {name} is not set. Set {name} too, or start through torchrun.")
    return _place(environ, "env", None, ASSUMED)


def single_process(environ: Mapping[str, str]) -> Placement:
    """Nobody: one process, all alone."""
    names = ("rank", "local_rank", "node_rank", "world_size", "local_world_size", "num_nodes", "job_id")
    return Placement("single", 0, 0, 0, 1, 1, 1, None, dict.fromkeys(names, ASSUMED))


Launcher = Callable[[Mapping[str, str]], Placement | None]
LAUNCHERS: tuple[Launcher, ...] = (torchrun, by_hand, single_process)


def find_placement(environ: Mapping[str, str]) -> Placement:
    """What the first launcher that is at work says."""
    for launcher in LAUNCHERS:
        placement = launcher(environ)
        if placement is not None:
            return placement
    raise AssertionError("single_process answers always")


def _place(environ: Mapping[str, str], launcher: str, job_id: str | None, job_source: str) -> Placement:
    sources = {"rank": "RANK", "world_size": "WORLD_SIZE", "job_id": job_source}
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    _require_below(environ, "RANK", "WORLD_SIZE")

    local_rank, sources["local_rank"] = _local_rank(environ, world_size)
    local_world_size, sources["local_world_size"] = _local_world_size(environ, rank, local_rank, world_size)
    if local_world_size > world_size:
        raise LaunchError(
            f"{_shown(environ, 'LOCAL_WORLD_SIZE', 'WORLD_SIZE')}: a node cannot hold more processes "
            "than there are. Set WORLD_SIZE to the number of processes on all nodes together."
        )
    if local_rank >= local_world_size:
        _require_below(environ, "LOCAL_RANK", "LOCAL_WORLD_SIZE")

    num_nodes, sources["num_nodes"] = _num_nodes(environ, local_world_size, world_size)
    node_rank, sources["node_rank"] = _node_rank(environ, rank, local_world_size, num_nodes)
    if num_nodes == 1 and local_world_size != world_size:
        raise LaunchError(
            f"{_shown(environ, 'GROUP_WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'WORLD_SIZE')}: one node must hold "
            "all processes. Set GROUP_WORLD_SIZE to the number of nodes."
        )
    return Placement(launcher, rank, local_rank, node_rank, world_size, local_world_size, num_nodes, job_id, sources)


def _local_rank(environ: Mapping[str, str], world_size: int) -> tuple[int, str]:
    if "LOCAL_RANK" in environ:
        return _number(environ, "LOCAL_RANK"), "LOCAL_RANK"
    if world_size == 1:
        return 0, ASSUMED
    raise LaunchError(
        f"{_shown(environ, 'RANK', 'WORLD_SIZE')} but LOCAL_RANK is not set, so the device of this process "
        "is unknown. Set LOCAL_RANK to its place on this node (0, 1, ...), or start through torchrun."
    )


def _local_world_size(environ: Mapping[str, str], rank: int, local_rank: int, world_size: int) -> tuple[int, str]:
    if "LOCAL_WORLD_SIZE" in environ:
        return _number(environ, "LOCAL_WORLD_SIZE"), "LOCAL_WORLD_SIZE"
    if local_rank == rank:
        return world_size, ASSUMED
    raise LaunchError(
        f"{_shown(environ, 'RANK', 'LOCAL_RANK')} but LOCAL_WORLD_SIZE is not set, so the number of "
        "processes on this node is unknown. Set LOCAL_WORLD_SIZE, or start through torchrun."
    )


def _num_nodes(environ: Mapping[str, str], local_world_size: int, world_size: int) -> tuple[int, str]:
    if "GROUP_WORLD_SIZE" in environ:
        num_nodes = _number(environ, "GROUP_WORLD_SIZE")
        if not 1 <= num_nodes <= world_size:
            raise LaunchError(
                f"{_shown(environ, 'GROUP_WORLD_SIZE', 'WORLD_SIZE')}: every node holds at least one process. "
                "Set GROUP_WORLD_SIZE to the number of nodes."
            )
        return num_nodes, "GROUP_WORLD_SIZE"
    if world_size % local_world_size == 0:
        return world_size // local_world_size, ASSUMED
    raise LaunchError(
        f"{_shown(environ, 'WORLD_SIZE', 'LOCAL_WORLD_SIZE')}: nodes of unequal size, and GROUP_WORLD_SIZE is "
        "not set. Set GROUP_WORLD_SIZE to the number of nodes and GROUP_RANK to this one's."
    )


def _node_rank(environ: Mapping[str, str], rank: int, local_world_size: int, num_nodes: int) -> tuple[int, str]:
    if "GROUP_RANK" not in environ:
        return min(rank // local_world_size, num_nodes - 1), ASSUMED
    node_rank = _number(environ, "GROUP_RANK")
    if node_rank >= num_nodes:
        raise LaunchError(
            f"{_shown(environ, 'GROUP_RANK', 'GROUP_WORLD_SIZE')}: there are {num_nodes} nodes, so GROUP_RANK "
            f"must lie in 0..{num_nodes - 1}."
        )
    return node_rank, "GROUP_RANK"


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ[name]
    if not re.fullmatch(rf"[0-9]{{1,{_MAX_DIGITS}}}", value):
        shown = value if len(value) <= 40 else value[:40] + "..."
        raise LaunchError(
            f"{name}={shown!r} is no count. It must be a whole number from 0 on: set it right, or unset it."
        )
    return int(value)


def _require_below(environ: Mapping[str, str], name: str, limit_name: str) -> None:
    if name not in environ or limit_name not in environ:
        return
    if _number(environ, name) >= (limit := _number(environ, limit_name)):
        allowed = f"{name} must lie in 0..{limit - 1}" if limit else f"{limit_name} must be at least 1"
        raise LaunchError(f"{_shown(environ, name, limit_name)}: {allowed}.")


def _shown(environ: Mapping[str, str], *names: str) -> str:
    return " ".join(f"{name}={environ[name]}" for name in names if name in environ)
