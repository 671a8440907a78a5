"""`rankwise doctor`, as people start it: real processes, some of which go missing."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

DOCTOR = [sys.executable, "-m", "rankwise", "doctor"]
PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
SECONDS = 100.0
"""A loaded machine takes its time to import torch; nothing here waits that long when all is well."""


@pytest.fixture(autouse=True)
def one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PLACES, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def by_hand(num_ranks: int, *, num_nodes: int = 1) -> list[dict[str, str]]:
    """The variables of each rank, as a launcher of one's own would set them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    per_node = num_ranks // num_nodes
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % per_node),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(per_node),
            "GROUP_RANK": str(rank // per_node),
            "GROUP_WORLD_SIZE": str(num_nodes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for rank in range(num_ranks)
    ]


@contextlib.contextmanager
def start(command: list[str], variables: Mapping[str, str], cwd: Path) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        command,
        env={**os.environ, **variables},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run(
    ranks: list[dict[str, str]], *arguments: str, folders: list[Path], command: list[str] | None = None
) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each rank, all started at once."""
    with contextlib.ExitStack() as stack:
        line = [*(command or DOCTOR), *arguments]
        started = [stack.enter_context(start(line, rank, folder)) for rank, folder in zip(ranks, folders, strict=True)]
        said = [process.communicate(timeout=SECONDS) for process in started]
        return [(process.returncode, *words) for process, words in zip(started, said, strict=True)]


def alone(*arguments: str, cwd: Path, **variables: str) -> tuple[int, str, str]:
    return run([variables], *arguments, folders=[cwd])[0]


def checks_of(output: str) -> dict[str, dict[str, Any]]:
    (line,) = output.splitlines()
    return {check["name"]: check for check in json.loads(line)["checks"]}


def test_one_process_without_a_launcher_is_examined(tmp_path: Path) -> None:
    status, output, errors = alone("--json", cwd=tmp_path)
    checks = checks_of(output)
    assert {check["status"] for check in checks.values()} <= {"pass", "warn"}
    assert checks["all-reduce"]["message"] == "one process: nothing to compare"
    assert str(tmp_path) in checks["directory"]["message"]
    assert (json.loads(output)["ranks"], json.loads(output)["ok"]) == (1, True)
    assert (status, errors) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_gets_plain_lines(tmp_path: Path) -> None:
    status, output, _ = alone(cwd=tmp_path)
    assert status == 0
    assert output.startswith("pass  rendezvous ")
    assert output.isascii()
    assert "\x1b" not in output


def test_ranks_of_torchrun_are_examined_together_and_told_once(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "rankwise", "doctor"]
    ((status, output, _),) = run([{}], "--json", folders=[tmp_path], command=torchrun)
    assert status == 0
    checks = checks_of(output)
    assert json.loads(output)["ranks"] == 2
    assert "started by torchrun" in checks["identity"]["message"]
    assert "over 2 ranks" in checks["all-reduce"]["message"]
    assert "all-reduce-nodes" not in checks


def test_two_nodes_are_measured_against_each_other(tmp_path: Path) -> None:
    main, other = run(by_hand(2, num_nodes=2), "--json", folders=[tmp_path] * 2)
    checks = checks_of(main[1])
    assert (main[0], other) == (0, (0, "", ""))
    assert "2 ranks on 2 nodes" in checks["identity"]["message"]
    assert "GB/s" in checks["all-reduce-nodes"]["message"]


def test_a_directory_that_one_rank_does_not_see_fails_on_every_rank(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        (folder / "runs").mkdir(parents=True)
    main, other = run(by_hand(2), "--json", "--dir", "runs", "--timeout", "20", folders=folders)
    check = checks_of(main[1])["directory"]
    assert check["status"] == "fail"
    assert str(folders[0] / "runs") in check["message"]
    assert f"rank 1: {folders[1] / 'runs'}" in check["message"]
    assert "mount" in check["advice"]
    assert json.loads(main[1])["ok"] is False
    assert [main[0], other[0]] == [1, 1]
    assert list((folders[0] / "runs").iterdir()) == []


def test_a_directory_that_is_not_there_fails(tmp_path: Path) -> None:
    status, output, _ = alone("--json", "--dir", "no", cwd=tmp_path)
    assert status == 1
    checks = checks_of(output)
    assert "No such file or directory" in checks["directory"]["message"]
    assert (checks["disk"]["status"], checks["disk"]["message"]) == (
        "fail",
        f"{tmp_path / 'no'}: there is no such folder",
    )


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    status, output, errors = alone("--json", "--timeout", "2", cwd=tmp_path, **by_hand(2)[0])
    checks = checks_of(output)
    assert status == 1
    assert checks["rendezvous"]["status"] == "fail"
    assert "rank 1" in checks["rendezvous"]["message"]
    assert "(--timeout)" in checks["rendezvous"]["message"]
    assert checks["shared-memory"]["status"] in ("pass", "warn")  # what one rank can know is told all the same
    assert "Traceback" not in errors


def test_where_the_ranks_cannot_know_the_meeting_point_nothing_is_said_of_late_ones(tmp_path: Path) -> None:
    places = {name: value for name, value in by_hand(2)[0].items() if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    status, output, _ = alone("--json", "--timeout", "2", cwd=tmp_path, **places)
    check = checks_of(output)["rendezvous"]
    assert (status, check["status"], check["advice"]) == (1, "fail", None)
    assert "2 processes on 1 node cannot find each other" in check["message"]
    assert "Set MASTER_ADDR" in check["message"]


def test_without_a_main_process_the_others_say_so(tmp_path: Path) -> None:
    status, output, errors = alone("--timeout", "2", cwd=tmp_path, **by_hand(2)[1])
    assert (status, output) == (1, "")
    assert errors.startswith("rankwise doctor: rank 1 on ")
    assert len(errors.splitlines()) == 1


def test_a_second_process_of_one_rank_says_so(tmp_path: Path) -> None:
    main, other = by_hand(2)
    results = run([main, other, other], "--timeout", "15", folders=[tmp_path] * 3)
    refused = [errors for status, _, errors in results[1:] if status == 1]
    assert refused
    assert any("rank 1" in errors and "Traceback" not in errors for errors in refused)


def test_a_network_interface_that_is_not_there_is_told_of_the_rank_that_names_it(tmp_path: Path) -> None:
    ranks = by_hand(2)
    ranks[1]["GLOO_SOCKET_IFNAME"] = "nope0"
    main, other = run(ranks, "--json", folders=[tmp_path] * 2)
    check = checks_of(main[1])["variables"]
    assert check["status"] == "fail"
    assert "rank 1: GLOO_SOCKET_IFNAME=nope0" in check["message"]
    assert [main[0], other[0]] == [1, 1]


DYING = """
import os, signal, sys
from rankwise.doctor import examine, main

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "1":
    examine.probe_all_reduce = die
sys.exit(main(["--json"]))
"""


def test_what_was_found_before_a_rank_died_is_told_with_its_name(tmp_path: Path) -> None:
    main, _ = run(by_hand(2), folders=[tmp_path] * 2, command=[sys.executable, "-c", DYING])
    checks = checks_of(main[1])
    assert main[0] == 1
    assert checks["directory"]["status"] == "pass"
    assert checks["connection"]["status"] == "fail"
    assert "rank 1" in checks["connection"]["message"]


def test_a_contradictory_environment_is_status_two_and_one_message(tmp_path: Path) -> None:
    status, output, errors = alone("--json", cwd=tmp_path, RANK="4", WORLD_SIZE="2", LOCAL_RANK="0")
    assert (status, output) == (2, "")
    assert "RANK=4" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("arguments", [["--timeout", "0"], ["--timeout", "soon"], ["--timeout", "nan"], ["--fast"]])
def test_options_that_are_not_understood_are_status_two(arguments: list[str], tmp_path: Path) -> None:
    status, output, errors = alone(*arguments, cwd=tmp_path)
    assert (status, output) == (2, "")
    assert "usage: rankwise doctor" in errors


def test_an_output_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            DOCTOR, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, timeout=SECONDS, check=False
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
