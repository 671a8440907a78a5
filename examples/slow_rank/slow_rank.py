"""`videovae train`, but one rank's clips come late, as from a disk that is slow on one node.

rankwise run --nproc-per-node 2 slow_rank.py --slow-rank 1 --delay-seconds 0.3 --delay-steps 50:300 \
    --preset debug --num-steps 500 --run-dir runs/slow

Options that are not its own go to `videovae train`. The trainer knows nothing of this: its loader is replaced here.
"""

import argparse
import os
import sys
import time

import rankwise
from videovae.cli import main
from videovae.data.loader import ClipLoader


def parse_steps(text):
    first, _, last = text.partition(":")
    return range(int(first), int(last))


def delay_clips(rank, delay_seconds, delay_steps):
    """On this rank every batch of these steps is waited for so much longer."""
    if rankwise.Identity.resolve(os.environ).rank != rank:
        return
    load = ClipLoader.__next__
    num_loaded = 0

    def load_late(loader):
        nonlocal num_loaded
        if num_loaded in delay_steps:
            time.sleep(delay_seconds)
        num_loaded += 1
        return load(loader)

    ClipLoader.__next__ = load_late


if __name__ == "__main__":
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--slow-rank", type=int, default=1, metavar="RANK")
    parser.add_argument("--delay-seconds", type=float, default=0.3)
    parser.add_argument("--delay-steps", type=parse_steps, default="50:300", metavar="FIRST:LAST")
    options, others = parser.parse_known_args()
    delay_clips(options.slow_rank, options.delay_seconds, options.delay_steps)
    sys.exit(main(["train", *others]))
