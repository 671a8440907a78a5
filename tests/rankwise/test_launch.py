"""`rankwise run`, as people start it: real processes, real signals."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

RUN = [sys.executable, "-m", "rankwise", "run", "--nproc-per-node", "2"]


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    def write(body: str) -> str:
        path = tmp_path / "script.py"
        path.write_text("import os, pathlib, signal, sys, time\nrank = int(os.environ['RANK'])\n" + body)
        return str(path)

    return write


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*RUN, *command], capture_output=True, text=True, timeout=60, check=False)


def wait_for(condition: Callable[[], bool], timeout_seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_every_rank_gets_its_place_and_its_share_of_the_cores(
    script: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    result = run(
        script(
            "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'OMP_NUM_THREADS')\n"
            "os.write(1, (' '.join(os.environ[name] for name in names) + '\\n').encode())"
        )
    )
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert sorted(result.stdout.split("\n")[:2]) == [f"0 0 2 {threads}", f"1 1 2 {threads}"]
    assert result.returncode == 0


def test_two_jobs_run_at_once_on_one_machine(script: Callable[[str], str]) -> None:
    command = [*RUN, script("time.sleep(1)")]
    jobs = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [job.communicate(timeout=60)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], errors


def test_status_two_is_passed_on_without_a_word_of_ours(script: Callable[[str], str]) -> None:
    body = "print('error: said by the rank', file=sys.stderr) if rank == 1 else time.sleep(30)\nsys.exit(2)"
    result = run(script(body))
    assert result.returncode == 2
    assert result.stderr == "error: said by the rank\n"


def test_a_failing_rank_is_named_in_one_line(script: Callable[[str], str]) -> None:
    result = run(script("sys.exit(7 if rank == 1 else time.sleep(30))"))
    assert result.returncode == 7
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: rank 1 (pid ")
    assert result.stderr.endswith("ended with exit status 7\n")


def test_the_rank_that_broke_is_named_and_not_the_one_that_lost_it(script: Callable[[str], str]) -> None:
    body = """
import rankwise
with rankwise.init(timeout_seconds=60):
    if rank == 1:
        raise ValueError("boom")
    rankwise.barrier()
"""
    result = run(script(body))
    assert result.returncode == 1
    last = result.stderr.partition("rankwise: ")[2].splitlines()
    assert last[0].startswith("rank 1 (")
    assert last[0].endswith(") failed first:")
    assert last[-1] == "ValueError: boom"
    assert result.stderr.count("Traceback") == 1


@pytest.mark.parametrize("number", [3, pytest.param(0, marks=pytest.mark.slow)])
def test_of_eight_ranks_the_first_that_failed_has_the_last_word_and_once(
    number: int, script: Callable[[str], str]
) -> None:
    body = f"""
import torch, torch.distributed as dist
import rankwise
with rankwise.init(device_type="cpu", timeout_seconds=60):
    rankwise.barrier("together")
    if rank == {number}:
        raise ValueError("boom")
    while True:
        dist.all_reduce(torch.ones(2))
"""
    result = run("--nproc-per-node", "8", script(body))
    assert result.returncode == 1
    words, *trace = result.stderr.partition("rankwise: rank")[2].splitlines()
    assert re.fullmatch(rf" {number} \(.+, cpu, pid \d+\) failed first:", words), result.stderr
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-1] == "ValueError: boom"
    assert result.stderr.count("boom") == 2  # the line of the script, and the error
    assert "by peer" not in result.stderr


def test_script_that_knows_nothing_of_us_has_its_traceback_at_the_end_and_once(script: Callable[[str], str]) -> None:
    body = "def fall():\n    raise ValueError('boom')\nif rank == 1: fall()\ntime.sleep(30)"
    result = run(script(body))
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert lines[0].startswith("rankwise: rank 1 (")
    assert lines[-1] == "ValueError: boom"
    assert result.stderr.count("Traceback") == 1


def test_failure_before_a_restart_is_printed_then(script: Callable[[str], str]) -> None:
    body = """
import rankwise
with rankwise.init(device_type="cpu", timeout_seconds=60):
    rankwise.barrier("together")
    if rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise ValueError("boom")
    rankwise.barrier("again")
