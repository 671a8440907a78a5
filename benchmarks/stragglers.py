"""Stragglers: how fast 10,240 rows are judged, how often nobody is blamed wrongly, how soon somebody is blamed rightly.

usage: stragglers.py [--quick] [--record FILE]

`--record` runs real training loops of two and four ranks and writes how long the phases of their steps took: the noise
that the tests in tests/rankwise/test_monitor_statistics.py are made of.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "rankwise"))

from straggler_noise import EVERY_STEPS, NAMES, STEP_SECONDS, Noise, alarms, recorded_source, simulate

from rankwise.monitor.statistics import History, Row, Window, judge
from rankwise.testing import run_on_ranks

NUM_ROWS = 10_240
NUM_JUDGED = 40
PROMISED_SECONDS = 0.05
NUM_RECORDED_STEPS = 400
NUM_WARM_UP_STEPS = 20
NUM_TRIALS = 20
NUM_SIMULATED_STEPS = 10_000


def main() -> int:
    """Print the three tables; exit status 1 where rows take longer than promised, or anybody is blamed wrongly."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the steps and of the trials")
    parser.add_argument("--record", type=Path, metavar="FILE", help="record real noise instead")
    options = parser.parse_args()
    if options.record is not None:
        record(options.record)
        return 0
    median = time_judgement()
    num_false = count_false_alarms(NUM_SIMULATED_STEPS // (20 if options.quick else 1))
    measure_power(1 if options.quick else NUM_TRIALS)
    print(f"python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}")
    return int(median > PROMISED_SECONDS or num_false > 0)


def time_judgement() -> float:
    """Rows of 10,240 ranks and seven phases: put in from what came over the wire, and judged."""
    rng = np.random.default_rng(0)
    windows = list(simulate(NUM_ROWS, 4, Noise(), rng))
    messages = [json.dumps(row) for row in rows_of(windows[0])]
    put_seconds, judge_seconds = [], []
    history = History(NUM_ROWS)
    for number in range(NUM_JUDGED + 2):
        window = Window(NUM_ROWS)
        begin = time.perf_counter()
        for rank, message in enumerate(messages):
            window.put(rank, Row(**json.loads(message)))
        put_seconds.append(time.perf_counter() - begin)
        for judged in (window, windows[number % len(windows)]):
            begin = time.perf_counter()
            history.add(judge(judged))
            judge_seconds.append(time.perf_counter() - begin)
    print(f"one window of {NUM_ROWS} ranks, {len(windows[0].phases)} phases, {len(messages[0])} bytes a row")
    print(f"{'milliseconds':24}{'least':>8}{'median':>8}{'9 in 10 below':>15}")
    for name, seconds in (("rows read and kept", put_seconds[2:]), ("judged", judge_seconds[4:])):
        values = sorted(1e3 * value for value in seconds)
        print(f"{name:24}{values[0]:8.1f}{statistics.median(values):8.1f}{values[int(0.9 * len(values))]:15.1f}")
    median = statistics.median(judge_seconds[4:])
    kept = "kept" if median < PROMISED_SECONDS else "NOT kept"
    print(f"judged in {1e3 * median:.1f} ms, at most {1e3 * PROMISED_SECONDS:.0f} ms promised: {kept}\n")
    return median


def rows_of(window: Window) -> list[dict[str, object]]:
    """What the ranks send."""
    return [
        {
            "seconds": window.seconds[rank],
            "own": window.own[rank],
            "own_error": window.own_errors[rank],
            "phases": {name: tuple(column[:, rank]) for name, column in window.phases.items()},
        }
        for rank in range(len(window.present))
    ]


def count_false_alarms(num_steps: int) -> int:
    """Alarms of jobs in which no rank is to blame."""
    print(f"false alarms in {num_steps} steps, nobody slow")
    print(f"{'noise':34}{'waiting':>12}" + "".join(f"{size:>8}" for size in (2, 3, 4, 8, 64, 1024)))
    total = 0
    for name, noise in (
        ("as assumed", Noise()),
        ("ten times the spikes", Noise(spike_rate=0.02)),
        ("30 % per phase and step", Noise(sigma=0.3)),
        ("2 % between ranks, 2 % drift", Noise(static=0.02, drift=0.02, rank_drift=0.01)),
        ("recorded on a busy machine", None),
    ):
        for measured in (True, False):
            counts = []
            for size in (2, 3, 4, 8, 64, 1024):
                rng = np.random.default_rng(size)
                source = recorded_source(size, rng) if noise is None else None
                windows = simulate(
                    size, num_steps // EVERY_STEPS, noise or Noise(), rng, measured=measured, source=source
                )
                counts.append(len(alarms(windows, size)))
            total += sum(counts)
            waiting = "measured" if measured else "hidden"
            print(f"{name:34}{waiting:>12}" + "".join(f"{count:8}" for count in counts))
    print()
    return total


def measure_power(num_trials: int) -> None:
    """After how many steps the slow rank is told, by how much slower it is; a wrong rank or phase is an error."""
    print(f"steps until the slow rank is told, median of {num_trials}; in brackets how many times it was told at all")
    print(f"{'phase, excess of a step':26}{'waiting':>10}" + "".join(f"{size:>14}" for size in (2, 8, 64, 1024)))
    for phase in ("data", "forward", "backward"):
        for percent in (6, 8, 10, 20, 50):
            for measured in (True, False) if phase == "data" else (True,):
                cells = [power(size, phase, percent, num_trials, measured=measured) for size in (2, 8, 64, 1024)]
                waiting = "measured" if measured else "hidden"
                print(f"{f'{phase}, {percent} %':26}{waiting:>10}" + "".join(f"{cell:>14}" for cell in cells))
    print()


def power(world_size: int, phase: str, percent: int, num_trials: int, *, measured: bool) -> str:
    """One cell: the excess is a share of what a step takes when nothing comes between.

    The whole job has as many spikes and collections at every size: where some rank is held up in every step, one that
    is a tenth slower holds up nobody.
    """
    found = []
    num_trials = min(num_trials, 5) if world_size == 1024 else num_trials
    for trial in range(num_trials):
        rng = np.random.default_rng(trial)
        slow = int(rng.integers(world_size))

        def add(number: int, own: np.ndarray, slow: int = slow) -> None:
            own[:, slow, NAMES.index(phase)] += percent / 100 * STEP_SECONDS

        noise = Noise(spike_rate=0.016 / world_size, gc_every_steps=15 * world_size)
        told = alarms(simulate(world_size, 20, noise, rng, extra=add, measured=measured), world_size)
        wrong = [alarm for alarm in told if alarm[1:] != (slow, phase)]
        assert not wrong, f"{wrong} in place of {(slow, phase)}"
        found += [(number + 1) * EVERY_STEPS for number, _, _ in told[:1]]
    return f"{statistics.median(found):.0f} ({len(found)}/{num_trials})" if found else f"- (0/{num_trials})"


def record(path: Path) -> None:
    """Run real loops and write what their steps took."""
    runs = {}
    for num_ranks in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            run_on_ranks(train, num_ranks, 300.0, (folder,))
            ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(num_ranks)]
        runs[f"{num_ranks} ranks"] = ranks
    about = (
        f"Microseconds of {', '.join(NAMES)} of every step of every rank, without waiting for others: a small "
        "convolutional network on gloo, one thread a rank, all ranks on two cores that other programs used as well. "
        "Recorded by benchmarks/stragglers.py --record."
    )
    path.write_text(json.dumps({"about": about, "phases": NAMES, "runs": runs}, separators=(",", ":")) + "\n")


