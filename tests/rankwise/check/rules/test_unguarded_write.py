from collections.abc import Callable

import pytest

Expect = Callable[..., None]
HEAD = """import os, time, torch, uuid, numpy as np, torch.distributed as dist
dist.init_process_group("nccl")
rank = dist.get_rank()
"""


@pytest.mark.parametrize(
    "write",
    [
        "torch.save(state, 'model.pt')",
        "torch.save(state, os.path.join(folder, f'step-{step}.pt'))",
        "open('log.txt', 'a').write('x')",
        "np.save('x.npy', x)",
        "model.save_pretrained(folder)",
        "table.to_csv('x.csv')",
        "dataset.save_to_disk(folder)",
        "(folder / 'x.json').write_text('{}')",
    ],
)
def test_a_write_of_every_rank_is_found(expect: Expect, write: str) -> None:
    expect("RW301", f"{HEAD}{write}  #! RW301\n")


@pytest.mark.parametrize(
    "path",
    [
        "f'rank{rank}.pt'",
        "'x%d' % rank",
        "os.path.join(folder, str(rank))",
        "f'{uuid.uuid4()}'",
        "f'{time.time()}'",
        "names[rank]",
    ],
)
def test_a_path_of_its_own_is_right(expect: Expect, path: str) -> None:
    expect("RW301", f"{HEAD}path = {path}\ntorch.save(state, path)\n")


@pytest.mark.parametrize(
    "guard",
    [
        "rank == 0",
        "is_main_process()",
        "not dist.is_initialized() or rank == 0",
        "args.rank == 0",
        "device_id == 0",
        "trainer.args.should_save",
        "trainer.is_world_process_zero()",
        "trainer.is_local_process_zero()",
        "flags and not rank",
    ],
)
def test_a_guard_is_right(expect: Expect, guard: str) -> None:
    expect("RW301", f"{HEAD}if {guard}:\n    torch.save(state, 'model.pt')\n")


def test_a_helper_is_right_where_its_callers_have_the_guard(expect: Expect) -> None:
    expect(
        "RW301",
        """
        import torch, torch.distributed as dist
        def write(state, name):
            torch.save(state, name)
        def save(state):
            write(state, "model.pt")
        def main():
            dist.init_process_group("nccl")
            if dist.get_rank() == 0:
                save({})
        """,
    )


def test_a_helper_without_a_guard_anywhere_is_found(expect: Expect) -> None:
    expect(
        "RW301",
        main="""
        import torch.distributed as dist
        from out import write
        def main():
            dist.init_process_group("nccl")
            write({})
        """,
        out="""
        import torch
        def write(state):
            torch.save(state, "model.pt")  #! RW301
        """,
    )


def test_a_decorator_is_a_guard_by_what_it_does(expect: Expect) -> None:
    expect(
        "RW301",
        """
        import torch, torch.distributed as dist
        def once(function):
            def inner(*args):
                if dist.get_rank() == 0:
                    return function(*args)
            return inner
        def always(function):
            def inner(*args):
                return function(*args)
            return inner
        @once
        def save():
            torch.save({}, "a.pt")
        @always
        def write():
            torch.save({}, "b.pt")  #! RW301
        def main():
            dist.init_process_group("nccl")
            save()
            write()
        """,
    )


def test_an_object_that_only_the_main_process_has_is_a_guard(expect: Expect) -> None:
    writer = "writer = make() if rank == 0 else None\n"
    expect("RW301", f"{HEAD}{writer}if writer is not None:\n    torch.save(state, 'a.pt')\n")
    expect("RW301", f"{HEAD}{writer}if writer:\n    torch.save(state, 'a.pt')\n")
    expect("RW301", f"{HEAD}{writer}if writer is None:\n    return\ntorch.save(state, 'a.pt')\n")


def test_a_flag_that_is_set_on_the_main_process_is_a_guard(expect: Expect) -> None:
    expect(
        "RW301",
        HEAD + "main = False\nif rank == 0:\n    main = True\nif main:\n    torch.save(state, 'a.pt')\n",
    )


def test_the_parent_of_spawned_processes_is_alone(expect: Expect) -> None:
    expect(
        "RW301",
        """
        import torch, torch.distributed as dist, torch.multiprocessing as mp
        def worker(rank):
            dist.init_process_group("nccl", rank=rank, world_size=2)
            torch.save({}, "worker.pt")  #! RW301
        def main():
            torch.save({}, "parent.pt")
            mp.spawn(worker, args=(), nprocs=2)
        """,
    )


def test_a_script_of_one_process_is_right(expect: Expect) -> None:
    expect("RW301", "import torch, distributed_data\ntorch.save({}, 'model.pt')\n")


def test_a_dump_after_a_failure_is_right(expect: Expect) -> None:
    expect("RW301", f"{HEAD}try:\n    step()\nexcept RuntimeError:\n    torch.save(batch, 'bad.pt')\n    raise\n")


