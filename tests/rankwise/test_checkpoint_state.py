"""A state fits or is refused by name, before anything changes."""

from typing import Any

import pytest
import torch

from rankwise.checkpoint.state import buffer_addresses, capture, check_fits, check_names, require_same, restore
from rankwise.errors import CheckpointError, CheckpointMismatchError


class Counter:
    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "a b", "\u00fc", "x" * 101, "a.b", "\n", 3])
def test_name_that_cannot_begin_the_names_of_tensors_is_refused(name: Any) -> None:
    with pytest.raises(CheckpointError, match="name"):
        check_names({name: 1})


def test_ordinary_names_are_taken() -> None:
    assert check_names({"vae": 1, "optimizer_g": 1, "net-0": 1, "_x": 1, "manifest": 1}) is None  # type: ignore[func-returns-value]


def test_states_are_found_at_any_depth() -> None:
    captured = capture({"a": Counter(1), "b": {"c": [Counter(2), (Counter(3),)]}, "d": 4})
    assert captured == {"a": {"count": 1}, "b": {"c": [{"count": 2}, ({"count": 3},)]}, "d": 4}


def test_objects_and_tensors_are_restored_in_place_and_plain_values_are_not() -> None:
    counter, tensor = Counter(0), torch.zeros(2)
    target = {"counter": counter, "deep": {"tensor": tensor}, "plain": 7}
    saved = {"counter": {"count": 5}, "deep": {"tensor": torch.ones(2)}, "plain": 8}
    check_fits(target, saved, "x")
    restore(target, saved, "x")
    assert (counter.count, tensor.tolist(), target["plain"]) == (5, [1.0, 1.0], 7)


def test_what_stands_in_lists_and_tuples_is_restored() -> None:
    first, second, tensor = Counter(0), Counter(0), torch.zeros(2)
    target = {"ranks": [first, (second, 7)], "tensors": (tensor, {"plain": 1})}
    saved = capture({"ranks": [Counter(1), (Counter(2), 8)], "tensors": (torch.ones(2), {"plain": 2})})
    check_fits(target, saved, "x")
    restore(target, saved, "x")
    assert (first.count, second.count, tensor.tolist()) == (1, 2, [1.0, 1.0])


@pytest.mark.parametrize(
    ("target", "saved"),
    [(7, "seven"), ([], [1.0, 2.0]), ((1, [2]), None), ({"a": {"b": [1, 2]}}, {"a": {"b": [3]}}), ({}, {}), ({}, None)],
)
def test_plain_values_are_compared_by_name_alone(target: Any, saved: Any) -> None:
    before = repr(target)
    check_fits(target, saved, "x")
    restore(target, saved, "x")
    assert repr(target) == before


def test_module_with_another_type_of_number_is_refused_with_both() -> None:
    saved = torch.nn.Linear(2, 3, dtype=torch.bfloat16).state_dict()
    with pytest.raises(CheckpointMismatchError, match=r"\['weight'\] is torch.bfloat16, this run needs torch.float32"):
        check_fits(torch.nn.Linear(2, 3), saved, "net")


@pytest.mark.parametrize("enabled", [False, True])
def test_optimizers_and_scalers_judge_for_themselves(enabled: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=enabled)
    optimizer, other = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=lr) for lr in (0.1, 0.2))
    target, saved = {"scaler": scaler, "optimizer": optimizer}, capture({"scaler": scaler, "optimizer": other})
    check_fits(target, saved, "x")
    restore(target, saved, "x")
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_module_with_other_keys_is_refused_by_name() -> None:
    saved = torch.nn.Linear(2, 3, bias=False).state_dict() | {"scale": torch.ones(1)}
    with pytest.raises(CheckpointMismatchError, match="net does not fit: it lacks keys 'bias' and it has keys 'scale'"):
        check_fits(torch.nn.Linear(2, 3), saved, "net")


def test_module_with_other_shapes_is_refused_with_both() -> None:
    with pytest.raises(CheckpointMismatchError, match=r"net\['weight'\] has shape \(4, 2\), this run needs \(3, 2\)"):
        check_fits(torch.nn.Linear(2, 3), torch.nn.Linear(2, 4).state_dict(), "net")


@pytest.mark.parametrize(
    ("target", "saved", "message"),
    [
        ({"a": Counter(0)}, {"b": {}}, "lacks keys 'a' and it has keys 'b'"),
        ({"a": Counter(0)}, 3, "holds a value of type int, this run has a mapping"),
        (torch.zeros(2), torch.zeros(3), r"has shape \(3,\), this run needs \(2,\)"),
        (torch.zeros(2), 1.0, "x holds a value of type float, this run has a tensor there"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), r"x is torch.int64, this run needs torch.float32"),
        ([Counter(0)], [{"count": 1}, {"count": 2}], "x holds a list of 2, this run has a list of 1 there"),
        ((Counter(0), Counter(0)), ({"count": 1},), "x holds a tuple of 1, this run has a tuple of 2 there"),
        ([], [torch.zeros(2)], "x holds a list of 1, this run has a list of 0 there"),
        ([torch.zeros(2)], {"a": 1}, "x holds a mapping, this run has a list of 1 there"),
        ({"a": [1, torch.zeros(2)]}, {"a": [1, torch.zeros(3)]}, r"x\['a'\]\[1\] has shape \(3,\)"),
        ({}, {"g": {"state": 1}}, "it has keys 'g' unknown to this run"),
        ({"g": {}}, {"g": {"lr": 1}}, r"x\['g'\] does not fit: it has keys 'lr'"),
        ({"g": 1}, {}, "lacks keys 'g'"),
        ({1: torch.zeros(2)}, {"1": torch.zeros(2)}, "it lacks keys 1 and it has keys '1'"),
        (None, {"g": 1}, "x holds a mapping, this run has None there, which cannot take it back"),
        ({"a": 0.0}, {"a": torch.zeros(2)}, r"x\['a'\] holds a tensor, this run has a value of type float there"),
    ],
)
def test_other_structure_is_refused(target: object, saved: object, message: str) -> None:
    with pytest.raises(CheckpointMismatchError, match=message):
        check_fits(target, saved, "x")


def test_refusal_of_the_object_itself_names_item_and_type() -> None:
    with pytest.raises(
        CheckpointMismatchError, match="item 'c' does not fit into this run's Counter: KeyError: 'count'"
    ):
        restore(Counter(0), {}, "item 'c'")


def test_long_lists_of_names_are_cut() -> None:
    with pytest.raises(CheckpointMismatchError, match=r"lacks keys 'k0', 'k1', 'k2', 'k3', \.\.\. \(9\)"):
        require_same("keys", [f"k{i}" for i in range(9)], [], "x")


def test_buffers_of_modules_are_found_at_any_depth_and_parameters_are_not() -> None:
    norm, other = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(2, affine=False)
    found = buffer_addresses({"a": {"b": [norm]}, "c": (other, torch.ones(1)), "d": 3})
    buffers = [*norm.buffers(), *other.buffers()]
    assert found == {buffer.data_ptr() for buffer in buffers}
    assert len(found) == 6
