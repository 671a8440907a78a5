"""Two writers of one checkpoint: the guard lets one process of each node through.

checkpoint_wrong.py FOLDER

The weights are equal on all ranks, but not what else belongs to a run, such as the place in the data. On a shared disk
the file becomes a mixture that no rank ever was in. When that happens is chance; here the second writer always comes
when the first has written half, so that it can be seen every time.
"""

import os
import sys
import time
from pathlib import Path

NUM_PARTS = 8

rank = int(os.environ["RANK"])
local_rank = int(os.environ["LOCAL_RANK"])
path = Path(sys.argv[1], "checkpoint.txt")
second_is_done = Path(sys.argv[1], "second-is-done")


def wait_until(condition):
    while not condition():
        time.sleep(0.01)


def save():
    if rank > 0:
        wait_until(lambda: path.exists() and path.read_text().count("\n") == NUM_PARTS // 2)
    with open(path, "w") as file:
        for part in range(NUM_PARTS):
            if rank == 0 and part == NUM_PARTS // 2:
                wait_until(second_is_done.exists)
            file.write(f"part {part}, from rank {rank}\n")
            file.flush()
    if rank > 0:
        second_is_done.touch()


if local_rank == 0:  # the fault: true on every node
    save()
if rank == 0:
    print(path.read_text(), end="", flush=True)
