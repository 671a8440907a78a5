"""What a log call costs, and what a person sees of eight ranks, with rankwise, accelerate, Lightning, loguru, stdlib.

    python benchmarks/logs.py

Each case has a process of its own (`log_calls.py`); they are asked in turn, many times over, so that whatever else the
machine does meets all of them alike. The console is that of jobs which torchrun really starts (`log_job.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import log_job
import processes
from rich.console import Console
from rich.table import Table

UNHEARD = {
    "stdlib_filtered": ("stdlib, below the level", "logging"),
    "rankwise_filtered": ("rankwise, below the level", "rankwise"),
    "rankwise_other_rank": ('rankwise, ranks="main" on rank 1', "rankwise"),
    "accelerate_other_rank": ("accelerate get_logger on rank 1", "accelerate"),
    "lightning_other_rank": ("Lightning rank_zero_info on rank 1", "lightning_fabric"),
    "loguru_filtered": ("loguru, below the level", "loguru"),
}
WRITTEN = {
    "stdlib_file": ("stdlib FileHandler", "logging"),
    "rankwise_file": ("rankwise, run directory", "rankwise"),
    "stdlib_call_rankwise_file": ("stdlib call, rankwise run directory", "rankwise"),
    "accelerate_file": ("accelerate over FileHandler", "accelerate"),
    "loguru_file": ("loguru file", "loguru"),
    "loguru_file_enqueue": ("loguru file, enqueue=True", "loguru"),
}
STYLES = {
    "bare_stdlib": ("stdlib", "logging"),
    "rankwise": ("rankwise", "rankwise"),
    "accelerate": ("accelerate", "accelerate"),
    "accelerate_every_rank": ("accelerate, main_process_only=False", "accelerate"),
    "fabric": ("Lightning, rank_zero_*", "lightning_fabric"),
    "fabric_every_rank": ("Lightning, rank_prefixed_message", "lightning_fabric"),
    "loguru": ("loguru", "loguru"),
}
"""Name in the worker -> its row's title, and what must be importable."""

NUM_RANKS = 8
MOST_OVER_FILTERED_US, MOST_WRITTEN_US = 1.0, 15.0
"""What rankwise promises of its own calls, in microseconds."""
INFO = re.compile(log_job.LINE.replace("%d", r"\d+"))
OF_TORCH = re.compile(r"\[[WE]\d{4} |\[Gloo\]|W\d{4} ")


@dataclass(frozen=True)
class Cost:
    """Microseconds of a call on the calling thread, over all batches."""

    least: float
    median: float
    nine_in_ten: float
    """Nine of ten batches cost no more."""
    cpu: float
    """Processor time of all threads per call, the median."""
    ratio: float
    """Of the medians, to the first case of the table."""
    num_records: int
    """How many stdlib records a call makes."""
    num_lost: int
    """Calls without a line in the file."""


@dataclass(frozen=True)
class View:
    """What one job left on the console, in lines."""

    total: int
    info: int
    alike: int
    own: int
    names_rank: bool
    """Whether a line with rank 5's own warning names the rank."""
    library: int
    """Lines of the library's own making."""
    torch: int
    """Complaints of torch, which many machines do not give."""


class Worker:
    """A process that times one case whenever it is asked."""

    def __init__(self, case: str, folder: Path, timeout_seconds: float) -> None:
        self._case = case
        self._timeout_seconds = timeout_seconds
        folder.mkdir()
        self._errors = folder.with_suffix(".stderr")
        command = [sys.executable, str(Path(__file__).with_name("log_calls.py")), case, str(folder)]
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def ask(self, question: str = "") -> dict[str, Any]:
        """The answer to a line, or without one what the process says of itself next."""
        assert self._process.stdin is not None, "it is a pipe"
        assert self._process.stdout is not None, "it is a pipe"
        if question:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        answer = ""
        if select.select([self._process.stdout], [], [], self._timeout_seconds)[0]:
            answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self._case} gave no answer: {self._errors.read_text()[-2000:]}")
        parsed: dict[str, Any] = json.loads(answer)
        return parsed

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def environment() -> dict[str, str]:
    """No launcher's variables, and one thread for torch."""
    kept = (*processes.KEPT_VARIABLES, "PYTHONPATH", "RES_OPTIONS")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"OMP_NUM_THREADS": "1"}


