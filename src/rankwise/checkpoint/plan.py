"""Who writes which part of a state: what is replicated once, spread over the ranks by bytes; shards where they lie.

What ranks only believe to be equal is taken from the main process, as DDP does at the next forward pass: buffers, such
as the running statistics of a batch norm, which every rank updates by itself, and small tensors, which may be such.

Every rank comes to the same answer by itself, from names, shapes and types alone, so that a save need not wait for the
others before it has its copy.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from rankwise.errors import CheckpointError

MAIN_BYTES = 1 << 16
"""Smaller replicated tensors are the main process's."""


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that one rank writes.

    Attributes:
        name: of the whole tensor.
        shape: of the whole tensor.
        offsets: where the box begins in it.
        data: the box itself, on any device, contiguous or not.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    data: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Of the box, packed."""
        return self.data.numel() * self.data.element_size()


def plan_pieces(
    tensors: Mapping[str, torch.Tensor], buffers: Collection[str], rank: int, world_size: int
) -> list[Piece]:
    """What `rank` writes of tensors that all ranks have: whole ones equal on all, or sharded.

    Args:
        buffers: names of those that are buffers of a module.
    Raises:
        CheckpointError: a DTensor holds partial sums.
    Ranks: local; the same names, shapes and types on every rank.
    """
    whole = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    pieces = _spread(whole, buffers, rank, world_size)
    sharded = {
        name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor) and _is_writer(name, tensor)
    }
    for item in create_default_local_save_plan(dict(sharded), is_coordinator=rank == 0).items:
        pieces.append(_shard(item, sharded[item.index.fqn]))
    return [piece for piece in pieces if piece.data.numel()]


def own_pieces(tensors: Mapping[str, torch.Tensor]) -> list[Piece]:
    """What a rank writes of tensors that it keeps for itself: all of them.

    Raises:
        CheckpointError: one of them is a DTensor.
    Ranks: local.
    """
    for name, each in tensors.items():
        if isinstance(each, DTensor):
            raise CheckpointError(
                f"the DTensor {name!r} belongs to all ranks together, so it cannot be in a PerRank item. "
                "Save the item without PerRank, or `to_local()` of the tensor."
            )
    return [Piece(name, tuple(each.shape), (0,) * each.dim(), each) for name, each in tensors.items() if each.numel()]


def structure(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """By name, shape and type in words: what must be equal on all ranks.

    Ranks: local.
    """
    return {name: f"{tuple(each.shape)} of {each.dtype}" for name, each in tensors.items()}


def _spread(tensors: Mapping[str, torch.Tensor], buffers: Collection[str], rank: int, world_size: int) -> list[Piece]:
    """This rank's part of replicated tensors: the largest go first, each to who has least so far."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    mains = {name for name, tensor in tensors.items() if tensor.nbytes < MAIN_BYTES or name in buffers}
    own = own_pieces({name: tensors[name] for name in tensors if name in mains}) if rank == 0 else []
    boxes = [box for name in tensors if name not in mains for box in _cut(name, tensors[name], total / world_size)]
    boxes.sort(key=lambda box: (-box.num_bytes, box.name, box.offsets))
    loads = [sum(tensors[name].nbytes for name in mains), *[0] * (world_size - 1)]
    for box in boxes:
        writer = loads.index(min(loads))
        loads[writer] += box.num_bytes
        if writer == rank:
            own.append(box)
    return own


def _cut(name: str, tensor: torch.Tensor, fair_share: float) -> Iterable[Piece]:
    """A tensor whole, or in slices along its first axis where it is larger than what one rank should write."""
    shape, zeros = tuple(tensor.shape), (0,) * tensor.dim()
    num_parts = math.ceil(tensor.nbytes / fair_share) if fair_share else 1
    if num_parts <= 1 or not shape:
        yield Piece(name, shape, zeros, tensor)
        return
    num_rows = math.ceil(shape[0] / num_parts)
    for start in range(0, shape[0], num_rows):
        yield Piece(name, shape, (start, *zeros[1:]), tensor[start : start + num_rows])


def _is_writer(name: str, tensor: DTensor) -> bool:
    """Whether this rank writes its shard: of the ranks that hold the same one, one does."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    for axis, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise CheckpointError(
                f"the DTensor {name!r} holds partial sums ({placement}), which no one rank has. "
                "Redistribute it to shards or replicas before the save."
            )
        if placement.is_replicate() and coordinate[axis] != zlib.crc32(name.encode()) % tensor.device_mesh.size(axis):
            return False
    return True


def _shard(item: WriteItem, tensor: DTensor) -> Piece:
    offsets = item.index.offset or ()
    return Piece(item.index.fqn, tuple(tensor.shape), tuple(offsets), tensor.to_local())
