"""FSDP2 (`fully_shard`) in a session: weights and optimizer state are cut over the ranks.

A checkpoint holds the whole tensors, so a run may go on with another number of ranks.

rankwise run --nproc-per-node 2 fsdp.py RUN_DIR
"""

import sys

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import rankwise

NUM_STEPS = 40
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
log = rankwise.get_logger("train")


def train(session):
    identity, device = session.identity, session.device
    with rankwise.same_on_every_rank(seed=0):
        model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).to(device)
    mesh = init_device_mesh(device.type, (identity.world_size,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)

    checkpoints = rankwise.CheckpointManager(session.run_dir / "checkpoints")
    step = rankwise.broadcast_object(checkpoints.latest()) or 0  # ranks must not see different ones
    if step:
        set_model_state_dict(model, checkpoints.read("model", step), options=WHOLE)
        set_optimizer_state_dict(model, optimizer, checkpoints.read("optimizer", step), options=WHOLE)

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
            # Gathering the pieces needs every rank; rank 0 gets the whole, and writes it.
            whole = get_model_state_dict(model, options=WHOLE)
            whole_optimizer = get_optimizer_state_dict(model, optimizer, options=WHOLE)
            checkpoints.save(step, {"model": whole, "optimizer": whole_optimizer})


if __name__ == "__main__":
    with rankwise.init(sys.argv[1]) as session:
        train(session)
