from collections.abc import Callable
from textwrap import dedent

import pytest

from rankwise.check import analyze

Expect = Callable[..., None]
HEAD = (
    "import os, torch\nimport torch.distributed as dist\nfrom torch.nn.parallel import DistributedDataParallel as DDP\n"
)


@pytest.mark.parametrize(
    "rank",
    [
        "int(os.environ['RANK'])",
        "int(os.environ.get('SLURM_PROCID', 0))",
        "int(os.getenv('OMPI_COMM_WORLD_RANK', '0'))",
        "dist.get_rank()",
        "dist.get_rank() if dist.is_initialized() else 0",
        "torch.distributed.get_rank()",
    ],
)
def test_every_source_of_a_global_rank_is_followed(expect: Expect, rank: str) -> None:
    expect("RW101", f"{HEAD}local_rank = {rank}\ntorch.cuda.set_device(local_rank)  #! RW101\n")


@pytest.mark.parametrize(
    "rank",
    [
        "int(os.environ['LOCAL_RANK'])",
        "int(os.environ['SLURM_LOCALID'])",
        "dist.get_rank() % torch.cuda.device_count()",
        "dist.get_node_local_rank()",
        "int(os.environ['RANK']) % int(os.environ['LOCAL_WORLD_SIZE'])",
        "something()",
    ],
)
def test_a_local_rank_is_right_whatever_its_name(expect: Expect, rank: str) -> None:
    expect("RW101", f"{HEAD}rank = {rank}\ntorch.cuda.set_device(rank)\nmodel = net.to(rank)\n")


@pytest.mark.parametrize(
    "use",
    [
        "torch.device('cuda', rank)",
        "torch.device(f'cuda:{rank}')",
        "torch.device('cuda:{}'.format(rank))",
        "torch.device('cuda:%d' % rank)",
        "torch.device('cuda:' + str(rank))",
        "net.cuda(rank)",
        "net.to(f'cuda:{rank}')",
        "DDP(net, device_ids=[rank])",
        "DDP(net, output_device=rank)",
        "torch.load(path, map_location={'cuda:0': f'cuda:{rank}'})",
        "torch.accelerator.set_device_index(rank)",
        "torch.npu.set_device(rank)",
        "Auto.from_pretrained(name, device_map={'': rank})",
    ],
)
def test_every_way_to_a_device_is_a_sink(expect: Expect, use: str) -> None:
    expect("RW101", f"{HEAD}rank = dist.get_rank()\nx = {use}  #! RW101\n")


def test_the_rank_is_followed_through_attributes_of_an_object(expect: Expect) -> None:
    expect(
        "RW101",
        """
        import torch, torch.distributed as dist
        class Trainer:
            def __init__(self):
                self.rank = dist.get_rank()
            def build(self, model):
                return model.to(self.rank)  #! RW101
        """,
    )


def test_the_rank_is_followed_through_arguments_into_another_file(expect: Expect) -> None:
    expect(
        "RW101",
        main="""
        import helpers, setup
        def main():
            rank = setup.whoami()
            helpers.place(model(), rank)
        main()
        """,
        setup="""
        import torch.distributed as dist
        def whoami():
            if not dist.is_initialized():
                return 0
            return dist.get_rank()
        """,
        helpers="""
        import torch
        def place(model, where):
            return model.cuda(where)  #! RW101
        """,
    )


def test_a_global_rank_for_a_parameter_called_local_is_reported_at_the_call(expect: Expect) -> None:
    expect(
        "RW101",
        """
        import os
        def evaluate(model, local_rank):
            return model.to(local_rank)
        def main(model):
            evaluate(model, int(os.environ["RANK"]))  #! RW101
        """,
    )


def test_the_worker_of_spawn_gets_a_local_rank(expect: Expect) -> None:
    expect(
        "RW101",
        """
        import torch, torch.distributed as dist, torch.multiprocessing as mp
        def worker(rank, world_size):
            dist.init_process_group("nccl", rank=rank, world_size=world_size)
            torch.cuda.set_device(rank)
            print(torch.device("cuda", dist.get_rank()))
        if __name__ == "__main__":
            mp.spawn(worker, args=(8,), nprocs=8)
        """,
    )


