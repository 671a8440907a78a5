from textwrap import dedent

from rankwise.check.explore import explore
from rankwise.check.sequences import Assumption, Sequences


def names(text: str, is_main: bool) -> list[str]:
    program = explore({"a.py": "import torch.distributed as dist\nrank = dist.get_rank()\n" + dedent(text)})
    trace = next(one for one in program.traces if one.name == "train")
    way = Sequences(program).way(trace.items, Assumption("rank", "", is_main))
    return [name for reached in way.reached for name in reached.names]


def test_each_rank_comes_to_what_its_branches_hold() -> None:
    text = """
    def train():
        dist.barrier()
        if rank == 0:
            dist.all_reduce(x)
        else:
            dist.broadcast(x, 0)
        dist.all_gather(y, x)
    """
    assert names(text, True) == ["barrier", "all_reduce", "all_gather"]
    assert names(text, False) == ["barrier", "broadcast", "all_gather"]


def test_who_returns_comes_no_further() -> None:
    text = """
    def train():
        if rank != 0:
            return
        dist.barrier()
    """
    assert names(text, True) == ["barrier"]
    assert names(text, False) == []


def test_recursion_ends() -> None:
    text = """
    def train():
        dist.barrier()
        train()
    """
    assert names(text, True) == ["barrier", "barrier"]


def test_what_a_lone_process_does_is_no_part_of_it() -> None:
    text = """
    def train():
        if not dist.is_initialized():
            return
        if dist.get_world_size() == 1:
            return
        dist.barrier()
    """
    assert names(text, False) == ["barrier"]
