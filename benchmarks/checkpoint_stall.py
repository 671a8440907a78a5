"""How long a training step is delayed by a checkpoint, and how long until it is durable, with rankwise and with others.

    python benchmarks/checkpoint_stall.py

Two ranks with a replicated model and AdamW state save in turn with every library, over and over, so that whatever else
the machine does meets all of them alike; each first save is left out. Then a training loop runs with and without saves.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel

import rankwise

NUM_RANKS = 2
WIDTH = 2048
STEPS_PER_SAVE = 50
LEAST_SECONDS = 60.0
"""What the steps between two saves of the training loop last at least."""
BASELINE = "torch.save on rank 0, fsync"


class Training:
    """A model whose parameters and AdamW state fill `num_bytes`, and steps that change all of them."""

    def __init__(self, num_bytes: int) -> None:
        num_layers = max(1, round(num_bytes / (3 * 4 * WIDTH * WIDTH)))
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(num_layers)])
        self.parallel: torch.nn.Module = DistributedDataParallel(self.net)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4)
        self.step(1)

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    @property
    def num_bytes(self) -> int:
        moments = sum(t.nbytes for entry in self.optimizer.state.values() for t in entry.values())
        return moments + sum(t.nbytes for t in self.net.state_dict().values())

    def step(self, batch_size: int) -> None:
        self.parallel(torch.randn(batch_size, WIDTH)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


Save = Callable[[Path, int], Callable[[], None]]
"""Saves into a folder and returns what waits until that is durable."""


def sync_folder(folder: Path) -> None:
    """What libraries leave to the system: every file and name on the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def on_main(function: Callable[[], None]) -> None:
    if dist.get_rank() == 0:
        function()


def with_torch_save(training: Training) -> Save:
    def save(folder: Path, step: int) -> Callable[[], None]:
        def write() -> None:
            folder.mkdir(parents=True)
            with (folder / "state.tmp").open("wb") as file:
                torch.save(training.state, file)
                file.flush()
                os.fsync(file.fileno())
            (folder / "state.tmp").rename(folder / "state.pt")

        on_main(write)
        return lambda: None

    return save


def with_rankwise(training: Training, folder: Path, *, async_save: bool) -> Save:
    manager = rankwise.CheckpointManager(folder, async_save=async_save, keep_last=1)

    def save(_: Path, step: int) -> Callable[[], None]:
        manager.save(step, {"model": training.net, "optimizer": training.optimizer})
        return manager.wait

    return save


def with_dcp(training: Training) -> Save:
    def save(folder: Path, step: int) -> Callable[[], None]:
        dcp.save(training.state, checkpoint_id=str(folder))
        return lambda: on_main(lambda: sync_folder(folder))

    return save


def with_dcp_async(training: Training, group: dist.ProcessGroup) -> Save:
    def save(folder: Path, step: int) -> Callable[[], None]:
        future: Any = dcp.async_save(training.state, checkpoint_id=str(folder), process_group=group)

        def wait() -> None:
            future.result()
            dist.barrier()
            on_main(lambda: sync_folder(folder))

        return wait

    return save


def with_accelerate(training: Training) -> Save:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.register_for_checkpointing()
    accelerator._models.append(training.parallel)
    accelerator._optimizers.append(training.optimizer)

    def save(folder: Path, step: int) -> Callable[[], None]:
        accelerator.save_state(str(folder))
        return lambda: on_main(lambda: sync_folder(folder))

    return save


def with_fabric(training: Training) -> Save:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=NUM_RANKS)
    fabric.launch()

    def save(folder: Path, step: int) -> Callable[[], None]:
        fabric.save(folder / "state.ckpt", {"model": training.net, "optimizer": training.optimizer})
        return lambda: on_main(lambda: sync_folder(folder))

    return save


def savers(training: Training, folder: Path) -> dict[str, Save]:
    """By title; a library that is missing is left out."""
    found: dict[str, Save] = {
        BASELINE: with_torch_save(training),
        "rankwise, async": with_rankwise(training, folder / "rankwise-async", async_save=True),
        "rankwise": with_rankwise(training, folder / "rankwise", async_save=False),
        "DCP save": with_dcp(training),
        "DCP async_save": with_dcp_async(training, dist.new_group(backend="gloo")),
    }
    for title, make in (("accelerate save_state", with_accelerate), ("Lightning Fabric save", with_fabric)):
        with contextlib.suppress(ImportError):
            found[title] = make(training)
    return found


