"""Checks of what the ranks run on: devices, shared memory, limits, disks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rankwise.device import find_shared_devices
from rankwise.doctor.facts import RankFacts, Space
from rankwise.doctor.fold import fold_names, fold_ranks, fold_same, fold_values, show_bytes
from rankwise.doctor.verdict import ALONE, Check, Finding, judge
from rankwise.visible import visible_text

MIN_SHARED_MEMORY_BYTES = 1 << 30
MIN_OPEN_FILES = 4096
MIN_LOCKED_BYTES = 64 << 20
MIN_DIRECTORY_BYTES = 5 << 30
MIN_TEMPORARY_BYTES = 1 << 30
FULL_BYTES = 16 << 20
"""Less room than this is none."""


def check_devices(rows: Sequence[RankFacts]) -> Check:
    """Every rank has a device that computes, all of one kind.

    Ranks: local.
    """
    kinds = {row.rank: row.device.device.partition(":")[0] for row in rows}
    if set(kinds.values()) == {"cpu"} and all(row.device.error is None for row in rows):
        return Check("devices", "pass", "every rank computes on the CPU: torch sees no accelerator", None)
    names = fold_same({row.rank: row.device.name or row.device.device for row in rows})
    return judge("devices", _device_findings(rows, kinds), names, device_rows(rows))


def device_rows(rows: Sequence[RankFacts]) -> list[dict[str, Any]]:
    """The device table: a row per rank.

    Ranks: local.
    """
    return [
        {
            "rank": row.rank,
            "host": row.host,
            "local_rank": row.local_rank,
            "device": row.device.device,
            "name": row.device.name,
            "uuid": row.device.uuid,
            "memory_bytes": row.device.total_bytes,
            "free_bytes": row.device.free_bytes,
        }
        for row in rows
    ]


def _device_findings(rows: Sequence[RankFacts], kinds: dict[int, str]) -> Iterator[Finding]:
    broken = {row.rank: row.device.error for row in rows if row.device.error is not None}
    if broken:
        yield Finding("fail", fold_values(broken), "Run this command on the ranks named until each has its device.")
    working = {rank: kind for rank, kind in kinds.items() if rank not in broken}
    if len(set(working.values())) > 1:
        advice = "Ask for devices on every node, and install the same torch and driver there."
        yield Finding("fail", f"the ranks have different kinds of device: {fold_values(working)}", advice)
        return
    names = {row.rank: row.device.name for row in rows if row.rank in working}
    if len(set(names.values())) > 1:
        advice = "All ranks wait for the slowest: ask for nodes of one kind."
        yield Finding("warn", f"the devices differ: {fold_values(names)}", advice)
    held = {
        row.rank: f"{show_bytes(row.device.free_bytes)} of {show_bytes(row.device.total_bytes)} free"
        for row in rows
        if row.rank in working and 2 * row.device.free_bytes < row.device.total_bytes
    }
    if held:
        advice = "Another process holds the rest: see nvidia-smi or its like on that host."
        yield Finding("warn", f"memory is taken already: {fold_values(held)}", advice)


def check_shared_devices(rows: Sequence[RankFacts]) -> Check:
    """No two ranks compute on one device.

    Ranks: local.
    """
    name = "shared-devices"
    if len(rows) == 1:
        return Check(name, "pass", ALONE)
    known = [row for row in rows if row.device.uuid]
    if not known:
        return Check(name, "pass", "no rank has a device that could be shared by mistake")
    problem = find_shared_devices(
        [
            (row.rank, row.local_rank, row.host, row.device.device, row.device.uuid, visible_text(row.variables))
            for row in rows
        ]
    )
    if problem is not None:
        return Check(name, "fail", problem, "Give each process a device of its own.")
    return Check(name, "pass", f"{len(known)} devices, one for each rank")


def check_shared_memory(rows: Sequence[RankFacts]) -> Check:
    """There is room in /dev/shm, through which data loader workers and NCCL pass what they have.

    Ranks: local.
    """
    spaces = [(row, row.shared_memory) for row in rows if row.shared_memory is not None]
    if not spaces:
        return Check("shared-memory", "pass", "no /dev/shm here")
    small = {row.rank: _room(space) for row, space in spaces if _is_below(space, MIN_SHARED_MEMORY_BYTES)}
    advice = (
        "Data loader workers die with a bus error when it is full. Remove what fills it, start the container with "
        "--shm-size=8g or more, or mount an emptyDir of medium Memory there."
    )
    findings = [Finding("warn", f"little room in /dev/shm: {_by_host(rows, small)}", advice)] if small else []
    least = min((space for _, space in spaces), key=lambda space: space.free_bytes)
    return judge("shared-memory", findings, f"{_room(least)} in /dev/shm" + _at_least(rows))


def check_limits(rows: Sequence[RankFacts]) -> Check:
    """A process may open files enough and, with InfiniBand, lock memory enough.

    Ranks: local.
    """
    few = {
        row.rank: f"{row.max_open_files} open files"
        for row in rows
        if row.max_open_files is not None and row.max_open_files < MIN_OPEN_FILES
    }
    locked = {
        row.rank: f"{show_bytes(row.max_locked_bytes)} of locked memory"
        for row in rows
        if row.max_locked_bytes is not None
        and row.max_locked_bytes < MIN_LOCKED_BYTES
        and row.has_infiniband
        and row.device.device.startswith("cuda")
    }
    findings = []
    if few:
        advice = f"Workers and connections need more: ulimit -n {MIN_OPEN_FILES} or more (LimitNOFILE of the service)."
        findings.append(Finding("warn", f"few files may be open: {fold_values(few)}", advice))
    if locked:
        advice = "NCCL cannot register memory with InfiniBand: ulimit -l unlimited (LimitMEMLOCK of the service)."
        findings.append(Finding("warn", f"little memory may be locked: {fold_values(locked)}", advice))
    limits = fold_same({row.rank: f"{row.max_open_files or 'any number of'} open files" for row in rows})
    return judge("limits", findings, limits)


def check_disk(rows: Sequence[RankFacts]) -> Check:
    """There is room where the run writes and where temporary files go.

    Ranks: local.
    """
    least = [min(spaces, key=lambda space: space.free_bytes) for spaces in zip(*map(_disks, rows), strict=True)]
    shown = ", ".join(f"{_room(space)} in {space.path}" for space in least)
    return judge("disk", _disk_findings(rows), shown + _at_least(rows))


def _disks(row: RankFacts) -> tuple[Space, Space]:
    return row.directory, row.temporary


def _disk_findings(rows: Sequence[RankFacts]) -> Iterator[Finding]:
    unknown: dict[int, list[str]] = {}
    full: dict[int, list[str]] = {}
    little: dict[int, list[str]] = {}
    for row in rows:
        for space, min_bytes in zip(_disks(row), (MIN_DIRECTORY_BYTES, MIN_TEMPORARY_BYTES), strict=True):
            if space.error is not None:
                unknown.setdefault(row.rank, []).append(f"{space.path}: {space.error}")
            elif space.free_bytes < min_bytes:
                kind = full if space.free_bytes < FULL_BYTES else little
                kind.setdefault(row.rank, []).append(f"{_room(space)} in {space.path}")
    if unknown:
        yield Finding("fail", _by_host(rows, _joined(unknown)), "Make it there, or name another with --dir or TMPDIR.")
    if full:
        yield Finding("fail", f"no room: {_by_host(rows, _joined(full))}", "Remove what fills it.")
    if little:
        yield Finding("warn", f"little room: {_by_host(rows, _joined(little))}", "Checkpoints may not fit: make room.")


def _joined(found: dict[int, list[str]]) -> dict[int, str]:
    return {rank: " and ".join(dict.fromkeys(texts)) for rank, texts in found.items()}


def _is_below(space: Space, min_bytes: int) -> bool:
    return space.error is None and space.free_bytes < min_bytes


def _room(space: Space) -> str:
    return space.error or f"{show_bytes(space.free_bytes)} free of {show_bytes(space.total_bytes)}"


def _by_host(rows: Sequence[RankFacts], values: dict[int, str]) -> str:
    """What was found, once per host: the ranks of a host share its disks, which change while they look."""
    if len(rows) == 1:
        return next(iter(values.values()))
    hosts: dict[str, list[int]] = {}
    for row in rows:
        if row.rank in values:
            hosts.setdefault(row.host, []).append(row.rank)
    return fold_names(
        (f"{host} ({fold_ranks(ranks)}): {values[ranks[0]]}" for host, ranks in hosts.items()), separator="; "
    )


def _at_least(rows: Sequence[RankFacts]) -> str:
    num_hosts = len({row.host for row in rows})
    return f" (the least of {num_hosts} hosts)" if num_hosts > 1 else ""


_Checks = tuple[Callable[[Sequence[RankFacts]], Check], ...]
LOCAL_CHECKS: _Checks = (check_devices, check_shared_memory, check_limits, check_disk)
"""Those that one rank can make alone."""

MACHINE_CHECKS: _Checks = (check_devices, check_shared_devices, check_shared_memory, check_limits, check_disk)
