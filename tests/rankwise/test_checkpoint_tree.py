"""Nested values come back from JSON and tensors as they went in."""

import json
import math
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.checkpoint.tree import _DTYPES, flatten, unflatten
from rankwise.errors import CheckpointCorruptError, CheckpointError


def there_and_back(value: object) -> Any:
    encoded, tensors = flatten(value, "item")
    stored = safetensors.torch.load(safetensors.torch.save(tensors))
    return unflatten(json.loads(json.dumps(encoded, allow_nan=False)), stored)


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


@pytest.mark.parametrize("dtype", sorted(_DTYPES, key=str), ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_of_every_type_and_shape_come_back_to_the_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    (back,) = there_and_back([tensor])
    assert (back.dtype, back.shape) == (dtype, shape)
    assert back.contiguous().flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist()


def test_tensors_without_order_of_their_own_are_stored_by_value() -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = [base.permute(2, 0, 1), base[:, 1], base[..., ::2], base.to(memory_format=torch.contiguous_format), base]
    tensors += [base[0], base[1], base.view(-1)[3:7]]
    tensors += [torch.zeros(1).expand(5), torch.nn.Parameter(base), torch.ones(2, dtype=torch.complex64).conj()]
    for tensor, back in zip(tensors, there_and_back(tensors), strict=True):
        assert torch.equal(tensor.detach().resolve_conj(), back)


def test_tied_tensors_are_stored_once_and_are_tied_again() -> None:
    weight = torch.randn(3)
    encoded, tensors = flatten({"a": weight, "b": weight, "empty": torch.empty(0), "void": torch.empty(0)}, "item")
    assert set(tensors) == {"a", "empty", "void"}
    back = unflatten(encoded, tensors)
    assert back["a"] is back["b"]


def test_tensor_names_stay_apart_where_paths_collide() -> None:
    tree = {"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2), "a.b_": torch.tensor(3)}
    back = there_and_back(tree)
    assert (back["a"]["b"], back["a.b"], back["a.b_"]) == (1, 2, 3)


def test_modules_keep_their_names_so_that_other_programs_can_read_them() -> None:
    _, tensors = flatten(torch.nn.Linear(2, 3).state_dict(), "net")
    assert set(tensors) == {"weight", "bias"}


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
    with pytest.raises(CheckpointError, match=rf"state\['item'\]\['groups'\]\['0'\] is a .*{kind}"):
        flatten({"groups": [value]}, "item")


def test_tensor_as_key_is_refused() -> None:
    with pytest.raises(CheckpointError, match="has a tensor for a key"):
        flatten({torch.tensor(1): 2}, "item")


def test_tensor_that_is_missing_in_its_file_is_corruption() -> None:
    encoded, _ = flatten({"a": torch.ones(2)}, "item")
    with pytest.raises(CheckpointCorruptError, match="'a' is missing"):
        unflatten(encoded, {})