@pytest.mark.parametrize(
    "write",
    [
        "(folder / uuid.uuid4().hex).with_suffix('.tmp').write_text('{}')",
        "path.with_suffix(f'.{uuid.uuid4().hex}').write_text('{}')",
        "accelerator.save(state, 'x.pt')",
        "cfg.dump()",
    ],
)
def test_a_write_that_is_each_ranks_own_or_is_guarded_inside_is_right(expect: Expect, write: str) -> None:
    expect("RW301", f"{HEAD}{write}\n")


def test_a_configuration_that_every_rank_dumps_is_found(expect: Expect) -> None:
    expect("RW301", f"{HEAD}cfg.dump(os.path.join(cfg.work_dir, 'config.py'))  #! RW301\n")


def test_a_write_in_a_hook_that_every_rank_runs_is_found(expect: Expect) -> None:
    expect(
        "RW301",
        """
        import torch, lightning as L
        class Model(L.LightningModule):
            def on_save_checkpoint(self, checkpoint):
                torch.save(self.ema, "ema.pt")  #! RW301
            def on_fit_end(self):
                if self.trainer.is_global_zero:
                    torch.save(self.ema, "ema.pt")
            def training_step(self, batch):
                torch.save(batch, "batch.pt")
        """,
    )


def test_who_calls_what_lets_the_main_process_first_runs_on_every_rank(expect: Expect) -> None:
    expect(
        "RW301",
        """
        def load(args):
            with args.main_process_first():
                return prepare()
        def main(args):
            load(args)
            open("args.json", "w").write(str(args))  #! RW301
        """,
    )


@pytest.mark.parametrize(
    "write",
    [
        "buffer = io.BytesIO()\ntorch.save(state, buffer)",
        "raw = io.BytesIO()\ntorch.save(state, raw)",
        "open('x.lock', 'w')",
        "model.save_pretrained('out', is_main_process=accelerator.is_main_process)",
        "torch.save(state, f'tp{mpu.get_tensor_model_parallel_rank()}.pt')",
        "torch.save(state, f'{dp_rank_of(x).dp_rank}.pt')",
        "if mpu.get_data_parallel_rank() == 0:\n    torch.save(state, 'x.pt')",
        "match rank:\n    case 0:\n        torch.save(state, 'x.pt')",
        "for path in shard_of(paths):\n    open(path + '.txt', 'w')",
        "for path in paths_of_this_process(paths):\n    open(path + '.txt', 'w')",
    ],
)
def test_what_is_no_file_or_may_be_each_ranks_own_is_right(expect: Expect, write: str) -> None:
    expect("RW301", f"import io\n{HEAD}{write}\n")


@pytest.mark.parametrize("paths", ["sorted(paths)", "enumerate(paths)", "paths"])
def test_a_write_for_each_of_a_list_that_all_have_is_found(expect: Expect, paths: str) -> None:
    expect("RW301", f"{HEAD}for path in {paths}:\n    open(path, 'w')  #! RW301\n")


def test_a_flag_that_an_object_was_made_with_is_a_guard(expect: Expect) -> None:
    expect(
        "RW301",
        """
        import torch, torch.distributed as dist
        class Saver:
            def __init__(self, enabled):
                self.enabled = enabled
            def save(self, state):
                if self.enabled:
                    torch.save(state, "x.pt")
        def main():
            dist.init_process_group()
            Saver(dist.get_rank() == 0).save(1)
        """,
    )


def test_who_makes_an_object_that_wraps_the_model_runs_on_every_rank(expect: Expect) -> None:
    expect(
        "RW301",
        """
        import torch
        from torch.nn.parallel import DistributedDataParallel as DDP
        class Trainer:
            def __init__(self, model):
                self.model = DDP(model)
            def save(self):
                torch.save(self.model.state_dict(), "x.pt")  #! RW301
        Trainer(net).save()
        """,
    )


@pytest.mark.parametrize("test", ["dist.get_world_size() > 1", "dist.is_initialized()", "config.gather"])
def test_an_early_return_inside_a_branch_leaves_its_mark(expect: Expect, test: str) -> None:
    body = (
        f"    if {test}:\n        dist.gather(x)\n        if rank != 0:\n            return\n    open('x.csv', 'w')\n"
    )
    expect("RW301", f"{HEAD}def main():\n{body}main()\n")


def test_a_lone_fabric_writes_what_it_likes(expect: Expect) -> None:
    head = "import torch, lightning as L\n"
    expect("RW301", f"{head}fabric = L.Fabric(devices=1)\ntorch.save(state, 'x.pt')\n")
    expect("RW301", f"{head}fabric = L.Fabric(devices=2)\ntorch.save(state, 'x.pt')  #! RW301\n")


