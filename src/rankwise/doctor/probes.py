"""What the ranks find out together: clocks, a directory that all of them see, and the speed of an all-reduce."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rankwise import collectives
from rankwise.doctor.facts import RankFacts, first_line, within

ALL_REDUCE_BYTES = 16 << 20
_NUM_ROUND_TRIPS = 8
_NUM_REPEATS = 3
_POLL_SECONDS = 0.05
_LONG = timedelta(days=1)


@dataclass(frozen=True)
class ClockOffset:
    """How far the clock of a host is ahead of the main process's."""

    rank: int
    host: str
    offset_seconds: float
    uncertainty_seconds: float
    """Half of the fastest round trip: the true offset is no further away than this."""


@dataclass(frozen=True)
class Sighting:
    """What one rank saw of the file that the main process wrote into the shared directory."""

    directory: str
    seen: bool = False
    seconds: float = 0.0
    """How long it took to appear."""
    writable: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Bandwidth:
    """One all-reduce, the fastest of a few."""

    num_ranks: int
    num_bytes: int
    seconds: float = 0.0
    """Of the slowest rank."""
    backend: str = "gloo"
    num_wrong: int = 0
    """Ranks whose sum is wrong."""
    error: str | None = None

    @property
    def bytes_per_second(self) -> float:
        """What each rank has to send and to receive, per second: independent of the number of ranks.

        Source: "bus bandwidth" of nccl-tests, doc/PERFORMANCE.md: 2 (n - 1) / n times the size over the time.
        """
        return 2 * (self.num_ranks - 1) / self.num_ranks * self.num_bytes / max(self.seconds, 1e-9)


def measure_clocks(rows: Sequence[RankFacts], rank: int, clock: Callable[[], float] = time.time) -> list[ClockOffset]:
    """The clock of the first rank of every other host against the main process's, on the main process.

    The main process asks for the time and takes the answer for the middle of the round trip; the fastest of a few
    counts. One host after the other: several at once would delay each other's answers.

    Returns:
        One entry for every host but the main process's; empty on the other ranks.
    Ranks: every rank must call, with equal rows.
    """
    first_of_host: dict[str, int] = {}
    for row in rows:
        first_of_host.setdefault(row.host, row.rank)
    offsets = []
    for host, peer in first_of_host.items():
        if peer == 0:
            continue
        if rank == 0:
            offsets.append(_ask_for_the_time(peer, host, clock))
        elif rank == peer:
            _tell_the_time(clock)
    return offsets


def _ask_for_the_time(peer: int, host: str, clock: Callable[[], float]) -> ClockOffset:
    trips = []
    told = torch.zeros(1, dtype=torch.float64)
    for _ in range(_NUM_ROUND_TRIPS):
        # The two clocks are read by wall time, the trip's length by one that nobody sets meanwhile.
        wall, start = clock(), time.monotonic()
        _send(told, peer)
        _receive(told, peer)
        trip = time.monotonic() - start
        trips.append((trip / 2, told.item() - (wall + trip / 2)))
    uncertainty, offset = min(trips)
    return ClockOffset(peer, host, offset, uncertainty)


def _tell_the_time(clock: Callable[[], float]) -> None:
    told = torch.zeros(1, dtype=torch.float64)
    for _ in range(_NUM_ROUND_TRIPS):
        _receive(told, 0)
        told.fill_(clock())
        _send(told, 0)


# The group's own timeout closes its connections for good, and then nobody can say who is missing: whoever starts these
# stops waiting sooner.


def _send(told: torch.Tensor, peer: int) -> None:
    work = dist.isend(told, peer)
    assert work is not None, "a member of the group gets a handle"
    work.wait(_LONG)


def _receive(told: torch.Tensor, peer: int) -> None:
    work = dist.irecv(told, peer)
    assert work is not None, "a member of the group gets a handle"
    work.wait(_LONG)


