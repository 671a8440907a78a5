"""How long `rankwise check` takes: one file from the shell, and 1,000 files of real code on one core.

    python benchmarks/check.py                     the Python files of the torch that is installed
    python benchmarks/check.py --tree CHECKOUT     those below another folder

The baseline of the first is an interpreter that does nothing, that of the second a process that only parses the files.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHECK = [sys.executable, "-P", "-m", "rankwise", "check", "--isolated", "--quiet"]
NOTHING = [sys.executable, "-c", "pass"]
PARSE = """
import ast, contextlib, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    with contextlib.suppress(SyntaxError, ValueError):
        ast.parse(path.read_bytes())
"""


def real_files(tree: Path, num_files: int) -> list[Path]:
    """So many Python files of the tree, from every place in it, the same ones each time; those of 1 KiB and more."""
    found = sorted(path for path in tree.rglob("*.py") if path.is_file() and path.stat().st_size >= 1024)
    random.Random(0).shuffle(found)
    if len(found) < num_files:
        raise SystemExit(f"there are {len(found)} files of 1 KiB and more below {tree}, not {num_files}; give --tree")
    return found[:num_files]


def seconds(command: Sequence[str | Path], repeats: int, core: int | None) -> list[tuple[float, float]]:
    """Wall time of the command, and that of its processes on a core, so many times after one that does not count."""
    taken = []
    for repeat in range(repeats + 1):
        used, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        result = subprocess.run(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
        )
        wall, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        if result.returncode not in (0, 1):
            raise SystemExit(f"{command} failed: {result.stderr.decode(errors='replace')}")
        if repeat:
            taken.append((wall, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime))
    return taken


def medians(taken: list[tuple[float, float]]) -> tuple[float, float]:
    """Of the wall times, and of those on a core."""
    return statistics.median(wall for wall, _ in taken), statistics.median(cpu for _, cpu in taken)


def copies(files: Sequence[Path], folder: Path) -> Path:
    """A folder with copies of the files, under names that do not meet."""
    folder.mkdir()
    for number, path in enumerate(files):
        (folder / f"file{number:04}_{path.name}").write_bytes(path.read_bytes())
    return folder


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures, in seconds."""
    core = min(os.sched_getaffinity(0))
    files = real_files(options.tree, options.num_files)
    by_size = sorted(files, key=lambda path: path.stat().st_size)
    rows: dict[str, Any] = {"single": {"an interpreter that does nothing": seconds(NOTHING, options.repeats, None)}}
    for part, path in (
        ("median", by_size[len(by_size) // 2]),
        ("9 in 10 are smaller", by_size[len(by_size) * 9 // 10]),
    ):
        num_lines = path.read_bytes().count(b"\n")
        rows["single"][f"{num_lines} lines ({part})"] = seconds([*CHECK, path], options.repeats, None)
    rows["many"] = []
    for num_files in sorted({max(1, options.num_files // part) for part in (8, 4, 2, 1)}):
        tree = copies(files[:num_files], folder / str(num_files))
        num_lines = sum(path.read_bytes().count(b"\n") for path in tree.iterdir())
        row = {"files": num_files, "lines": num_lines}
        row["parse alone"] = seconds([sys.executable, "-W", "ignore", "-c", PARSE, tree], options.tree_repeats, core)
        row["check"] = seconds([*CHECK, tree], options.tree_repeats, core)
        row["check --jobs 2"] = seconds([*CHECK, "--jobs", "2", tree], options.tree_repeats, None)
        rows["many"].append(row)
    return rows


def print_tables(rows: dict[str, Any]) -> None:
    """The figures, for people."""
    width = max(map(len, rows["single"]))
    print(f"{'one file, from the shell':<{width}}  least ms  median ms  most ms  median ms on a core")
    for name, taken in rows["single"].items():
        walls = [1000 * wall for wall, _ in taken]
        middle, cpu = (1000 * value for value in medians(taken))
        print(f"{name:<{width}}  {min(walls):8.0f}  {middle:9.0f}  {max(walls):7.0f}  {cpu:19.0f}")
    print("\nfiles    lines  | wall s: parse alone   check  check --jobs 2 | s on a core: parse alone   check  lines/s")
    for row in rows["many"]:
        parse, check, jobs = (medians(row[name]) for name in ("parse alone", "check", "check --jobs 2"))
        print(
            f"{row['files']:>5}  {row['lines']:>7}  | {parse[0]:19.2f}  {check[0]:6.2f}  {jobs[0]:14.2f} | "
            f"{parse[1]:24.2f}  {check[1]:6.2f}  {row['lines'] / check[1]:7,.0f}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 where one of the promises does not hold: 150 ms for a file, 10 s for 1,000 files on one core."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    spec = importlib.util.find_spec("torch")
    parser.add_argument(
        "--tree", type=Path, default=spec and spec.origin and Path(spec.origin).parent, metavar="FOLDER"
    )
    parser.add_argument("--num-files", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=20, help="of the checks of one file")
    parser.add_argument("--tree-repeats", type=int, default=3, help="of the checks of many files")
    parser.add_argument("--json", action="store_true", help="every figure, in seconds")
    options = parser.parse_args(arguments)
    if options.tree is None:
        parser.error("torch is not installed: give --tree")
    with tempfile.TemporaryDirectory(prefix="check-") as folder:
        rows = measure(options, Path(folder))
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print_tables(rows)
        print(f"\npython {platform.python_version()}, {os.cpu_count()} cores")
    single = max(medians(taken)[0] for taken in rows["single"].values())
    last = rows["many"][-1]
    return int(single > 0.15 or medians(last["check"])[0] > 10 * last["files"] / 1000)


if __name__ == "__main__":
    sys.exit(main())