def test_an_override_that_is_told_which_process_is_the_main_one_is_right(expect: Expect) -> None:
    expect(
        "RW301",
        f"{HEAD}def save(folder, is_main_process):\n    model.save_pretrained(folder, is_main_process)\nsave(1, 2)\n",
    )


def test_a_path_from_a_caller_that_is_not_given_is_not_judged(expect: Expect) -> None:
    text = f"{HEAD}def test(path):\n    if rank == 0:\n        print(path)\n    open(path, 'w')"
    expect("RW301", f"{text}\n")
    expect("RW301", f"{text}  #! RW301\ntest('x.txt')\n")


def test_who_a_set_of_ranks_lets_through_is_the_main_process(expect: Expect) -> None:
    expect("RW301", f"{HEAD}if rank in {{-1, 0}}:\n    torch.save(state, 'x.pt')\n")


def test_a_caller_that_is_alone_does_not_excuse_the_others(expect: Expect) -> None:
    source = """
def train(state):
    torch.save(state, 'init.pt')  #! RW301
def main(args):
    if not args.evolve:
        train(1)
    else:
        assert rank == -1
        train(2)
main(options)
"""
    expect("RW301", HEAD + source)


def test_what_is_refused_with_many_processes_is_done_by_one(expect: Expect) -> None:
    source = """
def main(args):
    if rank != -1:
        assert not args.evolve, 'not with many processes'
    if not args.evolve:
        torch.save(1, 'a.pt')  #! RW301
    else:
        torch.save(1, 'b.pt')
main(options)
"""
    expect("RW301", HEAD + source)


def test_an_assertion_about_devices_divides_no_ranks(expect: Expect) -> None:
    expect("RW301", f"{HEAD}assert torch.cuda.device_count() > rank\ntorch.save(1, 'x.pt')  #! RW301\n")


def test_what_all_callers_do_in_a_handler_is_no_finding(expect: Expect) -> None:
    source = """
def dump(batch):
    torch.save(batch, 'bad.pt')
def main():
    try:
        step()
    except RuntimeError:
        dump(1)
        raise
main()
"""
    expect("RW301", HEAD + source)


def test_a_random_name_of_another_library_is_random_too(expect: Expect) -> None:
    expect("RW301", f"from lhotse.utils import uuid4\n{HEAD}torch.save(1, f'{{uuid4()}}.pt')\n")


def test_the_number_of_a_turn_is_the_same_on_all_ranks(expect: Expect) -> None:
    expect("RW301", f"{HEAD}for i, x in enumerate(loader):\n    torch.save(x, f'{{i}}.pt')  #! RW301\n")
    expect("RW301", f"{HEAD}for name, x in loader:\n    torch.save(x, f'{{name}}.pt')\n")


def test_a_rank_told_to_who_makes_the_folder_is_not_in_its_name(expect: Expect) -> None:
    expect("RW301", f"{HEAD}folder, logger = create_exp_folder(args, rank)\nopen(f'{{folder}}/a', 'w')  #! RW301\n")
    expect("RW301", f"{HEAD}folder = folder_of(args, rank)\nopen(f'{{folder}}/a', 'w')\n")


def test_the_rest_of_a_tuple_keeps_its_values_beside_a_star(expect: Expect) -> None:
    source = "old = rank, 2\nargs.out, args.rank, args.size = 'out', *old\ntorch.save(1, args.out)  #! RW301\n"
    expect("RW301", HEAD + source)


def test_a_script_for_the_trainer_of_transformers_runs_under_a_launcher(expect: Expect) -> None:
    source = """import os, transformers
def main(args):
    {line}
    trainer = transformers.Trainer(model=model, args=args)
    trainer.train()
    with open('metrics.json', 'w') as file:{expected}
        file.write('x')
main(options)
"""
    expect("RW301", source.format(line="local_rank = os.environ['LOCAL_RANK']", expected="  #! RW301"))
    expect("RW301", source.format(line="device = 'cuda'", expected=""))


def test_a_helper_that_is_named_after_a_format_writes(expect: Expect) -> None:
    head = f"from utils import save_json, yaml_save\n{HEAD}"
    expect("RW301", f"{head}yaml_save(folder / 'opt.yaml', vars(args))  #! RW301\n")
    expect("RW301", f"{head}save_json(results, 'results.json')  #! RW301\n")
    expect("RW301", f"{head}if rank == 0:\n    save_json(results, 'results.json')\n")
    expect("RW301", f"{HEAD}trainer.state.save_to_json('results.json')\n")


def test_what_an_application_runs_is_not_handed_over(expect: Expect) -> None:
    source = "from absl import app\ndef main(argv):\n    torch.save(1, 'x.pt')  #! RW301\napp.run(main)\n"
    expect("RW301", HEAD + source.replace("torch.save", "rank = dist.get_rank()\n    torch.save"))