def train(folder: str) -> None:
    """One rank: gradients are averaged in one all-reduce after backward, whose time is left out."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(32 * 24 * 24, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters())
    images = np.random.default_rng(dist.get_rank()).integers(0, 256, (256, 3, 32, 32), dtype=np.uint8)
    rng = np.random.default_rng(dist.get_rank())
    rows = []
    end = time.perf_counter()
    for _ in range(NUM_RECORDED_STEPS + NUM_WARM_UP_STEPS):
        times = [end]
        top, left = rng.integers(0, 8, 2)
        batch = torch.from_numpy(images[rng.integers(0, 256, 16), :, top : top + 24, left : left + 24] / 255.0).float()
        labels = torch.from_numpy(rng.integers(0, 10, 16))
        times.append(time.perf_counter())
        loss = torch.nn.functional.cross_entropy(model(batch), labels)
        times.append(time.perf_counter())
        optimizer.zero_grad()
        loss.backward()
        times.append(time.perf_counter())
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        before = time.perf_counter()
        dist.all_reduce(gradients)
        waited = time.perf_counter() - before
        torch.nn.utils.vector_to_parameters(gradients, [parameter.grad for parameter in model.parameters()])
        optimizer.step()
        end = time.perf_counter()
        data, forward, backward = np.diff(times)
        rows.append([data, forward, backward, end - times[-1] - waited, 0.0])
    kept = [[round(1e6 * value) for value in row] for row in rows[NUM_WARM_UP_STEPS:]]
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(kept))


if __name__ == "__main__":
    sys.exit(main())
