"""Nested values come back from JSON and tensors as they went in."""

import json
import math
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from rankwise.checkpoint.tree import DTYPES, find_tensors, flatten, unflatten
from rankwise.errors import CheckpointCorruptError, CheckpointError


def there_and_back(value: object) -> Any:
    tree = flatten(value, "item")
    return unflatten(json.loads(json.dumps(tree.encoded, allow_nan=False)), tree.tensors)


KEYS = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), st.text()))
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
TREES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(st.sampled_from(["$tuple", "$dict", "$float", "$tensor", "$", "a"]), inner, max_size=2),
    ),
    max_leaves=8,
)


@given(TREES)
def test_any_tree_of_plain_values_comes_back_equal_and_of_equal_types(tree: object) -> None:
    back = there_and_back(tree)
    assert repr(back) == repr(tree)


def test_nan_and_infinities_come_back() -> None:
    nan, inf, minus = there_and_back([math.nan, math.inf, -math.inf])
    assert math.isnan(nan)
    assert (inf, minus) == (math.inf, -math.inf)


def test_tensors_keep_their_memory_until_somebody_copies_it() -> None:
    base = torch.nn.Parameter(torch.arange(24.0).reshape(2, 3, 4))
    (found,) = flatten([base], "item").tensors.values()
    assert found.data_ptr() == base.data_ptr()
    assert not found.requires_grad


def test_tied_tensors_stand_once_with_the_other_name_as_alias_and_are_tied_again() -> None:
    weight = torch.randn(3)
    tree = flatten({"a": weight, "b": weight, "c": weight[:2], "empty": torch.empty(0), "void": torch.empty(0)}, "item")
    assert set(tree.tensors) == {"item.a", "item.c", "item.empty", "item.void"}
    assert tree.aliases == {"item.b": "item.a"}
    back = unflatten(tree.encoded, tree.tensors)
    assert back["a"] is back["b"]


def test_views_that_read_the_same_memory_otherwise_are_not_tied() -> None:
    number = torch.tensor([1 + 2j], dtype=torch.complex64)
    views = [number, number.conj(), number.imag, number.conj().imag, number.real.view(torch.int32), number.real]
    tree = flatten(views, "item")
    assert not tree.aliases
    for view, back in zip(views, unflatten(tree.encoded, tree.tensors), strict=True):
        assert torch.equal(view, back)


def test_tensors_of_every_type_that_stands_in_a_checkpoint_are_taken() -> None:
    for name, dtype in DTYPES.items():
        assert str(dtype) == f"torch.{name}"
        assert flatten(torch.empty(2, dtype=dtype), "item").tensors["item"].dtype is dtype


def test_tensor_names_stay_apart_where_paths_collide() -> None:
    tree = {"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2), "a.b_": torch.tensor(3)}
    back = there_and_back(tree)
    assert (back["a"]["b"], back["a.b"], back["a.b_"]) == (1, 2, 3)


def test_names_and_paths_are_those_of_plain_dcp() -> None:
    net = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {"net": net.state_dict(), "g": optimizer.state_dict(), "betas": [(0.1, 0.2), 3], "a": [torch.ones(1), [2]]}
    dcp_state, dcp_paths = flatten_state_dict(state)
    trees = {name: flatten(value, name) for name, value in state.items()}
    assert {name for tree in trees.values() for name in (*tree.tensors, *tree.leaves)} == set(dcp_state)
    paths = {name: path for tree in trees.values() for name, path in tree.paths.items()}
    # The keys of a mapping that are no strings stay what they are in both.
    assert {name: tuple(map(str, path)) for name, path in paths.items()} == {
        name: tuple(map(str, path)) for name, path in dcp_paths.items()
    }
    for tree in trees.values():
        for name, value in tree.leaves.items():
            assert repr(value) == repr(dcp_state[name])


def test_ways_to_tensors_have_the_keys_that_they_had() -> None:
    value = {"state": {0: {"m": torch.ones(1)}}, "groups": [({"x": torch.ones(2)},)]}
    tree = flatten(value, "item")
    assert dict(find_tensors(json.loads(json.dumps(tree.encoded)))) == {
        ("state", 0, "m"): "item.state.0.m",
        ("groups", 0, 0, "x"): "item.groups.0.0.x",
    }


def test_mappings_come_back_as_dicts_in_order() -> None:
    tree = OrderedDict(b=1, a=defaultdict(int, {2: 3}))
    back = there_and_back(tree)
    assert list(back.items()) == [("b", 1), ("a", {2: 3})]
    assert type(back["a"]) is dict


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float64(1.0), "numpy.float64"),
        (np.int64(1), "numpy.int64"),
        (np.zeros(2), "numpy.ndarray"),
        (b"bytes", "builtins.bytes"),
        ({1, 2}, "builtins.set"),
        (torch.Size([1]), "torch.Size"),
        (Path("x"), "PosixPath"),
        (torch.float32, "torch.dtype"),
        (torch.zeros(2, dtype=torch.complex128), "torch.complex128"),
        (torch.zeros(2).to_sparse(), "torch.sparse_coo"),
        (torch.zeros(2, device="meta"), "on meta"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_its_place(value: object, kind: str) -> None:
    with pytest.raises(CheckpointError, match=rf"state\['item'\]\['groups'\]\[0\] is a .*{kind}"):
        flatten({"groups": [value]}, "item")


def test_tensor_as_key_is_refused() -> None:
    with pytest.raises(CheckpointError, match="has a tensor for a key"):
        flatten({torch.tensor(1): 2}, "item")


def test_class_of_tensor_that_would_come_back_as_another_is_refused() -> None:
    class Labelled(torch.Tensor):
        pass

    with pytest.raises(CheckpointError, match=r"is a .*Labelled; only plain tensors and DTensors"):
        flatten(torch.ones(2).as_subclass(Labelled), "item")


def test_tensor_that_is_missing_is_corruption() -> None:
    with pytest.raises(CheckpointCorruptError, match=r"'item.a' is missing"):
        unflatten(flatten({"a": torch.ones(2)}, "item").encoded, {})
