"""Workers have files of their own, and speak through the rank that made them."""

import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise import logs
from rankwise.identity import Identity
from rankwise.logs.children import ChildLine

IDENTITY = Identity(1, 1, 0, 2, 2, 1, hostname="node-a")
logger = logs.get_logger("test.children")


class Clips(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        logger.info("clip %d", index)
        if index == 3:
            logger.warning("clip %d is broken", index)
        return os.getpid()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def worker_records(run_dir: Path) -> list[dict[str, Any]]:
    return [record for path in (run_dir / "logs").glob("rank-00001.worker-*.jsonl") for record in read(path)]


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_data_loader_workers_write_files_of_their_own(context: str, tmp_path: Path) -> None:
    handle = logs.configure(IDENTITY, tmp_path, device="cpu")
    logger.info("waits while the fork happens")
    loader = torch.utils.data.DataLoader(
        Clips(), num_workers=2, multiprocessing_context=context, worker_init_fn=logs.worker_init()
    )
    pids = {int(pid) for pid in loader}
    handle.close()
    records = worker_records(tmp_path)
    assert len(pids) == 2
    assert {record["pid"] for record in records} == pids
    assert {record["worker"] for record in records} == {0, 1}
    assert {record["rank"] for record in records} == {1}
    assert sorted(record["message"] for record in records) == [
        "clip 0", "clip 1", "clip 2", "clip 3", "clip 3 is broken",
    ]  # fmt: skip
    assert [record["message"] for record in read(tmp_path / "logs/rank-00001.jsonl")] == [
        "waits while the fork happens"
    ]


def test_child_that_nobody_hears_prints_labelled(tmp_path: Path) -> None:
    code = f"""
import os
from rankwise import logs
from rankwise.identity import Identity
handle = logs.configure(Identity(1, 1, 0, 2, 2, 1, hostname="node-a"), {str(tmp_path)!r})
if os.fork() == 0:
    logs._open._handler.children._at_child.close()
    logs.get_logger("a").warning("alone")
    raise SystemExit
os.wait()
handle.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "WARNING [rank 1, node-a, worker MainProcess] a: alone\n" in done.stderr
    assert [record["message"] for record in worker_records(tmp_path)] == ["alone"]


def test_forked_process_that_becomes_a_rank_writes_that_rank_s_file(tmp_path: Path) -> None:
    code = f"""
import os
from rankwise import logs
from rankwise.identity import Identity
logs.configure(Identity(0, 0, 0, 2, 2, 1), {str(tmp_path)!r})
rank = 1 if os.fork() == 0 else 0
if rank:
    logs.configure(Identity(1, 1, 0, 2, 2, 1), {str(tmp_path)!r})
logs.get_logger("a").info("main", ranks="main")
logs.get_logger("a").info("rank %d", rank)
if not rank:
    os.wait()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    said = {path.name: [record["message"] for record in read(path)] for path in (tmp_path / "logs").iterdir()}
    assert said == {"rank-00000.jsonl": ["main", "rank 0"], "rank-00001.jsonl": ["rank 1"]}


def test_init_of_spawned_workers_pickles_and_does_nothing_without_a_session() -> None:
    init = pickle.loads(pickle.dumps(logs.worker_init()))
    before = list(logging.getLogger().handlers)
    init(3)
    assert logging.getLogger().handlers == before


def test_line_from_children_never_waits(tmp_path: Path) -> None:
    line = ChildLine(lambda record: None)
    answers = [line.send({"message": "x" * 1000}) for _ in range(10_000)]
    line.close()
    assert answers[0] is True
    assert answers[-1] is False
    assert line.send({}) is False


def test_close_takes_what_children_have_sent_before() -> None:
    heard: list[dict[str, Any]] = []
    line = ChildLine(heard.append)
    line.listen()
    for number in range(5):
        line.send({"number": number})
    line.close()
    assert [record["number"] for record in heard] == [0, 1, 2, 3, 4]


def say_and_end(init: logs.WorkerInit | None) -> None:
    """The work of a process of its own, which ends at once."""
    if init is not None:
        init()
    logger.warning("from a child")
    for number in range(20):
        logger.info("info %d", number)
    print("never ended", end="")


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_process_that_ends_at_once_has_written_all_and_its_warning_is_sent_by_its_rank(
    context: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sent: list[dict[str, Any]] = []
    handle = logs.configure(IDENTITY, tmp_path, device="cpu", capture_prints=context == "fork")
    logs.set_channel(lambda record: sent.append(record) is None)
    make_process: Any = multiprocessing.get_context(context).Process
    process = make_process(target=say_and_end, args=(None if context == "fork" else logs.worker_init(),), name="Helper")
    process.start()
    process.join(60)
    handle.close()
    printed = ["never ended"] if context == "fork" else []
    said = [record["message"] for record in worker_records(tmp_path)]
    assert said == ["from a child", *(f"info {number}" for number in range(20)), *printed]
    assert [(record["message"], record["pid"], record["worker"], record["rank"]) for record in sent] == [
        ("from a child", process.pid, "Helper", 1)
    ]
    assert capfd.readouterr().err == ""


def test_init_that_travels_otherwise_than_to_a_process_that_starts_has_no_way_to_the_rank(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handle = logs.configure(IDENTITY, tmp_path, device="cpu")
    init = pickle.loads(pickle.dumps(logs.worker_init()))
    handle.close()
    init()
    try:
        logger.warning("from a child")
    finally:
        assert logs._open is not None
        logs._open.close()
    assert "WARNING [rank 1, node-a, cpu, worker MainProcess] test.children: from a child\n" in capfd.readouterr().err
