from collections.abc import Callable

import pytest

Expect = Callable[..., None]
HEAD = "import os, torch, wandb\nlocal_rank = int(os.environ['LOCAL_RANK'])\n"


@pytest.mark.parametrize(
    "work",
    ["torch.save(state, 'model.pt')", "wandb.init()", "model.save_pretrained('out')", "open('config', 'w').write('')"],
)
@pytest.mark.parametrize(
    "guard", ["local_rank == 0", "not local_rank", "local_rank in (-1, 0)", "epoch > 3 and local_rank == 0"]
)
def test_global_work_under_a_guard_of_the_node_is_found(expect: Expect, work: str, guard: str) -> None:
    expect("RW201", f"{HEAD}if {guard}:  #! RW201\n    {work}\n")


@pytest.mark.parametrize(
    "guard",
    [
        "int(os.environ['RANK']) == 0",
        "local_rank == 0 and int(os.environ['GROUP_RANK']) == 0",
        "local_rank == 0 and torch.distributed.get_rank() == 0",
        "local_rank == -1",
    ],
)
def test_a_guard_of_the_global_rank_is_right(expect: Expect, guard: str) -> None:
    expect("RW201", f"{HEAD}if {guard}:\n    torch.save(state, 'model.pt')\n")


@pytest.mark.parametrize(
    "work", ["print('hello')", "download('data')", "torch.save(state, '/tmp/model.pt')", "bar = tqdm(x)"]
)
def test_work_of_each_node_is_right(expect: Expect, work: str) -> None:
    expect("RW201", f"{HEAD}if local_rank == 0:\n    {work}\n")


def test_a_helper_is_followed_by_what_it_returns_not_by_its_name(expect: Expect) -> None:
    expect(
        "RW201",
        """
        import os, torch
        def is_main_process():
            return int(os.environ["LOCAL_RANK"]) == 0  #! RW201
        def train(model):
            if is_main_process():
                torch.save(model, "model.pt")
        """,
    )


def test_a_helper_is_followed_by_its_arguments(expect: Expect) -> None:
    expect(
        "RW201",
        """
        import os, torch
        def is_master(local=False):
            return int(os.environ["LOCAL_RANK"]) == 0 if local else int(os.environ["RANK"]) == 0
        def train(model):
            if is_master():
                torch.save(model, "model.pt")
        """,
    )


def test_an_early_return_is_a_guard(expect: Expect) -> None:
    expect(
        "RW201",
        """
        import os, torch
        class Saver:
            def __init__(self):
                self.local_rank = int(os.environ["LOCAL_RANK"])
            def save(self, model):
                if self.local_rank != 0:  #! RW201
                    return
                torch.save(model, "model.pt")
        """,
    )


def test_what_a_called_method_writes_counts(expect: Expect) -> None:
    expect(
        "RW201",
        """
        import os, torch
        class Trainer:
            def __init__(self):
                self.local_rank = int(os.environ["LOCAL_RANK"])
            def write(self):
                torch.save(self.model, "model.pt")
            def train(self):
                if self.local_rank == 0:  #! RW201
                    self.write()
        """,
    )


def test_accelerate_tells_node_and_job_apart(expect: Expect) -> None:
    expect(
        "RW201",
        """
        import torch
        from accelerate import Accelerator
        accelerator = Accelerator()
        if accelerator.is_local_main_process:  #! RW201
            torch.save(state, "a.pt")
        if accelerator.is_main_process:
            torch.save(state, "b.pt")
        """,
    )


def test_an_attribute_named_local_may_hold_a_global_rank(expect: Expect) -> None:
    expect(
        "RW201",
        """
        import torch, torch.distributed as dist
        cfg.local_rank = dist.get_rank()
        if cfg.local_rank == 0:
            torch.save(state, "a.pt")
        """,
    )


def test_a_variable_that_is_misnamed_is_reported_where_it_is_made(expect: Expect) -> None:
    expect(
        "RW201",
        """
        import os, wandb
        class Monitor:
            def __init__(self):
                rank = int(os.environ["LOCAL_RANK"])  #! RW201
                self.is_master = rank == 0
                if not self.is_master:
                    return
                wandb.init()
        """,
    )


def test_a_save_of_any_object_to_a_path_is_found(expect: Expect) -> None:
    expect("RW201", f"{HEAD}if local_rank == 0:  #! RW201\n    state.save(os.path.join(root, 'last.ckpt'))\n")
    expect("RW201", f"{HEAD}if local_rank == 0:\n    meter.save(value)\n")


def test_an_upload_is_work_for_one_process(expect: Expect) -> None:
    expect("RW201", f"{HEAD}if local_rank == 0:  #! RW201\n    api.upload_folder(folder_path='out', repo_id='x')\n")


@pytest.mark.parametrize(
    "work",
    [
        "shutil.copytree(shared, '/local/data')",
        "if not os.path.exists(folder):\n        os.makedirs(folder)",
    ],
)
def test_work_that_every_node_may_need_is_right(expect: Expect, work: str) -> None:
    expect("RW201", f"import shutil\n{HEAD}if local_rank == 0:\n    {work}\n")


def test_a_guard_of_one_node_beside_it_is_right(expect: Expect) -> None:
    source = """import os, torch
local_rank = int(os.environ["LOCAL_RANK"])
if head.node_id == current_node_id and local_rank == 0:
    torch.save(1, "x.pt")
"""
    expect("RW201", source)


def test_a_writer_for_tensorboard_of_any_library_is_global_work(expect: Expect) -> None:
    source = """import os
from utils import TensorboardWriter
local_rank = int(os.environ["LOCAL_RANK"])
if local_rank == 0:  #! RW201
    writer = TensorboardWriter(folder)
"""
    expect("RW201", source)


def test_the_local_rank_of_an_imported_configuration_is_known(expect: Expect) -> None:
    named = "import torch\nfrom config import cfg\n"
    expect("RW201", f"{named}if cfg.local_rank == 0:  #! RW201\n    torch.save(state, 'model.pt')\n")
    given = """
    import os, torch
    from config import cfg
    def main():
        cfg.gpu = int(os.environ["RANK"]) % torch.cuda.device_count()
        train(cfg)
    def train(cfg):
        if cfg.gpu == 0:  #! RW201
            torch.save(state, 'model.pt')
    main()
    """
    expect("RW201", given)


def test_a_function_that_is_called_local_rank_is_no_number(expect: Expect) -> None:
    source = "import torch\nimport horovod.torch as hvd\nif hvd.rank() == 0:\n    torch.save(state, 'model.pt')\n"
    expect("RW201", source)
    expect("RW201", source.replace("hvd.rank() == 0:", "hvd.local_rank() == 0:  #! RW201"))
