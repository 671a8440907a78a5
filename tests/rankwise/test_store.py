"""Ranks meet at one store, through an address or through a file, or say in time why they do not."""

import functools
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import pytest
import torch.distributed as dist

from rankwise import store as store_module
from rankwise.errors import LaunchError, RankwiseError, StoppedError
from rankwise.identity import Identity
from rankwise.parent import start_time
from rankwise.rollcall import call_roll
from rankwise.store import _meet, _resolvable, _told_port, find_store, machine, wait_until
from rankwise.testing import on_ranks

LONG = timedelta(seconds=60)
SHORT = timedelta(seconds=0.5)
OPEN_MPI = {"PMIX_NAMESPACE": "prterun-1@1"}


def never() -> bool:
    return False


def identity_of(rank: int, world_size: int = 2, launcher: str = "env") -> Identity:
    sources = {"local_world_size": "LOCAL_WORLD_SIZE"}
    return Identity(rank, rank, 0, world_size, world_size, 1, launcher, "here", sources=sources)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files is the test's own, and nobody says where to meet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up on a port within a second."""
    monkeypatch.setattr(store_module, "_PORT_SECONDS", 0.5)
    monkeypatch.setattr(store_module, "_ANSWER_SECONDS", 0.5)


@contextmanager
def listening(*, answer: bytes | None = None) -> Iterator[int]:
    """The port of a program that is no store; without an answer it takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        ended = threading.Event()

        def serve() -> None:
            while answer is not None and not ended.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            ended.set()
            thread.join()


def closed_port() -> int:
    with listening() as port:
        return port


def meet_at(monkeypatch: pytest.MonkeyPatch, address: str, port: int) -> None:
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", str(port))


def meet_in(folder: Path, environ: dict[str, str], launcher: str) -> Identity:
    """Make this rank of a test one that `launcher` started, which says nothing of where to meet."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(environ)
    tempfile.tempdir = str(folder)
    identity = Identity.resolve(os.environ)
    assert identity.launcher == launcher
    return identity


def left_by_dead_process(path: Path, port: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_time(process.pid)
    process.communicate()
    path.write_text(json.dumps({"port": port, "pid": process.pid, "started": started}))


@pytest.mark.parametrize("launcher", ["openmpi", "mpich"])
@on_ranks(3)
def test_processes_of_one_node_meet_through_a_file(tmp_path: Path, launcher: str) -> None:
    rank = os.environ["RANK"]
    environs = {
        "openmpi": {
            "OMPI_COMM_WORLD_RANK": rank,
            "OMPI_COMM_WORLD_SIZE": "3",
            "OMPI_COMM_WORLD_LOCAL_RANK": rank,
            "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
            **OPEN_MPI,
        },
        "mpich": {"PMI_RANK": rank, "PMI_SIZE": "3", "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": "3"},
    }
    identity = meet_in(tmp_path, environs[launcher], launcher)
    found = find_store(identity, LONG, never)
    found.set(f"here/{rank}", rank)
    assert [found.get(f"here/{other}") for other in range(3)] == [b"0", b"1", b"2"]
    assert find_store(identity, LONG, never) is found
    folder = tmp_path / f"rankwise-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(list(folder.iterdir())) == 1
    dist.barrier()  # the store goes with rank 0


@on_ranks(2)
def test_file_of_a_dead_process_is_ignored(tmp_path: Path) -> None:
    tempfile.tempdir = str(tmp_path)
    folder = tmp_path / f"rankwise-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{os.getppid()}-{start_time(os.getppid())}.json"  # the name without a token
    rank = dist.get_rank()
    if rank == 1:
        left_by_dead_process(path, closed_port())
    dist.barrier()
    assert path.exists()
    assert _told_port(path) is None
    dist.barrier()
    if rank == 0:
        time.sleep(0.2)  # the other has looked by then
    store = find_store(identity_of(rank), LONG, never)
    store.set(str(rank), "")
    store.wait(["0", "1"], LONG)
    dist.barrier()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "5", "{}", '{"port": null, "pid": 1, "started": 1}', '{"port": 1, "pid": "x", "started": 1}'],
)
def test_file_that_tells_no_port_is_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / "job.json").write_text(content)
    assert _told_port(tmp_path / "job.json") is None
    assert _told_port(tmp_path / "none.json") is None


def test_file_of_a_process_whose_number_is_used_again_is_ignored(tmp_path: Path) -> None:
    path, here = tmp_path / "job.json", {"port": 1234, "pid": os.getpid(), "started": start_time(os.getpid())}
    path.write_text(json.dumps(here))
    assert _told_port(path) == 1234
    path.write_text(json.dumps(here | {"started": 1}))
    assert _told_port(path) is None


