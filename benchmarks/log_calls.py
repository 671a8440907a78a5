"""One library's log call, timed here as often as `logs.py` asks: a line on stdin asks, one on stdout answers.

python benchmarks/log_calls.py CASE FOLDER
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MESSAGE = '"step %d of %d, loss %.4f", 7, 1000, 0.5'
BRACES = '"step {} of {}, loss {:.4f}", 7, 1000, 0.5'
"""The same message for loguru, which formats with `str.format`."""
FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
NUM_UNHEARD, NUM_WRITTEN = 5_000, 200
"""Calls in a batch: those that log nothing, and those that write, which a queue holds with ease."""
NUM_BATCHES = 10


@dataclass(frozen=True)
class Call:
    """A statement to time, the names in it, and what brings the file up to date after a batch."""

    statement: str
    names: dict[str, Any]
    flush: Callable[[], object] | None = None


def stdlib_filtered(folder: Path) -> Call:
    log = logging.getLogger("bench")
    log.setLevel("WARNING")
    return Call(f"log.info({MESSAGE})", {"log": log})


def rankwise_filtered(folder: Path) -> Call:
    import rankwise

    configure_rankwise(None, "WARNING")
    return Call(f"log.info({MESSAGE})", {"log": rankwise.get_logger("bench")})


def rankwise_other_rank(folder: Path) -> Call:
    import rankwise

    configure_rankwise(None, "INFO")
    return Call(f'log.info({MESSAGE}, ranks="main")', {"log": rankwise.get_logger("bench")})


def accelerate_other_rank(folder: Path) -> Call:
    return Call(f"log.info({MESSAGE})", {"log": accelerate_logger(folder, rank=1)})


def lightning_other_rank(folder: Path) -> Call:
    os.environ["RANK"] = "1"  # read while the next line imports
    from lightning_fabric.utilities.rank_zero import rank_zero_info

    return Call(f"rank_zero_info({MESSAGE})", {"rank_zero_info": rank_zero_info})


def loguru_filtered(folder: Path) -> Call:
    from loguru import logger

    logger.remove()
    logger.add(folder / "log", level="WARNING")
    return Call(f"logger.info({BRACES})", {"logger": logger})


def stdlib_file(folder: Path) -> Call:
    add_file_handler(folder)
    return Call(f"log.info({MESSAGE})", {"log": logging.getLogger("bench")}, lambda: None)


def rankwise_file(folder: Path) -> Call:
    import rankwise

    handle = configure_rankwise(folder, "INFO")
    return Call(f"log.info({MESSAGE})", {"log": rankwise.get_logger("bench")}, handle.flush)


def stdlib_call_rankwise_file(folder: Path) -> Call:
    handle = configure_rankwise(folder, "INFO")
    return Call(f"log.info({MESSAGE})", {"log": logging.getLogger("bench")}, handle.flush)


def accelerate_file(folder: Path) -> Call:
    return Call(f"log.info({MESSAGE})", {"log": accelerate_logger(folder, rank=0)}, lambda: None)


def loguru_file(folder: Path) -> Call:
    return loguru_sink(folder, enqueue=False)


def loguru_file_enqueue(folder: Path) -> Call:
    return loguru_sink(folder, enqueue=True)


def configure_rankwise(run_dir: Path | None, level: str) -> Any:
    """The logs of rank 1 of 2 without its session, which would wait for rank 0."""
    from rankwise import logs
    from rankwise.identity import Identity

    return logs.configure(Identity(1, 1, 0, 2, 2, 1), run_dir, level)


def accelerate_logger(folder: Path, rank: int) -> Any:
    """A logger of rank 0 or 1; the state that says so is edited, since a real rank 1 would wait for rank 0."""
    from accelerate import PartialState
    from accelerate.logging import get_logger

    state = PartialState(cpu=True)
    state.process_index = state.local_process_index = rank
    add_file_handler(folder)
    return get_logger("bench", log_level="INFO")


def add_file_handler(folder: Path) -> None:
    logging.basicConfig(filename=folder / "log", level="INFO", format=FORMAT)


def loguru_sink(folder: Path, *, enqueue: bool) -> Call:
    from loguru import logger

    logger.remove()
    logger.add(folder / "log", level="INFO", enqueue=enqueue)
    return Call(f"logger.info({BRACES})", {"logger": logger}, logger.complete)


CASES: dict[str, Callable[[Path], Call]] = {
    make.__name__: make
    for make in (
        stdlib_filtered,
        rankwise_filtered,
        rankwise_other_rank,
        accelerate_other_rank,
        lightning_other_rank,
        loguru_filtered,
        stdlib_file,
        rankwise_file,
        stdlib_call_rankwise_file,
        accelerate_file,
        loguru_file,
        loguru_file_enqueue,
    )
}


def measure(call: Call) -> dict[str, Any]:
    """Microseconds of a call on this thread, a figure per batch, and of processor time in all threads per call."""
    # timeit turns the garbage collector off, which a program does not.
    timer = timeit.Timer(call.statement, "gc.enable()", globals=call.names | {"gc": gc})
    num_calls = NUM_UNHEARD if call.flush is None else NUM_WRITTEN
    calls_us = []
    begin = time.process_time()
    for _ in range(NUM_BATCHES):
        calls_us.append(timer.timeit(num_calls) / num_calls * 1e6)
        if call.flush is not None:
            call.flush()
    num_calls *= NUM_BATCHES
    return {"calls_us": calls_us, "cpu_us": (time.process_time() - begin) / num_calls * 1e6, "num_calls": num_calls}


def num_records(call: Call) -> int:
    """How many stdlib records one call makes, shown or not."""
    made = 0
    make = logging.getLogRecordFactory()

    def counted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        nonlocal made
        made += 1
        return make(*args, **kwargs)

    logging.setLogRecordFactory(counted)
    exec(call.statement, call.names)
    logging.setLogRecordFactory(make)
    return made


def num_lines(folder: Path) -> int:
    """Whole lines in all files, of which the parent takes one for a call."""
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob("*") if path.is_file())


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    call = CASES[name](folder)
    measure(call)  # warm-up
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        if line.strip() != "go":
            break
        before = num_lines(folder)
        answer = measure(call)
        answer["num_lines"] = num_lines(folder) - before
        print(json.dumps(answer), flush=True)
    print(json.dumps({"num_records": num_records(call)}), flush=True)


if __name__ == "__main__":
    main()
