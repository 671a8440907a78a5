"""A session sets up in order, cleans up always, and says who failed first."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import rankwise
from rankwise import collectives
from rankwise import session as session_module
from rankwise.errors import RankFailedError, RankFailure, RankwiseError
from rankwise.group import at_session_end
from rankwise.testing import on_ranks


def read_run_file(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return content


def messages(run_dir: Path, rank: int) -> list[str]:
    lines = (run_dir / f"logs/rank-{rank:05d}.jsonl").read_text().splitlines()
    return [json.loads(line)["message"] for line in lines]


def test_single_process_needs_nothing_and_makes_no_group(tmp_path: Path) -> None:
    for _ in range(2):
        with rankwise.init(tmp_path, device_type="cpu") as session:
            assert (session.identity.launcher, session.device.type) == ("single", "cpu")
            assert not dist.is_initialized()
            assert session.agree_to_stop() is False
            assert session.first_failure(0) is None
    run = read_run_file(tmp_path)
    assert (run["format"], run["world_size"], run["launcher"]) == (1, 1, "single")
    assert run["versions"]["torch"] == torch.__version__
    assert [row["pid"] for row in run["ranks"]] == [os.getpid()]
    assert run["git_revision"] is None or len(run["git_revision"]) == 40


def test_run_file_holds_no_values_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", "do-not-tell-anybody")
    with rankwise.init(tmp_path, device_type="cpu"):
        pass
    assert "do-not-tell" not in (tmp_path / "run.json").read_text()


def test_everything_is_restored_when_the_body_raises(tmp_path: Path) -> None:
    before = (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), list(logging.getLogger().handlers))
    with pytest.raises(ValueError, match="body"), rankwise.init(tmp_path, device_type="cpu"):  # noqa: PT012
        assert signal.getsignal(signal.SIGTERM) is not before[0]
        raise ValueError("body")
    after = (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), list(logging.getLogger().handlers))
    assert after == before
    assert "the session ends with ValueError" in messages(tmp_path, 0)
    with rankwise.init(device_type="cpu"):
        pass


def test_second_session_within_the_first_is_refused() -> None:
    with rankwise.init(device_type="cpu"):
        with pytest.raises(RankwiseError, match="a session is open already"), rankwise.init(device_type="cpu"):
            pass
        with pytest.raises(RankwiseError, match="a session is open already"), rankwise.init(device_type="cpu"):
            pass


def test_run_directory_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RankwiseError, match=r"cannot write .*file/logs: Not a directory"):
        rankwise.init(tmp_path / "file", device_type="cpu").__enter__()


def test_sigterm_and_the_first_interrupt_ask_for_a_stop_and_the_second_interrupts(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with rankwise.init(device_type="cpu") as session:
        os.kill(os.getpid(), signal.SIGTERM)
        assert session.stop_requested
        assert session.agree_to_stop()
    with rankwise.init(device_type="cpu") as session:
        assert not session.stop_requested
        os.kill(os.getpid(), signal.SIGINT)
        assert session.stop_requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "press Ctrl-C again" in capfd.readouterr().err


def test_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with rankwise.init(device_type="cpu") as session:
            os.kill(os.getpid(), signal.SIGINT)
            assert not session.stop_requested
    finally:
        signal.signal(signal.SIGINT, before)


@on_ranks(2)
def test_end_is_told_while_the_ranks_can_still_talk() -> None:
    heard: list[tuple[bool, list[int]]] = []
    with rankwise.init() as session:
        at_session_end(lambda failed: heard.append((failed, rankwise.gather_objects(session.identity.rank))))
    assert heard == [(False, [0, 1])]


def test_failing_end_is_told_to_all_who_wait_and_so_is_the_failure_of_one_of_them() -> None:
    heard: list[tuple[str, bool]] = []

    def fail(failed: bool) -> None:
        heard.append(("failing", failed))
        raise ValueError("at the end")

    with pytest.raises(ValueError, match="of the body"), rankwise.init(device_type="cpu"):  # noqa: PT012
        at_session_end(lambda failed: heard.append(("first", failed)))
        raise ValueError("of the body")
    with pytest.raises(ValueError, match="at the end"), rankwise.init(device_type="cpu"):  # noqa: PT012
        at_session_end(lambda failed: heard.append(("second", failed)))
        at_session_end(fail)
    assert heard == [("first", True), ("failing", False), ("second", True)]


def test_run_directory_may_be_a_string(tmp_path: Path) -> None:
    with rankwise.init(str(tmp_path / "mine"), device_type="cpu") as session:
        assert session.run_dir == tmp_path / "mine"
    assert read_run_file(tmp_path / "mine")["world_size"] == 1
    assert messages(tmp_path / "mine", 0)


@on_ranks(3)
def test_signal_to_one_rank_stops_all_at_the_same_step() -> None:
    with rankwise.init() as session:
        step = 0
        while not session.agree_to_stop():
            step += 1
            if session.identity.rank == 1 and step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
        assert session.stop_requested is (session.identity.rank == 1)
        assert rankwise.gather_objects(step) == [5, 5, 5]


@on_ranks(3)
def test_rank_that_cannot_set_up_is_named_on_every_rank(tmp_path: Path) -> None:
    if os.environ["RANK"] == "2":
        tmp_path /= "file"
        tmp_path.write_text("in the way")
    with pytest.raises(RankFailedError, match=r"rank 2 .*cannot write .*file/logs") as raised, rankwise.init(tmp_path):
        pass
    assert raised.value.on_every_rank


@on_ranks(2)
def test_foreign_error_in_the_set_up_of_one_rank_is_named_on_every_rank() -> None:
    def busy(*arguments: object, **options: object) -> None:
        raise RuntimeError("device is busy")

    if os.environ["RANK"] == "1":
        session_module.select_device = busy
    with (
        pytest.raises(RankFailedError, match=r"rank 1 cannot set up on .*: RuntimeError: device is busy"),
        rankwise.init(),
    ):
        pass


@on_ranks(2)
def test_stop_signal_while_a_rank_sets_up_is_kept_for_the_first_agreement() -> None:
    select_device = session_module.select_device

    def select_and_be_stopped(*arguments: Any, **options: Any) -> torch.device:
        os.kill(os.getpid(), signal.SIGTERM)
        return select_device(*arguments, **options)

    if os.environ["RANK"] == "1":
        session_module.select_device = select_and_be_stopped
    with rankwise.init() as session:
        assert session.stop_requested is (session.identity.rank == 1)
        assert session.agree_to_stop()


@on_ranks(3)
def test_first_failure_by_arrival_is_told_to_those_who_ask() -> None:
    with pytest.raises(ValueError, match="rank"), rankwise.init() as session:  # noqa: PT012
        rank = session.identity.rank
        if rank == 0:
            failure = session.first_failure(20)
            assert failure is not None
            assert (failure.rank, failure.error_type, failure.message) == (1, "ValueError", "of rank 1")
            assert "test_session.py" in failure.traceback
        elif rank == 2:
            assert session.first_failure(20) is not None
        raise ValueError(f"of rank {rank}")


def fail_in_order() -> None:
    with rankwise.init() as session:
        if session.identity.rank == 1:
            raise ValueError("the cause")
        collectives.barrier()
        raise AssertionError("rank 0 went on")


def test_lost_connection_is_blamed_on_the_rank_that_failed_first() -> None:
    with pytest.raises(AssertionError) as raised:
        on_ranks(2)(fail_in_order)()
    told = str(raised.value).partition("---- rank 1")[0]
    assert "RankFailedError: rank 1 (" in told
    assert "failed first: ValueError: the cause" in told
    assert "by peer" not in told


@on_ranks(2)
def test_rank_that_lost_its_connection_to_nobody_s_fault_is_the_first_failure() -> None:
    session_module.FIRST_FAILURE_SECONDS = 0.1
    expected = dist.DistNetworkError if os.environ["RANK"] == "0" else RankFailedError
    with pytest.raises(expected, match="reset by peer"), rankwise.init() as session:  # noqa: PT012
        if session.identity.rank == 1:
            assert session.first_failure(20) is not None
        raise dist.DistNetworkError("Connection reset by peer")


# Below: real torchrun. One program with several acts, because starting torch twice costs seconds.

TORCHRUN_PROGRAM = """
import os, pathlib, signal, sys
import torch, torch.distributed as dist
import rankwise