def test_rank_that_never_hears_of_rank_0_says_so(temporary: Path) -> None:
    with pytest.raises(RankwiseError, match=r"rank 1 of 2 did not hear from rank 0 on here within 0\.5 s.*MASTER_ADDR"):
        _meet(identity_of(1), SHORT)


@pytest.mark.parametrize("fault", ["mode", "owner", "link", "file"])
def test_folder_that_others_can_change_is_refused(temporary: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    folder = temporary / f"rankwise-{os.getuid()}"
    if fault == "file":
        folder.touch(mode=0o600)
    elif fault == "link":
        (temporary / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to("elsewhere")
    elif fault == "owner":
        somebody = os.getuid() + 1
        monkeypatch.setattr(store_module.os, "getuid", lambda: somebody)
        folder = temporary / f"rankwise-{somebody}"
        folder.mkdir(mode=0o700)
    else:
        folder.mkdir()
        folder.chmod(0o755)
    with pytest.raises(LaunchError, match=rf"{folder} is not this user's alone\. Remove it, or set MASTER_ADDR"):
        _meet(identity_of(0), SHORT)


def test_folder_that_cannot_be_written_is_an_error_of_ours(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "gone"))
    with pytest.raises(RankwiseError, match=r"rank 0 cannot tell the others its port .*gone.*Set MASTER_ADDR"):
        _meet(identity_of(0), SHORT)


@pytest.mark.parametrize("at_once", [False, True])
@on_ranks(2)
def test_second_process_that_claims_rank_0_is_named(tmp_path: Path, at_once: bool) -> None:
    tempfile.tempdir = str(tmp_path)
    if at_once:
        make = store_module.TCPStore

        @functools.wraps(make)
        def make_slowly(*arguments: object, **options: object) -> object:
            time.sleep(0.3)
            return make(*arguments, **options)

        store_module.TCPStore = make_slowly
    dist.barrier()
    if not at_once and dist.get_rank() == 1:
        time.sleep(0.5)
    store = find_store(identity_of(0), LONG, never)
    with pytest.raises(LaunchError, match=r"two processes claim rank 0: pid \d+ on here and pid \d+ on here"):
        call_roll(store, identity_of(0), timedelta(seconds=5), never)
    dist.barrier()


@on_ranks(2)
def test_second_process_that_claims_rank_0_at_an_address_is_named() -> None:
    port = closed_port() if dist.get_rank() == 0 else 0
    ports: list[int] = [port]
    dist.broadcast_object_list(ports)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[0]))
    store = find_store(identity_of(0), LONG, never)
    with pytest.raises(LaunchError, match="two processes claim rank 0"):
        call_roll(store, identity_of(0), timedelta(seconds=5), never)
    dist.barrier()


@pytest.mark.parametrize("answer", [None, b"HTTP/1.0 400 Bad Request\r\n\r\n", b""])
@pytest.mark.usefixtures("quick")
def test_port_of_another_program_is_named_in_time(monkeypatch: pytest.MonkeyPatch, answer: bytes | None) -> None:
    begin = time.monotonic()
    with listening(answer=answer) as port:
        meet_at(monkeypatch, "127.0.0.1", port)
        with pytest.raises(RankwiseError, match=rf"rank 0 cannot open a store at 127\.0\.0\.1:{port}: another program"):
            _meet(identity_of(0), LONG)
        with pytest.raises(RankwiseError, match=rf"rank 1 of 2 found no rank 0 at 127\.0\.0\.1:{port} within 0\.5 s:"):
            _meet(identity_of(1), SHORT)
    assert time.monotonic() - begin < 30


@pytest.mark.usefixtures("quick")
def test_address_without_rank_0_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    meet_at(monkeypatch, "127.0.0.1", closed_port())
    with pytest.raises(RankwiseError, match=r"rank 1 of 2 found no rank 0 at 127\.0\.0\.1:\d+ within 0\.5 s: .*open"):
        _meet(identity_of(1), SHORT)


@pytest.mark.usefixtures("quick")
def test_address_that_is_not_the_main_process_s_own_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    meet_at(monkeypatch, "192.0.2.1", closed_port())  # for documentation: nobody has it
    with pytest.raises(RankwiseError, match=r"rank 0 cannot open a store at 192\.0\.2\.1:\d+: .*Set MASTER_ADDR"):
        _meet(identity_of(0), SHORT)


