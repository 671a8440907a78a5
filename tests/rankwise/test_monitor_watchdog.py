"""Real ranks that hang, each in a way of its own: the right one is named, once, and its stacks are there."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import rankwise
from rankwise.monitor.position import Position
from rankwise.monitor.watchdog import Watchdog
from rankwise.telemetry import Event, event_from_json
from rankwise.testing import RankProcesses, on_ranks

LIMIT_SECONDS = 3.0
STUCK_STEP = 5
NUM_RANKS = 3
WAIT_SECONDS = 60.0
"""How long a loaded machine may take to say what it should have said after three seconds."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="what peers see of a process is Linux's")


class Loop:
    """Stands for a training loop."""

    def __init__(self) -> None:
        self.at = Position(0, None, time.monotonic(), 0)

    @contextmanager
    def phase(self, name: str | None) -> Iterator[None]:
        self.move(self.at.step, name)
        yield
        self.move(self.at.step, None)

    def move(self, step: int, phase: str | None) -> None:
        self.at = Position(step, phase, time.monotonic(), self.at.number + 1)


def wait_for(condition: Callable[[], object], timeout_seconds: float = WAIT_SECONDS) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def spin_until(path: Path) -> None:
    while not path.exists():
        pass


def misbehave(kind: str, folder: Path) -> None:
    if kind == "loop":
        spin_until(folder / "go")
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "gil":
        # A call into C that keeps the GIL, until the file is there; at most a minute.
        usleep = ctypes.PyDLL(None).system
        usleep(b"for i in $(seq 600); do test -e " + os.fsencode(folder / "go") + b" && exit; sleep 0.1; done")
    elif kind == "fifo":
        (folder / "fifo").read_text()


def train(folder: Path, kind: str, culprit: int, on_hang: str) -> None:
    """Fifteen steps, of which one rank makes the sixth only when it is let."""
    rank = dist.get_rank()
    loop = Loop()
    with rankwise.init(folder, device_type="cpu", timeout_seconds=100) as session:
        watchdog = Watchdog(
            session,
            lambda: loop.at,
            timeout_seconds=LIMIT_SECONDS,
            on_hang=on_hang,  # type: ignore[arg-type]
            tell=lambda event: print(f"{event.kind}: {event.message}", flush=True),
        )
        watchdog.start()
        for step in range(1, 16):
            is_stuck = step == STUCK_STEP + 1 and rank == culprit
            if is_stuck and kind == "early":
                watchdog.close()
                assert wait_for((folder / "go").exists)
            with loop.phase("data"):
                time.sleep(0.3)  # so that some beats come before
            with loop.phase("forward"):
                if is_stuck:
                    misbehave(kind, folder)
            with loop.phase("backward"):
                dist.all_reduce(torch.ones(1))
            loop.move(step, None)
        watchdog.close()


def stacks_in(folder: Path) -> dict[int, str]:
    """By rank what was written of the one hang."""
    written = [path for path in (folder / "hangs").glob("2*") if path.is_dir()]
    assert len(written) < 2
    return {int(path.stem[-5:]): path.read_text() for one in written for path in one.glob("rank-*.txt")}


def let_go(kind: str, folder: Path, pid: int | None) -> None:
    (folder / "go").touch()
    if kind == "stop":
        assert pid is not None
        os.kill(pid, signal.SIGCONT)
    elif kind == "fifo":
        (folder / "fifo").write_text("")