def _sum(values: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    options = dist.AllreduceOptions()
    options.timeout = _LONG
    group = group or dist.group.WORLD
    assert group is not None, "there are several ranks"
    group.allreduce([values], options).wait()


def probe_directory(directory: Path, *, is_main_process: bool, timeout_seconds: float) -> list[Sighting]:
    """Whether each rank sees, in `directory` as it knows it, a file that the main process has just written there.

    The file is removed again.

    Returns:
        One sighting per rank, on every rank.
    Ranks: every rank must call.
    """
    name, error = "", None
    if is_main_process:
        try:
            name = within(timeout_seconds, lambda: _write_nonce(directory))
        except OSError as failed:
            error = f"the main process cannot write there: {failed.strerror or failed}"
    try:
        name, error = collectives.broadcast_object((name, error))
        sighting = Sighting(str(directory), error=error)
        if error is None:
            try:
                sighting = within(2 * timeout_seconds, lambda: _look_for(directory, name, timeout_seconds))
            except OSError as failed:
                sighting = Sighting(str(directory), error=failed.strerror or str(failed))
        return collectives.gather_objects(sighting)
    finally:
        if is_main_process and name:
            with contextlib.suppress(OSError):
                within(timeout_seconds, lambda: (directory / name).unlink(missing_ok=True))


def _write_nonce(directory: Path) -> str:
    """The name of a new file; nobody can know it, or its content, before."""
    name = f".rankwise-doctor-{secrets.token_hex(8)}"
    path = directory / name
    try:
        with open(path, "x") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise
    return name


def _look_for(directory: Path, name: str, timeout_seconds: float) -> Sighting:
    start = time.monotonic()
    writable = os.access(directory, os.W_OK | os.X_OK)
    while True:
        seconds = time.monotonic() - start
        with contextlib.suppress(FileNotFoundError):
            if (directory / name).read_text() == name:
                return Sighting(str(directory), True, seconds, writable)
        if seconds > timeout_seconds:
            is_there = "" if directory.is_dir() else "there is no such directory"
            return Sighting(str(directory), False, seconds, writable, is_there or None)
        time.sleep(_POLL_SECONDS)


def measure_all_reduce(
    rank: int, num_ranks: int, group: dist.ProcessGroup | None = None, device: str = "cpu"
) -> Bandwidth:
    """A sum over the ranks of `group`, checked and timed; the first, which connects them, is not timed.

    Args:
        rank: place in `group`.
        group: None means all ranks.
    Returns:
        As this rank alone sees it: its own time, and whether its own sum was wrong.
    Ranks: every rank of `group` must call.
    """
    num_elements = ALL_REDUCE_BYTES // 4
    expected = num_ranks * (num_ranks + 1) / 2
    fastest, wrong = float("inf"), False
    for repeat in range(1 + _NUM_REPEATS):
        values = torch.full((num_elements,), float(rank + 1), dtype=torch.float32, device=device)
        # So that all begin at once, and nobody's time holds the wait for another; ends with a copy to the CPU.
        meeting = torch.zeros(1, device=device)
        _sum(meeting, group)
        meeting.item()
        start = time.monotonic()
        _sum(values, group)
        values[0].item()
        seconds = time.monotonic() - start
        fastest = fastest if repeat == 0 else min(fastest, seconds)
        # Sums stay whole and below 2**24 for up to 5792 ranks, so float32 is exact in any order of addition.
        wrong = wrong or not bool((values == expected).all().item())
    return Bandwidth(num_ranks, ALL_REDUCE_BYTES, fastest, dist.get_backend(group), int(wrong))


def merge(parts: Sequence[Bandwidth | None]) -> Bandwidth | None:
    """What all ranks saw of one all-reduce; None where nobody took part.

    Ranks: local.
    """
    there = [part for part in parts if part is not None]
    if not there:
        return None
    return replace(
        there[0],
        seconds=max(part.seconds for part in there),
        num_wrong=sum(part.num_wrong for part in there),
        error=next((part.error for part in there if part.error), None),
    )


def probe_all_reduce(rank: int, num_ranks: int, timeout_seconds: float) -> Bandwidth | None:
    """The all-reduce of all ranks over the CPU; None where there is one.

    Ranks: every rank must call.
    """
    if num_ranks == 1:
        return None
    return _measure_together(num_ranks, "gloo", timeout_seconds, lambda: measure_all_reduce(rank, num_ranks))


def probe_between_nodes(rows: Sequence[RankFacts], rank: int, timeout_seconds: float) -> Bandwidth | None:
    """The same among one rank of each node, so that all of it goes between nodes; None where there is one node.

    Ranks: every rank must call, with equal rows.
    """
    first_of_node: dict[int, int] = {}
    for row in rows:
        first_of_node.setdefault(row.node_rank, row.rank)
    members = sorted(first_of_node.values())
    if len(members) == 1:
        return None

    def measure() -> Bandwidth | None:
        group = dist.new_group(members, backend="gloo", timeout=_LONG)
        return measure_all_reduce(members.index(rank), len(members), group) if rank in members else None

    return _measure_together(len(members), "gloo", timeout_seconds, measure)


def probe_devices_together(rows: Sequence[RankFacts], rank: int, timeout_seconds: float) -> Bandwidth | None:
    """The same between the devices, through their own backend; None where `can_compute_together` says no.

    Ranks: every rank must call, with equal rows.
    """
    if not can_compute_together(rows):
        return None
    device = torch.device(rows[rank].device.device)
    backend = dist.get_default_backend_for_device(device)

    def measure() -> Bandwidth:
        torch.accelerator.set_device_index(device.index)  # a new thread starts on device 0
        # NCCL would end the process at its own timeout, before anybody is told.
        group = dist.new_group(backend=backend, timeout=_LONG)
        return measure_all_reduce(rank, len(rows), group, str(device))

    return _measure_together(len(rows), backend, timeout_seconds, measure)


def _measure_together(
    num_ranks: int, backend: str, timeout_seconds: float, measure: Callable[[], Bandwidth | None]
) -> Bandwidth | None:
    """What all ranks saw of one all-reduce. A rank that does not come is named by the gather, which has a timeout."""
    failed = Bandwidth(num_ranks, ALL_REDUCE_BYTES, backend=backend)
    try:
        mine = within(timeout_seconds, measure)
    except TimeoutError:
        mine = replace(failed, error=f"{backend} did not finish within {timeout_seconds:g} s")
    except Exception as error:  # of the backend, whatever its kind: it is what this command is here to tell
        mine = replace(failed, error=f"{backend}: {type(error).__name__}: {first_line(error)}")
    return merge(collectives.gather_objects(mine))


def can_compute_together(rows: Sequence[RankFacts]) -> bool:
    """Whether every rank has a working accelerator of one kind, and none has another's.

    Ranks: local.
    """
    kinds = {row.device.device.partition(":")[0] for row in rows}
    uuids = [(row.host, row.device.uuid) for row in rows if row.device.uuid]
    works = all(row.device.error is None for row in rows)
    return len(rows) > 1 and works and len(kinds) == 1 and kinds != {"cpu"} and len(set(uuids)) == len(uuids)