def test_ranks_meet_at_the_address_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    meet_at(monkeypatch, "127.0.0.1", closed_port())
    host = _meet(identity_of(0), LONG)
    host.set("key", "value")
    assert _meet(identity_of(1), LONG).get("key") == b"value"


def test_ranks_of_a_later_attempt_do_not_find_what_the_last_one_left(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meet_at(monkeypatch, "127.0.0.1", agent.port)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    first = _meet(identity_of(0, launcher="torchrun"), LONG)  # rank 0 hosts nothing
    first.set("key", "first")
    assert _meet(identity_of(1, launcher="torchrun"), LONG).get("key") == b"first"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not _meet(identity_of(0, launcher="torchrun"), LONG).check(["key"])


def test_stop_request_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_store", None)
    monkeypatch.setattr(wait_until, "__defaults__", (0.1,))
    meet_at(monkeypatch, "127.0.0.1", closed_port())
    with pytest.raises(StoppedError, match="rank 1 was asked to stop before it found the other ranks"):
        find_store(identity_of(1), timedelta(seconds=2), lambda: True)
    for thread in threading.enumerate():
        if thread.name == "rankwise-rendezvous":
            thread.join(30)


def test_search_that_failed_may_be_tried_again(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.setattr(store_module, "_store", None)
    with pytest.raises(RankwiseError, match="did not hear from rank 0"):
        find_store(identity_of(1), SHORT, never)
    assert find_store(identity_of(0), LONG, never) is find_store(identity_of(0), SHORT, never)


def test_wait_ends_when_done_or_when_the_time_is_up() -> None:
    begin = time.monotonic()
    assert wait_until(lambda: time.monotonic() - begin > 0.1, 60.0, never)
    assert wait_until(lambda: True, 0.0, never)
    assert not wait_until(never, 0.1, never)
    assert time.monotonic() - begin < 30


def test_wait_of_a_rank_that_is_to_stop_ends_after_its_grace() -> None:
    begin = time.monotonic()
    assert not wait_until(never, 600.0, lambda: True, grace_seconds=0.2)
    assert 0.2 <= time.monotonic() - begin < 30
    assert wait_until(lambda: time.monotonic() - begin > 0.3, 600.0, lambda: True, grace_seconds=60.0)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for Slurm's command that knows node n7; no name is known to the name service but localhost."""
    path = tmp_path / "scontrol"
    path.write_text(
        "#!/bin/sh\n"
        'echo "$@" >> "$0.log"\n'
        '[ "$5" = n7 ] || [ "$4" = n7 ] || { echo "Node not found" >&2; exit 1; }\n'
        'echo "NodeName=n7 Arch=x86_64 NodeAddr=10.1.2.7 NodeHostName=n7 Version=23"\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    known = socket.getaddrinfo

    def look_up(name: str, *more: object) -> object:
        if name == "localhost" or not name.isascii():
            return known(name, *more)  # type: ignore[arg-type]
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    return path


@pytest.mark.parametrize(
    ("name", "address"),
    [("n7", "10.1.2.7"), ("n8", "n8"), ("localhost", "localhost")],
)
@pytest.mark.usefixtures("scontrol")
def test_slurm_is_asked_for_a_node_that_the_name_service_does_not_know(name: str, address: str) -> None:
    assert _resolvable(name) == address


def test_slurm_is_asked_only_in_its_jobs_and_where_the_name_is_not_known(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _resolvable("localhost")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert _resolvable("n7") == "n7"
    assert not Path(f"{scontrol}.log").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    _resolvable("n7")
    assert Path(f"{scontrol}.log").read_text() == "show node --oneliner n7\n"


def test_name_that_cannot_be_one_is_left_as_it_is(scontrol: Path) -> None:
    name = "\u00e4" * 80
    assert _resolvable(name) == name
    scontrol.unlink()
    assert _resolvable("n7") == "n7"


def missing(reason: str) -> NoReturn:
    """Skip the test; where everything has to be there, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (nothing may be missing where CI=true)")
    pytest.skip(reason)


def test_machine_is_the_same_in_every_process_and_another_in_another_network() -> None:
    ask = [sys.executable, "-c", "from rankwise.store import machine; print(machine())"]
    assert subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip() == machine()
    if os.getuid() != 0 or shutil.which("unshare") is None:
        missing("only root makes network namespaces, with unshare")
    elsewhere = subprocess.run(["unshare", "--net", *ask], capture_output=True, text=True, check=True).stdout.strip()
    assert elsewhere.partition(":")[0] == machine().partition(":")[0]
    assert elsewhere != machine()