@pytest.mark.parametrize(
    ("kind", "culprit", "expected", "others"),
    [
        ("loop", 1, r"is in forward of step 6 \(test_monitor_watchdog\.py:\d+ in spin_until\)", "2 others wait in"),
        pytest.param(
            "loop",
            0,
            r"is in forward of step 6 \(test_monitor_watchdog\.py:\d+ in spin_until\)",
            "2 others wait in",
            marks=pytest.mark.slow,
        ),
        ("gil", 1, r"was last in \w+ of step \d, asleep in a call that lets no other thread of it run Python", ""),
        ("stop", 1, r"was last in \w+ of step \d, stopped by a signal", "the 2 others wait in communication"),
        (
            "stop",
            0,
            r"was last in \w+ of step \d, stopped by a signal",
            r"rank [12], which tells it, waits in backward",
        ),
        ("fifo", 2, r"is in forward of step 6 \(test_monitor_watchdog\.py:\d+ in misbehave\)", "the 2 others wait in"),
        ("early", 1, "left the loop after step 5", "the 2 others wait in communication"),
    ],
)
def test_rank_that_hangs_is_named_in_one_line_with_stacks_until_it_goes_on(
    tmp_path: Path, kind: str, culprit: int, expected: str, others: str
) -> None:
    os.mkfifo(tmp_path / "fifo")
    with RankProcesses(train, NUM_RANKS, (tmp_path, kind, culprit, "tell")) as ranks:
        assert wait_for(lambda: "no progress" in ranks.output()), ranks.output()
        line = next(line for line in ranks.output().splitlines() if "no progress" in line)
        pid = ranks.processes[culprit].pid
        assert re.search(rf"no progress for \d+ s: rank {culprit} \(.+, cpu, pid {pid}\) {expected}; .*{others}", line)
        assert f"Stacks: {tmp_path}/hangs/2" in line
        assert wait_for(lambda: len(stacks_in(tmp_path)) == NUM_RANKS)
        # Whoever speaks does so first; the others' files may still be growing.
        waiting = next(rank for rank in range(NUM_RANKS) if rank != culprit)
        assert wait_for(lambda: "in all_reduce" in stacks_in(tmp_path)[waiting])
        if kind in ("loop", "fifo", "gil"):
            function = "spin_until" if kind == "loop" else "misbehave"
            assert wait_for(lambda: f"in {function}" in stacks_in(tmp_path)[culprit]), stacks_in(tmp_path)[culprit]
        elif kind == "stop":
            assert wait_for(lambda: "state: T (stopped by a signal)" in stacks_in(tmp_path)[culprit])
        let_go(kind, tmp_path, pid)
        assert ranks.join(WAIT_SECONDS) == {}
        output = ranks.output()
    assert output.count("no progress for") == 1, output
    if culprit == 0 and kind == "stop":
        told = [
            event_from_json(line) for path in (tmp_path / "events").iterdir() for line in path.read_text().splitlines()
        ]
        assert [(event.kind, event.ranks) for event in told if event is not None] == [("hang", [0])]
    assert output.count(f"hang_over: rank {culprit} goes on after ") == 1, output


@pytest.mark.parametrize(
    ("kind", "culprit"),
    [
        ("loop", 1),
        pytest.param("gil", 1, marks=pytest.mark.slow),
        pytest.param("stop", 1, marks=pytest.mark.slow),
        ("stop", 0),
        pytest.param("early", 1, marks=pytest.mark.slow),
    ],
)
def test_job_that_is_to_end_on_a_hang_ends_on_every_rank(tmp_path: Path, kind: str, culprit: int) -> None:
    with RankProcesses(train, NUM_RANKS, (tmp_path, kind, culprit, "end")) as ranks:
        assert wait_for(lambda: "no progress" in ranks.output()), ranks.output()
        told = time.monotonic()
        assert wait_for(lambda: not any(process.is_alive() for process in ranks.processes)), ranks.output()
        assert time.monotonic() - told < 20  # four seconds, on a machine with nothing else to do
        is_killed = kind in ("gil", "stop")
        expected = {rank: -signal.SIGKILL if rank == culprit and is_killed else 1 for rank in range(NUM_RANKS)}
        assert {rank: process.exitcode for rank, process in enumerate(ranks.processes)} == expected
        output = ranks.output()
    assert len(re.findall(r"no progress for \d+ s: rank", output)) == 1, output
    assert f"no progress for {output.partition('no progress for ')[2].partition(' ')[0]} s: rank {culprit} (" in output
    assert set(stacks_in(tmp_path)) == set(range(NUM_RANKS))


def test_killed_rank_is_the_lifelines_to_tell_and_no_hang(tmp_path: Path) -> None:
    with RankProcesses(train, NUM_RANKS, (tmp_path, "kill", 1, "end")) as ranks:
        assert wait_for(lambda: not any(process.is_alive() for process in ranks.processes)), ranks.output()
        assert ranks.processes[1].exitcode == -signal.SIGKILL
        assert "no progress" not in ranks.output()


def fail_beside_a_stuck_rank(folder: Path) -> None:
    """Rank 1 fails, rank 2 never comes to where it would hear of that."""
    rank = dist.get_rank()
    loop = Loop()
    with rankwise.init(folder, device_type="cpu", timeout_seconds=100) as session:
        watchdog = Watchdog(
            session,
            lambda: loop.at,
            timeout_seconds=LIMIT_SECONDS,
            on_hang="end",
            tell=lambda event: print(event.message, flush=True),
        )
        watchdog.start()
        dist.barrier()
        if rank == 1:
            raise ValueError("boom")
        if rank == 2:
            with loop.phase("forward"):
                spin_until(folder / "go")
        rankwise.barrier()


def test_rank_that_is_stuck_when_another_fails_ends_too(tmp_path: Path) -> None:
    with RankProcesses(fail_beside_a_stuck_rank, NUM_RANKS, (tmp_path,)) as ranks:
        assert wait_for(lambda: not any(process.is_alive() for process in ranks.processes)), ranks.output()
        assert [process.exitcode for process in ranks.processes] == [1, 1, 1]
        assert "no progress" not in ranks.output()
    assert "in spin_until" in (tmp_path / "hangs" / "after-failure" / "rank-00002.txt").read_text()


