"""What a person sees of eight ranks, and what their files hold: really launched."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, sys, time
import rankwise

log = rankwise.get_logger("train")
with rankwise.init(sys.argv[1], device_type="cpu", timeout_seconds=60) as session:
    rank = session.identity.rank
    session.set_step(7)
    log.info("rank %d is here", rank)
    log.info("all are here", ranks="main")
    rankwise.barrier("together")
    log.warning("the disk is %d %% full", 90 + rank)
    if rank == 5:
        log.warning("my fan is loud")
    rankwise.barrier("warned")
    time.sleep(0.5)
    if rank == 3:
        raise ValueError("rank 3 has had enough of " + os.environ["HUB_TOKEN"])
    rankwise.barrier("never")
"""

SECRET = "do-not-tell-anybody"


def test_console_of_eight_ranks_shows_each_thing_once_and_the_files_hold_all(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "rankwise", "run", "--nproc-per-node", "8", str(script), str(run_dir)]
    (tmp_path / "tmp").mkdir()
    environ = os.environ | {"HUB_TOKEN": SECRET, "TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environ)
    assert done.returncode == 1
    console, _, last = done.stderr.partition("rankwise: rank 3 (")
    lines = [line for line in console.splitlines() if not line.startswith("[W")]  # torch, of a slow name service
    assert [line for line in lines if "the disk is" in line and "x8, ranks 0-7" in line], done.stderr
    assert sum("the disk is" in line for line in lines) == 1, done.stderr
    fans = [line for line in lines if "my fan is loud" in line]
    assert len(fans) == 1
    assert re.search(r"rank 5\b.*cpu", fans[0]), fans
    assert sum("is here" in line for line in lines) == 1
    assert sum("all are here" in line for line in lines) == 1
    assert len(lines) == 5, done.stderr  # and the line of the start
    assert last.count("Traceback") == 1
    assert last.rstrip().endswith("ValueError: rank 3 has had enough of ***")
    assert SECRET not in done.stderr + done.stdout

    for rank in range(8):
        path = run_dir / f"logs/rank-{rank:05d}.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        messages = [record["message"] for record in records]
        assert f"rank {rank} is here" in messages
        assert f"the disk is {90 + rank} % full" in messages
        assert ("my fan is loud" in messages) is (rank == 5)
        assert ("all are here" in messages) is (rank == 0)
        assert {record["rank"] for record in records} == {rank}
        assert all(record["step"] == 7 for record in records if record["logger"] == "train")
        ends = [record for record in records if "exception" in record]
        assert ends[-1]["exception"]["type"] == ("ValueError" if rank == 3 else "RankFailedError")
    # The error files of the launcher too.
    assert [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()] == []
