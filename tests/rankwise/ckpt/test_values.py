"""A step taken apart."""

from typing import Any

import pytest
import torch

from rankwise import PerRank
from rankwise.ckpt.values import TensorName, leaves, read_step, show_place
from rankwise.errors import CheckpointCorruptError, CheckpointNotFoundError


def test_tensors_and_values_are_found_at_their_places(run: Any) -> None:
    tied = torch.ones(2)
    path = run.save(
        1,
        net={"a": tied, "b": tied, "list": [torch.zeros(1), {"n": 1}]},
        pair=(1, [2]),
        rng=PerRank({"x": torch.ones(1), "n": 4}),
    )
    step = read_step(path)
    tensors = {show_place(place): name for place, name in step.tensors().items()}
    assert set(tensors) == {"net.a", "net.b", "net.list.0", "rng.rank-00000.x"}
    assert tensors["net.a"] == tensors["net.b"]
    assert set(tensors.values()) == set(step.records)
    assert step.values() == {("net", "list", 1, "n"): 1, ("pair",): (1, [2]), ("rng", "rank-00000", "n"): 4}


def test_one_item_may_be_read_without_the_others(run: Any) -> None:
    path = run.save(1, net=torch.ones(1), n=1, own=PerRank(3))
    assert list(read_step(path, "n").values().values()) == [1]
    assert read_step(path, "own").items == {"own": [3]}
    with pytest.raises(CheckpointNotFoundError, match=r"has no item 'vae'\. It holds net, n, own"):
        read_step(path, "vae")


def test_what_is_damaged_is_not_taken_apart(run: Any, flip: Any) -> None:
    path = run.save(1, n=1)
    flip(path / "values.json", 3)
    with pytest.raises(CheckpointCorruptError, match=r"values\.json is damaged"):
        read_step(path)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({}, [((), {})]),
        ([], [((), [])]),
        ([1, [2]], [((), [1, [2]])]),
        ([1, [{}]], [((0,), 1), ((1, 0), {})]),
        ((TensorName("x"), 1), [((0,), TensorName("x")), ((1,), 1)]),
        ({3: {"a": None}}, [((3, "a"), None)]),
    ],
)
def test_a_list_is_one_value_unless_tensors_or_mappings_are_in_it(value: Any, found: Any) -> None:
    assert list(leaves(value)) == found
