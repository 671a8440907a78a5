"""The scripts of examples/ do what they say, on real processes."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from rankwise.runreader import read_run

EXAMPLES = Path(__file__).parents[1] / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
RANKWISE_RUN = [sys.executable, "-m", "rankwise", "run"]
PLACE_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

pytestmark = pytest.mark.timeout(300)


def run(
    commands: Sequence[Sequence[str | Path]], folder: Path, num_lines: int = 0
) -> list["subprocess.CompletedProcess[str]"]:
    """Run the commands side by side, as the nodes of a job.

    A launcher whose own ranks ended well waits minutes for one that failed. So once one has failed, the others are
    ended as soon as they have printed `num_lines`.
    """
    environ = {name: value for name, value in os.environ.items() if name not in PLACE_VARIABLES}
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with contextlib.ExitStack() as stack:
        nodes = []
        for number, command in enumerate(commands):
            files = [folder / f"node-{number}.{name}" for name in ("out", "err")]
            out, err = (stack.enter_context(open(path, "w")) for path in files)
            process = subprocess.Popen([*map(str, command)], stdout=out, stderr=err, env=environ, cwd=folder)
            stack.callback(end, process)
            nodes.append((process, files))
        deadline = time.monotonic() + 200
        while any(process.poll() is None for process, _ in nodes):
            if any(process.poll() for process, _ in nodes):
                for process, (out_path, _) in nodes:
                    if len(out_path.read_text().splitlines()) >= num_lines:
                        end(process)
            assert time.monotonic() < deadline, [path.read_text() for _, files in nodes for path in files]
            time.sleep(0.1)
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *(path.read_text() for path in files))
        for process, files in nodes
    ]


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a launcher: asked first, so that it ends its ranks."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)  # one that waits for another node hears nothing, and has no ranks any more
    process.kill()
    process.wait()


def on_two_nodes(
    script: str, folder: Path, *arguments: str | Path, num_lines: int = 0
) -> list["subprocess.CompletedProcess[str]"]:
    """Two agents of two processes each: to the ranks, two nodes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = ["--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    command = [*place, EXAMPLES / "article" / script, *arguments]
    return run([[*TORCHRUN, f"--node-rank={node}", *command] for node in (0, 1)], folder, num_lines)


def on_two_ranks(launcher: Sequence[str], script: str, folder: Path, *arguments: str | Path) -> str:
    """What a script of examples/ddp says on the console."""
    (node,) = run([[*launcher, "--standalone", "--nproc-per-node=2", EXAMPLES / "ddp" / script, *arguments]], folder)
    assert node.returncode == 0, node.stderr
    return node.stdout + node.stderr


def losses(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([0-9.]+)", text)]


def test_wrong_logs_say_once_per_node_what_was_meant_once(tmp_path: Path) -> None:
    nodes = on_two_nodes("logs_wrong.py", tmp_path)
    assert [node.returncode for node in nodes] == [0, 0], nodes
    lines = "".join(node.stdout for node in nodes).splitlines()
    assert lines.count("step 100: loss 0.250") == 2
    assert len([line for line in lines if line.startswith("building the model")]) == 4


def test_right_logs_say_it_once_and_keep_every_rank(tmp_path: Path) -> None:
    nodes = on_two_nodes("logs_right.py", tmp_path, tmp_path / "run")
    assert [node.returncode for node in nodes] == [0, 0], nodes
    console = "".join(node.stdout + node.stderr for node in nodes)
    assert console.count("step 100: loss 0.250") == 1
    assert console.count("building the model") == 1
    # Labelled with its host and device too where the main process shows it.
    assert len(re.findall(r"\[rank 3(, [^]]+)?\] train: the last rank can speak too", console)) == 1
    for rank in range(4):
        records = (tmp_path / "run" / "logs" / f"rank-{rank:05d}.jsonl").read_text().splitlines()
        messages = [json.loads(record)["message"] for record in records]
        assert f"building the model on local rank {rank % 2}" in messages
        assert ("step 100: loss 0.250" in messages) == (rank == 0)


def test_wrong_device_fails_on_the_second_node_alone(tmp_path: Path) -> None:
    first, second = on_two_nodes("device_wrong.py", tmp_path, "--devices-per-node=2", num_lines=2)
    assert sorted(first.stdout.splitlines()) == ["rank 0 computes on device 0", "rank 1 computes on device 1"]
    assert "computes on" not in second.stdout
    assert second.returncode == 1
    assert re.search(r"invalid device ordinal: device [23] of 2", second.stderr)


def test_right_device_is_the_local_rank_on_both_nodes(tmp_path: Path) -> None:
    first, second = on_two_nodes("device_right.py", tmp_path, "--devices-per-node=2")
    assert [first.returncode, second.returncode] == [0, 0], (first, second)
    assert first.stdout.splitlines() == [f"rank {rank} computes on device {rank % 2}" for rank in range(4)]


def test_wrong_checkpoint_is_of_two_ranks(tmp_path: Path) -> None:
    nodes = on_two_nodes("checkpoint_wrong.py", tmp_path, tmp_path)
    assert [node.returncode for node in nodes] == [0, 0], nodes
    writers = [re.findall(r"\d+", line) for line in nodes[0].stdout.splitlines()]
    assert writers == [[str(part), "2" if part < 4 else "0"] for part in range(8)]


def test_right_checkpoint_has_every_ranks_own_part(tmp_path: Path) -> None:
    nodes = on_two_nodes("checkpoint_right.py", tmp_path, tmp_path / "checkpoints")
    assert [node.returncode for node in nodes] == [0, 0], nodes
    assert nodes[0].stdout.splitlines() == [f"part {rank}, from rank {rank}" for rank in range(4)]
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000100"]


def test_the_script_after_trains_and_goes_on_where_it_was(tmp_path: Path) -> None:
    said = losses(on_two_ranks(TORCHRUN, "after.py", tmp_path, "run"))
    assert len(said) == 10
    assert said[-1] < 0.1 < said[0]
    for step in range(6, 11):
        (tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "manifest.json").unlink()
    assert losses(on_two_ranks(RANKWISE_RUN, "after.py", tmp_path, "run")) == said[5:]
    done = on_two_ranks(RANKWISE_RUN, "after.py", tmp_path, "run")
    assert losses(done) == []
    assert done.count("nothing is left to do") == 1


def test_the_script_after_without_a_folder_says_what_it_takes(tmp_path: Path) -> None:
    (done,) = run([[sys.executable, EXAMPLES / "ddp" / "after.py"]], tmp_path)
    assert done.returncode == 2
    assert "usage: after.py [-h] RUN_DIR" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_script_that_knows_nothing_of_us_gives_the_same_losses_inside_a_session(tmp_path: Path) -> None:
    assert "rankwise" not in (EXAMPLES / "ddp" / "before.py").read_text().split('"""', 2)[2]
    alone = losses(on_two_ranks(TORCHRUN, "before.py", tmp_path, "alone.pt"))
    assert len(alone) == 10
    assert alone[-1] < 0.1 < alone[0]
    assert losses(on_two_ranks(RANKWISE_RUN, "wrapped.py", tmp_path, "wrapped.pt")) == alone
    said = on_two_ranks(TORCHRUN, "own_group.py", tmp_path, "own.pt")
    assert losses(said) == alone
    assert "ranks [0, 1], group still there: True" in said


def test_fsdp_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    said = losses(on_two_ranks(RANKWISE_RUN, "fsdp.py", tmp_path, "run"))
    (tmp_path / "run" / "checkpoints" / "step-00000040" / "manifest.json").unlink()
    (alone,) = run([[*TORCHRUN, "--standalone", "--nproc-per-node=1", EXAMPLES / "ddp" / "fsdp.py", "run"]], tmp_path)
    assert alone.returncode == 0, alone.stderr
    (later,) = losses(alone.stderr)
    assert said[1] < said[0] > later


def test_the_slow_rank_has_late_clips_in_the_steps_that_are_said(tmp_path: Path) -> None:
    own = ["--slow-rank=1", "--delay-seconds=2", "--delay-steps=1:3"]
    others = ["--preset=debug", "--num-steps=4", "--eval-every=4", "--save-every=4", "--run-dir", tmp_path / "run"]
    command = [*RANKWISE_RUN, "--standalone", "--nproc-per-node=2", EXAMPLES / "slow_rank" / "slow_rank.py"]
    (node,) = run([[*command, *own, *others]], tmp_path)
    assert node.returncode == 0, node.stderr
    quick, slow = (read_run(tmp_path / "run").history(rank).phases["data"] for rank in (0, 1))
    # A busy machine may hold up any other step too, but hardly all of them.
    assert min(slow[1:3]) > 2 > min(slow[0], slow[3])
    assert min(quick[1:3]) < 2