os.write(1, b"done\\n")
"""
    result = run("--max-restarts", "1", script(body))
    assert (result.returncode, result.stdout) == (0, "done\ndone\n")
    assert result.stderr.count("ValueError: boom") == 1


def test_log_directory_gets_the_output_of_every_rank(script: Callable[[str], str], tmp_path: Path) -> None:
    result = run("--log-dir", str(tmp_path / "logs"), script("print('said by', rank, flush=True)"))
    assert result.returncode == 0
    assert sorted(file.read_text() for file in tmp_path.glob("logs/**/stdout.log")) == ["said by 0\n", "said by 1\n"]
    assert "said by 1" in result.stdout


def test_bind_gives_each_rank_cores_of_its_own(script: Callable[[str], str]) -> None:
    cores = sorted(os.sched_getaffinity(0))
    result = run("--bind", script("os.write(1, (repr(sorted(os.sched_getaffinity(0))) + chr(10)).encode())"))
    first, second = (set(json.loads(line)) for line in sorted(result.stdout.splitlines()))
    assert first | second <= set(cores)
    assert len(cores) < 2 or not first & second


@pytest.mark.parametrize("wrong", [["--nproc-per-node", "0"], ["--nproc-per-node", "many"], ["--nnodes", "a"]])
def test_arguments_that_cannot_be_used_are_one_line(wrong: list[str], script: Callable[[str], str]) -> None:
    command = [sys.executable, "-m", "rankwise", "run", *wrong, script("")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("seconds", [0.5, 2.0, 2.5])
def test_a_stop_signal_while_ranks_are_being_started_ends_the_job(
    seconds: float, script: Callable[[str], str], tmp_path: Path
) -> None:
    body = f"(pathlib.Path({str(tmp_path)!r}) / 'ran').touch()\ntime.sleep(60)"
    job = subprocess.Popen([*RUN, "--max-restarts", "1", script(body)], stderr=subprocess.PIPE)
    with contextlib.suppress(subprocess.TimeoutExpired):
        job.wait(seconds)
    job.terminate()
    job.communicate(timeout=20)
    assert job.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)


def test_a_killed_rank_is_named(script: Callable[[str], str]) -> None:
    result = run(script("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(30)"))
    assert result.returncode == 128 + signal.SIGKILL
    assert "error: rank 1 (pid " in result.stderr
    assert "was killed by SIGKILL" in result.stderr


def test_a_killed_rank_of_a_session_is_named_with_its_host_in_the_end(script: Callable[[str], str]) -> None:
    body = """
import rankwise
with rankwise.init(device_type="cpu", timeout_seconds=60):
    rankwise.barrier("together")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    rankwise.barrier("never")
"""
    result = run(script(body))
    assert result.returncode == 128 + signal.SIGKILL
    assert re.search(r"rankwise: rank 1 \(.+, pid \d+\) failed first:\nRankLost: killed by SIGKILL\n$", result.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_lets_the_ranks_finish(
    number: signal.Signals, script: Callable[[str], str], tmp_path: Path
) -> None:
    body = f"""
def stop(*_):
    (pathlib.Path({str(tmp_path)!r}) / f"stopped-{{rank}}").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(pathlib.Path({str(tmp_path)!r}) / f"ready-{{rank}}").touch()
time.sleep(60)
"""
    job = subprocess.Popen([*RUN, script(body)])
    assert wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    job.send_signal(number)
    assert job.wait(timeout=30) == 0
    assert len(list(tmp_path.glob("stopped-*"))) == 2


def test_a_second_signal_kills_ranks_that_do_not_stop(script: Callable[[str], str], tmp_path: Path) -> None:
    body = f"""
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(tmp_path)!r}) / f"deaf-{{rank}}").touch())
(pathlib.Path({str(tmp_path)!r}) / f"ready-{{rank}}").touch()
while True:
    time.sleep(1)
"""
    job = subprocess.Popen([*RUN, script(body)], stderr=subprocess.PIPE)
    assert wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    job.terminate()
    assert wait_for(lambda: len(list(tmp_path.glob("deaf-*"))) == 2)
    job.terminate()
    job.communicate(timeout=30)
    assert job.returncode == 128 + signal.SIGKILL


def test_ranks_end_within_five_seconds_of_a_killed_launcher(script: Callable[[str], str], tmp_path: Path) -> None:
    body = f"""
import rankwise
with rankwise.init():
    (pathlib.Path({str(tmp_path)!r}) / f"ready-{{rank}}").write_text(str(os.getpid()))
    while True:
        time.sleep(1)
"""
    job = subprocess.Popen([*RUN, script(body)], stderr=subprocess.DEVNULL)
    assert wait_for(lambda: len([p for p in tmp_path.glob("ready-*") if p.read_text()]) == 2)
    ranks = [psutil.Process(int(path.read_text())) for path in tmp_path.glob("ready-*")]
    job.kill()
    job.wait()
    gone, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive
    assert len(gone) == 2


def test_torchrun_options_are_understood(script: Callable[[str], str]) -> None:
    path = script("print('node', os.environ['GROUP_RANK'], 'port', os.environ['MASTER_PORT'])")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "rankwise",
        "run",
        "--nnodes=1",
        "--nproc-per-node=1",
        f"--master-port={port}",
        path,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == f"node 0 port {port}\n"
