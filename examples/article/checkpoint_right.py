"""One checkpoint, of which every rank writes its own part and the main process says when it is whole.

checkpoint_right.py FOLDER
"""

import sys

import torch

import rankwise

with rankwise.init() as session:
    checkpoints = rankwise.CheckpointManager(sys.argv[1])
    with rankwise.same_on_every_rank(seed=0):
        model = torch.nn.Linear(4, 1)
    place = {"from rank": session.identity.rank}
    checkpoints.save(100, {"model": model, "place": rankwise.PerRank(place)})  # every rank calls; nobody is guarded
    if session.identity.is_main_process:
        for rank in range(session.identity.world_size):
            print(f"part {rank}, from rank {checkpoints.read('place', rank=rank)['from rank']}", flush=True)
