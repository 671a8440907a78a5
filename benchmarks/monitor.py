"""What a Monitor costs a training step: DDP on one process, with and without, in turn, the same work.

    python benchmarks/monitor.py
    python benchmarks/monitor.py --device cuda

Steps are made as long as asked for (20 ms). A Monitor is open, reads the device and writes its lines; in one step of
two, by turns the first and the second, phases, DDP's hooks and `step` are in force, in the other they are not. Steps
beside each other are compared, for what else a machine does moves them by more than what is measured here. What the
Monitor's threads use is measured by itself, in further steps that all have the calls.
"""

from __future__ import annotations

import argparse
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
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rankwise
from rankwise import monitor
from rankwise.monitor import current
from rankwise.monitor.ddp import DdpWaits

MOST_PERCENT = 0.5
"""What rankwise promises that a Monitor costs, of a step of 20 ms."""
WIDTH, NUM_LAYERS = 256, 12
WARM_UP_STEPS = 100
THREADS = ("rankwise-monitor", "rankwise-watchdog")


@dataclass(frozen=True)
class Result:
    """What was found."""

    step_ms: float
    """Without the calls."""
    added_us: list[float]
    """What a step with the calls took more than the one beside it: wall time."""
    threads_ms_per_second: float | None
    """Processor time of the Monitor's threads."""

    @property
    def added_percent(self) -> float:
        """Calls and threads, as if both came on top of the step: as where no core is free."""
        threads = (self.threads_ms_per_second or 0.0) / 1e3
        return 100 * (statistics.median(self.added_us) / 1e3 / self.step_ms + threads)


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
            now_ms = statistics.median(self.timed_step() for _ in range(20))
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

    def timed_step(self) -> float:
        """One; gives its milliseconds, with all that the device has to do for it."""
        self._synchronize()
        begin = time.perf_counter()
        self.step()
        self._synchronize()
        return (time.perf_counter() - begin) * 1e3

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def measure(session: rankwise.Session, options: argparse.Namespace) -> Result:
    work = Work(session.device, options.step_ms)
    with rankwise.Monitor(session) as opened:
        for _ in range(WARM_UP_STEPS):
            step_ms(work, opened, is_measured=True)
        pairs: list[tuple[float, float]] = []
        for number in range(options.pairs):
            took: dict[bool, float] = {}
            for is_measured in (True, False) if number % 2 else (False, True):
                took[is_measured] = step_ms(work, opened, is_measured=is_measured)
            pairs.append((took[True], took[False]))
            if sys.stderr.isatty():
                print(f"\r{number + 1}/{options.pairs}", end="", file=sys.stderr)
        opened.watch(work.ddp)
        threads = ThreadsTime()
        for _ in range(max(1, options.pairs // 4)):
            work.timed_step()
        used = threads.per_second()
    return Result(
        step_ms=statistics.median(without for _, without in pairs),
        added_us=[1e3 * (one - without) for one, without in pairs],
        threads_ms_per_second=used,
    )


def step_ms(work: Work, opened: rankwise.Monitor, *, is_measured: bool) -> float:
    """Milliseconds of a step. Hooks are set and taken away before both kinds, so that both begin in the same state."""
    waits = DdpWaits(work.ddp, opened.timeline)
    if not is_measured:
        waits.close()
        current.set_open(None)  # as where no Monitor is: phases and steps do nothing
    try:
        return work.timed_step()
    finally:
        waits.close()
        current.set_open(opened)


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


class ThreadsTime:
    """What the Monitor's threads use from now on."""

    def __init__(self) -> None:
        self._begin, self._before = time.perf_counter(), threads_ms()

    def per_second(self) -> float | None:
        """Milliseconds in each second."""
        after, seconds = threads_ms(), time.perf_counter() - self._begin
        return None if self._before is None or after is None else (after - self._before) / seconds


def table(result: Result) -> Table:
    shown = Table(title=f"a step of {result.step_ms:.1f} ms", title_justify="left", title_style="", box=None)
    shown.add_column("more in a step with a Monitor")
    for name in ("first quartile", "median", "third quartile", "pairs"):
        shown.add_column(name, justify="right")
    quartiles = statistics.quantiles(result.added_us, n=4)
    shown.add_row("wall time, us", *(f"{each:.0f}" for each in quartiles), str(len(result.added_us)))
    shown.add_row("of the step, %", *(f"{each / result.step_ms / 10:.2f}" for each in quartiles), "")
    return shown


def verdict(result: Result) -> str:
    threads = "?" if result.threads_ms_per_second is None else f"{result.threads_ms_per_second:.2f}"
    calls = statistics.median(result.added_us)
    percent = calls / 1e1 / result.step_ms
    low, high = median_bounds(result.added_us)
    return (
        f"a step takes {calls:.0f} us more (19 of 20 such medians: {low:.0f} to {high:.0f}): {percent:.2f} %, at most "
        f"{MOST_PERCENT} % promised: {'kept' if percent < MOST_PERCENT else 'NOT KEPT'}\n"
        f"threads use {threads} ms a second of a core; where none is free, all together is {result.added_percent:.2f} %"
    )


def median_bounds(values: list[float]) -> tuple[float, float]:
    """Where the median would come out in 19 of 20 such runs, by order statistics."""
    ordered, num = sorted(values), len(values)
    reach = 0.98 * num**0.5
    return ordered[max(0, round(num / 2 - reach))], ordered[min(num - 1, round(num / 2 + reach))]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "rankwise"):
        found[package] = importlib.metadata.version(package)
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a Monitor costs a training step.")
    parser.add_argument("--device", default="cpu", help="cpu, or the type of an accelerator, such as cuda")
    parser.add_argument("--step-ms", type=float, default=20.0, help="about how long a step shall be")
    parser.add_argument("--pairs", type=int, default=2000, help="steps with, and as many without")
    parser.add_argument("--json", action="store_true", help="one object instead of the table")
    parsed = parser.parse_args(arguments)
    if parsed.pairs < 2 or parsed.step_ms <= 0:
        parser.error("--pairs has to be 2 or more, --step-ms more than 0")
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
