"""Chaotic logs: a line from every process, then a line from every node.

The second guard looks right on one node, where only one process has local rank 0. The variable's name hides it.
"""

import os

rank = int(os.environ["LOCAL_RANK"])  # the fault: this is no rank

print(f"building the model on device {rank}\n", end="", flush=True)  # unguarded: as many lines as processes
if rank == 0:
    print("step 100: loss 0.250\n", end="", flush=True)  # meant once; two nodes say it twice
