"""`rankwise ckpt` as a person calls it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from rankwise import CheckpointManager, PerRank, cli
from rankwise.ckpt import main
from rankwise.ckpt.differing import compare
from rankwise.ckpt.listing import describe
from rankwise.ckpt.values import read_step
from rankwise.ckpt.verifying import find_problems
from rankwise.testing import on_ranks


def test_the_command_is_a_verb_of_rankwise(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run.save(3)
    assert cli.main(["ckpt", "verify", str(run.run)]) == 0
    assert capsys.readouterr().out.startswith("well ")


def test_listing_needs_no_torch(run: Any) -> None:
    run.save(3)
    code = "import sys; from rankwise.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "ckpt", "ls", str(run.run)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "model, optimizer, step" in result.stdout


@pytest.mark.parametrize("command", ["ls", "verify", "prune"])
def test_a_folder_that_is_not_there_is_status_two(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: there is no folder ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "ls|verify|diff|prune|convert"),
        (["burn", "RUN"], "invalid choice: 'burn'"),
        (["ls"], "required: RUN"),
        (["ls", "RUN", "--jsn"], "--jsn"),
        (["verify", "RUN", "--step", "-1"], "--step"),
        (["verify", "RUN", "--step", "last"], "'last' is not the number of a step"),
        (["diff", "A"], "two paths, or a RUN and two steps"),
        (["diff", "A", "1", "newest"], "'newest' is not the number of a step"),
        (["prune", "RUN", "--keep-last", "0"], "'0' is not a number from 1 on"),
        (["convert", "RUN", "DEST"], "required: --to"),
        (["convert", "RUN", "DEST", "--to", "torch", "--from", "dcp", "--step", "1"], "--step goes with a RUN"),
    ],
)
def test_what_is_not_understood_is_status_two_and_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["ls", "--help"], ["convert", "--help"]])
def test_help_is_printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "usage: rankwise ckpt" in capsys.readouterr().out


def test_a_reader_who_has_seen_enough_is_no_error(run: Any) -> None:
    for step in range(3):
        run.save(step, value=1)
    code = "import sys; from rankwise.ckpt import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-X", "dev", "-c", code, "ls", str(run.run), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


@on_ranks(2)
def test_what_two_ranks_have_saved_together_is_listed_verified_compared_and_converted(tmp_path: Path) -> None:
    rank = dist.get_rank()
    weight = torch.arange(40_000.0).reshape(200, 200)
    for step in (1, 2):
        with CheckpointManager(tmp_path / "checkpoints") as manager:
            manager.save(step, {"net": {"weight": weight * step}, "draw": PerRank({"rank": rank, "x": weight[rank]})})
    if rank != 0:
        return
    path = tmp_path / "checkpoints" / "step-00000001"
    assert (path / "__1_0.distcp").is_file()
    row = describe(path)
    assert (row.whole, row.world_size, row.num_tensors, row.per_rank_items) == (True, 2, 3, ("draw",))
    assert main(["verify", str(tmp_path)]) == 0
    found = compare(read_step(path), read_step(path.with_name("step-00000002")))
    assert [(change.name, change.max_abs, change.relative) for change in found.changed] == [
        ("net.weight", 39_999.0, 0.5)
    ]
    assert (found.num_equal, found.values) == (2, {})
    assert main(["convert", str(path), str(tmp_path / "all.pt"), "--to", "torch"]) == 0
    state = torch.load(tmp_path / "all.pt", weights_only=True)
    assert torch.equal(state["net"]["weight"], weight)
    assert [own["rank"] for own in state["draw"]] == [0, 1]
    assert torch.equal(state["draw"][1]["x"], weight[1])
    assert main(["convert", str(path), str(tmp_path / "net"), "--to", "safetensors", "--item", "net"]) == 0
    assert torch.equal(load_file(tmp_path / "net")["weight"], weight)
    (path / "__1_0.distcp").write_bytes(b"")
    [problem] = find_problems(path)
    assert "__1_0.distcp is damaged: 0 bytes long" in problem
