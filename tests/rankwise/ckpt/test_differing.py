"""`rankwise ckpt diff`."""

import json
from typing import Any

import pytest
import torch

from rankwise import PerRank
from rankwise.ckpt import main


def differences(capsys: pytest.CaptureFixture[str], *places: Any) -> dict[str, Any]:
    status = main(["diff", *map(str, places), "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert status == (0 if found["equal"] else 1)
    return found


def test_the_same_state_is_equal(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        run.save(step, net=torch.ones(3), values=[1, float("nan"), (2,)], rank=PerRank({"draw": torch.ones(2), "n": 1}))
    assert main(["diff", str(run.run), "1", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "equal: 2 tensors and all plain values"


def test_what_differs_is_measured_and_the_worst_comes_first(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run.save(1, net={"a": torch.ones(4), "b": torch.full((4,), 100.0), "c": torch.ones(2), "d": torch.tensor([1, 5])})
    run.save(
        2,
        net={
            "a": torch.tensor([1.0, 1.5, 1.0, 1.25]),
            "b": torch.tensor([100.0, 100.0, 100.0, 101.0]),
            "c": torch.ones(2),
            "d": torch.tensor([1, 1]),
        },
    )
    found = differences(capsys, run.run, 1, 2)
    assert [(each["name"], each["max_abs"], each["num_changed"], each["num_values"]) for each in found["changed"]] == [
        ("net.d", 4.0, 1, 2),
        ("net.a", 0.5, 2, 4),
        ("net.b", 1.0, 1, 4),
    ]
    assert [round(each["relative"], 3) for each in found["changed"]] == [0.8, 0.333, 0.01]
    assert found["num_equal"] == 1
    assert main(["diff", str(run.run), "1", "2", "--limit", "1"]) == 1
    shown = capsys.readouterr().out
    assert "net.d" in shown
    assert "net.a" not in shown
    assert "... and 2 more" in shown


def test_what_one_side_lacks_and_other_forms_are_told(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run.save(1, net={"gone": torch.ones(1), "same": torch.ones(1), "form": torch.ones(2), "kind": torch.ones(2)})
    run.save(2, net={"new": torch.ones(1), "same": torch.ones(1), "form": torch.ones(3), "kind": torch.ones(2).int()})
    found = differences(capsys, run.run, 1, 2)
    assert (found["only_a"], found["only_b"]) == (["net.gone"], ["net.new"])
    assert found["forms"] == {
        "net.form": ["float32 [2]", "float32 [3]"],
        "net.kind": ["float32 [2]", "int32 [2]"],
    }
    assert main(["diff", str(run.run), "1", "2"]) == 1
    shown = capsys.readouterr().out
    assert "tensors only in A: 1\nname\nnet.gone\n" in shown
    assert "net.form  float32 [2]  float32 [3]" in shown


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (1, 2, ["1", "2"]),
        (1, 1.0, ["1", "1.0"]),
        ((1, 2), [1, 2], ["(1, 2)", "[1, 2]"]),
        ({"x": 1}, {}, ["1", None]),
        (None, False, ["None", "False"]),
    ],
)
def test_plain_values_are_compared_with_their_types(
    run: Any, old: Any, new: Any, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run.save(1, value=old)
    run.save(2, value=new)
    found = differences(capsys, run.run, 1, 2)
    assert next(iter(found["values"].values())) == said


def test_items_of_single_ranks_are_compared_rank_by_rank(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run.save(1, rng=PerRank({"n": 1, "draw": torch.zeros(2)}))
    run.save(2, rng=PerRank({"n": 2, "draw": torch.ones(2)}))
    found = differences(capsys, run.run, 1, 2)
    assert found["values"] == {"rng.rank-00000.n": ["1", "2"]}
    assert [each["name"] for each in found["changed"]] == ["rng.rank-00000.draw"]


@pytest.mark.parametrize(
    ("old", "new", "num_changed", "max_abs"),
    [
        (torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0]), 1, None),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 3.0]), 1, 2.0),
        (torch.tensor([float("inf"), 1.0]), torch.tensor([float("inf"), 1.5]), 1, 0.5),
        (torch.tensor([float("inf")]), torch.tensor([-float("inf")]), 1, None),
        (torch.tensor([0.0]), torch.tensor([-0.0]), 1, 0.0),
        (torch.tensor([True, False]), torch.tensor([True, True]), 1, 1.0),
        (torch.tensor(2**60), torch.tensor(2**60 + 1), 1, 0.0),
        (torch.tensor([3 + 4j]), torch.tensor([0j]), 1, 5.0),
        (torch.ones(2).to(torch.bfloat16), torch.zeros(2).to(torch.bfloat16), 2, 1.0),
        (torch.ones(2).to(torch.float8_e5m2), torch.zeros(2).to(torch.float8_e5m2), 2, 1.0),
        (torch.tensor([1], dtype=torch.uint16), torch.tensor([4], dtype=torch.uint16), 1, 3.0),
    ],
)
def test_every_kind_of_number_is_compared_bit_by_bit(
    run: Any,
    old: torch.Tensor,
    new: torch.Tensor,
    num_changed: int,
    max_abs: float | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run.save(1, x=old)
    run.save(2, x=new)
    [change] = differences(capsys, run.run, 1, 2)["changed"]
    assert (change["num_changed"], change["max_abs"]) == (num_changed, max_abs)


def test_a_long_tensor_is_compared_to_its_end(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = torch.zeros(1 << 20 | 3), torch.zeros(1 << 20 | 3)
    new[-1] = 2.0
    run.save(1, x=old)
    run.save(2, x=new)
    [change] = differences(capsys, run.run, 1, 2)["changed"]
    assert (change["num_changed"], change["max_abs"], change["num_values"]) == (1, 2.0, (1 << 20) + 3)


def test_two_runs_are_compared_by_their_newest_steps(
    run: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run.save(1, x=torch.zeros(2))
    other = type(run)(tmp_path / "other")
    other.save(5, x=torch.ones(2))
    path = other.save(7, x=torch.zeros(2))
    assert differences(capsys, run.run, other.run)["equal"]
    assert differences(capsys, run.run, path)["equal"]
    assert not differences(capsys, run.run, other.folder / "step-00000005")["equal"]


def test_tied_and_untied_tensors_of_equal_values_are_equal(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tied = torch.ones(3)
    run.save(1, net={"a": tied, "b": tied})
    run.save(2, net={"a": torch.ones(3), "b": torch.ones(3)})
    assert differences(capsys, run.run, 1, 2)["equal"]


def test_what_cannot_be_compared_is_status_two(run: Any, flip: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run.save(1, x=torch.zeros(2))
    path = run.save(2, x=torch.ones(2))
    for places in (["nowhere", run.run], [run.run, 1, 3], [run.run, run.run / "checkpoints" / "x"]):
        assert main(["diff", *map(str, places)]) == 2
        assert capsys.readouterr().err.startswith("error: there is no ")
    record = json.loads((path / "tensors.json").read_text())["x"]["chunks"][0]
    flip(path / record["file"], record["start"])
    assert main(["diff", str(run.run), "1", "2"]) == 2
    assert "is damaged" in capsys.readouterr().err