folder = pathlib.Path(sys.argv[1])
for session_number in range(2):
    with rankwise.init(folder, timeout_seconds=60) as session:
        identity = session.identity
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == 2 and identity.launcher == "torchrun", identity
        assert dist.get_backend() == "gloo" if session.device.type == "cpu" else True
        rankwise.get_logger("act").info("session %d", session_number)
        if session_number == 1 and identity.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        assert session.agree_to_stop() is (session_number == 1)
    assert not dist.is_initialized()
os.write(1, f"done {os.environ['RANK']}\\n".encode())

blocked = folder / "run.json" if os.environ["RANK"] == "1" else folder
try:
    with rankwise.init(blocked, timeout_seconds=60):
        raise AssertionError("rank 1 has no run directory")
except rankwise.RankFailedError as error:
    assert error.on_every_rank and error.failures[0].rank == 1, error
    os.write(1, f"refused {os.environ['RANK']}\\n".encode())
if sys.argv[2] == "fail":
    with rankwise.init(folder, timeout_seconds=60) as session:
        if session.identity.rank == 0:
            raise ValueError("the main process is the cause")
        rankwise.barrier()
"""


def run_torchrun(folder: Path, act: str) -> subprocess.CompletedProcess[str]:
    program = folder / "program.py"
    program.write_text(TORCHRUN_PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, str(program), str(folder / "run"), act], capture_output=True, text=True, timeout=100, env=environ
    )


def test_torchrun_two_sessions_in_a_row_then_failures_that_are_named(tmp_path: Path) -> None:
    done = run_torchrun(tmp_path, "fail")
    assert sorted(line for line in done.stdout.splitlines() if line[:4] in ("done", "refu")) == [
        "done 0",
        "done 1",
        "refused 0",
        "refused 1",
    ]
    assert done.returncode == 1
    run = read_run_file(tmp_path / "run")
    assert [(row["rank"], row["local_rank"], row["device"]) for row in run["ranks"]] == [(0, 0, "cpu"), (1, 1, "cpu")]
    assert run["launcher"] == "torchrun"
    assert str(tmp_path / "program.py") in run["command"]
    for rank in (0, 1):
        assert [m for m in messages(tmp_path / "run", rank) if m.startswith("session")] == ["session 0", "session 1"]
    said = done.stderr.partition("ChildFailedError")[0]  # torchrun's own table comes after it
    assert said.count("rankwise: rank 0 (") == said.count("    raise ValueError") == 1, done.stderr
    assert "by peer" not in said


def test_missing_rank_is_an_error_when_the_time_is_up(tmp_path: Path) -> None:
    program = "import rankwise; rankwise.init(device_type='cpu', timeout_seconds=1).__enter__()"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=os.environ | place
    )
    assert done.returncode == 1
    assert "MissingRanksError: 1 of 2 ranks started within 1 s; missing: rank 1" in done.stderr
    assert time.monotonic() - start < 30


def test_session_tells_how_long_it_waits() -> None:
    with rankwise.init(device_type="cpu", timeout_seconds=12.5) as session:
        assert session.timeout_seconds == 12.5
        assert session.token == ""  # nobody else is in it


def meet_until_one_hangs(hang: RankFailure) -> None:
    with rankwise.init() as session:
        assert len(set(rankwise.gather_objects(session.token))) == 1
        if session.identity.is_main_process:
            session.note_hang(hang)
        while True:
            rankwise.barrier()


@on_ranks(2)
def test_hang_of_another_rank_is_a_failure_that_collectives_raise() -> None:
    hang = RankFailure(1, "there", "Hang", "it made no progress")
    with pytest.raises(RankFailedError, match=r"rank 1 \(there\) failed first: Hang: it made no progress"):
        meet_until_one_hangs(hang)
