"""Ranks draw different numbers, agree where they must, and go on exactly where they were."""

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from rankwise.errors import CheckpointMismatchError
from rankwise.identity import Identity
from rankwise.seed import RngState, same_on_every_rank, seed_all

CPU = torch.device("cpu")


def identity(rank: int) -> Identity:
    return Identity(rank, rank, 0, 8, 8, 1)


def draw() -> tuple[float, ...]:
    return (
        random.random(),
        random.gauss(),
        float(np.random.rand()),
        float(np.random.standard_normal()),
        float(torch.rand(())),
        float(torch.randn(())),
    )


@pytest.fixture(autouse=True)
def keep_random_state() -> Iterator[None]:
    before = RngState(CPU).state_dict()
    yield
    RngState(CPU).load_state_dict(before)


def test_stream_depends_on_seed_and_rank_and_nothing_else() -> None:
    draws = {}
    for seed in range(4):
        for rank in range(4):
            seed_all(seed, identity(rank))
            draws[seed, rank] = draw()
    # seed + rank would make (0, 1) and (1, 0) the same.
    for place in range(6):
        assert len({numbers[place] for numbers in draws.values()}) == 16
    seed_all(2, identity(3))
    assert draw() == draws[2, 3]


def test_block_is_the_same_on_every_rank_and_leaves_no_trace() -> None:
    inside, after = [], []
    for rank in range(2):
        seed_all(0, identity(rank))
        with same_on_every_rank(5):
            inside.append(draw())
        after.append(draw())
        seed_all(0, identity(rank))
        assert draw() == after[rank]
    assert inside[0] == inside[1]
    assert inside[0] not in after
    with same_on_every_rank(6):
        assert draw() != inside[0]


def test_block_does_not_start_an_accelerator_and_leaves_it_the_seed_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA keeps the last seed it was given until it starts."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    seed_all(0, identity(1))
    expected = draw()
    seed_all(0, identity(1))
    with same_on_every_rank(5):
        draw()
    assert draw() == expected
    rank_seed, _, block_seed, last_seed = seeds
    assert last_seed == rank_seed != block_seed


def test_block_that_raises_restores_too() -> None:
    seed_all(0, identity(0))
    expected = draw()
    seed_all(0, identity(0))
    with pytest.raises(KeyError), same_on_every_rank(5):  # noqa: PT012
        draw()
        raise KeyError
    assert draw() == expected


def test_state_goes_on_in_the_middle_of_a_pair_of_gaussians() -> None:
    seed_all(0, identity(0))
    draw()  # leaves the second half of a pair in python's and numpy's generators
    state = RngState(CPU).state_dict()
    expected = [draw() for _ in range(3)]
    draw()
    RngState(CPU).load_state_dict(state)
    assert [draw() for _ in range(3)] == expected


def test_state_is_tensors_and_plain_values() -> None:
    def check(value: Any) -> None:
        if isinstance(value, dict):
            for item in value.values():
                check(item)
        elif not isinstance(value, torch.Tensor):
            assert json.loads(json.dumps(value)) == value

    check(RngState(CPU).state_dict())


def test_state_of_another_device_type_is_refused_before_anything_changes() -> None:
    state = RngState(CPU).state_dict()
    state["accelerator"] = {"type": "cuda", "state": torch.zeros(16, dtype=torch.uint8)}
    before = random.getstate()
    with pytest.raises(CheckpointMismatchError, match="saved on cuda and cannot go on on cpu"):
        RngState(CPU).load_state_dict(state)
    assert random.getstate() == before


def test_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        seed_all(-1, identity(0))
