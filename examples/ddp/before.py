"""A DDP script as it is usually written. It knows nothing of rankwise.

torchrun --nproc-per-node 2 before.py checkpoint.pt
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

NUM_EPOCHS = 10


def train(checkpoint):
    rank = int(os.environ["RANK"])
    local_rank = int(os.environ["LOCAL_RANK"])
    use_cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{local_rank}" if use_cuda else "cpu")

    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1).to(device)
    ddp = DistributedDataParallel(model, device_ids=[local_rank] if use_cuda else None)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.1)
    first_epoch = 0
    if os.path.exists(checkpoint):
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch = state["epoch"]

    x = torch.randn(256, 8)
    dataset = TensorDataset(x, x.sum(1, keepdim=True))
    sampler = DistributedSampler(dataset, seed=0)
    loader = DataLoader(dataset, batch_size=32, sampler=sampler)
    for epoch in range(first_epoch, NUM_EPOCHS):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            loss = (ddp(inputs.to(device)) - targets.to(device)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
        if rank == 0:
            print(f"epoch {epoch}: loss {loss.item():.6f}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            torch.save(state, checkpoint)
        dist.barrier()


if __name__ == "__main__":
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train(sys.argv[1])
    dist.destroy_process_group()
