from collections.abc import Callable

import pytest

Expect = Callable[..., None]
HEAD = (
    "import torch.distributed as dist\nfrom torch.nn.parallel import DistributedDataParallel as DDP\nmodel = DDP(net)\n"
)


@pytest.mark.parametrize(
    "use", ["model(x)", "model.forward(x)", "model.eval()(x)", "validate(model, loader)", "save_samples(model)"]
)
def test_a_forward_of_the_wrapper_on_one_rank_is_found(expect: Expect, use: str) -> None:
    expect("RW403", f"{HEAD}if dist.get_rank() == 0:\n    y = {use}  #! RW403\n")


@pytest.mark.parametrize(
    "use", ["model.module(x)", "model.state_dict()", "net(x)", "validate(model.module, x)", "unwrap_model(model)(x)"]
)
def test_the_module_inside_is_right(expect: Expect, use: str) -> None:
    expect("RW403", f"{HEAD}if dist.get_rank() == 0:\n    y = {use}\n")


def test_a_forward_of_all_ranks_is_right(expect: Expect) -> None:
    expect("RW403", f"{HEAD}y = model(x)\n")


def test_the_wrapper_is_followed_through_attributes_and_calls(expect: Expect) -> None:
    expect(
        "RW403",
        """
        import torch.distributed as dist
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
        class Trainer:
            def __init__(self, model):
                self.model = FSDP(model)
            def evaluate(self, loader):
                for batch in loader:
                    self.model(batch)  #! RW403
            def train(self, loader):
                for batch in loader:
                    self.model(batch)
                if dist.get_rank() == 0:
                    self.evaluate(loader)
        """,
    )


def test_a_branch_that_takes_the_wrapper_off_is_believed(expect: Expect) -> None:
    expect(
        "RW403", f"{HEAD}if dist.get_rank() == 0:\n    if distributed:\n        model = model.module\n    model(x)\n"
    )


@pytest.mark.parametrize("test", ['hasattr(model, "module")', "isinstance(model, DDP)"])
def test_what_is_asked_for_its_wrapper_has_none_where_the_answer_is_no(expect: Expect, test: str) -> None:
    body = f"    if {test}:\n        y = model.module(x)\n    else:\n        y = model(x)\n"
    expect("RW403", f"{HEAD}if dist.get_rank() == 0:\n{body}")


def test_a_model_that_callers_hand_over_is_what_they_say(expect: Expect) -> None:
    expect(
        "RW403",
        """
        import torch.distributed as dist
        def save(model):
            model.module.state_dict()
        def evaluate(model):
            return model(x)
        if dist.get_rank() == 0:
            evaluate(Net.from_pretrained("x"))
        """,
    )


def test_what_a_lone_process_hands_over_has_no_wrapper(expect: Expect) -> None:
    text = f"{HEAD}def evaluate(model):\n    return model(x)\nlocal_rank = int(os.environ['LOCAL_RANK'])\n"
    text += "if local_rank == -1:\n    evaluate(model)\nif local_rank == 0:\n    evaluate(load())\n"
    expect("RW403", "import os\n" + text)


def test_a_model_that_is_wrapped_where_there_are_many_is_a_wrapper(expect: Expect) -> None:
    source = """import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
device = torch.device("cuda", dist.get_rank() % 8)
model = make(device)
if distributed:
    model = DDP(model)
if dist.get_rank() == 0:
    model(x)  #! RW403
"""
    expect("RW403", source)


@pytest.mark.parametrize(
    "made", ["DDP(net, broadcast_buffers=False)", "apex.parallel.DistributedDataParallel(net, delay_allreduce=True)"]
)
def test_a_wrapper_whose_forward_is_quiet_is_right(expect: Expect, made: str) -> None:
    expect("RW403", f"import apex\n{HEAD}model = {made}\nif dist.get_rank() == 0:\n    model(x)\n")


PREPARED = """
from accelerate import Accelerator
accelerator = Accelerator()
model, optimizer = accelerator.prepare(model, optimizer)
if accelerator.is_main_process:
"""


def test_a_forward_of_a_prepared_model_on_one_rank_is_found(expect: Expect) -> None:
    expect("RW403", f"{PREPARED}    model(x)  #! RW403\n")


@pytest.mark.parametrize(
    "use", ["accelerator.unwrap_model(model)(x)", "model.module(x)", "log_validation(model, accelerator)"]
)
def test_what_may_unwrap_a_prepared_model_is_right(expect: Expect, use: str) -> None:
    expect("RW403", f"{PREPARED}    {use}\n")