def here(cases: dict[str, tuple[str, str]]) -> list[str]:
    return [case for case, (_, module) in cases.items() if importlib.util.find_spec(module) is not None]


def costs(cases: dict[str, tuple[str, str]], repeats: int, timeout_seconds: float) -> dict[str, Cost]:
    """Each case that is here, asked in turn."""
    with tempfile.TemporaryDirectory(prefix="logs-") as name, workers(here(cases), Path(name), timeout_seconds) as all_:
        for worker in all_.values():
            worker.ask()  # ready, and warm
        answers: dict[str, list[dict[str, Any]]] = {case: [] for case in all_}
        for _ in range(repeats):
            for case, worker in all_.items():
                answers[case].append(worker.ask("go"))
        num_records = {case: worker.ask("end")["num_records"] for case, worker in all_.items()}
    base = statistics.median(batches(answers[next(iter(cases))]))
    return {case: cost(answers[case], base, num_records[case], writes=cases is WRITTEN) for case in answers}


@contextlib.contextmanager
def workers(cases: list[str], folder: Path, timeout_seconds: float) -> Iterator[dict[str, Worker]]:
    with contextlib.ExitStack() as stack:
        started = {}
        for case in cases:
            started[case] = Worker(case, folder / case, timeout_seconds)
            stack.callback(started[case].close)
        yield started


def batches(answers: list[dict[str, Any]]) -> list[float]:
    return [each for answer in answers for each in answer["calls_us"]]


def cost(answers: list[dict[str, Any]], base: float, num_records: int, *, writes: bool) -> Cost:
    all_us = sorted(batches(answers))
    median = statistics.median(all_us)
    num_lost = sum(answer["num_calls"] - answer["num_lines"] for answer in answers) if writes else 0
    cpu = statistics.median(answer["cpu_us"] for answer in answers)
    nine_in_ten = all_us[int(0.9 * (len(all_us) - 1))]
    return Cost(all_us[0], median, nine_in_ten, cpu, median / base, num_records, num_lost)


def view(style: str, timeout_seconds: float) -> View:
    """Run one job of eight ranks and count its lines; nothing that it started stays."""
    token = uuid.uuid4().hex
    worker = str(Path(__file__).with_name("log_job.py"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM_RANKS)]
    with tempfile.TemporaryDirectory(prefix="logs-") as name, contextlib.ExitStack() as stack:
        path = Path(name) / "console"
        log = stack.enter_context(path.open("wb"))
        stack.callback(processes.end_all, token)
        started = processes.start(processes.Command([*launcher, worker, style], environment()), token, log)
        in_time = processes.wait([started], Path(name), timeout_seconds)
        text = path.read_text(errors="replace")
        if not in_time or started.returncode:
            raise SystemExit(f"the job of {style} {'failed' if in_time else 'hung'}: {text[-2000:]}")
    return count(text)


def count(text: str) -> View:
    lines = [line for line in text.splitlines() if line.strip()]
    info = sum(INFO.search(line) is not None for line in lines)
    alike = sum(log_job.ALIKE in line for line in lines)
    own = [line for line in lines if log_job.OWN in line]
    torch = sum(OF_TORCH.match(line) is not None for line in lines)
    names_rank = any(re.search(rf"rank\W{{0,2}}{log_job.SPEAKER}\b", line, re.IGNORECASE) for line in own)
    return View(len(lines), info, alike, len(own), names_rank, len(lines) - info - alike - len(own) - torch, torch)


def views(repeats: int, timeout_seconds: float) -> dict[str, list[View]]:
    seen: dict[str, list[View]] = {style: [] for style in here(STYLES)}
    for _ in range(repeats):
        for style, those in seen.items():
            those.append(view(style, timeout_seconds))
            print(f"{STYLES[style][0]}: {those[-1].total} lines", file=sys.stderr)
    return seen


