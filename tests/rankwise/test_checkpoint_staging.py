"""The copy is equal to the bit, stays as it is, and its memory is used again."""

import pytest
import torch

from rankwise.checkpoint.manifest import as_bytes
from rankwise.checkpoint.plan import Piece
from rankwise.checkpoint.staging import Arena, in_host_memory
from rankwise.checkpoint.tree import DTYPES

BASE = torch.arange(24.0).reshape(2, 3, 4)
KINDS = [
    *(torch.randint(0, 2, (3, 5)).to(dtype) for dtype in DTYPES.values()),
    torch.tensor(3.0),
    BASE.permute(2, 0, 1),
    BASE[:, 1],
    BASE[..., ::2],
    BASE.view(-1)[3:7],
    torch.zeros(1).expand(5),
    torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj(),
    torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj().imag,
    torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
]


def as_pieces(tensors: list[torch.Tensor]) -> list[Piece]:
    return [Piece(str(i), tuple(t.shape), (0,) * t.dim(), t) for i, t in enumerate(tensors)]


@pytest.mark.parametrize("copy", [Arena().copy, in_host_memory], ids=["arena", "in place"])
def test_copies_are_contiguous_equal_to_the_bit_and_have_a_storage_of_their_own(copy: object) -> None:
    for tensor, copied in zip(KINDS, copy(as_pieces(KINDS)), strict=True):  # type: ignore[operator]
        data = copied.data
        assert (data.dtype, data.shape, copied.shape) == (tensor.dtype, tensor.shape, tuple(tensor.shape))
        assert data.is_contiguous()
        assert not data.is_conj()
        assert not data.is_neg()
        assert data.untyped_storage().nbytes() == data.nbytes
        assert bytes(as_bytes(data)) == bytes(as_bytes(tensor.resolve_conj().resolve_neg().contiguous()))


def test_copy_stays_as_it_is_when_the_original_changes() -> None:
    tensors = [torch.ones(1000), torch.ones(3)]
    copies = Arena().copy(as_pieces(tensors))
    for tensor in tensors:
        tensor.zero_()
    assert all(piece.data.eq(1).all() for piece in copies)


def test_memory_is_used_again_and_grows_only_where_it_must() -> None:
    arena = Arena()
    first = arena.copy(as_pieces([torch.ones(1000), torch.ones(5)]))
    assert first[1].data.data_ptr() % 64 == 0
    again = arena.copy(as_pieces([torch.zeros(900)]))
    assert again[0].data.data_ptr() == first[0].data.data_ptr()
    larger = arena.copy(as_pieces([torch.zeros(100_000)]))
    # What was handed out before lives as long as somebody has it.
    assert first[1].data.tolist() == [1.0] * 5
    assert larger[0].data.data_ptr() != first[0].data.data_ptr()


def test_nothing_to_copy_takes_no_memory() -> None:
    assert Arena().copy([]) == in_host_memory([]) == []


def test_what_lies_packed_on_the_cpu_is_not_copied_while_training_waits() -> None:
    packed = torch.ones(10)
    (piece,) = in_host_memory(as_pieces([packed]))
    assert piece.data.data_ptr() == packed.data_ptr()
