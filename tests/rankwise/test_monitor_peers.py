"""What the system tells of a process: running, stopped, dead, or another one with the same id."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rankwise.monitor import peers
from rankwise.monitor.peers import facts_as_text, is_traced, kill_process, look_at_process, state_in_words
from rankwise.parent import start_time

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")


def comes_true(condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "100"]) as process:
        assert comes_true(lambda: look_at_process(process.pid, None)["state"] == "S")
        yield process
        process.kill()


def test_sleeping_process_is_told_with_its_threads(sleeper: "subprocess.Popen[bytes]") -> None:
    facts = look_at_process(sleeper.pid, start_time(sleeper.pid))
    assert facts["state"] == "S"
    assert facts["num_threads"] == 1
    assert facts["threads"][0].startswith(f"{sleeper.pid} sleep: S (sleeping)")
    assert facts["tracer"] == 0
    assert "state: S (asleep in a call" in facts_as_text(facts)


def test_stopped_process_is_told_and_goes_on(sleeper: "subprocess.Popen[bytes]") -> None:
    sleeper.send_signal(signal.SIGSTOP)
    assert comes_true(lambda: look_at_process(sleeper.pid, None)["state"] == "T")
    assert state_in_words("T") == "stopped by a signal"
    sleeper.send_signal(signal.SIGCONT)
    assert comes_true(lambda: look_at_process(sleeper.pid, None)["state"] == "S")


def test_dead_process_is_told_before_and_after_its_parent_has_waited() -> None:
    process = subprocess.Popen(["true"])
    started = start_time(process.pid)
    assert comes_true(lambda: look_at_process(process.pid, started)["state"] == "Z")
    process.wait()
    assert look_at_process(process.pid, started) == {"state": "gone"}
    assert facts_as_text({"state": "gone"}) == "state: gone (its process is gone)\n"


def test_other_process_with_the_same_id_is_neither_told_of_nor_killed(sleeper: "subprocess.Popen[bytes]") -> None:
    started = start_time(sleeper.pid)
    assert started is not None
    assert look_at_process(sleeper.pid, started - 1) == {"state": "gone"}
    assert not kill_process(sleeper.pid, started - 1)
    assert not kill_process(sleeper.pid, None)
    assert sleeper.poll() is None


def test_stopped_process_is_killed(sleeper: "subprocess.Popen[bytes]") -> None:
    started = start_time(sleeper.pid)
    sleeper.send_signal(signal.SIGSTOP)
    assert kill_process(sleeper.pid, started)
    assert sleeper.wait(30) == -signal.SIGKILL
    assert not kill_process(sleeper.pid, started)


def test_children_are_told(sleeper: "subprocess.Popen[bytes]") -> None:
    facts = look_at_process(os.getpid(), start_time(os.getpid()))
    assert any(child.startswith(f"{sleeper.pid} sleep: S") for child in facts["children"])
    assert f"{sleeper.pid} sleep" in facts_as_text(facts)


def test_kernel_stack_and_system_call_stand_in_the_text() -> None:
    text = facts_as_text({"state": "D", "wchan": "nfs_wait", "syscall": "0 0x3", "kernel_stack": "[<0>] nfs_wait"})
    assert text.splitlines() == [
        f"state: D ({state_in_words('D')})",
        "sleeps in kernel function: nfs_wait",
        "system call: 0 0x3",
        "kernel stack:",
        "  [<0>] nfs_wait",
    ]


def test_process_without_a_debugger_is_not_traced() -> None:
    assert is_traced() == (psutil.Process().status() == psutil.STATUS_TRACING_STOP)


def test_traced_process_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_read", lambda path: "Name:\tpython\nTracerPid:\t812\n")
    assert is_traced()


def test_system_without_proc_is_asked_through_psutil(
    monkeypatch: pytest.MonkeyPatch, sleeper: "subprocess.Popen[bytes]"
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(peers, "Path", lambda path: Path("/nonexistent"))
    sleeper.send_signal(signal.SIGSTOP)
    assert comes_true(lambda: look_at_process(sleeper.pid, None)["state"] == "T")
    sleeper.kill()
    sleeper.wait()
    assert look_at_process(sleeper.pid, None) == {"state": "gone"}
