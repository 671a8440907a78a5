from collections.abc import Callable
from textwrap import indent

import pytest

from rankwise.check import analyze

Expect = Callable[..., None]
HEAD = "import torch.distributed as dist\nrank = dist.get_rank()\n"


@pytest.mark.parametrize(
    "body",
    [
        "if rank == 0:\n    dist.barrier()  #! RW401",
        "if rank:\n    dist.all_reduce(x)  #! RW401",
        "if rank == 0 and step % 10 == 0:\n    dist.barrier()  #! RW401",
        "if rank == 0:\n    save()\n    dist.barrier()  #! RW401\nelse:\n    wait()",
        "for step in range(9):\n    if rank == 0:\n        dist.barrier()  #! RW401",
        "if rank == 0:\n    dist.all_reduce(x)  #! RW401\nelse:\n    dist.barrier()  #! RW401",
        "if dist.get_world_size() - 1 == rank:\n    dist.barrier()  #! RW401",
        "if is_main_process():\n    dist.barrier()  #! RW401",
    ],
)
def test_a_collective_of_some_ranks_is_found(expect: Expect, body: str) -> None:
    expect("RW401", f"{HEAD}def train(x):\n{indent(body, '    ')}\n")


@pytest.mark.parametrize(
    "body",
    [
        "if rank != 0:\n    dist.barrier()\nwork()\nif rank == 0:\n    dist.barrier()",
        "if rank == 0:\n    work()\n    dist.barrier()\nelse:\n    dist.barrier()\n    work()",
        "if rank == 0:\n    save()\ndist.barrier()",
        "if rank == 0:\n    dist.broadcast(x, 0)\nelse:\n    dist.broadcast(y, 0)",
        "if dist.is_initialized():\n    dist.barrier()",
        "if dist.get_world_size() > 1:\n    dist.barrier()",
        "if rank in members:\n    dist.all_reduce(x, group=group)",
        "if rank == 0:\n    dist.send(x, 1)\nelse:\n    dist.recv(x, 0)",
        "if config.sync:\n    dist.barrier()",
        "if rank < 0:\n    return\ndist.barrier()",
        "if rank == 0:\n    raise ValueError('x')\ndist.barrier()",
        "if rank == 0:\n    torch.cuda.synchronize()",
        "if rank == 0:\n    reduce(add, x)",
    ],
)
def test_equal_sequences_on_both_sides_are_right(expect: Expect, body: str) -> None:
    expect("RW401", f"{HEAD}def train(x):\n{indent(body, '    ')}\n")


def test_a_collective_inside_a_function_is_found_at_the_call(expect: Expect) -> None:
    expect(
        "RW401",
        main="""
        from metrics import evaluate
        import torch.distributed as dist
        def train():
            if dist.get_rank() == 0:
                print(evaluate())  #! RW401
        """,
        metrics="""
        import torch.distributed as dist
        def mean(x):
            dist.all_reduce(x)
            return x
        def evaluate():
            return mean(1)
        """,
    )


def test_a_function_that_guards_itself_is_right(expect: Expect) -> None:
    expect(
        "RW401",
        """
        import torch.distributed as dist
        def first():
            if dist.get_rank() != 0:
                dist.barrier()
            work()
            if dist.get_rank() == 0:
                dist.barrier()
        def train():
            first()
        """,
    )


def test_wrappers_of_libraries_are_known(expect: Expect) -> None:
    expect(
        "RW401",
        """
        from accelerate import Accelerator
        import torch.distributed.checkpoint as dcp
        def train(trainer, path):
            accelerator = Accelerator()
            if accelerator.is_main_process:
                accelerator.wait_for_everyone()  #! RW401
                x = accelerator.gather(x)  #! RW401
            if trainer.is_global_zero:
                trainer.save_checkpoint(path)  #! RW401
                dcp.save(x)  #! RW401
                rankwise.barrier()  #! RW401
            accelerator.wait_for_everyone()
        """.replace(
            "import torch.distributed.checkpoint as dcp", "import rankwise, torch.distributed.checkpoint as dcp"
        ),
    )


