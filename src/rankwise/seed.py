"""Randomness: equal where ranks must agree (weights), different where they must not (noise, crops)."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from rankwise.errors import CheckpointMismatchError
from rankwise.identity import Identity


def seed_all(seed: int, identity: Identity) -> None:
    """Seed python, numpy and torch (every device) with a stream of this rank's own.

    The streams come out of a hash of (seed, rank): with seed + rank, rank 1 of seed 0 would draw what rank 0
    of seed 1 draws.

    Args:
        seed: 0 or more, the same on every rank.
    Ranks: local.
    """
    _seed_generators(np.random.SeedSequence(seed, spawn_key=(identity.rank,)))


@contextlib.contextmanager
def same_on_every_rank(seed: int) -> Iterator[None]:
    """Random numbers inside are the same on every rank; afterwards each rank goes on where it was.

    For what ranks must agree on without talking, such as fresh weights. An accelerator that this process has not
    used so far is not started by it.

    Ranks: local; it holds across ranks that use the same seed.
    """
    generators = RngState(_device_in_use())
    before, initial_seed = generators.state_dict(), torch.initial_seed()
    _seed_generators(np.random.SeedSequence(seed))
    try:
        yield
    finally:
        # An accelerator not in use yet has no state to restore: it starts, or starts anew, from the seed it had.
        torch.manual_seed(initial_seed)
        generators.load_state_dict(before)


class RngState:
    """The state of every random generator that this process draws from, for checkpoints.

    Args:
        device: the session's device; its generator is included when it is no CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only.

        Ranks: local; differs per rank.
        """
        version, words, gauss = random.getstate()
        numpy_state: Any = np.random.get_state(legacy=False)
        return {
            "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
            "numpy": {
                "words": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
                "position": int(numpy_state["state"]["pos"]),
                "has_gauss": int(numpy_state["has_gauss"]),
                "gauss": float(numpy_state["gauss"]),
            },
            "torch": torch.get_rng_state(),
            "accelerator": _accelerator_state(self.device),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on drawing where `state` was taken.

        Raises:
            CheckpointMismatchError: it was taken on another type of device.
        Ranks: local.
        """
        saved = state["accelerator"]
        saved_type = saved["type"] if saved else "cpu"
        if saved_type != self.device.type:
            raise CheckpointMismatchError(
                f"the random state was saved on {saved_type} and cannot go on on {self.device.type}. "
                f"Resume with device type {saved_type!r}."
            )
        python, numpy_state = state["python"], state["numpy"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
        np.random.set_state(
            {
                "bit_generator": "MT19937",
                "state": {
                    "key": numpy_state["words"].numpy().astype(np.uint32),
                    "pos": numpy_state["position"],
                },
                "has_gauss": numpy_state["has_gauss"],
                "gauss": numpy_state["gauss"],
            }
        )
        torch.set_rng_state(state["torch"])
        if saved:
            torch.get_device_module(self.device).set_rng_state(saved["state"], *_index_argument(self.device))


def _device_in_use() -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.device("cpu")
    # Asking an accelerator for its random state would start it, with all the memory that takes.
    is_initialized = getattr(torch.get_device_module(found), "is_initialized", lambda: True)
    return found if is_initialized() else torch.device("cpu")


def _seed_generators(sequence: np.random.SeedSequence) -> None:
    words = sequence.generate_state(8)
    random.seed(int.from_bytes(words[:4].tobytes(), "little"))
    np.random.seed(words[4:6])
    torch.manual_seed(int.from_bytes(words[6:].tobytes(), "little"))


def _accelerator_state(device: torch.device) -> dict[str, Any] | None:
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    return {"type": device.type, "state": module.get_rng_state(*_index_argument(device))}


def _index_argument(device: torch.device) -> tuple[torch.device, ...]:
    # MPS has one device and its functions take no argument.
    return () if device.type == "mps" or device.index is None else (device,)
