"""Real ranks, one of which is slow: it is named with its phase, and nobody else."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import rankwise
from rankwise.errors import RankwiseError
from rankwise.identity import Identity
from rankwise.monitor.stragglers import StragglerWatch
from rankwise.telemetry import Event, event_from_json, events_path
from rankwise.testing import on_ranks

EVERY_STEPS = 5
SLOW_SECONDS = 0.12
SLOW_RANK = 5
_CLONE_NEWNET = 0x40000000


def train(
    watch: StragglerWatch,
    rank: int,
    num_steps: int,
    slow: Callable[[int], str | None],
    *,
    measured: bool = True,
    group: dist.ProcessGroup | None = None,
    num_values: int = 1000,
) -> None:
    """Steps whose ranks wait for each other in an all-reduce; `slow` names the phase in which this rank is slow."""
    values = torch.ones(num_values)
    for step in range(1, num_steps + 1):
        begin = time.perf_counter()
        phases = {}
        for phase, seconds in (("data", 0.004), ("forward", 0.008), ("backward", 0.012)):
            started = time.perf_counter()
            time.sleep(seconds + (SLOW_SECONDS if slow(step) == phase else 0.0))
            phases[phase] = time.perf_counter() - started
        started = time.perf_counter()
        dist.all_reduce(values, group=group)
        phases["communication" if measured else "backward"] = (
            phases.get("communication" if measured else "backward", 0.0) + time.perf_counter() - started
        )
        seconds = time.perf_counter() - begin
        phases["other"] = seconds - sum(phases.values())
        watch.add(step, seconds, phases)


def wait_for(watch: StragglerWatch, is_there: Callable[[], bool], seconds: float = 30.0) -> None:
    """What was sent comes through a thread."""
    deadline = time.monotonic() + seconds
    while not is_there() and time.monotonic() < deadline:
        watch.poll()
        time.sleep(0.02)


def run(
    slow: Callable[[int, int], str | None], num_steps: int, *, measured: bool = True
) -> tuple[rankwise.Session, list[Event]]:
    """The events of the main process, after a job in which `slow(rank, step)` says who is slow and where."""
    events: list[Event] = []
    with rankwise.init() as session:
        rank = session.identity.rank
        watch = StragglerWatch(session.identity, "node-b", f"cpu:{rank}", every_steps=EVERY_STEPS, tell=events.append)
        train(watch, rank, num_steps, lambda step: slow(rank, step), measured=measured)
        if rank == 0:
            wait_for(watch, lambda: watch.num_judged == num_steps // EVERY_STEPS)
            assert watch.num_judged == num_steps // EVERY_STEPS
        rankwise.barrier()
        watch.close()
        return session, events


@pytest.mark.parametrize("phase", ["data", "forward", "backward"])
@on_ranks(8)
def test_slow_rank_is_named_with_its_phase(phase: str) -> None:
    session, events = run(lambda rank, step: phase if rank == SLOW_RANK else None, 25)
    assert [(event.kind, tuple(event.ranks), event.phase) for event in events] == (
        [("straggler", (SLOW_RANK,), phase)] if session.identity.is_main_process else []
    )
    for event in events:
        assert event.message.startswith("rank 5 (node-b, cpu:5) holds the others up by ")
        assert f" in {phase}, for " in event.message
        assert SLOW_SECONDS * 0.6 < event.details["held_seconds"] < SLOW_SECONDS * 1.8


@pytest.mark.parametrize("phase", ["data", "forward"])
@on_ranks(8)
def test_slow_rank_is_named_where_waiting_hides_in_backward(phase: str) -> None:
    _, events = run(lambda rank, step: phase if rank == SLOW_RANK else None, 25, measured=False)
    assert all((event.kind, tuple(event.ranks), event.phase) == ("straggler", (5,), phase) for event in events)
    assert len(events) == (dist.get_rank() == 0)


@on_ranks(4)
def test_rank_with_more_to_compute_is_named_under_ddp(tmp_path: Path) -> None:
    """Nothing is slept here: the rank multiplies matrices, and the Monitor measures all by itself."""
    with rankwise.init(tmp_path) as session, rankwise.Monitor(session, every_seconds=0.2, straggler_steps=5) as monitor:
        rank = session.identity.rank
        module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
        monitor.watch(module)
        matrix = torch.randn(256, 256)
        for _ in range(20):
            with monitor.phase("data"):
                batch = torch.randn(16, 64)
            with monitor.phase("forward"):
                until = time.thread_time() + (SLOW_SECONDS if rank == 2 else 0.0)
                while time.thread_time() < until:
                    matrix = torch.nn.functional.normalize(matrix @ matrix)
                loss = module(batch).sum()
            with monitor.phase("backward"):
                loss.backward()
            monitor.step()
        watch = monitor._stragglers
        assert watch is not None
        if rank == 0:
            wait_for(watch, lambda: watch.num_judged == 4)
        rankwise.barrier()
    if rank == 0:
        lines = events_path(tmp_path, 0).read_text().splitlines()
        events = [event for line in lines if (event := event_from_json(line)) is not None]
        found = [(event.kind, tuple(event.ranks), event.phase) for event in events if "straggler" in event.kind]
        assert found == [("straggler", (2,), "forward")]


@on_ranks(2)
def test_of_two_ranks_the_one_that_waits_is_not_blamed() -> None:
    _, events = run(lambda rank, step: "data" if rank == 1 else None, 25)
    assert [tuple(event.ranks) for event in events] == ([(1,)] if dist.get_rank() == 0 else [])


@on_ranks(4)
def test_end_is_told_when_the_rank_is_well_again() -> None:
    _, events = run(lambda rank, step: "data" if rank == 2 and step <= 25 else None, 50)
    if dist.get_rank() == 0:
        assert [(event.kind, tuple(event.ranks)) for event in events] == [("straggler", (2,)), ("straggler_over", (2,))]
        assert "no longer holds the others up" in events[1].message


@on_ranks(4)
def test_nobody_is_blamed_for_one_long_step_in_a_window() -> None:
    _, events = run(lambda rank, step: "forward" if rank == 1 and step % EVERY_STEPS == 0 else None, 40)
    assert events == []


@on_ranks(1)
def test_a_single_rank_needs_no_comparison() -> None:
    with rankwise.init() as session:
        watch = StragglerWatch(session.identity, "here", "cpu", every_steps=1, tell=print)
        watch.add(1, 1.0, {"data": 1.0})
        watch.poll()
        watch.close()


def test_no_steps_make_no_row() -> None:
    with pytest.raises(RankwiseError, match="every_steps=0 makes no rows"):
        StragglerWatch(Identity(0, 0, 0, 1, 1, 1), "here", "cpu", every_steps=0, tell=print)


@pytest.fixture
def wires() -> None:
    """Skip where no host with a wire of its own can be made."""
    missing = [name for name in ("ip", "tc", "unshare") if shutil.which(name) is None]
    if not missing:
        tried = "ip link add br0 type bridge && ip link set lo up && tc qdisc add dev lo root tbf rate 1mbit burst 4kb"
        done = subprocess.run(["unshare", "--net", "sh", "-c", f"{tried} latency 1s"], capture_output=True, check=False)
        missing = [] if done.returncode == 0 else [f"a network of one's own: {done.stderr.decode().strip()}"]
    if missing:
        reason = f"needs {', '.join(missing)}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@on_ranks(8)
def test_rank_with_a_slow_wire_is_named(wires: None) -> None:
    """Each rank is a host on a bridge, and the wire of one has a fiftieth of the others' speed."""
    rank = dist.get_rank()
    move_to_a_host_of_its_own(rank)
    events: list[Event] = []
    group = dist.new_group(backend="gloo")
    with rankwise.init(device_type="cpu") as session:
        watch = StragglerWatch(session.identity, f"node-{rank}", "cpu", every_steps=2, tell=events.append)
        num_values = 50_000
        train(watch, rank, 12, lambda step: None, group=group, num_values=num_values)
        if rank == 0:
            wait_for(watch, lambda: bool(events))
            assert [(event.kind, tuple(event.ranks), event.phase) for event in events] == [
                ("straggler", (SLOW_RANK,), "communication")
            ]
            print(events[0].message)
            assert events[0].message.startswith("the network of rank 5 (node-5, cpu) is slow: a transfer takes ")
            assert events[0].details["transfer_seconds"] > 5 * events[0].details["usual_transfer_seconds"]
        rankwise.barrier()
        watch.close()


