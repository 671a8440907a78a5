"""The rules that warn, each with what it finds and what it leaves."""

from collections.abc import Callable

import pytest

from rankwise.check import analyze

Expect = Callable[..., None]
HEAD = "import os, torch, wandb, torch.distributed as dist\ndist.init_process_group('nccl')\nrank = dist.get_rank()\n"


@pytest.mark.parametrize("start", ["wandb.init()", "torch.utils.tensorboard.SummaryWriter('runs')"])
def test_a_tracker_of_every_rank_is_found(expect: Expect, start: str) -> None:
    expect("RW302", f"{HEAD}x = {start}  #! RW302\n")
    expect("RW302", f"{HEAD}if rank == 0:\n    x = {start}\n")
    expect("RW302", f"{HEAD}x = {start} if rank == 0 else None\n")


def test_a_tracker_per_rank_that_is_meant_so_is_right(expect: Expect) -> None:
    expect("RW302", f"{HEAD}wandb.init(group='job', name=f'rank{{rank}}')\n")
    expect("RW302", f"{HEAD}wandb.init(mode='online' if rank == 0 else 'disabled')\n")


def test_a_tracker_at_the_level_of_a_module_that_workers_import_is_found(expect: Expect) -> None:
    expect(
        "RW302",
        """
        import wandb, torch.multiprocessing as mp
        wandb.init()  #! RW302
        def worker(rank):
            pass
        if __name__ == "__main__":
            mp.spawn(worker, nprocs=2, args=())
        """,
    )


@pytest.mark.parametrize(
    ("call", "fixed"),
    [
        ("os.makedirs(out)", "os.makedirs(out, exist_ok=True)"),
        ("os.makedirs(out, exist_ok=False)", "os.makedirs(out, exist_ok=True)"),
        ("path.mkdir()", "path.mkdir(exist_ok=True)"),
        ("path.mkdir(parents=True)", "path.mkdir(parents=True, exist_ok=True)"),
    ],
)
def test_a_folder_that_ranks_race_for_is_found_and_mended(expect: Expect, call: str, fixed: str) -> None:
    expect("RW303", f"{HEAD}if not os.path.exists(out):\n    {call}  #! RW303\n")
    expect("RW303", f"{HEAD}{fixed}\n")
    expect("RW303", f"{HEAD}if rank == 0:\n    {call}\n")
    expect("RW303", f"{HEAD}try:\n    {call}\nexcept FileExistsError:\n    pass\n")
    [finding] = analyze({"a.py": f"{HEAD}{call}\n"}, {"RW303"}).findings
    [edit] = finding.edits
    assert call[: edit.column] + edit.replacement + call[edit.end_column :] == fixed


def test_a_load_without_a_device_is_found_and_mended(expect: Expect) -> None:
    expect("RW601", f"{HEAD}x = torch.load(path)  #! RW601\ny = torch.load(path, map_location='cpu')\n")
    expect("RW601", f"{HEAD}if rank == 0:\n    torch.load(path)\n")
    expect("RW601", "import torch\ntorch.load(path)\n")
    [finding] = analyze({"a.py": f"{HEAD}torch.load(path)\n"}, {"RW601"}).findings
    assert finding.edits[0].replacement == ', map_location="cpu"'


def test_a_group_without_a_device_is_found(expect: Expect) -> None:
    expect(
        "RW102", "import torch.distributed as dist\ndist.init_process_group('nccl')  #! RW102\nmodel.to(local_rank)\n"
    )
    expect(
        "RW102", "import torch, torch.distributed as dist\ntorch.cuda.set_device(1)\ndist.init_process_group('nccl')\n"
    )
    expect("RW102", "import torch.distributed as dist\ndist.init_process_group('gloo')\nmodel.to(local_rank)\n")


def test_a_group_before_the_device_is_found(expect: Expect) -> None:
    late = "dist.init_process_group('nccl')  #! RW103\ntorch.cuda.set_device(local_rank)\n"
    expect("RW103", f"import torch, torch.distributed as dist\n{late}")
    early = "torch.cuda.set_device(local_rank)\ndist.init_process_group('nccl')\n"
    expect("RW103", f"import torch, torch.distributed as dist\n{early}")


def test_a_download_of_rank_0_alone_is_found(expect: Expect) -> None:
    expect("RW202", f"{HEAD}if rank == 0:  #! RW202\n    snapshot_download('x')\nsnapshot_download('y')\n")


def test_a_read_without_a_barrier_is_found(expect: Expect) -> None:
    expect("RW304", f"{HEAD}if rank == 0:\n    torch.save(x, path)\ny = torch.load(path)  #! RW304\n")
    expect("RW304", f"{HEAD}if rank == 0:\n    torch.save(x, path)\ndist.barrier()\ny = torch.load(path)\n")


def test_data_that_is_not_shared_out_is_found(expect: Expect) -> None:
    wrapped = "from torch.nn.parallel import DistributedDataParallel as DDP\nmodel = DDP(net)\n"
    expect("RW502", f"{HEAD}{wrapped}loader = DataLoader(data, shuffle=True)  #! RW502\n")
    expect("RW502", f"{HEAD}{wrapped}loader = DataLoader(data, sampler=DistributedSampler(data))\n")
    expect("RW502", f"{HEAD}loader = DataLoader(data, shuffle=True)\n")


def test_equal_seeds_are_found(expect: Expect) -> None:
    expect("RW503", f"{HEAD}torch.manual_seed(7)  #! RW503\ntorch.manual_seed(7 + rank)\n")


def test_the_prefix_of_the_wrapper_is_found(expect: Expect) -> None:
    wrapped = "from torch.nn.parallel import DistributedDataParallel as DDP\nmodel = DDP(net)\n"
    expect("RW602", f"{wrapped}torch.save(model.state_dict(), p)  #! RW602\ntorch.save(model.module.state_dict(), p)\n")


def test_a_checkpoint_that_is_written_without_the_others_is_no_collective(expect: Expect) -> None:
    source = """import os, torch.distributed.checkpoint as dcp
def convert(tree, folder):
    os.mkdir(folder)
    dcp.save(tree, checkpoint_id=folder, no_dist=True)
"""
    expect("RW303", source)


LOADS = "import io, torch, torch.distributed as dist\ndist.init_process_group()\nrank = dist.get_rank()\n"


def test_a_load_without_a_device_is_found(expect: Expect) -> None:
    expect("RW601", f"{LOADS}torch.load(path)  #! RW601\n")


@pytest.mark.parametrize(
    "load", ["torch.load(f'{rank}.pt')", "torch.load(io.BytesIO(x))", "file.seek(0)\ntorch.load(file)"]
)
def test_a_load_of_ones_own_file_or_of_bytes_is_right(expect: Expect, load: str) -> None:
    expect("RW601", f"{LOADS}{load}\n")


def test_a_tracker_that_one_rank_makes_and_others_make_elsewhere_is_right(expect: Expect) -> None:
    source = """import wandb, torch.distributed as dist
class Tracking:
    def __init__(self):
        wandb.init()
def train():
    if dist.get_rank() == 0:
        Tracking()
    dist.barrier()
def drive():
    Tracking()
"""
    expect("RW302", source)
