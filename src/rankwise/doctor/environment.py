"""Checks of what the ranks were started with: places, variables, network interfaces, threads, versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rankwise.doctor.facts import RankFacts
from rankwise.doctor.fold import fold_names, fold_ranks, fold_same, fold_values
from rankwise.doctor.verdict import ALONE, Check, Finding, judge
from rankwise.identity import ASSUMED
from rankwise.rollcall import VERIFIED
from rankwise.visible import visible_devices, visible_text

_MUST_BE_EQUAL = ("python", "torch", "rankwise", "cuda", "hip", "nccl")
_THREADS = "OMP_NUM_THREADS"
_MAY_DIFFER = ("_IFNAME", "_HCA", "_DEBUG_FILE", "_HOSTID", "_TOPO_FILE", "_GRAPH_FILE", "_CONF_FILE", "_NUMA_NODE")
_PLACES = ("rank", "local_rank", "node_rank", "world_size", "local_world_size", "num_nodes")
_SLOW_SWITCHES = {
    ("CUDA_LAUNCH_BLOCKING", "1"): "the CPU waits for every kernel",
    ("NCCL_P2P_DISABLE", "1"): "devices of one node do not talk to each other directly",
    ("NCCL_SHM_DISABLE", "1"): "devices of one node talk through the network",
    ("NCCL_IB_DISABLE", "1"): "InfiniBand and RoCE are not used",
    ("TORCH_DISTRIBUTED_DEBUG", "DETAIL"): "every collective is checked on all ranks first",
    ("NCCL_DEBUG", "TRACE"): "every call of NCCL is printed",
}


def check_identity(rows: Sequence[RankFacts]) -> Check:
    """Every rank was started by one launcher, and the places within each node fit together.

    Ranks: local.
    """
    return judge("identity", _identity_findings(rows), _places(rows))


def _identity_findings(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    launchers = {row.rank: row.launcher for row in rows}
    if len(set(launchers.values())) > 1:
        yield Finding(
            "fail",
            f"the ranks were started by different launchers: {fold_values(launchers)}",
            "Start all ranks with one command; unset RANK, LOCAL_RANK and WORLD_SIZE in shells that export them.",
        )
    nodes: dict[int, list[RankFacts]] = {}
    for row in rows:
        nodes.setdefault(row.node_rank, []).append(row)
    advice = "Give each process of a node its own LOCAL_RANK from 0 on, and each node its own node rank."
    for node_rank, members in sorted(nodes.items()):
        hosts = sorted({row.host for row in members})
        if len(hosts) > 1:
            yield Finding("fail", f"node {node_rank} is said to be {len(hosts)} hosts: {fold_names(hosts)}", advice)
        elif sorted(row.local_rank for row in members) != list(range(len(members))):
            seen = fold_values({row.rank: f"local rank {row.local_rank}" for row in members})
            yield Finding("fail", f"node {node_rank} ({hosts[0]}) has {seen}", advice)
        elif wrong := [row for row in members if row.local_world_size != len(members)]:
            said = fold_values({row.rank: str(row.local_world_size) for row in wrong})
            yield Finding("fail", f"node {node_rank} has {len(members)} ranks, but local_world_size on {said}", advice)


def _places(rows: Sequence[RankFacts]) -> str:
    first = rows[0]
    if len(rows) == 1 and first.launcher == "single":
        return f"one process without a launcher, on {first.host}"
    hosts = list(dict.fromkeys(row.host for row in rows))
    nodes = "1 node" if first.num_nodes == 1 else f"{first.num_nodes} nodes"
    ranks = "1 rank" if len(rows) == 1 else f"{len(rows)} ranks"
    fields: dict[str, list[str]] = {}
    for name in _PLACES:
        fields.setdefault(first.sources.get(name, ASSUMED), []).append(name)
    assumed, agreed = fields.pop(ASSUMED, []), fields.pop(VERIFIED, [])
    text = f"{ranks} on {nodes} ({fold_names(hosts)}), started by {first.launcher}"
    text += f"; known from {', '.join(fields)}" if fields else ""
    text += f"; found out together: {', '.join(agreed)}" if agreed else ""
    return text + (f"; assumed: {', '.join(assumed)}" if assumed else "")


def check_variables(rows: Sequence[RankFacts]) -> Check:
    """No variable names what is not there, differs where it must not, or slows the job down by mistake.

    Ranks: local.
    """
    findings = [*_interface_findings(rows), *_visibility_findings(rows), *_switch_findings(rows)]
    names = sorted({name for row in rows for name in row.variables})
    shown = f"nothing suspicious in {fold_names(names)}" if names else "none that concerns the ranks is set"
    return judge("variables", findings, shown)


def _interface_findings(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    for name, is_missing in (("GLOO_SOCKET_IFNAME", missing_for_gloo), ("NCCL_SOCKET_IFNAME", missing_for_nccl)):
        bad = [row for row in rows if name in row.variables and is_missing(row.variables[name], row.interfaces)]
        if bad:
            is_used = name.startswith("GLOO") or any(row.device.device.startswith("cuda") for row in bad)
            seen = {
                row.rank: f"{name}={row.variables[name]} on {row.host}, which has {fold_names(row.interfaces)}"
                for row in bad
            }
            yield Finding(
                "fail" if is_used else "warn",
                f"no such network interface: {fold_values(seen)}",
                f"Set {name} on each host to an interface that it has, or unset it.",
            )


def missing_for_gloo(value: str, interfaces: Sequence[str]) -> bool:
    """Whether gloo would look for an interface that is not here: it takes exact names, separated by commas.

    Ranks: local.
    """
    return any(name not in interfaces for name in value.split(","))


def missing_for_nccl(value: str, interfaces: Sequence[str]) -> bool:
    """Whether NCCL would find no interface: it takes prefixes, exact names after "=", and all others after "^".

    Ranks: local.
    Source: NCCL user guide, "Environment Variables", NCCL_SOCKET_IFNAME.
    """
    is_exact, excludes = value.lstrip("^").startswith("="), value.startswith("^")
    wanted = [name for name in value.lstrip("^=").split(",") if name]

    def matches(interface: str) -> bool:
        return any(interface == name if is_exact else interface.startswith(name) for name in wanted)

    return bool(wanted) and not any(matches(interface) != excludes for interface in interfaces)


def _visibility_findings(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    empty: dict[int, str] = {}
    for row in rows:
        if visible_devices(row.variables) == ():
            empty[row.rank] = f"{visible_text(row.variables)} lets it see no device"
    # Where every rank is told to see none, someone wants the CPU.
    if empty and len(empty) < len(rows):
        yield Finding("warn", fold_values(empty), "Let each process see the devices that it is to use.")


def _switch_findings(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    for (name, value), effect in _SLOW_SWITCHES.items():
        ranks = [
            row.rank
            for row in rows
            if row.variables.get(name, "").upper() == value
            and (row.device.device != "cpu" or name == "TORCH_DISTRIBUTED_DEBUG")
        ]
        if ranks:
            message = f"{name}={value} on {fold_ranks(ranks)}: {effect}"
            yield Finding("warn", message, f"Unset {name} unless you look for a fault.")
    names = {name for row in rows for name in row.variables if name.startswith(("NCCL_", "GLOO_", "TORCH_"))}
    for name in sorted(name for name in names if not name.endswith(_MAY_DIFFER)):
        values = {row.rank: row.variables.get(name, "not set") for row in rows}
        if len(set(values.values())) > 1:
            message = f"{name} differs: {fold_values(values)}"
            yield Finding("warn", message, "Set it to the same value on every rank: ranks that disagree may hang.")


def check_threads(rows: Sequence[RankFacts]) -> Check:
    """No process is told to compute with more threads than its share of the node's cores.

    Where nothing is told, `rankwise.init` takes that share; what torch has taken before does not matter then.

    Ranks: local.
    """
    crowded = {
        row.rank: f"{row.num_threads} threads in each of {row.local_world_size} processes, whose share is "
        f"{row.fair_threads} of {_cores(row)} ({_THREADS}={row.variables[_THREADS]})"
        for row in rows
        if row.num_threads > row.fair_threads and row.variables.get(_THREADS)
    }
    fair = min((row.fair_threads for row in rows if row.rank in crowded), default=1)
    findings = [Finding("warn", fold_values(crowded), f"Set {_THREADS}={fair}.")] if crowded else []
    seen = {
        row.rank: f"torch computes with {row.num_threads} of {_cores(row)}"
        if row.variables.get(_THREADS)
        else f"init() computes with {row.fair_threads} of {_cores(row)}" + (" for each rank" if len(rows) > 1 else "")
        for row in rows
    }
    return judge("threads", findings, fold_same(seen))


def _cores(row: RankFacts) -> str:
    return "1 core" if row.num_cores == 1 else f"{row.num_cores} cores"


def check_versions(rows: Sequence[RankFacts]) -> Check:
    """Every rank runs the same Python, torch and libraries.

    Ranks: local.
    """
    first = rows[0].versions
    shown = ", ".join(f"{name} {version}" for name, version in first.items())
    if len(rows) == 1:
        return Check("versions", "pass", f"{shown} ({ALONE})")
    names = dict.fromkeys(name for row in rows for name in row.versions)
    findings = []
    for name in names:
        values = {row.rank: row.versions.get(name, "none") for row in rows}
        if len(set(values.values())) > 1:
            findings.append(_version_finding(name, values))
    return judge("versions", findings, shown)


def _version_finding(name: str, values: dict[int, str]) -> Finding:
    same_minor = len({tuple(value.split(".")[:2]) for value in values.values()}) == 1
    is_fatal = name in _MUST_BE_EQUAL and not (name == "python" and same_minor)
    advice = "Use one image or one environment on all nodes."
    return Finding("fail" if is_fatal else "warn", f"{name} differs: {fold_values(values)}", advice)


ENVIRONMENT_CHECKS: tuple[Callable[[Sequence[RankFacts]], Check], ...] = (
    check_identity,
    check_variables,
    check_threads,
    check_versions,
)
