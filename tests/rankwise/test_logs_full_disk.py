"""A file system that is really full: nothing waits, warnings are seen, and the file says what it lacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, time
from rankwise import logs
from rankwise.identity import Identity

run_dir = sys.argv[1]
with open(os.path.join(run_dir, "filler"), "wb", buffering=0) as filler:
    filler.write(bytes(900 << 10))
handle = logs.configure(Identity(0, 0, 0, 1, 1, 1), run_dir)
log = logs.get_logger("a")
slowest, num_made = 0.0, 0
for number in range(2000):
    level, extra = (30, None) if number % 100 == 50 else (20, logs.FILE_ONLY)
    begin = time.perf_counter()
    log.log(level, "record %d %s", number, "x" * 300, extra=extra)
    slowest = max(slowest, time.perf_counter() - begin)
log.warning("the last while it is full")
os.unlink(os.path.join(run_dir, "filler"))
log.warning("there is room again")
handle.close()
with open(os.path.join(run_dir, "logs/rank-00000.jsonl")) as file:
    sys.stdout.write(file.read())
print(slowest)
"""


def in_small_file_system(folder: Path, program: str) -> "subprocess.CompletedProcess[str]":
    """Run it where `folder` has room for 1 MiB; the mount is seen by that process alone, and ends with it."""
    mount = f'mount -t tmpfs -o size=1m tmpfs "{folder}" && exec "$@"'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    probe = [*command, mount, "sh", "true"]
    try:
        can_mount = subprocess.run(probe, capture_output=True, timeout=20).returncode == 0
    except FileNotFoundError:
        can_mount = False
    if not can_mount:
        assert os.environ.get("CI") != "true", "where CI runs, root has to be able to mount"
        pytest.skip("cannot mount a small file system here")
    rest = ["sh", sys.executable, "-c", program, str(folder)]
    return subprocess.run([*command, mount, *rest], capture_output=True, text=True, timeout=60)


def test_full_file_system_holds_up_nothing_and_its_file_says_what_it_lacks(tmp_path: Path) -> None:
    done = in_small_file_system(tmp_path, PROGRAM)
    assert done.returncode == 0, done.stderr
    *lines, slowest = done.stdout.splitlines()
    assert float(slowest) < 10  # a write that waits for room would never end

    said = []
    for line in lines:
        try:
            said.append(json.loads(line)["message"])
        except ValueError:
            continue  # the one that was cut where the room ended
    assert said[-1] == "there is room again"
    assert "the last while it is full" not in said
    notices = [message for message in said if message.endswith("log records are missing here")]
    num_kept = len(said) - len(notices) - 1
    assert 0 < num_kept < 2001
    assert num_kept + sum(int(message.split()[0]) for message in notices) == 2001
    assert "the last while it is full" in done.stderr
    assert done.stderr.count("No space left on device") + done.stderr.count("bytes written") == 1
    assert f"{2001 - num_kept} log records are missing in " in done.stderr
