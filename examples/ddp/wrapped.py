"""rankwise around a DDP function that stays as it is.

The group is there when `train` begins, and so is what a session gives: a device chosen and checked, logs, the first
failure named at the end. `train` needs no change.

rankwise run --nproc-per-node 2 wrapped.py checkpoint.pt
"""

import sys

from before import train

import rankwise

if __name__ == "__main__":
    with rankwise.init():
        train(sys.argv[1])
