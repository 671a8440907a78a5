"""Where a thread is, whether it waits for others, and its stack when it holds the GIL."""

import ctypes
import io
import os
import pdb
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from rankwise.monitor.stacks import HeldTimer, Look, look_at_thread, torch_collectives, write_stacks
from rankwise.testing import on_ranks


def comes_true(condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def thread_in(call: Callable[[], object]) -> Iterator[int]:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    assert thread.ident is not None
    yield thread.ident
    thread.join(30)
    assert not thread.is_alive()


def wait_in_library(event: threading.Event) -> None:
    event.wait(60)


def test_place_is_the_innermost_frame_of_the_users_own() -> None:
    event = threading.Event()
    with thread_in(lambda: wait_in_library(event)) as ident:
        assert comes_true(lambda: "in wait_in_library" in look_at_thread(ident).where)
        assert look_at_thread(ident).where.startswith("test_monitor_stacks.py:")
        assert not look_at_thread(ident).waits
        event.set()


def test_thread_that_is_not_there_is_nowhere() -> None:
    assert look_at_thread(1) == Look()


def all_reduce() -> None:
    dist.all_reduce(torch.ones(1))


@on_ranks(2)
def test_thread_in_a_collective_waits(tmp_path: Path) -> None:
    if dist.get_rank() == 1:
        assert comes_true((tmp_path / "seen").exists)
        all_reduce()  # rankwise: ignore[RW401] one rank is to be missing
        return
    with thread_in(all_reduce) as ident:
        assert comes_true(lambda: look_at_thread(ident).waits)
        assert look_at_thread(ident).where.endswith("in all_reduce")
        (tmp_path / "seen").touch()


@on_ranks(2)
def test_thread_that_waits_for_gradients_of_others_waits(tmp_path: Path) -> None:
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    loss = model(torch.ones(1, 2)).sum()
    if dist.get_rank() == 1:
        assert comes_true((tmp_path / "seen").exists)
        loss.backward()
        return
    with thread_in(loss.backward) as ident:
        assert comes_true(lambda: look_at_thread(ident).waits)
        (tmp_path / "seen").touch()


@on_ranks(2)
def test_collectives_of_torch_are_counted() -> None:
    before = torch_collectives()["enqueued"]
    for _ in range(3):
        all_reduce()
    told = torch_collectives(num_last=2)
    assert told["enqueued"] == before + 3
    assert [entry["profiling_name"] for entry in told["last"]] == ["gloo:all_reduce"] * 2


def test_without_a_process_group_no_collectives_are_told() -> None:
    code = "from rankwise.monitor.stacks import torch_collectives; print(torch_collectives(3))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "{}\n"


def test_thread_at_the_prompt_of_a_debugger_is_at_rest() -> None:
    reading, writing = os.pipe()
    with open(reading) as stdin, open(writing, "w") as keys:
        debugger = pdb.Pdb(stdin=stdin, stdout=io.StringIO(), nosigint=True)
        debugger.use_rawinput = False
        with thread_in(debugger.set_trace) as ident:
            assert comes_true(lambda: look_at_thread(ident).at_prompt)
            keys.write("continue\n")
            keys.flush()


def test_stacks_of_all_threads_are_written_under_their_names(tmp_path: Path) -> None:
    event = threading.Event()
    with thread_in(lambda: wait_in_library(event)) as ident:
        assert comes_true(lambda: "wait_in_library" in look_at_thread(ident).where)
        with open(tmp_path / "stacks", "w") as file:
            write_stacks(file, "rank 3")
        event.set()
    text = (tmp_path / "stacks").read_text()
    assert text.startswith("rank 3\n\nthreads of Python:\n")
    assert f"0x{ident:016x} Thread-" in text
    assert "in wait_in_library" in text
    assert "in test_stacks_of_all_threads_are_written_under_their_names" in text


def test_timer_tells_of_a_held_gil(tmp_path: Path) -> None:
    timer = HeldTimer(tmp_path / "hangs" / "held" / "rank-00000.txt")
    timer.wind(0.2)
    ctypes.PyDLL(None).sleep(1)  # unlike CDLL it keeps the GIL
    timer.close()
    text = (tmp_path / "hangs" / "held" / "rank-00000.txt").read_text()
    assert "in test_timer_tells_of_a_held_gil" in text


def test_timer_that_is_wound_up_in_time_writes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    timer = HeldTimer(tmp_path / "hangs" / "held" / "rank-00000.txt")
    for _ in range(3):
        timer.wind(30.0)
    timer.close()
    assert list(tmp_path.iterdir()) == []
    timer.wind(0.1)  # after its end it stays off
    time.sleep(0.3)
    assert list(tmp_path.iterdir()) == []


def test_timer_takes_any_number_of_seconds(tmp_path: Path) -> None:
    timer = HeldTimer(tmp_path / "hangs" / "held" / "rank-00000.txt")
    try:
        timer.wind(1e12)
    finally:
        timer.close()


def test_timer_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "hangs" / "held").mkdir(parents=True)
    (tmp_path / "hangs" / "held" / "rank-00001.txt").touch()
    timer = HeldTimer(tmp_path / "hangs" / "held" / "rank-00000.txt")
    timer.wind(30.0)
    timer.close()
    assert [path.name for path in (tmp_path / "hangs" / "held").iterdir()] == ["rank-00001.txt"]


def test_forked_child_ends_while_its_parents_timer_runs(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; from rankwise.monitor.stacks import HeldTimer\n"
        "timer = HeldTimer(pathlib.Path(sys.argv[1]))\n"
        "timer.wind(50)\n"
        "pid = os.fork()\n"
        "timer.wind(50)\n"
        "if pid == 0: sys.exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
        "timer.close()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "hangs" / "held" / "rank-00000.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=40)
    assert done.stdout == "7\n"
    assert list(tmp_path.iterdir()) == []


def test_timer_that_cannot_write_is_silent(tmp_path: Path) -> None:
    (tmp_path / "hangs").touch()
    timer = HeldTimer(tmp_path / "hangs" / "held" / "rank-00000.txt")
    timer.wind(30.0)
    timer.close()


def test_timer_ends_the_process_where_that_is_asked(tmp_path: Path) -> None:
    code = (
        "import ctypes; from rankwise.monitor.stacks import HeldTimer; HeldTimer(None).wind(0.2, end=True); "
        "ctypes.PyDLL(None).sleep(30)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "most recent call first" in done.stderr
