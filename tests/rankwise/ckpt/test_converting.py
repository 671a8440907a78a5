"""`rankwise ckpt convert`: what comes out is read by the libraries that it is for."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file

from rankwise import PerRank
from rankwise.ckpt import main


def load_dcp(state: dict[str, Any], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=path, no_dist=True)


def test_one_item_as_safetensors_has_the_names_of_its_own_state(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Linear(3, 2)
    run.save(1, model=model, step=1)
    file = tmp_path / "model.safetensors"
    assert main(["convert", str(run.run), str(file), "--to", "safetensors", "--item", "model"]) == 0
    fresh = torch.nn.Linear(3, 2)
    fresh.load_state_dict(load_file(file))
    assert torch.equal(fresh.weight, model.weight)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    captured = capsys.readouterr()
    assert "2 tensors" in captured.out
    assert captured.err == ""


def test_every_type_that_a_checkpoint_holds_comes_through_safetensors(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rankwise.checkpoint.tree import DTYPES

    tensors = {name: torch.arange(3).to(dtype) for name, dtype in DTYPES.items()}
    tied = torch.ones(2, 2)
    run.save(1, all={**tensors, "scalar": torch.tensor(5.0), "empty": torch.zeros(0, 3), "a": tied, "b": tied, "n": 7})
    file = tmp_path / "all.safetensors"
    assert main(["convert", str(run.run), str(file), "--to", "safetensors"]) == 0
    found = load_file(file)
    for name, tensor in tensors.items():
        assert found[f"all.{name}"].dtype == tensor.dtype
        assert found[f"all.{name}"].view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()
    assert found["all.scalar"].shape == ()
    assert found["all.empty"].shape == (0, 3)
    assert found["all.a"].tolist() == found["all.b"].tolist() == tied.tolist()
    assert "left out: 1 plain values" in capsys.readouterr().err


def test_a_torch_file_holds_all_and_loads_without_code(run: Any, tmp_path: Path) -> None:
    tied = torch.ones(2)
    state = {"a": tied, "b": tied, "pair": (1, "x"), 3: [None, float("inf")]}
    run.save(1, state=state, rng=PerRank({"draw": torch.zeros(2), "n": 4}))
    assert main(["convert", str(run.run), str(tmp_path / "all.pt"), "--to", "torch"]) == 0
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    assert set(found) == {"state", "rng"}
    assert found["state"]["a"].data_ptr() == found["state"]["b"].data_ptr()
    assert (found["state"]["pair"], found["state"][3]) == ((1, "x"), [None, float("inf")])
    [own] = found["rng"]
    assert (own["draw"].tolist(), own["n"]) == ([0.0, 0.0], 4)
    assert main(["convert", str(run.run), str(tmp_path / "one.pt"), "--to", "torch", "--item", "rng"]) == 0
    assert torch.load(tmp_path / "one.pt", weights_only=True)[0]["n"] == 4


def test_a_plain_dcp_directory_is_loaded_by_dcp(run: Any, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    run.save(1, model=model, step=1)
    assert main(["convert", str(run.run), str(tmp_path / "all"), "--to", "dcp"]) == 0
    state: dict[str, Any] = {"model": torch.nn.Linear(3, 2).state_dict(), "step": 0}
    load_dcp(state, tmp_path / "all")
    assert torch.equal(state["model"]["weight"], model.weight)
    assert state["step"] == 1
    assert main(["convert", str(run.run), str(tmp_path / "one"), "--to", "dcp", "--item", "model"]) == 0
    own = torch.nn.Linear(3, 2).state_dict()
    load_dcp(own, tmp_path / "one")
    assert torch.equal(own["weight"], model.weight)


def test_a_plain_dcp_directory_is_converted_too(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model.state_dict(), "step": 3}, checkpoint_id=tmp_path / "plain", no_dist=True)
    given = ["convert", str(tmp_path / "plain"), "--from", "dcp"]
    assert main([*given, str(tmp_path / "all.pt"), "--to", "torch"]) == 0
    assert torch.load(tmp_path / "all.pt", weights_only=True)["step"] == 3
    assert main([*given, str(tmp_path / "m.safetensors"), "--to", "safetensors", "--item", "model"]) == 0
    assert torch.equal(load_file(tmp_path / "m.safetensors")["weight"], model.weight)
    assert main([*given, str(tmp_path / "s.pt"), "--to", "torch", "--item", "step"]) == 0
    assert torch.load(tmp_path / "s.pt", weights_only=True) == 3


def test_the_step_that_is_asked_for_is_converted(run: Any, tmp_path: Path) -> None:
    run.save(1, x=torch.zeros(1))
    run.save(2, x=torch.ones(1))
    for name, options, value in (("a", [], 1.0), ("b", ["--step", "1"], 0.0)):
        file = tmp_path / name
        assert main(["convert", str(run.run), str(file), "--to", "torch", "--item", "x", *options]) == 0
        assert torch.load(file, weights_only=True).tolist() == [value]


@pytest.mark.parametrize("to", ["safetensors", "torch", "dcp"])
@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_nothing_is_overwritten(
    run: Any, tmp_path: Path, to: str, there: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run.save(1, x=torch.zeros(1))
    target = tmp_path / "there"
    match there:
        case "file":
            target.write_text("mine")
        case "folder":
            target.mkdir()
        case "link":
            target.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", str(run.run), str(target), "--to", to]) == 2
    assert "is there already, and nothing is overwritten" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "torch", "--item", "vae"], "has no item 'vae'. It holds x, n"),
        (["--to", "torch", "--step", "5"], "there is no step 5"),
        (["--to", "safetensors", "--item", "n"], "has no tensors to convert"),
        (["--to", "safetensors", "--item", "twice"], "two tensors would have the name '1'"),
        (["--to", "torch", "--from", "dcp"], "has no .metadata"),
    ],
)
def test_what_cannot_be_converted_is_status_two_and_leaves_nothing(
    run: Any, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run.save(1, x=torch.zeros(1), n=1, twice={1: torch.ones(1), "1": torch.zeros(1)})
    assert main(["convert", str(run.run), str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("to", ["safetensors", "torch", "dcp"])
def test_a_damaged_step_is_not_converted(
    run: Any, tmp_path: Path, to: str, flip: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.save(1, a=torch.zeros(4), b=torch.ones(4))
    record = json.loads((path / "tensors.json").read_text())["b"]["chunks"][0]
    flip(path / record["file"], record["start"])
    assert main(["convert", str(run.run), str(tmp_path / "out"), "--to", to]) == 1
    assert "is damaged" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["run"]


def test_a_file_that_appears_meanwhile_is_not_overwritten(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(1, x=torch.zeros(1))
    target, save = tmp_path / "out", torch.save

    def save_late(*args: Any) -> None:
        save(*args)
        target.write_text("mine")

    monkeypatch.setattr(torch, "save", save_late)
    assert main(["convert", str(run.run), str(target), "--to", "torch"]) == 2
    assert target.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
