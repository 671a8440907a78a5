"""What the ranks find out together, on real processes."""

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from rankwise.collectives import gather_objects
from rankwise.doctor import probes
from rankwise.doctor.facts import DeviceFacts, RankFacts, is_any_probe_left
from rankwise.doctor.probes import (
    Bandwidth,
    can_compute_together,
    measure_all_reduce,
    measure_clocks,
    merge,
    probe_all_reduce,
    probe_between_nodes,
    probe_devices_together,
    probe_directory,
)
from rankwise.testing import on_ranks

SECONDS = 30.0


@on_ranks(3)
def test_a_clock_that_is_ahead_is_measured_within_its_uncertainty() -> None:
    rank = dist.get_rank()
    rows = [RankFacts(rank=other, host=host) for other, host in enumerate(("a", "b", "a"))]
    ahead = 5.0 if rank == 1 else 0.0
    offsets = measure_clocks(rows, rank, lambda: time.time() + ahead)
    assert [(offset.rank, offset.host) for offset in offsets] == ([(1, "b")] if rank == 0 else [])
    for offset in offsets:
        # A thousandth more: the two wall clocks are one here, which is adjusted while we look.
        assert abs(offset.offset_seconds - 5.0) <= offset.uncertainty_seconds + 0.001


@on_ranks(2)
def test_a_shared_directory_is_seen_by_all_and_left_clean(tmp_path: Path) -> None:
    found = probe_directory(tmp_path, is_main_process=dist.get_rank() == 0, timeout_seconds=SECONDS)
    assert [(sighting.seen, sighting.writable, sighting.error) for sighting in found] == [(True, True, None)] * 2
    dist.barrier()
    assert list(tmp_path.iterdir()) == []


@on_ranks(2)
def test_a_directory_of_each_rank_is_not_shared(tmp_path: Path) -> None:
    own = tmp_path / str(dist.get_rank())
    own.mkdir()
    found = probe_directory(own, is_main_process=dist.get_rank() == 0, timeout_seconds=0.5)
    assert [(sighting.directory, sighting.seen) for sighting in found] == [
        (str(tmp_path / "0"), True),
        (str(tmp_path / "1"), False),
    ]


@on_ranks(2)
def test_a_directory_that_the_main_process_lacks_is_told_to_all(tmp_path: Path) -> None:
    found = probe_directory(tmp_path / "no", is_main_process=dist.get_rank() == 0, timeout_seconds=SECONDS)
    error = "the main process cannot write there: No such file or directory"
    assert [sighting.error for sighting in found] == [error] * 2


@on_ranks(2)
def test_a_directory_that_another_rank_lacks_is_told(tmp_path: Path) -> None:
    os.chdir(tmp_path)
    if dist.get_rank() == 0:
        Path("here").mkdir()
    name = ("here", "there")[dist.get_rank()]
    found = probe_directory(tmp_path / name, is_main_process=dist.get_rank() == 0, timeout_seconds=0.5)
    assert [sighting.error for sighting in found] == [None, "there is no such directory"]


@on_ranks(2)
def test_the_sum_of_all_ranks_is_right_and_timed() -> None:
    found = probe_all_reduce(dist.get_rank(), 2, SECONDS)
    assert found is not None
    assert (found.num_ranks, found.num_wrong, found.error, found.backend) == (2, 0, None, "gloo")
    assert found.seconds > 0
    assert gather_objects(found) == [found, found]


@on_ranks(2)
def test_a_wrong_sum_is_noticed_on_every_rank() -> None:
    brings = dist.get_rank() + (7 if dist.get_rank() == 1 else 0)
    assert measure_all_reduce(brings, 2).num_wrong == 1


@on_ranks(3)
def test_between_nodes_one_rank_of_each_takes_part() -> None:
    rows = [RankFacts(rank=rank, node_rank=node) for rank, node in enumerate((0, 0, 1))]
    found = probe_between_nodes(rows, dist.get_rank(), SECONDS)
    assert found is not None
    assert (found.num_ranks, found.num_wrong, found.error) == (2, 0, None)


@on_ranks(2)
def test_a_backend_that_raises_on_one_rank_is_told_on_all() -> None:
    def fail(*arguments: object) -> Bandwidth:
        raise RuntimeError("unhandled system error\n  at some file")

    if dist.get_rank() == 1:
        probes.measure_all_reduce = fail  # type: ignore[assignment]
    else:
        probes.measure_all_reduce = lambda *arguments: Bandwidth(2, 1, 1.0)  # type: ignore[assignment]
    found = probe_all_reduce(dist.get_rank(), 2, SECONDS)
    assert found is not None
    assert found.error == "gloo: RuntimeError: unhandled system error"


def stand_in_for_devices() -> list[RankFacts]:
    """Rows of ranks whose "accelerator" is the CPU, which every machine has."""
    probes.can_compute_together = lambda rows: True  # type: ignore[assignment]
    torch.accelerator.set_device_index = lambda index: None  # type: ignore[assignment]
    return [RankFacts(rank=rank, device=DeviceFacts("cpu")) for rank in range(dist.get_world_size())]


@on_ranks(2)
def test_devices_are_measured_through_a_group_of_their_own() -> None:
    found = probe_devices_together(stand_in_for_devices(), dist.get_rank(), SECONDS)
    assert found is not None
    assert (found.num_ranks, found.num_wrong, found.error, found.backend) == (2, 0, None, "gloo")


@on_ranks(2)
def test_a_backend_that_waits_for_ever_on_one_rank_is_told_on_all() -> None:
    def hang(*arguments: object) -> Bandwidth:
        threading.Event().wait()
        return Bandwidth(2, 1)

    quick = Bandwidth(2, 1, 1.0)
    probes.measure_all_reduce = hang if dist.get_rank() == 1 else lambda *arguments: quick  # type: ignore[assignment]
    found = probe_devices_together(stand_in_for_devices(), dist.get_rank(), 3.0)
    assert found is not None
    assert found.error == "gloo did not finish within 3 s"
    assert dist.get_rank() == 0 or is_any_probe_left()


def test_one_rank_or_one_node_has_nothing_to_measure() -> None:
    assert probe_all_reduce(0, 1, SECONDS) is None
    assert probe_between_nodes([RankFacts(rank=0), RankFacts(rank=1)], 0, SECONDS) is None
    assert measure_clocks([RankFacts(rank=0), RankFacts(rank=1)], 0) == []


def test_the_slowest_rank_counts() -> None:
    parts = [Bandwidth(3, 1, 0.5), None, Bandwidth(3, 1, 0.7, num_wrong=1)]
    assert merge(parts) == Bandwidth(3, 1, 0.7, num_wrong=1)
    assert merge([None]) is None


def test_devices_work_together_where_each_rank_has_its_own_of_one_kind() -> None:
    rows = [RankFacts(rank=rank, device=DeviceFacts(f"cuda:{rank}", uuid=f"GPU-{rank}")) for rank in range(2)]
    assert can_compute_together(rows)
    assert not can_compute_together(rows[:1])
    for other in (
        DeviceFacts(),
        DeviceFacts("cuda:0", uuid="GPU-0"),
        DeviceFacts("xpu:1", uuid="GPU-1"),
        DeviceFacts("cuda:1", uuid="GPU-1", error="broken"),
    ):
        assert not can_compute_together([rows[0], replace(rows[1], device=other)])
    assert not can_compute_together([replace(row, device=DeviceFacts()) for row in rows])