def versions() -> dict[str, str]:
    """What the figures are about; only what is here."""
    found = {"python": platform.python_version()}
    for package in ("torch", "rankwise", "accelerate", "lightning-fabric", "loguru"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def cost_table(title: str, cases: dict[str, tuple[str, str]], found: dict[str, Cost]) -> Table:
    writes = cases is WRITTEN
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
    table.add_column("microseconds per call")
    last = ("cpu, all threads", "lines lost") if writes else ("records made",)
    for name in ("least", "median", "9 in 10 below", "ratio", *last):
        table.add_column(name, justify="right")
    digits = 1 if writes else 2
    for case, (row, module) in cases.items():
        if case not in found:
            table.add_row(row, "not here")
            continue
        each = found[case]
        figures = [f"{number:.{digits}f}" for number in (each.least, each.median, each.nine_in_ten)]
        records = str(each.num_records) if module != "loguru" else "-"
        tail = [f"{each.cpu:.{digits}f}", str(each.num_lost)] if writes else [records]
        table.add_row(row, *figures, f"{each.ratio:.2f}", *tail)
    return table


def view_table(seen: dict[str, list[View]]) -> Table:
    table = Table(title="console of 8 ranks", title_justify="left", title_style="", box=None, pad_edge=False)
    table.add_column("lines")
    for name in ("total", "INFO", "all alike", "rank 5's own", "the library's", "torch's", "own names rank 5"):
        table.add_column(name, justify="right")
    for style, (row, _) in STYLES.items():
        if style not in seen:
            table.add_row(row, "not here")
            continue
        those = seen[style]
        counts = [
            spread([getattr(each, name) for each in those])
            for name in ("total", "info", "alike", "own", "library", "torch")
        ]
        names = "yes" if all(each.names_rank for each in those) else "no"
        table.add_row(row, *counts, names if any(each.own for each in those) else "not shown")
    return table


def spread(counts: list[int]) -> str:
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"


def targets(unheard: dict[str, Cost], written: dict[str, Cost]) -> list[str]:
    """What rankwise promises, and what was found; nothing fails by it, since the machine has its say."""
    more = unheard["rankwise_other_rank"].median - unheard["stdlib_filtered"].median
    file = written["rankwise_file"].median
    return [
        f'ranks="main" on another rank: {more:+.2f} us against the filtered stdlib call, at most '
        f"{MOST_OVER_FILTERED_US:.0f} us promised: {'kept' if more <= MOST_OVER_FILTERED_US else 'NOT KEPT'}",
        f"INFO record to a file: {file:.1f} us, at most {MOST_WRITTEN_US:.0f} us promised: "
        f"{'kept' if file <= MOST_WRITTEN_US else 'NOT KEPT'}",
    ]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What log calls cost, and what a person sees of eight ranks.")
    parser.add_argument("--repeats", type=int, default=20, help="rounds in which each case is timed")
    parser.add_argument("--jobs", type=int, default=3, help="jobs of eight ranks for each row")
    parser.add_argument("--timeout-seconds", type=float, default=120.0, help="after these a process counts as hung")
    parser.add_argument("--json", action="store_true", help="one object instead of the tables")
    parsed = parser.parse_args(arguments)
    if parsed.repeats < 1 or parsed.jobs < 1:
        parser.error("--repeats and --jobs have to be 1 or more")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 whatever the figures are."""
    options = parse(arguments)
    # So that what was started ends also when this is asked to.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    unheard = costs(UNHEARD, options.repeats, options.timeout_seconds)
    written = costs(WRITTEN, options.repeats, options.timeout_seconds)
    seen = views(options.jobs, options.timeout_seconds)
    if options.json:
        told = {"versions": versions(), "repeats": options.repeats}
        for name, found in (("unheard", unheard), ("written", written)):
            told[name] = {case: asdict(each) for case, each in found.items()}
        told["console"] = {style: [asdict(each) for each in those] for style, those in seen.items()}
        print(json.dumps(told, indent=2))
        return 0
    console = Console(width=140, highlight=False, markup=False, soft_wrap=True)
    for table in (
        cost_table("a call that logs nothing", UNHEARD, unheard),
        cost_table("an INFO record to a file", WRITTEN, written),
        view_table(seen),
    ):
        console.print(table)
        console.print()
    for line in [*targets(unheard, written), ", ".join(f"{name} {version}" for name, version in versions().items())]:
        console.print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