def move_to_a_host_of_its_own(rank: int) -> None:
    """A network namespace for this process; that of rank 0 has the bridge which joins them all."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(_CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    pids: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())  # over the connections that were made before
    if rank == 0:
        ip("link", "add", "br0", "type", "bridge")
        ip("address", "add", "10.213.78.1/24", "dev", "br0")
        ip("link", "set", "br0", "up")
        for other, pid in enumerate(pids[1:], 1):
            ip("link", "add", f"to-{other}", "type", "veth", "peer", "name", "wire", "netns", str(pid))
            ip("link", "set", f"to-{other}", "master", "br0", "up")
    ip("link", "set", "lo", "up")
    dist.barrier()
    if rank > 0:
        ip("address", "add", f"10.213.78.{rank + 1}/24", "dev", "wire")
        ip("link", "set", "wire", "up")
    if rank == SLOW_RANK:
        tbf = ("root", "tbf", "rate", "20mbit", "burst", "32kb", "latency", "2s")
        subprocess.run(["tc", "qdisc", "add", "dev", "wire", *tbf], check=True)
    dist.barrier()
    os.environ["GLOO_SOCKET_IFNAME"] = "wire" if rank else "br0"
    place = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank), "GROUP_WORLD_SIZE": "8"}
    os.environ.update(place, MASTER_ADDR="10.213.78.1", MASTER_PORT="29500", GROUP_RANK=str(rank))


def ip(*arguments: str) -> None:
    assert Path("/proc/self/ns/net").exists()
    subprocess.run(["ip", *arguments], check=True)