def test_a_function_for_the_main_process_alone_has_no_collective(expect: Expect) -> None:
    expect(
        "RW401",
        """
        import torch.distributed as dist
        from pytorch_lightning.utilities import rank_zero_only
        import hydra
        @rank_zero_only
        def save():
            dist.barrier()  #! RW401
        @hydra.main()
        def main():
            dist.barrier()
        """,
    )


def test_a_broadcast_behind_a_look_at_the_files_is_found(expect: Expect) -> None:
    expect(
        "RW401",
        """
        import torch.distributed as dist
        def load(path):
            if path.exists():
                dist.broadcast_object_list([None])  #! RW401
        """,
    )


def test_the_message_names_the_collective_and_the_guard() -> None:
    text = f"{HEAD}if rank == 0:\n    dist.barrier()\n"
    [finding] = analyze({"train.py": text}, {"RW401"}).findings
    assert "only rank 0 comes to this barrier" in finding.message
    assert finding.trail[0].text == "guard: rank == 0"


MAIN_FIRST = """import os, torch.distributed as dist
rank, local_rank = dist.get_rank(), int(os.environ["LOCAL_RANK"])
def load(path, evaluate=False):
    if local_rank not in (-1, 0) and not evaluate:
        dist.barrier()
    prepare(path)
    if local_rank == 0 and not evaluate:
        dist.barrier()
"""


def test_a_flag_of_the_call_says_whether_its_collectives_are_reached(expect: Expect) -> None:
    expect("RW401", f"{MAIN_FIRST}if rank == 0:\n    load('test', evaluate=True)\n")
    expect("RW401", f"{MAIN_FIRST}if rank == 0:\n    load('test')  #! RW401\n")


def test_the_first_of_a_node_and_the_first_of_all_may_be_tested_in_one_function(expect: Expect) -> None:
    expect(
        "RW401",
        """
        import os, torch.distributed as dist
        rank, local_rank = dist.get_rank(), int(os.environ["LOCAL_RANK"])
        def main():
            if local_rank != 0:
                dist.barrier()
            load()
            if local_rank == 0:
                dist.barrier()
            if rank == 0:
                save()
        """,
    )


def test_a_difference_inside_a_function_is_told_there_alone(expect: Expect) -> None:
    expect(
        "RW401",
        """
        import torch.distributed as dist
        rank = dist.get_rank()
        def train():
            if rank == 0:
                dist.all_reduce(x)  #! RW401
        def main():
            train()
            if rank == 0:
                save()
        """,
    )


def test_a_context_manager_may_hold_back_on_entry_and_let_go_on_exit(expect: Expect) -> None:
    expect(
        "RW401",
        """
        import torch.distributed as dist
        class First:
            def __enter__(self):
                if dist.get_rank() != 0:
                    dist.barrier()
            def __exit__(self, *error):
                if dist.get_rank() == 0:
                    dist.barrier()
        """,
    )


def test_a_function_in_a_test_is_true(expect: Expect) -> None:
    expect(
        "RW401",
        """
        import os, torch.distributed as dist
        local_rank = int(os.environ["LOCAL_RANK"])
        def load(path):
            if local_rank not in (-1, 0) and not evaluate:
                dist.barrier()
            prepare(path)
            if local_rank == 0 and not evaluate:
                dist.barrier()
        def evaluate():
            load("test")
        if local_rank == 0:
            evaluate()
        """,
    )


def test_sides_that_do_the_same_more_or_less_often_are_not_compared(expect: Expect) -> None:
    source = """import torch.distributed as dist
def send(data, rank):
    if rank == 0:
        if len(data) == 0:
            dist.broadcast(size, 0)
        else:
            dist.broadcast(size, 0)
            dist.broadcast(data, 0)
    else:
        dist.broadcast(size, 0)
        if size == 0:
            return
        dist.broadcast(data, 0)
send(x, dist.get_rank())
"""
    expect("RW401", source)
