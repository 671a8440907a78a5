from collections.abc import Callable

import pytest

Expect = Callable[..., None]
HEAD = """import os, torch, torch.distributed as dist
from torch.utils.data import DistributedSampler
local_rank, rank = int(os.environ["LOCAL_RANK"]), int(os.environ["RANK"])
world_size = dist.get_world_size()
"""


@pytest.mark.parametrize(
    "use",
    [
        "DistributedSampler(data, num_replicas=world_size, rank={})",
        "DistributedSampler(data, world_size, {})",
        "dist.init_process_group('nccl', rank={}, world_size=world_size)",
        "data.shard(num_shards=world_size, index={})",
        "data.shard(world_size, {})",
        "files[{}::world_size]",
        "range({}, len(files), world_size)",
        "[f for i, f in enumerate(files) if i % world_size == {}]",
        "torch.manual_seed(seed + {})",
    ],
)
def test_a_local_rank_beside_the_world_size_is_found(expect: Expect, use: str) -> None:
    expect("RW203", f"{HEAD}x = {use.format('local_rank')}  #! RW203\n")
    expect("RW203", f"{HEAD}x = {use.format('rank')}\n")


def test_a_share_of_the_node_is_right(expect: Expect) -> None:
    size = "int(os.environ['LOCAL_WORLD_SIZE'])"
    expect("RW203", f"{HEAD}x = DistributedSampler(data, num_replicas={size}, rank=local_rank)\n")


def test_on_one_node_the_index_of_spawn_is_the_global_rank(expect: Expect) -> None:
    expect(
        "RW203",
        """
        import torch.distributed as dist, torch.multiprocessing as mp
        def worker(rank, world_size):
            dist.init_process_group("nccl", rank=rank, world_size=world_size)
        mp.spawn(worker, args=(8,), nprocs=8)
        """,
    )


def test_an_argument_that_the_launcher_sets_is_a_local_rank(expect: Expect) -> None:
    expect(
        "RW203",
        """
        import argparse
        from torch.utils.data import DistributedSampler
        parser = argparse.ArgumentParser()
        parser.add_argument("--rank", "--local_rank", dest="rank", type=int, default=0)
        args = parser.parse_args()
        sampler = DistributedSampler(data, num_replicas=args.world_size, rank=args.rank)  #! RW203
        """,
    )


@pytest.mark.parametrize(
    "use",
    [
        "n = len(x) // dist.get_world_size()\nmine = x[local_rank * n : local_rank * n + n]  #! RW203",
        "n = math.ceil(len(x) / dist.get_world_size())\nmine = x[local_rank * n :]  #! RW203",
        "mine = np.array_split(x, dist.get_world_size())[local_rank]  #! RW203",
        "mine = x.chunk(dist.get_world_size())[local_rank]  #! RW203",
        "seed = 42 + local_rank\ntorch.manual_seed(seed)  #! RW203",
    ],
)
def test_a_share_or_a_seed_by_the_local_rank_is_found(expect: Expect, use: str) -> None:
    head = (
        "import math, os, numpy as np, torch, torch.distributed as dist\nlocal_rank = int(os.environ['LOCAL_RANK'])\n"
    )
    expect("RW203", f"{head}{use}\n")


@pytest.mark.parametrize(
    "use",
    [
        "n = len(x) // torch.cuda.device_count()\nmine = x[local_rank * n :]",
        "mine = x.chunk(4)[local_rank]",
        "n = len(x) // dist.get_world_size()\nmine = x[dist.get_rank() * n :]",
        "seed = 42 + local_rank\nseed = 42\ntorch.manual_seed(seed)",
    ],
)
def test_a_share_of_the_node_or_of_the_global_rank_is_right(expect: Expect, use: str) -> None:
    head = (
        "import math, os, numpy as np, torch, torch.distributed as dist\nlocal_rank = int(os.environ['LOCAL_RANK'])\n"
    )
    expect("RW203", f"{head}{use}\n")


def test_a_rank_among_the_processes_of_one_model_is_no_local_rank(expect: Expect) -> None:
    text = "local_rank = get_sp_parallel_rank()\nworld_size = get_sp_world_size()\nn = heads // world_size\n"
    expect("RW203", f"import torch.distributed as dist\n{text}x = y[local_rank * n :]\n")


def test_a_local_rank_that_an_unknown_helper_gives_is_one_by_its_name(expect: Expect) -> None:
    source = """import torch.distributed as dist
args.local_rank, args.rank, args.world_size = get_envs()
dist.init_process_group("nccl", rank=args.local_rank, world_size=args.world_size)  #! RW203
"""
    expect("RW203", source)


def test_a_seed_of_several_parts_is_found(expect: Expect) -> None:
    head = "import os, torch\nlocal_rank, world_size = int(os.environ['LOCAL_RANK']), int(os.environ['WORLD_SIZE'])\n"
    expect("RW203", f"{head}torch.manual_seed(666 + local_rank + world_size * step)  #! RW203\n")
    expect("RW203", f"{head}torch.manual_seed(666 + local_rank + int(os.environ['NODE_RANK']) * 8)\n")


def test_a_seed_of_a_helper_is_found(expect: Expect) -> None:
    head = (
        "import os, torch\nlocal_rank = int(os.environ['LOCAL_RANK'])\ndef init_seeds(n):\n    torch.manual_seed(n)\n"
    )
    expect("RW203", f"{head}init_seeds(42 + local_rank)  #! RW203\n")
