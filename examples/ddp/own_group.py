"""rankwise in a script that makes its process group itself.

`init` finds the group, uses it, and leaves it as it was: the script that made it also ends it.

torchrun --nproc-per-node 2 own_group.py checkpoint.pt
"""

import os
import sys

import torch
import torch.distributed as dist
from before import train

import rankwise

if __name__ == "__main__":
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    with rankwise.init() as session:
        train(sys.argv[1])
        ranks = rankwise.gather_objects(session.identity.rank)
    dist.barrier()  # the group outlives the session
    if dist.get_rank() == 0:
        print(f"ranks {ranks}, group still there: {dist.is_initialized()}", flush=True)
    dist.destroy_process_group()
