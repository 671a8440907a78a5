"""The ranks find each other or say why not, and the cause of a failure is the rank that failed first."""

import importlib
import json
import os
import queue
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

import rankwise
from rankwise import collectives, group, rollcall, waiting
from rankwise import session as session_module
from rankwise import store as store_module
from rankwise.errors import DeviceError, LaunchError, RankFailedError, RankwiseError
from rankwise.group import listen, tell_main, tell_others
from rankwise.testing import on_ranks


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"LOCAL_RANK": "0"}, "Set MASTER_ADDR .* and MASTER_PORT"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "http"}, "MASTER_PORT=http is no port"),
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


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def without_group(world_size: int) -> None:
    """Make this rank forget its group, as if it had been started by hand."""
    dist.destroy_process_group()
    size = str(world_size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)


def meet_at_a_store(world_size: int = 2) -> None:
    """As without a group, but the ranks know a store already, in place of a fixed port that may be taken."""
    is_server = dist.get_rank() == 0
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if is_server else None
    port = rankwise.broadcast_object(server.port if server else 0)
    store_module._store = server or dist.TCPStore("127.0.0.1", port, is_master=False)
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
    assert waiting._link is None


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
    rollcall.STOP_GRACE_SECONDS = 0.2
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
    message = (
        "rank 0 gave up: MissingRanksError: 1 of 2"
        if is_late
        else "^1 of 2 ranks started within 0.3 s; missing: rank 1"
    )
    with pytest.raises(RankwiseError, match=message), rankwise.init(timeout_seconds=0.3):
        pass
    (tmp_path / ("heard" if is_late else "gave-up")).touch()
    while not (tmp_path / "heard").exists():  # the store goes with rank 0
        time.sleep(0.01)


@on_ranks(2)
def test_two_ranks_on_one_device_are_both_named_on_every_rank() -> None:
    meet_at_a_store()
    group.device_uuid = lambda device: "GPU-1"
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"rank 0 .* and rank 1 .* one device") as raised, rankwise.init():
            pass
        assert raised.value.on_every_rank
    with rankwise.init(share_devices=True):
        rankwise.barrier()


@on_ranks(1)
def test_one_process_makes_a_group_when_asked_and_on_loopback_alone() -> None:
    without_group(world_size=1)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    with rankwise.init(make_group=True) as session:
        assert dist.get_world_size() == session.identity.world_size == 1
        total = torch.ones(1)
        dist.all_reduce(total)
        listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert set(listening) <= {"127.0.0.1"}
    assert not dist.is_initialized()


@on_ranks(2)
def test_ranks_that_share_a_machine_listen_on_loopback_alone() -> None:
    meet_at_a_store()
    before = {c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}
    with rankwise.init(device_type="cpu"):
        now = {c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}
        assert {address.ip for address in now - before} <= {"127.0.0.1"}
        assert rankwise.agree(bool(now - before))


@on_ranks(3)
def test_identity_that_was_assumed_is_corrected_before_the_device_is_chosen() -> None:
    meet_at_a_store(world_size=3)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"):
        del os.environ[name]
    assert rankwise.Identity.resolve(os.environ).local_rank == 0
    with rankwise.init() as session:
        identity = session.identity
        assert (identity.local_rank, identity.local_world_size) == (identity.rank, 3)
        assert (identity.node_rank, identity.num_nodes) == (0, 1)
        assert identity.sources["local_rank"] == "store"


@on_ranks(2)
def test_side_group_has_all_ranks_and_its_own_order(tmp_path: Path) -> None:
    def require_own(side: dist.ProcessGroup) -> None:
        assert side is not dist.group.WORLD
        assert (dist.get_world_size(side), dist.get_backend(side)) == (2, "gloo")
        # What runs in it and in the default group may start in another order on another rank.
        rank = dist.get_rank()
        totals = [torch.tensor([rank + 1.0]), torch.tensor([rank + 10.0])]
        groups = [side, None]
        for number in (0, 1) if rank == 0 else (1, 0):
            groups[number] = dist.all_reduce(totals[number], group=groups[number], async_op=True)  # type: ignore[assignment]
        for work in groups:
            work.wait()  # type: ignore[union-attr]
        assert [total.item() for total in totals] == [3.0, 21.0]

    require_own(group.make_side_group())
    meet_at_a_store()
    with rankwise.init():
        require_own(group.make_side_group())
        rankwise.barrier()


@on_ranks(2)
def test_side_group_is_not_waited_for_where_a_rank_has_failed() -> None:
    meet_at_a_store()
    is_failing = os.environ["RANK"] == "1"
    expected, message = (ValueError, "the cause") if is_failing else (RankFailedError, "first: ValueError: the cause")
    with pytest.raises(expected, match=message), rankwise.init(timeout_seconds=50):  # noqa: PT012
        if is_failing:
            raise ValueError("the cause")
        group.make_side_group()


def test_what_waits_for_the_end_is_called_once_the_last_first_unless_it_was_taken_back() -> None:
    called: list[tuple[str, bool]] = []
    forget = {name: group.at_session_end(lambda failed, name=name: called.append((name, failed))) for name in "abc"}  # type: ignore[misc]
    forget["b"]()
    group.end_session(failed=False)
    assert called == [("c", False), ("a", False)]
    for each in forget.values():
        each()  # too late, and no harm
    group.end_session(failed=True)
    assert len(called) == 2


@on_ranks(2)
def test_side_channels_never_wait_for_each_other() -> None:
    meet_at_a_store()
    with rankwise.init() as session:
        connection = session._connection
        assert connection is not None
        stores = [connection._store, connection._link._store, connection._lifeline._store]
        waiting_thread = threading.Thread(target=lambda: stores[0].wait(["never"], timedelta(seconds=2)), daemon=True)
        threading.excepthook = lambda arguments: None
        waiting_thread.start()
        start = time.monotonic()
        for store in stores[1:]:
            store.set(f"key-{session.identity.rank}", "value")
        assert time.monotonic() - start < 1.5
        waiting_thread.join()


@on_ranks(2)
def test_listeners_hear_messages_in_both_directions_and_may_break() -> None:
    heard: queue.Queue[tuple[int, Any]] = queue.Queue()

    def listener(rank: int, content: Any) -> None:
        heard.put((rank, content))
        raise RuntimeError("a listener that breaks")

    with rankwise.init() as session:
        rank = session.identity.rank
        forget = listen("greeting", listener)
        rankwise.barrier()
        assert tell_main("greeting", f"from {rank}")
        if rank == 0:
            told = sorted(heard.get(timeout=30) for _ in range(2))
            assert told == [(0, "from 0"), (1, "from 1")]
            assert tell_others("greeting", "to all")
        else:
            assert heard.get(timeout=30) == (0, "to all")
        forget()
        rankwise.barrier()
        tell_main("greeting", "nobody listens")
        rankwise.barrier()
        assert heard.empty()
    assert not tell_main("greeting", "nobody is there")