SCRIPT = """
import os, pathlib, signal, sys, time, torch, torch.distributed as dist
import rankwise
with rankwise.init(sys.argv[1], device_type="cpu") as session:
    with rankwise.Monitor(session, hang_timeout_seconds=3.0, on_hang="end") as monitor:
        for step in range(6):
            with monitor.phase("data"):
                time.sleep(0.3)
            with monitor.phase("forward"):
                if step == 5 and session.identity.rank == 1:
                    {hang}
            with monitor.phase("backward"):
                dist.all_reduce(torch.ones(1))
            monitor.step()
"""


@pytest.mark.parametrize(
    ("hang", "said"),
    [
        pytest.param(
            "time.sleep(600)", r"is in forward of step 6 \(script\.py:\d+ in <module>\)", marks=pytest.mark.slow
        ),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "was last in .+, stopped by a signal"),
    ],
)
def test_job_of_the_launcher_ends_with_the_rank_that_hung_as_its_last_words(
    tmp_path: Path, hang: str, said: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(hang=hang))
    command = [sys.executable, "-m", "rankwise", "run", "--nproc-per-node", "2", str(script), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1, done.stderr
    assert len(re.findall(rf"no progress for \d+ s: rank 1 \(.+\) {said}; the other waits in", done.stderr)) == 1, (
        done.stderr
    )
    last = done.stderr.partition("failed first:\n")[2].splitlines()
    assert re.match(r"Hang: it made no progress for \d+ s in \w+ .*after step \d, and the job was not to wait", last[0])
    assert len(last) == 1
    assert re.search(r"rankwise: rank 1 \(.+\) failed first:", done.stderr), done.stderr


def validate_long(folder: Path) -> None:
    loop, told = Loop(), []
    rank = dist.get_rank()
    with rankwise.init(folder, device_type="cpu", timeout_seconds=100) as session:
        watchdog = Watchdog(session, lambda: loop.at, timeout_seconds=2.0, on_hang="tell", tell=told.append)
        watchdog.start()
        with loop.phase("validation"):
            for _ in range(12 if rank == 0 else 0):
                time.sleep(0.5)
                loop.move(0, "validation")
            dist.barrier()
        watchdog.close()
    assert told == []


@on_ranks(2)
def test_ranks_that_wait_for_one_that_makes_progress_do_not_hang(tmp_path: Path) -> None:
    validate_long(tmp_path)


@on_ranks(2)
def test_nobody_is_watched_after_the_loop(tmp_path: Path) -> None:
    loop = Loop()
    told: list[Event] = []
    with rankwise.init(tmp_path, device_type="cpu") as session:
        watchdog = Watchdog(session, lambda: loop.at, timeout_seconds=1.0, on_hang="end", tell=told.append)
        watchdog.start()
        watchdog.close()
        time.sleep(3.0)
        dist.barrier()
    assert told == []
    assert not (tmp_path / "hangs").exists()


def test_process_alone_is_watched_too(tmp_path: Path) -> None:
    loop = Loop()
    told: list[Event] = []
    with rankwise.init(tmp_path, device_type="cpu") as session:
        watchdog = Watchdog(
            session, lambda: loop.at, timeout_seconds=1.0, on_hang="tell", tell=told.append, use_held_timer=False
        )
        watchdog.start()
        assert wait_for(lambda: len(told) == 1)
        loop.move(1, None)
        assert wait_for(lambda: len(told) == 2)
        watchdog.close()
    assert [event.kind for event in told] == ["hang", "hang_over"]
    assert told[0].ranks == (0,)
    assert "rank 0 (" in told[0].message
    assert wait_for(lambda: "in test_process_alone_is_watched_too" in stacks_in(tmp_path)[0])


def test_tell_that_does_not_return_does_not_keep_the_line_from_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankwise.monitor.watchdog._TELL_SECONDS", 0.2)
    loop = Loop()
    with rankwise.init(tmp_path, device_type="cpu") as session:
        watchdog = Watchdog(
            session,
            lambda: loop.at,
            timeout_seconds=1.0,
            on_hang="tell",
            tell=lambda event: time.sleep(10),
            use_held_timer=False,
        )
        watchdog.start()
        printed = ""

        def is_printed() -> bool:
            nonlocal printed
            printed += capsys.readouterr().err
            return "rankwise: no progress for" in printed

        assert wait_for(is_printed)
        watchdog.close()


def test_time_for_which_the_process_slept_is_not_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loop = Loop()
    told: list[Event] = []
    with rankwise.init(tmp_path, device_type="cpu") as session:
        watchdog = Watchdog(
            session, lambda: loop.at, timeout_seconds=2.0, on_hang="tell", tell=told.append, use_held_timer=False
        )
        now = time.monotonic()
        watchdog._turned = watchdog._awake = now
        watchdog._turn(now + 600)
        watchdog._turn(now + 601)
        assert told == []
        for seconds in range(602, 606):
            watchdog._turn(now + seconds)
        assert [event.kind for event in told] == ["hang"]
