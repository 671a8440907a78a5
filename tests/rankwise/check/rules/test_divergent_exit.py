from collections.abc import Callable
from textwrap import indent

import pytest

from rankwise.check import analyze

Expect = Callable[..., None]
HEAD = "import sys, torch.distributed as dist\nrank = dist.get_rank()\n"


@pytest.mark.parametrize(
    "body",
    [
        "if rank != 0:\n    return  #! RW402\nsave()\ndist.barrier()",
        "if rank != 0:\n    sys.exit(0)  #! RW402\ndist.barrier()",
        "for step in steps:\n    if rank != 0:\n        continue  #! RW402\n    dist.all_reduce(step)",
        "with torch.no_grad():\n    if rank == 0:\n        return  #! RW402\ndist.barrier()",
    ],
)
def test_an_exit_of_some_ranks_before_a_collective_is_found(expect: Expect, body: str) -> None:
    expect("RW402", f"{HEAD}def train(steps):\n{indent(body, '    ')}\n")
    expect("RW401", f"{HEAD}def train(steps):\n{indent(body, '    ')}\n")


@pytest.mark.parametrize(
    "body",
    [
        "dist.barrier()\nif rank != 0:\n    return\nsave()",
        "if rank != 0:\n    dist.barrier()\n    return\nsave()\ndist.barrier()",
        "if _rank_not_in_group(group):\n    return\ndist.all_reduce(x)",
        "if config.dry:\n    return\ndist.barrier()",
        "if not dist.is_initialized():\n    return\ndist.barrier()",
        "if dist.get_world_size() == 1:\n    return\ndist.barrier()",
    ],
)
def test_an_exit_that_leaves_nobody_waiting_is_right(expect: Expect, body: str) -> None:
    expect("RW402", f"{HEAD}def train(x):\n{indent(body, '    ')}\n")


def test_an_exit_before_several_collectives_is_one_finding() -> None:
    text = f"{HEAD}def train(x):\n    if rank:\n        return\n" + "    dist.barrier()\n" * 3
    findings = analyze({"a.py": text}, {"RW402"}).findings
    assert [finding.line for finding in findings] == [5]
    assert "line 6 and 2 more" in findings[0].message
