"""The thread of the saves does one thing after the other and holds nobody up."""

import gc
import subprocess
import sys
import threading
import weakref

import pytest

from rankwise.checkpoint import background
from rankwise.checkpoint.background import Worker


def test_tasks_are_done_in_order_and_errors_reach_who_waits() -> None:
    worker, done = Worker("test-worker"), []
    futures = [worker.submit(lambda number=number: done.append(number)) for number in range(5)]  # type: ignore[misc]
    bad = worker.submit(lambda: [][0])
    last = worker.submit(lambda: done.append(threading.current_thread().name))
    for future in (*futures, last):
        future.result(20)
    assert done == [0, 1, 2, 3, 4, "test-worker"]
    with pytest.raises(IndexError):
        bad.result(20)
    worker.close()


def test_closed_worker_ends_after_what_it_has() -> None:
    worker, go = Worker("test-worker"), threading.Event()
    first, second = worker.submit(lambda: bool(go.wait(20))), worker.submit(lambda: None)
    worker.close()
    assert not second.done()
    go.set()
    second.result(20)
    first.result(20)
    worker._thread.join(20)
    assert not worker._thread.is_alive()


def test_nothing_that_a_task_held_is_kept_once_it_is_done() -> None:
    class State:
        pass

    worker, state = Worker("test-worker"), State()
    gone = weakref.ref(state)
    future = worker.submit(lambda held=state: None)  # type: ignore[misc]
    future.result(20)
    del state
    worker.submit(lambda: None).result(20)
    gc.collect()
    assert gone() is None
    worker.close()


def test_program_ends_though_a_task_never_does() -> None:
    program = """
import runpy, sys, threading
module = runpy.run_path(sys.argv[1])  # without torch, which takes seconds to come
module["Worker"]("stuck").submit(threading.Event().wait)
print("end")
"""
    command = [sys.executable, "-c", program, background.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
