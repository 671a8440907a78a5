"""What a Monitor costs a training step: DDP on one process, with and without, in turn, the same work.

    python benchmarks/monitor.py
    python benchmarks/monitor.py --device cuda

Steps are made as long as asked for (20 ms), and come in blocks: one with a Monitor open, with phases, DDP watched, the
device read and lines written once a second, and one with the same code and none open, whichever is first by turns.
What the calls cost by themselves, and what the threads use, is measured too: it is far below what else a machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rankwise
from rankwise import monitor

MOST_PERCENT = 0.5
"""What rankwise promises that a Monitor costs, of a step of 20 ms."""
WIDTH, NUM_LAYERS = 256, 12
NUM_CALLS, NUM_ROUNDS = 50, 60
THREADS_SECONDS = 10.0
THREADS = ("rankwise-monitor", "rankwise-watchdog")


@dataclass(frozen=True)
class Block:
    """Milliseconds of a step in one block of steps."""

    wall: float
    cpu: float
    """Processor time of all threads of the process."""
    thread: float
    """Processor time of the thread that trains."""


@dataclass(frozen=True)
class Result:
    """What was found."""

    step_ms: float
    ratios_wall: list[float]
    ratios_cpu: list[float]
    calls_us: float
    """What a step costs the training thread more: its phases, DDP's hooks, and the step itself."""
    threads_ms_per_second: float | None
    """Processor time of the Monitor's threads."""

    @property
    def added_percent(self) -> float:
        """Calls and threads, as if both came on top of the step: as where no core is free."""
        threads = (self.threads_ms_per_second or 0.0) / 1e3
        return 100 * (self.calls_us / 1e3 / self.step_ms + threads)


