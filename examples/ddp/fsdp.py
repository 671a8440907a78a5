"""FSDP2 (`fully_shard`) in a session: weights and optimizer state are cut over the ranks.

Every rank saves its shards, and a run may go on with another number of ranks: they are cut anew.

rankwise run --nproc-per-node 2 fsdp.py RUN_DIR
"""

import sys

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import rankwise

NUM_STEPS = 40
log = rankwise.get_logger("train")


def train(session):
    identity, device = session.identity, session.device
    with rankwise.same_on_every_rank(seed=0):
        model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).to(device)
    mesh = init_device_mesh(device.type, (identity.world_size,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)

    checkpoints = rankwise.CheckpointManager(session.run_dir / "checkpoints", async_save=True)
    state = {"model": model, "optimizer": optimizer}
    step = checkpoints.load(state) or 0

    rankwise.seed_all(step, identity)
    while step < NUM_STEPS and not session.agree_to_stop():
        x = torch.randn(32, 8, device=device)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 20 == 0:
            mean = rankwise.reduce_mean({"loss": loss.item()})
            log.info(f"step {step}: loss {mean['loss']:.6f}", ranks="main")
            checkpoints.save(step, state)


if __name__ == "__main__":
    with rankwise.init(sys.argv[1]) as session:
        train(session)
