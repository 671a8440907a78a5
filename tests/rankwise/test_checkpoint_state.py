"""A state fits or is refused by name, before anything changes."""

from typing import Any

import pytest
import torch

from rankwise.checkpoint.state import capture, check_fits, check_names, require_same, restore
from rankwise.errors import CheckpointError, CheckpointMismatchError


class Counter:
    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "a b", "\u00fc", "x" * 101, "manifest", "rank-3"])
def test_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="name"):
        check_names({name: 1})


def test_ordinary_names_are_taken() -> None:
    assert check_names({"vae": 1, "optimizer_g": 1, "net.0": 1, "ranking": 1}) is None  # type: ignore[func-returns-value]


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
        ({"a": Counter(0)}, 3, "holds a int, this run has a mapping"),
        (torch.zeros(2), torch.zeros(3), r"has shape \(3,\), this run needs \(2,\)"),
        (torch.zeros(2), 1.0, "has shape float"),
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