def measure_saves(training: Training, folder: Path, num_rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of delay and until durable, for each library in turn; the first round is left out."""
    methods = savers(training, folder)
    seconds: dict[str, dict[str, list[float]]] = {title: {"stall": [], "durable": []} for title in methods}
    for number in range(num_rounds + 1):
        for title, save in methods.items():
            training.step(1)
            target = folder / f"save-{number}-{title.split()[0]}{len(title)}"
            dist.barrier()
            begin = time.perf_counter()
            wait = save(target, number)
            dist.barrier()  # the next step would wait for the slowest rank
            stall = time.perf_counter() - begin
            wait()
            dist.barrier()
            durable = time.perf_counter() - begin
            if number:
                seconds[title]["stall"].append(stall)
                seconds[title]["durable"].append(durable)
            on_main(lambda target=target: shutil.rmtree(target, ignore_errors=True))  # type: ignore[misc]
    return seconds


def measure_throughput(training: Training, folder: Path, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of as many steps with an asynchronous save among them and without, in turn."""
    batch_size = 1
    while _seconds_of(training, batch_size, 3) / 3 * STEPS_PER_SAVE < LEAST_SECONDS * 1.1:
        batch_size = math.ceil(batch_size * 1.3)
    manager = rankwise.CheckpointManager(folder / "loop", async_save=True, keep_last=1)
    manager.save(0, {"model": training.net, "optimizer": training.optimizer})
    manager.wait()
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for number in range(num_rounds):
        for kind in ("without", "with") if number % 2 else ("with", "without"):
            dist.barrier()
            begin = time.perf_counter()
            if kind == "with":
                manager.save(number + 1, {"model": training.net, "optimizer": training.optimizer})
            for _ in range(STEPS_PER_SAVE):
                training.step(batch_size)
            dist.barrier()
            seconds[kind].append(time.perf_counter() - begin)
            manager.wait()
    manager.close()
    return seconds


def _seconds_of(training: Training, batch_size: int, num_steps: int) -> float:
    begin = time.perf_counter()
    for _ in range(num_steps):
        training.step(batch_size)
    return rankwise.broadcast_object(time.perf_counter() - begin)


def saves_table(seconds: dict[str, dict[str, list[float]]]) -> Table:
    table = Table(title="seconds of one save: median (least to most)")
    for column in ("", "step delayed", "of torch.save's", "until durable"):
        table.add_column(column, justify="left" if not column else "right")
    baseline = statistics.median(seconds[BASELINE]["stall"])
    for title, found in seconds.items():
        share = statistics.median(found["stall"]) / baseline
        table.add_row(title, spread(found["stall"]), f"{share:.1%}", spread(found["durable"]))
    return table


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def throughput_line(seconds: dict[str, list[float]]) -> str:
    pairs = [without / with_save for without, with_save in zip(seconds["without"], seconds["with"], strict=True)]
    return (
        f"training loop, {STEPS_PER_SAVE} steps in {spread(seconds['without'])} s without a save and in "
        f"{spread(seconds['with'])} s with one: throughput {statistics.median(pairs):.1%} "
        f"({min(pairs):.1%} to {max(pairs):.1%})"
    )


def work(options: argparse.Namespace) -> None:
    """What each rank does."""
    warnings.filterwarnings("ignore")
    with rankwise.init(log_level="WARNING") as session:
        training = Training(int(options.gigabytes * 1e9))
        saves = measure_saves(training, options.folder, options.rounds)
        loops = measure_throughput(training, options.folder, options.loop_rounds) if options.loop_rounds else None
        if session.identity.is_main_process:
            told = {"bytes": training.num_bytes, "saves": saves, "loop": loops, "versions": versions()}
            options.result.write_text(json.dumps(told))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "rankwise", "accelerate", "lightning-fabric"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@contextlib.contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    folder = (parent or Path.cwd()) / f"checkpoint-stall-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="parameters and AdamW state together")
    parser.add_argument("--rounds", type=int, default=7, help="saves with each library, besides the first")
    parser.add_argument("--loop-rounds", type=int, default=3, help="pairs of loops; 0 leaves them out")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default the current one")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 whatever the figures are."""
    options = parse(arguments)
    if "RANK" in os.environ:
        work(options)
        return 0
    with scratch(options.folder) as folder:
        result = folder / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
        command += [__file__, f"--gigabytes={options.gigabytes}", f"--rounds={options.rounds}"]
        command += [f"--loop-rounds={options.loop_rounds}", f"--folder={folder}", f"--result={result}"]
        status = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode
        if status:
            return status
        told = json.loads(result.read_text())
    if options.json:
        print(json.dumps(told, indent=1))
        return 0
    console = Console(width=120, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{told['bytes'] / 1e9:.2f} GB of state, {NUM_RANKS} ranks of one thread, {os.cpu_count()} cores")
    console.print(saves_table(told["saves"]))
    if told["loop"]:
        console.print(throughput_line(told["loop"]))
    console.print(", ".join(f"{name} {version}" for name, version in told["versions"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
