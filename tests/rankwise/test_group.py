"""The ranks find each other or say why not, and the cause of a failure is the rank that failed first."""

import importlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import rankwise
from rankwise import collectives, group
from rankwise import session as session_module
from rankwise.errors import LaunchError, RankFailedError, RankwiseError
from rankwise.group import is_lost_connection
from rankwise.testing import on_ranks


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "WORLD_SIZE=2 but MASTER_ADDR and MASTER_PORT not set"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "http"}, "MASTER_PORT='http' is no port"),
    ],
)
def test_ranks_that_cannot_find_each_other_say_what_to_set(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], message: str
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", **environ}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=message):
        rankwise.init(device_type="cpu").__enter__()


def without_group(world_size: int) -> None:
    """Make this rank forget its group, as if it had been started by hand."""
    dist.destroy_process_group()
    size = str(world_size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)


def meet_at_a_store(world_size: int = 2) -> None:
    """As without a group, but the ranks know a store already, in place of a fixed port that may be taken."""
    is_server = dist.get_rank() == 0
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if is_server else None
    port = rankwise.broadcast_object(server.port if server else 0)
    group._rendezvous_store = server or dist.TCPStore("127.0.0.1", port, is_master=False)
    without_group(world_size)


def signal_when_started(*numbers: int) -> None:
    """Send this process one signal after the other, the next when the session knows of the last."""

    def send() -> None:
        while session_module._open_session is None:
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            while not session_module._open_session.stop_requested:
                time.sleep(0.01)

    threading.Thread(target=send, daemon=True).start()


@on_ranks(2)
def test_group_that_is_there_is_used_and_left_alone(tmp_path: Path) -> None:
    for _ in range(2):
        with rankwise.init(tmp_path) as session:
            assert session.identity.rank == dist.get_rank()
            assert session.device == torch.device("cpu")
    assert dist.is_initialized()
    collectives.barrier()
    run = json.loads((tmp_path / "run.json").read_text())
    assert [row["rank"] for row in run["ranks"]] == [0, 1]
    assert len({row["pid"] for row in run["ranks"]}) == 2


@on_ranks(2)
def test_group_that_contradicts_the_environment_is_refused() -> None:
    os.environ["RANK"] = str(1 - dist.get_rank())
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    with pytest.raises(LaunchError, match="the process group that is there says rank"), rankwise.init():
        pass


@on_ranks(2)
def test_rank_whose_group_cannot_be_made_is_named_by_those_who_waited_for_it() -> None:
    meet_at_a_store()
    rank = int(os.environ["RANK"])

    def no_interface(*arguments: object, **options: object) -> None:
        raise ValueError("no such interface")

    if rank == 1:
        dist.init_process_group = no_interface
    expected, message = (RankFailedError, "rank 1 .* failed first: ValueError: no") if rank == 0 else (ValueError, "no")
    with pytest.raises(expected, match=message), rankwise.init(timeout_seconds=2):
        pass
    assert not dist.is_initialized()


@on_ranks(2)
def test_group_that_cannot_talk_over_the_cpu_gets_a_side_that_can() -> None:
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # makes torch know this backend
    meet_at_a_store()
    with rankwise.init(backend="fake") as session:
        assert dist.get_backend() == "fake"
        assert rankwise.gather_objects(session.identity.rank) == [0, 1]
    assert not dist.is_initialized()
    assert collectives._cpu_group is None


def test_every_accelerator_is_joined_by_gloo_on_the_cpu() -> None:
    backends = {name: group._default_backend(torch.device(name, 0)) for name in ("cpu", "cuda", "xpu")}
    assert backends == {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}


@on_ranks(1)
def test_second_interrupt_ends_the_search_for_ranks_that_never_come() -> None:
    without_group(world_size=2)
    signal_when_started(signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), rankwise.init(device_type="cpu", timeout_seconds=50):
        pass


@on_ranks(1, timeout_seconds=20)
def test_stop_signal_ends_the_wait_for_ranks_that_never_come() -> None:
    meet_at_a_store(world_size=2)
    group.STOP_GRACE_SECONDS = 0.2
    signal_when_started(signal.SIGTERM)
    with pytest.raises(RankwiseError, match="1 of 2 ranks started when this one was asked to stop"), rankwise.init():
        pass
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@on_ranks(2)
def test_rank_that_comes_too_late_hears_who_gave_up(tmp_path: Path) -> None:
    meet_at_a_store()
    is_late = os.environ["RANK"] == "1"
    while is_late and not (tmp_path / "gave-up").exists():
        time.sleep(0.01)
    message = "rank 0 .* failed: RankwiseError: 1 of 2 ranks" if is_late else "^1 of 2 ranks started within 0.3 s"
    with pytest.raises(RankwiseError, match=message), rankwise.init(timeout_seconds=0.3):
        pass
    (tmp_path / ("heard" if is_late else "gave-up")).touch()
    while not (tmp_path / "heard").exists():  # the store goes with rank 0
        time.sleep(0.01)


def test_error_in_a_chain_is_known_as_a_lost_connection() -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    assert is_lost_connection(lost)
    assert is_lost_connection(dist.DistNetworkError("reset"))
    wrapped = KeyError("x")
    wrapped.__context__ = lost
    assert not is_lost_connection(wrapped)
    wrapped.__cause__ = lost
    assert is_lost_connection(wrapped)
    assert not is_lost_connection(RuntimeError("shape mismatch"))
    assert not is_lost_connection(ValueError("Connection closed by peer"))
