"""Where the ranks of a job find each other, as far as the environment says."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from rankwise.errors import LaunchError
from rankwise.identity import ASSUMED, Identity
from rankwise.variables import hosts, number, shown

LOOPBACK = "127.0.0.1"
_FIRST_PORT, _LAST_PORT = 10240, 32767  # above what services use, below what Linux gives to clients
_STEP_STRIDE = 7919  # a prime: the steps of one job stay clear of the next jobs
_MAX_COMPONENTS = 128  # Slurm's own limit for a heterogeneous job
_MAX_HOSTS = 65536
_TOKENS = {
    "slurm": ("SLURM_WORKING_CLUSTER", "SLURM_JOB_ID", "SLURM_STEP_ID"),
    "openmpi": ("PMIX_NAMESPACE", "OMPI_MCA_orte_precondition_transports"),
    "pmix": ("PMIX_NAMESPACE",),
}


@dataclass(frozen=True)
class MeetingPoint:
    """Where rank 0 listens for the others."""

    address: str | None
    """Name or address of the node of rank 0."""
    port: int | None
    """None where all processes are on one node and must agree on a free port, through a file."""
    token: str | None
    """What all processes of this job know and those of other jobs do not, fit for a file's name; None: not known."""
    how: str
    """Where the address is from, for messages."""


def find_meeting_point(identity: Identity, environ: Mapping[str, str]) -> MeetingPoint:
    """Where the ranks meet; a pure function.

    Raises:
        LaunchError: nobody says where; the message says what to set.
    Ranks: local; the answer is the same on every rank.
    """
    if identity.world_size == 1:
        return MeetingPoint(LOOPBACK, None, None, "one process")
    token = _token(identity, environ)
    address, port = _given_address(environ), _given_port(environ)
    if address is not None and port is not None:
        return MeetingPoint(address, port, token, "MASTER_ADDR and MASTER_PORT")
    how = "MASTER_ADDR" if address else "one node"
    # Where the number of processes on this node is assumed, the other ranks may have assumed something else.
    is_proven = identity.sources.get("local_world_size") != ASSUMED
    if identity.local_world_size == identity.world_size and is_proven:
        return MeetingPoint(address or LOOPBACK, port, token, how)
    if address is None:
        address, how = _first_node(identity, environ), "slurm node list"
    if port is None:
        port = _derived_port(identity, environ, token)
    if address is None or port is None:
        raise LaunchError(_what_to_set(identity, environ))
    return MeetingPoint(address, port, token, how)


def _given_address(environ: Mapping[str, str]) -> str | None:
    if "MASTER_ADDR" not in environ:
        return None
    address = environ["MASTER_ADDR"]
    if not re.fullmatch(r"[!-~]{1,255}", address):
        raise LaunchError(
            f"{shown(environ, 'MASTER_ADDR')} is no host name or address. Set it to the node of rank 0, or unset it."
        )
    return address


def _given_port(environ: Mapping[str, str]) -> int | None:
    if "MASTER_PORT" not in environ:
        return None
    if not re.fullmatch("[0-9]{1,5}", environ["MASTER_PORT"]) or not 1 <= int(environ["MASTER_PORT"]) <= 65535:
        raise LaunchError(
            f"{shown(environ, 'MASTER_PORT')} is no port. Set a number in 1..65535 that is free on the node of rank 0."
        )
    return int(environ["MASTER_PORT"])


def _first_node(identity: Identity, environ: Mapping[str, str]) -> str | None:
    """The node of rank 0 as far as Slurm's lists tell; None outside Slurm."""
    in_step = identity.launcher in ("slurm", "env")
    if in_step and environ.get("SLURM_DISTRIBUTION", "").startswith("arbitrary"):
        raise LaunchError(
            f"{shown(environ, 'SLURM_DISTRIBUTION')}: the node list does not tell which node has rank 0. "
            "Set MASTER_ADDR to the first node of the host file."
        )
    # The daemons of mpirun are a step of their own, which leaves out the node of mpirun.
    step_names = ("SLURM_STEP_NODELIST",) if in_step else ()
    name = next((name for name in (*step_names, "SLURM_JOB_NODELIST", "SLURM_NODELIST") if environ.get(name)), None)
    if name is None:
        return None
    if in_step and "SLURM_HET_SIZE" in environ:
        return _first_node_of_components(environ, name)
    return next(hosts(environ, name))


def _first_node_of_components(environ: Mapping[str, str], name: str) -> str:
    """Rank 0 runs on the first component of the step, but the step's list is sorted by name.

    Source: measured with Slurm 22.05, steps of some and of all components.
    """
    in_step = set(islice(hosts(environ, name), _MAX_HOSTS))
    for component in range(_MAX_COMPONENTS):
        for kind in ("HET", "PACK"):
            component_name = f"SLURM_JOB_NODELIST_{kind}_GROUP_{component}"
            if environ.get(component_name):
                first = next(hosts(environ, component_name))
                if first in in_step:
                    return first
    raise LaunchError(
        f"{shown(environ, name, 'SLURM_HET_SIZE')}: the node of rank 0 is not known in this heterogeneous job. "
        "Set MASTER_ADDR to it."
    )


def _derived_port(identity: Identity, environ: Mapping[str, str], token: str | None) -> int | None:
    """A port that all ranks compute alike, and other jobs on these nodes most likely do not."""
    if "SLURM_JOB_ID" in environ and (token is None or identity.launcher == "slurm"):
        seed = zlib.crc32(environ.get("SLURM_WORKING_CLUSTER", "").encode(errors="replace"))
        seed += number(environ, "SLURM_JOB_ID")
        if identity.launcher == "slurm" and "SLURM_STEP_ID" in environ:
            seed += _STEP_STRIDE * number(environ, "SLURM_STEP_ID")
    elif token is not None:
        seed = zlib.crc32(token.encode())
    else:
        return None
    return _FIRST_PORT + seed % (_LAST_PORT - _FIRST_PORT + 1)


def _token(identity: Identity, environ: Mapping[str, str]) -> str | None:
    names = _TOKENS.get(identity.launcher, ())
    values = [environ[name] for name in names if environ.get(name)]
    if not values:
        return None
    text = "-".join((identity.launcher, *values))
    return f"{re.sub('[^A-Za-z0-9._-]+', '-', text)[:80]}-{zlib.crc32(text.encode(errors='replace')):08x}"


def _what_to_set(identity: Identity, environ: Mapping[str, str]) -> str:
    where = "MASTER_ADDR (the node of rank 0) and MASTER_PORT (a port that is free there)"
    options = {
        "openmpi": " for all ranks: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=PORT",
        "mpich": " for all ranks: mpiexec -genv MASTER_ADDR HOST -genv MASTER_PORT PORT",
        "intelmpi": " for all ranks: mpirun -genv MASTER_ADDR HOST -genv MASTER_PORT PORT",
    }.get(identity.launcher, ", or start through torchrun")
    seen = shown(environ, "MASTER_ADDR", "MASTER_PORT") or "neither MASTER_ADDR nor MASTER_PORT is set"
    nodes = "1 node" if identity.num_nodes == 1 else f"{identity.num_nodes} nodes"
    return f"{identity.world_size} processes on {nodes} cannot find each other: {seen}. Set {where}{options}."