def test_the_worker_of_spawn_with_an_offset_of_its_node_has_both(expect: Expect) -> None:
    expect(
        "RW101",
        """
        import torch, torch.distributed as dist, torch.multiprocessing as mp
        def worker(gpu, node_rank, gpus_per_node):
            rank = node_rank * gpus_per_node + gpu
            torch.cuda.set_device(gpu)
            torch.cuda.set_device(rank)  #! RW101
        if __name__ == "__main__":
            mp.spawn(worker, args=(node_rank, 8), nprocs=8)
        """,
    )


def test_the_process_index_of_accelerate_is_global(expect: Expect) -> None:
    expect(
        "RW101",
        """
        import torch
        from accelerate import PartialState
        right = {"": PartialState().local_process_index}
        model = load(device_map=right)
        model = load(device_map={"": PartialState().process_index})  #! RW101
        """,
    )


def test_the_local_rank_of_a_device_mesh_is_of_no_node(expect: Expect) -> None:
    expect("RW101", f"{HEAD}rank = mesh['dp'].get_local_rank()\ntorch.cuda.set_device(rank)\n")


def test_visible_devices_by_the_global_rank_are_found(expect: Expect) -> None:
    expect("RW101", f"{HEAD}os.environ['CUDA_VISIBLE_DEVICES'] = str(dist.get_rank())  #! RW101\n")


def test_the_fix_takes_the_local_rank_that_is_at_hand() -> None:
    text = dedent(
        """
        import os, torch
        local_rank = int(os.environ["LOCAL_RANK"])
        rank = int(os.environ["RANK"])
        torch.cuda.set_device(rank)
        """
    )
    [finding] = analyze({"train.py": text}, {"RW101"}).findings
    [edit] = finding.edits
    assert (edit.line, edit.column, edit.end_line, edit.end_column) == (5, 22, 5, 26)
    assert edit.replacement == "local_rank"


def test_the_trail_tells_where_the_rank_comes_from() -> None:
    text = "import torch.distributed as dist, torch\nrank = dist.get_rank()\n\ntorch.cuda.set_device(rank)\n"
    [finding] = analyze({"train.py": text}, {"RW101"}).findings
    assert (finding.line, finding.column, finding.end_column) == (4, 23, 27)
    assert (finding.trail[0].text, finding.trail[0].line) == ("rank <- dist.get_rank()", 2)


def test_columns_count_characters() -> None:
    text = "import torch, os\nrank = int(os.environ['RANK'])\nprint('\u00e9\u00e9'); torch.cuda.set_device(rank)\n"
    [finding] = analyze({"train.py": text}, {"RW101"}).findings
    assert text.splitlines()[2][finding.column - 1 : finding.end_column - 1] == "rank"


def test_a_wrong_device_is_told_where_it_is_made_and_not_at_each_use(expect: Expect) -> None:
    expect(
        "RW101",
        """
        import torch, torch.distributed as dist
        device = torch.device("cuda", dist.get_rank())  #! RW101
        model.to(device)
        x = x.to(device=device)
        """,
    )


def test_a_tensor_made_on_a_device_by_the_global_rank_is_found(expect: Expect) -> None:
    expect("RW101", "import torch, torch.distributed as dist\nx = torch.zeros(1, device=dist.get_rank())  #! RW101\n")


def test_a_name_of_a_device_is_told_once_where_it_is_made(expect: Expect) -> None:
    source = """import torch, torch.distributed as dist
rank = dist.get_rank()
device = f"cuda:{rank}"  #! RW101
a.to(device)
b.to(device)
"""
    expect("RW101", source)
    expect("RW101", source.replace('f"cuda:{rank}"', '"cuda:{}".format(rank)'))


def test_a_plain_device_of_another_caller_changes_nothing(expect: Expect) -> None:
    source = """import os, torch
def train(rank):
    model.to(rank)  #! RW101
if parallel:
    train(rank=int(os.environ["RANK"]))
else:
    train(rank=torch.device("cuda"))
"""
    expect("RW101", source)


def test_constants_of_modules_that_were_not_given_are_known_by_name(expect: Expect) -> None:
    source = """
    import torch
    from tool.utils import LOCAL_RANK, RANK
    torch.cuda.set_device(LOCAL_RANK)
    torch.cuda.set_device(RANK)  #! RW101
    """
    expect("RW101", source)
    expect("RW101", "import torch\nfrom tool import utils\ntorch.cuda.set_device(utils.RANK)  #! RW101\n")
    expect("RW101", source.replace("  #! RW101", ""), **{"tool/utils": "import os\nRANK = LOCAL_RANK = 0\n"})
