from collections.abc import Callable

import pytest

from rankwise.check import analyze

Expect = Callable[..., None]
HEAD = """from accelerate import Accelerator
import deepspeed, torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.checkpoint.state_dict import get_model_state_dict
accelerator = Accelerator()
engine, optimizer, _, _ = deepspeed.initialize(model=net)
sharded = FSDP(net)
"""
GATHERS = [
    "accelerator.get_state_dict(model)",
    "accelerator.save_state('x')",
    "get_model_state_dict(model)",
    "sharded.state_dict()",
    "deepspeed.zero.GatheredParameters(x)",
]


@pytest.mark.parametrize("use", GATHERS)
def test_a_gather_on_one_rank_is_found(expect: Expect, use: str) -> None:
    expect("RW404", f"{HEAD}if accelerator.is_main_process:\n    {use}  #! RW404\n")


@pytest.mark.parametrize("use", GATHERS)
def test_a_gather_on_all_ranks_is_right(expect: Expect, use: str) -> None:
    expect("RW404", f"{HEAD}{use}\nif accelerator.is_main_process:\n    model.state_dict()\n")


def test_where_accelerate_may_run_plain_ddp_it_is_a_warning() -> None:
    text = f"{HEAD}if accelerator.is_main_process:\n    accelerator.save_state('x')\n"
    assert [one.severity for one in analyze({"a.py": text}, {"RW404"}).findings] == ["warning"]
