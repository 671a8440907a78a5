"""All ranks together write every value once, and each writes its share."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import rankwise
from rankwise.checkpoint.plan import MAIN_BYTES, Piece, own_pieces, plan_pieces, structure
from rankwise.errors import CheckpointError
from rankwise.testing import on_ranks

LARGE = MAIN_BYTES // 4


def put_together(shape: tuple[int, ...], pieces: list[Piece]) -> torch.Tensor:
    """The tensor that pieces make up; every value is in one of them alone."""
    whole, times = torch.zeros(shape), torch.zeros(shape)
    for piece in pieces:
        place = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.data.shape, strict=True))
        whole[place] = piece.data
        times[place] += 1
    assert times.eq(1).all()
    return whole


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_replicated_tensors_are_written_once_and_spread_by_bytes(world_size: int) -> None:
    sizes = {"a": (LARGE * 7,), "b": (LARGE, 3), "c": (LARGE,), "d": (5, LARGE), "e": (LARGE // 2, 4), "small": (9,)}
    tensors = {name: torch.randn(size) for name, size in sizes.items()}
    plans = [plan_pieces(tensors, (), rank, world_size) for rank in range(world_size)]
    for name, tensor in tensors.items():
        found = [piece for plan in plans for piece in plan if piece.name == name]
        assert all(piece.shape == tuple(tensor.shape) for piece in found)
        assert torch.equal(put_together(tuple(tensor.shape), found), tensor)
    loads = [sum(piece.num_bytes for piece in plan) for plan in plans]
    assert max(loads) <= 1.34 * sum(loads) / world_size
    assert [piece.name for plan in plans[1:] for piece in plan if piece.name == "small"] == []


def test_one_large_tensor_is_shared_out_along_its_first_axis() -> None:
    tensor = torch.randn(7, LARGE)
    plans = [plan_pieces({"w": tensor}, (), rank, 3) for rank in range(3)]
    assert sorted(piece.data.shape[0] for plan in plans for piece in plan) == [1, 3, 3]
    assert torch.equal(put_together((7, LARGE), [piece for plan in plans for piece in plan]), tensor)


def test_large_tensor_with_few_rows_is_cut_no_further() -> None:
    plans = [plan_pieces({"w": torch.randn(1, 8 * LARGE)}, (), rank, 4) for rank in range(4)]
    assert [len(plan) for plan in plans] == [1, 0, 0, 0]


def test_buffers_and_small_tensors_are_the_main_process_s() -> None:
    tensors = {"mean": torch.randn(4 * LARGE), "w": torch.randn(4 * LARGE), "step": torch.tensor(1.0)}
    main, other = (plan_pieces(tensors, {"mean"}, rank, 2) for rank in range(2))
    assert {piece.name for piece in main} >= {"mean", "step"}
    assert {piece.name for piece in other} == {"w"}


def test_what_has_no_values_is_written_by_nobody() -> None:
    tensors = {"a": torch.empty(0), "b": torch.empty(3, 0)}
    assert plan_pieces(tensors, (), 0, 2) == plan_pieces(tensors, (), 1, 2) == own_pieces(tensors) == []
    assert structure(tensors) == {"a": "(0,) of torch.float32", "b": "(3, 0) of torch.float32"}


@on_ranks(3)
def test_shards_are_written_where_they_lie_and_replicas_once() -> None:
    mesh = init_device_mesh("cpu", (3,))
    rank = dist.get_rank()
    whole = torch.arange(8.0).reshape(4, 2)
    tensors: dict[str, torch.Tensor] = {
        "rows": distribute_tensor(whole, mesh, [Shard(0)]),
        "columns": distribute_tensor(whole, mesh, [Shard(1)]),  # the last rank has none
        **{f"copy-{number}": distribute_tensor(whole, mesh, [Replicate()]) for number in range(8)},
    }
    plans = rankwise.gather_objects(
        [(piece.name, piece.offsets, piece.data) for piece in plan_pieces(tensors, (), rank, 3)]
    )
    for name in tensors:
        found = [Piece(each, (4, 2), offsets, data) for plan in plans for each, offsets, data in plan if each == name]
        assert torch.equal(put_together((4, 2), found), whole)
    assert [sum(name == "rows" for name, _, _ in plan) for plan in plans] == [1, 1, 0]  # two rows, two rows, none
    writers = [rank for rank, plan in enumerate(plans) for name, _, _ in plan if name.startswith("copy")]
    assert len(writers) == 8
    assert len(set(writers)) > 1


@on_ranks(2)
def test_partial_sums_and_dtensors_of_one_rank_alone_are_refused_by_name() -> None:
    mesh = init_device_mesh("cpu", (2,))
    partial = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    with pytest.raises(CheckpointError, match=r"the DTensor 'g' holds partial sums .*Redistribute it"):
        plan_pieces({"g": partial}, (), dist.get_rank(), 2)
    sharded = distribute_tensor(torch.ones(2), mesh, [Shard(0)])
    with pytest.raises(CheckpointError, match=r"the DTensor 'g' belongs to all ranks .* without PerRank"):
        own_pieces({"g": sharded})
