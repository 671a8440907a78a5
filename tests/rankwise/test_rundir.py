"""A run directory belongs to one job at a time, and says who ran there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rankwise
from rankwise.errors import RankFailedError, RankwiseError
from rankwise.identity import Identity
from rankwise.rundir import RunFile
from rankwise.testing import on_ranks

HOLD = """
import sys, rankwise
with rankwise.init(sys.argv[1]):
    print("open", flush=True)
    sys.stdin.read()
print("closed", flush=True)
sys.stdin.read()
"""


def hold(run_dir: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


def files(run_dir: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_directory_of_a_job_that_runs_is_refused_and_nothing_in_it_changes(tmp_path: Path) -> None:
    with hold(tmp_path) as process:
        try:
            before = files(tmp_path)
            with (
                pytest.raises(RankwiseError, match=rf"written by another job: rank 0, pid {process.pid} on host"),
                rankwise.init(tmp_path),
            ):
                pass
            assert files(tmp_path) == before
        finally:
            process.kill()


def test_directory_is_free_again_when_the_session_ended_though_its_process_lives(tmp_path: Path) -> None:
    with hold(tmp_path) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert "ended" not in json.loads((tmp_path / "run.json").read_text())
            process.stdin.close()
            assert process.stdout.readline() == "closed\n"
            assert json.loads((tmp_path / "run.json").read_text())["ended"]
            with rankwise.init(tmp_path):
                pass
        finally:
            process.kill()


def test_directory_of_a_killed_job_is_taken(tmp_path: Path) -> None:
    with hold(tmp_path) as process:
        process.kill()
        process.wait()
    with rankwise.init(tmp_path):
        assert "ended" not in json.loads((tmp_path / "run.json").read_text())


def test_row_of_a_rank_names_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H100", uuid="8932f937-d72c-4106-c12f-20bd9faed9f6")
    module = SimpleNamespace(
        get_device_properties=lambda index: properties, get_device_name=lambda device: "NVIDIA H100"
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    identity = Identity.resolve({}, hostname="node-a")
    RunFile(tmp_path).write(identity, torch.device("cuda", 2))
    (row,) = json.loads((tmp_path / "run.json").read_text())["ranks"]
    assert row["device"] == "cuda:2"
    assert row["device_name"] == "NVIDIA H100"
    assert row["device_uuid"] == "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"


def test_device_without_names_is_written_without_them(tmp_path: Path) -> None:
    with rankwise.init(tmp_path, device_type="cpu"):
        (row,) = json.loads((tmp_path / "run.json").read_text())["ranks"]
    assert (row["device"], row["device_name"], row["device_uuid"]) == ("cpu", None, None)


@on_ranks(2)
def test_one_job_has_one_session_after_the_other_there(tmp_path: Path) -> None:
    for _ in range(2):
        with rankwise.init(tmp_path):
            rankwise.barrier()


@on_ranks(2)
def test_refusal_of_one_rank_reaches_all(tmp_path: Path) -> None:
    if os.environ["RANK"] == "0":
        row = {
            "process": rankwise.parent.launcher_token().rsplit(":", 2)[0] + f":{os.getppid()}:",
            "pid": 1,
            "host": "h",
        }
        started = rankwise.parent.start_time(os.getppid())
        rows = [row | {"process": row["process"] + str(started)}]
        (tmp_path / "run.json").write_text(json.dumps({"started": "then", "ranks": rows}))
    with (
        pytest.raises(RankFailedError, match="written by another job: rank 0, pid 1 on host h, since then"),
        rankwise.init(tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"ranks": [], "started": ""}', '{"ranks": [{"process": "x"}], "started": ""}']
)
def test_file_that_names_nobody_stops_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with rankwise.init(tmp_path):
        pass
    assert json.loads((tmp_path / "run.json").read_text())["ranks"][0]["rank"] == 0
