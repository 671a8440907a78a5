"""The script of before.py with rankwise.

rankwise run --nproc-per-node 2 after.py RUN_DIR        or torchrun, srun, mpirun, or python alone
"""

import argparse

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import rankwise

NUM_EPOCHS = 10
log = rankwise.get_logger("train")


def train(session):
    identity, device = session.identity, session.device
    with rankwise.same_on_every_rank(seed=0):
        model = torch.nn.Linear(8, 1).to(device)
        x = torch.randn(256, 8)
    rankwise.seed_all(0, identity)  # from here on every rank draws its own numbers: dropout, crops, noise
    ddp = DistributedDataParallel(model) if identity.world_size > 1 else model
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer, "rng": rankwise.PerRank(rankwise.RngState(device))}
    checkpoints = rankwise.CheckpointManager(session.run_dir / "checkpoints")
    epoch = checkpoints.load(state) or 0
    if epoch >= NUM_EPOCHS:
        log.info(f"all {NUM_EPOCHS} epochs are done: nothing is left to do", ranks="main")

    dataset = TensorDataset(x, x.sum(1, keepdim=True))
    sampler = DistributedSampler(dataset, identity.world_size, identity.rank, seed=0)
    loader = DataLoader(dataset, batch_size=32, sampler=sampler)
    while epoch < NUM_EPOCHS and not session.agree_to_stop():  # SIGTERM on one rank stops all at this point
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            loss = (ddp(inputs.to(device)) - targets.to(device)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        mean = rankwise.reduce_mean({"loss": loss.item()})
        log.info(f"epoch {epoch}: loss {mean['loss']:.6f}", ranks="main")
        epoch += 1
        checkpoints.save(epoch, state)  # every rank calls: whole on all ranks, or not at all


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", metavar="RUN_DIR")
    with rankwise.init(parser.parse_args().run_dir) as session:
        train(session)
