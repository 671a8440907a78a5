"""Eight ranks that all log as fast as they can: few lines, and every record is in the count of one of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import rankwise

log = rankwise.get_logger("train")
with rankwise.init(sys.argv[1], device_type="cpu", timeout_seconds=60) as session:
    rankwise.barrier("together")
    for number in range(3000):
        word = "".join("abcdefghij"[int(digit)] for digit in str(number))
        log.warning("again %d", number)
        log.warning("%s of %s", word, "abcdefgh"[session.identity.rank])
    rankwise.barrier("said")
"""
NUM_RECORDS = 8 * 2 * 3000


def num_told(line: str) -> int:
    """For how many records a line stands."""
    count = re.search(r"\((?:x|\.\.\. )([0-9,]+)", line)
    return 1 if count is None else int(count[1].replace(",", ""))


@pytest.mark.slow
def test_flood_of_eight_ranks_is_limited_and_counted(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    command = [sys.executable, "-m", "rankwise", "run", "--nproc-per-node", "8", str(script), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if re.match(r"\S+ WARNING ", line)]
    assert sum(map(num_told, lines)) == NUM_RECORDS, "\n".join(lines[-30:])
    assert len(lines) < NUM_RECORDS / 10
    for rank in range(8):
        content = (tmp_path / f"run/logs/rank-{rank:05d}.jsonl").read_bytes()
        assert content.count(b'"level": "WARNING"') == 6000
