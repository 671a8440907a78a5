"""`rankwise whoami` tells the truth in one line, or says what is wrong, and needs no torch for it."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from rankwise.cli import main
from rankwise.errors import DeviceError
from rankwise.identity import Identity
from rankwise.whoami import MAX_LINE_BYTES, json_line, table

FIELDS = {
    "rank",
    "local_rank",
    "node_rank",
    "world_size",
    "local_world_size",
    "num_nodes",
    "launcher",
    "hostname",
    "job_id",
    "is_main_process",
    "is_local_main_process",
    "device",
    "sources",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "job-7",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "2",
    "CUDA_VISIBLE_DEVICES": "0,1",
}


def run(*options: str, environ: dict[str, str] | None = None, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """`rankwise whoami` in a process whose environment is `environ` and nothing of a launcher."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "rankwise", "whoami", *options],
        env=kept | (environ or {}),
        text=True,
        check=False,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kwargs,
    )


def test_json_is_one_line_with_every_field() -> None:
    done = run("--json", environ=TORCHRUN)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert done.stdout.endswith("}\n")
    told = json.loads(done.stdout)
    assert told.keys() == FIELDS
    assert told | {"sources": None} == {
        "rank": 3,
        "local_rank": 1,
        "node_rank": 1,
        "world_size": 4,
        "local_world_size": 2,
        "num_nodes": 2,
        "launcher": "torchrun",
        "hostname": socket.gethostname(),
        "job_id": "job-7",
        "is_main_process": False,
        "is_local_main_process": False,
        "device": "cuda:1",
        "sources": None,
    }
    assert told["sources"]["rank"] == "RANK"
    assert told["sources"]["node_rank"] == "GROUP_RANK"


def test_device_is_null_where_the_environment_does_not_say() -> None:
    told = json.loads(run("--json").stdout)
    assert told["device"] is None
    assert (told["launcher"], told["world_size"], told["is_main_process"]) == ("single", 1, True)


@pytest.mark.parametrize(("options", "last"), [([], b"shows\n"), (["--json"], b"}\n")])
def test_all_leaves_in_one_write(options: list[str], last: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    written: list[tuple[int, bytes]] = []

    def write(descriptor: int, data: bytes) -> int:
        written.append((descriptor, data))
        return len(data)

    monkeypatch.setattr(os, "write", write)
    assert main(["whoami", *options]) == 0
    assert [descriptor for descriptor, _ in written] == [1]
    assert written[0][1].endswith(last)


def test_neither_json_nor_the_table_imports_torch() -> None:
    code = (
        "import sys; from rankwise.cli import main; status = main(['whoami', '--json']) or main(['whoami']);"
        "sys.exit(status or (3 if 'torch' in sys.modules or 'numpy' in sys.modules else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [[], ["--json"], ["--probe"]])
def test_contradiction_is_one_message_and_status_two(options: list[str]) -> None:
    done = run(*options, environ={"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "RANK=4 WORLD_SIZE=4" in done.stderr


@pytest.mark.parametrize("options", [["--jsonl"], ["--json", "-x"], ["now"]])
def test_unknown_option_gives_usage_and_status_two(options: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["whoami", *options]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "usage: rankwise whoami" in captured.err
    assert f"error: {options[-1]!r} is no option" in captured.err


def test_help_goes_to_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["whoami", "--help"]) == 0
    assert capfd.readouterr().out.startswith("usage: rankwise whoami")


def test_reader_that_has_gone_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run("--json", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk_is_told_in_one_message() -> None:
    with open("/dev/full", "wb") as full:
        done = run("--json", stdout=full)
    assert done.returncode == 1
    assert re.fullmatch(r"error: the output cannot be written: No space left on device\..*\n", done.stderr)


def test_table_names_the_source_of_every_value() -> None:
    done = run(environ=TORCHRUN)
    assert (done.returncode, done.stderr) == (0, "")
    first, *lines = done.stdout.splitlines()
    assert first == "rank 3 of 4"
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines}
    assert rows.keys() == FIELDS - {"sources"}
    assert rows["rank"] == ["3", "RANK"]
    assert rows["local_world_size"] == ["2", "LOCAL_WORLD_SIZE"]
    assert rows["is_main_process"] == ["no"]
    assert rows["device"] == ["cuda:1", "the devices that the environment shows"]
    assert rows["hostname"] == [socket.gethostname(), "this system's own name"]
    starts = {line.index(line.split()[1], len(line.split()[0])) for line in lines}
    assert len(starts) == 1, "the values are not aligned"


def test_probe_reports_what_torch_gives(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("rankwise.device.select_device", lambda identity: f"cuda:{identity.local_rank + 5}")
    assert main(["whoami", "--json", "--probe"]) == 0
    assert json.loads(capfd.readouterr().out)["device"] == "cuda:5"


def test_probe_without_a_device_is_one_message_and_status_two(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def select_device(identity: Identity) -> None:
        raise DeviceError(f"rank {identity.rank} has none of the 0 devices")

    monkeypatch.setattr("rankwise.device.select_device", select_device)
    assert main(["whoami", "--json", "--probe"]) == 2
    assert capfd.readouterr() == ("", "error: rank 0 has none of the 0 devices\n")


def test_probe_asks_this_machine(capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    assert main(["whoami", "--json", "--probe"]) == 0
    device = torch.device(json.loads(capfd.readouterr().out)["device"])
    assert device.type == (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type


@pytest.mark.parametrize(
    ("hostname", "job_id", "source"),
    [
        ("h" * 64, "1234567", "S" * 300),
        ("h" * 253, "1234567", "SLURM_STEP_TASKS_PER_NODE"),
        ("host-a", "\udcff" * 5000, "RANK"),
        ("\u3042" * 2000, "j" * 2000, "x" * 5000),
    ],
)
def test_json_line_stays_short_whatever_the_names(hostname: str, job_id: str, source: str) -> None:
    identity = Identity(8, 1, 4, 16, 2, 8, "slurm", hostname, job_id, dict.fromkeys(FIELDS - {"device"}, source))
    line = json_line(identity, "cuda:1")
    assert len(line.encode()) + 1 < MAX_LINE_BYTES
    told = json.loads(line)
    assert told.keys() == FIELDS
    assert (told["rank"], told["local_rank"], told["device"]) == (8, 1, "cuda:1")
    assert told["hostname"][:9] == hostname[:9]
    if len(hostname + job_id) < 300:
        assert (told["hostname"], told["job_id"]) == (hostname, job_id), "the sources should have been cut first"


def test_table_shows_what_cannot_be_printed() -> None:
    identity = replace(Identity.resolve({}, hostname="host-a"), job_id="a\nb\x1b[31m")
    text = table(identity, None, probed=False)
    assert r"'a\nb\x1b[31m'" in text
    assert len(text.splitlines()) == 1 + len(FIELDS - {"sources"})


def test_no_job_is_nobodys_assumption() -> None:
    identity = Identity.resolve({}, hostname="host-a")
    told = json.loads(json_line(identity, None))
    assert (told["job_id"], told["sources"]["job_id"]) == (None, "none")
    (line,) = (line for line in table(identity, None, probed=False).splitlines() if line.startswith("job_id"))
    assert line.split() == ["job_id", "-", "-"]
