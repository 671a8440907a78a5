"""The copy that training waits for: into memory of the host that is kept and used again.

Memory is taken from the system once, in large pages where it gives them, because touching new pages costs ten times
what the copy does. A copy-on-write snapshot by `fork` would stall even less, but every page that training then touches
first is copied in a fault of its own: 1 GB cost 3.7 s of training where this was chosen, and 0.16 s this way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
from collections.abc import Sequence

import numpy as np
import torch

from rankwise.checkpoint.plan import Piece

_ALIGNMENT = 64


class Arena:
    """Host memory for one copy of what this rank writes; grows, and never shrinks."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces with their data copied into this memory, where nothing else changes it until the next call.

        Accelerators copy asynchronously into pinned memory; on return all copies are done.

        Ranks: local.
        """
        starts, end = [], 0
        for piece in pieces:
            starts.append(end)
            end += -(-piece.num_bytes // _ALIGNMENT) * _ALIGNMENT
        on_accelerator = any(piece.data.device.type != "cpu" for piece in pieces)
        if self._memory.numel() < end or (on_accelerator and not self._memory.is_pinned()):
            self._memory = _allocate(end, on_accelerator)
        buffer = memoryview(self._memory.numpy().data)
        copies = []
        for piece, start in zip(pieces, starts, strict=True):
            # A storage of its own: a view of the whole memory would be written with the whole memory.
            raw = torch.frombuffer(buffer[start : start + piece.num_bytes], dtype=torch.uint8)
            data = raw.view(piece.data.dtype).view(piece.data.shape)
            if _is_plain(piece.data):
                # The C library's copy: it goes past caches that are too small for it, which torch's never does.
                np.copyto(raw.numpy(), piece.data.reshape(-1).view(torch.uint8).numpy())
            else:
                data.copy_(piece.data, non_blocking=True)
            copies.append(dataclasses.replace(piece, data=data))
        if on_accelerator:
            torch.accelerator.current_stream().synchronize()
        return copies


def in_host_memory(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces with contiguous data on the CPU, copied only where it is not so yet: for while training waits.

    Ranks: local.
    """
    return [dataclasses.replace(piece, data=_packed(piece.data)) for piece in pieces]


def _is_plain(data: torch.Tensor) -> bool:
    """Whether the memory of a tensor is on the CPU and as it would be written."""
    return data.device.type == "cpu" and data.is_contiguous() and not data.is_conj() and not data.is_neg()


def _packed(data: torch.Tensor) -> torch.Tensor:
    plain = data.resolve_conj().resolve_neg().cpu().contiguous()
    # torch.save writes the whole storage of a view.
    return plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()


def _allocate(num_bytes: int, pinned: bool) -> torch.Tensor:
    if pinned:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    if not num_bytes:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes)
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
