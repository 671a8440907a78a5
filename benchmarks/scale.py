"""How long readers of a run directory take, and how much memory, for runs of many ranks that never ran.

    python benchmarks/scale.py                                     10,240 ranks x 100 steps
    python benchmarks/scale.py --ranks 64 --steps 10000
    python benchmarks/scale.py --live 1024                         keys of `rankwise top` while so many ranks write

Each command has a process of its own. The first time is that of the first call, by which the files are in the page
cache; nothing is read from a disk that is not.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import select
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import NamedTuple

CALL = "import importlib, sys; sys.exit(importlib.import_module(f'rankwise.{sys.argv[1]}').main(sys.argv[2:]))"
FRAME_END = b"\x1b[?2026l"
ROWS, COLUMNS = 50, 160
KEYS = (b"j", b"j", b"\x1b[6~", b"k", b"\x1b[6~", b"\x1b[5~")


class Cost(NamedTuple):
    """What one call took."""

    wall_seconds: float
    cpu_seconds: float
    peak_mib: float
    out_bytes: int
    status: int


def measure(verb: str, *arguments: str) -> Cost:
    with tempfile.TemporaryFile() as out:
        begin = time.monotonic()
        child = subprocess.Popen([sys.executable, "-c", CALL, verb, *arguments], stdout=out)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - begin
        return Cost(
            wall,
            usage.ru_utime + usage.ru_stime,
            usage.ru_maxrss / 1024,
            os.fstat(out.fileno()).st_size,
            child.returncode,
        )


def make(folder: Path, ranks: int, steps: int) -> float:
    begin = time.monotonic()
    command = [sys.executable, "-m", "rankwise.simulation", str(folder), "--ranks", str(ranks), "--steps", str(steps)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin


def size_of(folder: Path) -> tuple[int, int]:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


class Screen:
    """A program in a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.environ["TERM"] = "xterm-256color"
            os.execvp(command[0], command)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))

    def wait(self, wanted: bytes, timeout_seconds: float) -> bool:
        """Whether that came in time; what comes before it is read and dropped."""
        seen = b""
        deadline = time.monotonic() + timeout_seconds
        while wanted not in seen:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._terminal], [], [], left)[0]:
                return False
            try:
                seen = seen[-len(wanted) :] + os.read(self._terminal, 1 << 16)
            except OSError:
                return False
        return True

    def drain(self) -> None:
        while select.select([self._terminal], [], [], 0)[0]:
            os.read(self._terminal, 1 << 16)

    def press(self, key: bytes) -> None:
        os.write(self._terminal, key)

    def close(self) -> int:
        self.press(b"q")
        deadline = time.monotonic() + 10
        while (done := os.waitpid(self._pid, os.WNOHANG))[0] == 0:
            assert time.monotonic() < deadline, "it does not end"
            self.drain()
            time.sleep(0.01)
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(done[1])


def time_keys(run: Path, num_ranks: int, num_keys: int) -> list[float]:
    """Seconds from a key to the end of the frame that it brings."""
    screen = Screen(sys.executable, "-c", CALL, "top", str(run))
    if not screen.wait(f"of {num_ranks}".encode(), 120):
        raise SystemExit("top shows nothing")
    times = []
    for number in range(num_keys):
        time.sleep(0.073)  # at all places of top's own second
        screen.drain()
        begin = time.monotonic()
        screen.press(KEYS[number % len(KEYS)])
        if not screen.wait(FRAME_END, 30):
            raise SystemExit("a key brought no frame")
        times.append(time.monotonic() - begin)
    screen.close()
    return times


def live(folder: Path, num_ranks: int, num_keys: int) -> list[float]:
    """As `time_keys`, while a writer adds to the files of all ranks once a second."""
    command = [sys.executable, "-m", "rankwise.simulation", str(folder), "--ranks", str(num_ranks), "--steps", "5000"]
    writer = subprocess.Popen([*command, "--live"])
    try:
        # It writes rank after rank: the last one is there when all are.
        last = folder / "monitor" / f"rank-{num_ranks - 1:05d}.jsonl"
        while not last.exists():
            time.sleep(0.5)
        return time_keys(folder, num_ranks, num_keys)
    finally:
        writer.terminate()
        writer.wait()


def said(times: list[float]) -> str:
    ordered = sorted(times)
    named = {
        "median": statistics.median(ordered),
        "95 in 100": ordered[int(len(ordered) * 0.95)],
        "longest": ordered[-1],
    }
    return "key to frame: " + ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in named.items())


def readers(folder: Path, repeats: int, verbs: list[str]) -> dict[str, list[Cost]]:
    run = str(folder)
    calls = {
        "logs --level warning": ("logreader", run, "--level", "warning"),
        "logs --json": ("logreader", run, "--json"),
        "top --once": ("top", run, "--once"),
        "top --json": ("top", run, "--json"),
        "report": ("report", run, "-o", str(folder.parent / "report.html")),
    }
    chosen = {name: call for name, call in calls.items() if name.split()[0] in verbs}
    return {name: [measure(*call) for _ in range(repeats)] for name, call in chosen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Readers of run directories, at scale.")
    parser.add_argument("--ranks", type=int, default=10_240)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--verbs",
        nargs="*",
        default=["logs", "top", "report", "keys"],
        help="of logs, top, report, keys (default: all)",
    )
    parser.add_argument("--live", type=int, default=0, metavar="RANKS", help="time keys of top while so many write")
    parser.add_argument("--keys", type=int, default=120)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        if given.live:
            times = live(place / "run", given.live, given.keys)
            print(json.dumps(times) if given.json else f"{given.live} ranks write; {said(times)}")
            return
        seconds = make(place / "run", given.ranks, given.steps)
        files, size = size_of(place / "run")
        costs = readers(place / "run", given.repeats, given.verbs)
        # Where all ranks are on the screen there is nothing to scroll, and a key brings no frame.
        has_keys = "keys" in given.verbs and given.ranks > 4 * ROWS
        times = time_keys(place / "run", given.ranks, given.keys) if has_keys else []
        if given.json:
            print(json.dumps({"files": files, "bytes": size, "made_seconds": seconds, "costs": costs, "keys": times}))
            return
        print(f"{given.ranks} ranks x {given.steps} steps: {files} files, {size / 2**20:.0f} MiB, in {seconds:.0f} s")
        print(f"{'command':22} {'first s':>8} {'median s':>9} {'cpu s':>7} {'peak MiB':>9} {'output MiB':>11} status")
        for name, own in costs.items():
            wall, cpu = (statistics.median(cost[index] for cost in own) for index in (0, 1))
            peak, out = max(cost.peak_mib for cost in own), own[-1].out_bytes / 2**20
            status = ",".join(sorted({str(cost.status) for cost in own}))
            print(f"{name:22} {own[0].wall_seconds:8.1f} {wall:9.1f} {cpu:7.1f} {peak:9.0f} {out:11.1f} {status}")
        if times:
            print(f"top, live, of the run that has ended: {said(times)}")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