class Work:
    """A model and its step.

    Args:
        step_ms: about how long that shall take; None takes what `batch_size` gives.
    """

    def __init__(
        self,
        device: torch.device,
        step_ms: float | None = None,
        num_layers: int = NUM_LAYERS,
        batch_size: int = 64,
    ) -> None:
        layers = [layer for _ in range(num_layers) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        self.ddp = DistributedDataParallel(nn.Sequential(*layers).to(device), bucket_cap_mb=1)
        self._optimizer = torch.optim.AdamW(self.ddp.parameters())
        self._device = device
        self._batch_size = batch_size
        for _ in range(4 if step_ms is not None else 0):  # the cost is not quite in proportion
            assert step_ms is not None, "asked above"
            now_ms = self.block(10).wall
            self._batch_size = max(1, round(self._batch_size * step_ms / now_ms))

    def step(self) -> None:
        """One, as a person would write it."""
        with monitor.phase("data"):
            x = torch.randn(self._batch_size, WIDTH, device=self._device)
        with monitor.phase("forward"):
            loss = self.ddp(x).square().mean()
        with monitor.phase("backward"):
            loss.backward()
        with monitor.phase("optimizer"):
            self._optimizer.step()
            self._optimizer.zero_grad()
        monitor.step()

    def block(self, num_steps: int) -> Block:
        """So many steps, timed together; the device is waited for at both ends only."""
        self.step()
        self._synchronize()
        wall, cpu, thread = time.perf_counter(), time.process_time(), time.thread_time()
        for _ in range(num_steps):
            self.step()
        self._synchronize()
        scale = 1e3 / num_steps
        return Block(
            (time.perf_counter() - wall) * scale,
            (time.process_time() - cpu) * scale,
            (time.thread_time() - thread) * scale,
        )

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


@contextlib.contextmanager
def watched(session: rankwise.Session, work: Work) -> Iterator[rankwise.Monitor]:
    """With a Monitor as a person has it."""
    with rankwise.Monitor(session) as opened:
        opened.watch(work.ddp)
        yield opened


def measure(session: rankwise.Session, options: argparse.Namespace) -> Result:
    work = Work(session.device, options.step_ms)
    pairs: list[tuple[Block, Block]] = []
    for number in range(options.pairs + 1):
        blocks: dict[bool, Block] = {}
        for is_watched in (True, False) if number % 2 else (False, True):
            with watched(session, work) if is_watched else contextlib.nullcontext():
                blocks[is_watched] = work.block(options.block_steps)
        if number:  # the first warms up
            pairs.append((blocks[True], blocks[False]))
            if sys.stderr.isatty():
                print(f"\r{number}/{options.pairs}", end="", file=sys.stderr)
    with watched(session, work):
        threads = threads_ms_per_second(work)
    return Result(
        step_ms=statistics.median(without.wall for _, without in pairs),
        ratios_wall=[one.wall / without.wall for one, without in pairs],
        ratios_cpu=[one.cpu / without.cpu for one, without in pairs],
        calls_us=calls(session),
        threads_ms_per_second=threads,
    )


def calls(session: rankwise.Session) -> float:
    """Microseconds that the Monitor adds to the training thread: phases, hooks in DDP and all, in a tiny step."""
    work = Work(session.device, num_layers=1, batch_size=1)
    added = []
    for _ in range(NUM_ROUNDS):
        with watched(session, work):
            one = work.block(NUM_CALLS)
        without = work.block(NUM_CALLS)
        # Of this thread's own time, where the whole step is in it: others on the machine do not count.
        added.append(one.thread - without.thread if session.device.type == "cpu" else one.wall - without.wall)
    return statistics.median(added) * 1e3


def threads_ms() -> float | None:
    """Milliseconds of processor time that the Monitor's threads have used; None where the system does not tell."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    used_ns = 0
    try:
        for task in Path("/proc/self/task").iterdir():
            if names.get(int(task.name)) in THREADS:
                used_ns += int((task / "schedstat").read_text().split()[0])
    except (OSError, ValueError):
        return None
    return used_ns / 1e6


def threads_ms_per_second(work: Work) -> float | None:
    """What the Monitor's threads use while a model is trained."""
    begin, before = time.perf_counter(), threads_ms()
    while time.perf_counter() - begin < THREADS_SECONDS:
        work.block(10)
    after, seconds = threads_ms(), time.perf_counter() - begin
    return None if before is None or after is None else (after - before) / seconds


def quartiles(ratios: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return low, middle, high


def table(result: Result) -> Table:
    shown = Table(title=f"a step of {result.step_ms:.1f} ms", title_justify="left", title_style="", box=None)
    shown.add_column("with a Monitor / without")
    for name in ("first quartile", "median", "third quartile", "blocks"):
        shown.add_column(name, justify="right")
    for name, ratios in (("wall time", result.ratios_wall), ("processor time", result.ratios_cpu)):
        shown.add_row(name, *(f"{each:.4f}" for each in quartiles(ratios)), str(len(ratios)))
    return shown


def verdict(result: Result) -> str:
    threads = "?" if result.threads_ms_per_second is None else f"{result.threads_ms_per_second:.2f}"
    kept = "kept" if result.added_percent < MOST_PERCENT else "NOT KEPT"
    return (
        f"calls {result.calls_us:.1f} us a step, threads {threads} ms a second: together "
        f"{result.added_percent:.2f} % of this step, at most {MOST_PERCENT} % promised: {kept}"
    )


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "rankwise"):
        found[package] = importlib.metadata.version(package)
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a Monitor costs a training step.")
    parser.add_argument("--device", default="cpu", help="cpu, or the type of an accelerator, such as cuda")
    parser.add_argument("--step-ms", type=float, default=20.0, help="about how long a step shall be")
    parser.add_argument("--block-steps", type=int, default=100, help="steps in a block: two seconds of 20 ms")
    parser.add_argument("--pairs", type=int, default=30, help="blocks with and without")
    parser.add_argument("--json", action="store_true", help="one object instead of the table")
    parsed = parser.parse_args(arguments)
    if parsed.pairs < 2 or parsed.block_steps < 1 or parsed.step_ms <= 0:
        parser.error("--pairs has to be 2 or more, --block-steps 1 or more, --step-ms more than 0")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 whatever the figures are."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory(prefix="monitor-") as folder,
        rankwise.init(folder, device_type=options.device, make_group=True, log_level=logging.WARNING) as session,
    ):
        result = measure(session, options)
    if options.json:
        print(json.dumps({"versions": versions(), "device": options.device, **asdict(result)}, indent=2))
        return 0
    console = Console(width=140, highlight=False, markup=False, soft_wrap=True)
    console.print(table(result))
    console.print(verdict(result))
    console.print(", ".join(f"{name} {version}" for name, version in versions().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
