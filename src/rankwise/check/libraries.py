"""What the checker knows of libraries: their objects, their collectives, and who joins the ranks."""

from __future__ import annotations

import re

from rankwise.check.facts import named_test
from rankwise.check.trace import Call
from rankwise.check.values import Kind, Thing, Value, constant, of

ACCELERATOR = frozenset({"Accelerator", "PartialState", "AcceleratorState"})
TRAINERS = frozenset({"Trainer", "Seq2SeqTrainer", "SFTTrainer"})
_MADE = {
    "DistributedDataParallel": "ddp",
    "DDP": "ddp",
    "MMDistributedDataParallel": "ddp",
    "FullyShardedDataParallel": "fsdp",
    "FSDP": "fsdp",
    "DistributedSampler": "sampler",
    "DataLoader": "loader",
    "SummaryWriter": "tracker",
    "Path": "path",
    "PosixPath": "path",
    "Accelerator": "accelerator",
    "PartialState": "accelerator",
    "AcceleratorState": "accelerator",
    "Fabric": "fabric",
    "Popen": "process",
    "BytesIO": "buffer",
    "StringIO": "buffer",
}


def made(name: str, inner: Value, line: int) -> Thing | None:
    """The object that a constructor of a known library makes."""
    last = name.rpartition(".")[2]
    if last == "Trainer" and ("lightning" in name or name in ("pl.Trainer", "L.Trainer")):
        return Thing("lightning", inner, line)
    if name == "deepspeed.initialize":
        return Thing("deepspeed", inner, line)
    if last == "DistributedDataParallel" and name.startswith("apex."):
        return Thing("quiet ddp", inner, line)
    if last == "fully_shard" and "torch" in name:
        return Thing("fsdp", inner, line)
    tag = _MADE.get(last)
    return Thing(tag, inner, line) if tag else None


_ACCELERATE: dict[str, Kind] = {
    "process_index": "rank",
    "local_process_index": "local_rank",
    "num_processes": "world_size",
}
_LIGHTNING: dict[str, Kind] = {
    "global_rank": "rank",
    "local_rank": "local_rank",
    "node_rank": "node_rank",
    "world_size": "world_size",
}


def attribute(thing: Thing, name: str) -> Value | None:
    """What an attribute of a known library's object holds."""
    if thing.tag == "accelerator" and name in _ACCELERATE:
        return of(_ACCELERATE[name])
    if thing.tag in ("lightning", "fabric") and name in _LIGHTNING:
        return of(_LIGHTNING[name])
    if name == "module" and thing.tag in ("ddp", "quiet ddp", "prepared", "fsdp", "deepspeed"):
        return thing.inner if isinstance(thing.inner.data, Thing) else Value(data=Thing("bare"))
    if thing.tag == "loader" and name == "sampler":
        return thing.inner
    return named_test(name)


_COLLECTIVES = frozenset(
    [
        "barrier",
        "monitored_barrier",
        "all_reduce",
        "all_gather",
        "all_gather_into_tensor",
        "all_gather_object",
        "all_to_all",
        "all_to_all_single",
        "broadcast",
        "broadcast_object_list",
        "reduce",
        "gather",
        "gather_object",
        "scatter",
        "scatter_object_list",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "new_group",
        "new_subgroups",
        "init_process_group",
        "all_reduce_coalesced",
        "all_gather_coalesced",
        "init_device_mesh",
    ]
)
_BY_NAME_ALONE = frozenset(
    [
        "barrier",
        "monitored_barrier",
        "wait_for_everyone",
        "all_reduce",
        "all_gather",
        "all_gather_object",
        "all_gather_into_tensor",
        "allreduce",
        "allgather",
        "allgather_object",
        "broadcast_object_list",
        "broadcast_object",
        "gather_object",
        "gather_for_metrics",
        "block_all",
        "sync_all_reduce",
        "all_reduce_mean",
        "reduce_scatter",
        "all_to_all",
        "wait_for_all_processes",
        "synchronize_between_processes",
        "reduce_across_processes",
        "allreduce_",
        "gather_rows",
        "broadcast_tensors",
        "sync_ranks",
    ]
)
_OF_ACCELERATOR = frozenset(["wait_for_everyone", "gather", "gather_for_metrics", "reduce", "pad_across_processes"])
_OF_FABRIC = frozenset(["barrier", "all_gather", "all_reduce", "broadcast", "setup", "setup_module", "save"])
_OF_HOROVOD = frozenset(
    [
        "allreduce",
        "allgather",
        "broadcast",
        "broadcast_object",
        "broadcast_parameters",
        "broadcast_optimizer_state",
        "join",
        "barrier",
        "alltoall",
        "allgather_object",
    ]
)
_OF_RANKWISE = frozenset(["barrier", "agree", "broadcast_object", "gather_objects", "gather_rows", "raise_together"])
_OF_DCP = frozenset(["save", "load", "async_save", "save_state_dict", "load_state_dict"])


def collective(name: str, receiver: Value | None) -> str | None:
    """The collective that a call outside of the given files ends in; None where it ends in none."""
    base, _, last = name.rpartition(".")
    thing = receiver.data if receiver is not None else None
    if isinstance(thing, Thing):
        own = {"accelerator": _OF_ACCELERATOR, "fabric": _OF_FABRIC}.get(thing.tag)
        if own is not None:
            return last if last in own else None
        return last if thing.tag == "lightning" and last == "save_checkpoint" else None
    if base == "torch.distributed" or base.startswith(("torch.distributed.distributed_c10d", "deepspeed.comm")):
        return last if last in _COLLECTIVES else None
    if base in ("torch.distributed.checkpoint", "torch.distributed.checkpoint.state_dict_saver"):
        return f"checkpoint.{last}" if last in _OF_DCP else None
    if base.startswith("torch.distributed.nn"):
        return last if last in _COLLECTIVES else None
    if base.startswith("horovod"):
        return last if last in _OF_HOROVOD else None
    if base.partition(".")[0] == "rankwise":
        return last if last in _OF_RANKWISE else None
    if base.startswith(("torch.", "threading", "multiprocessing", "numpy", "jax")) or base in ("torch", "asyncio"):
        return None
    if last in ("rendezvous", "mesh_reduce", "all_reduce") and base.startswith("torch_xla"):
        return last
    if last == "save_checkpoint" and re.fullmatch(r"(?:self\.)?_?(?:pl_)?trainer(?:\.strategy)?", base):
        return last
    if last == "synchronize" and re.search(r"dist|comm", base):
        return last
    return last.lower() if last.lower() in _BY_NAME_ALONE else None


def collective_of(call: Call) -> str | None:
    """The same for a call; None also where its arguments say that no other rank takes part."""
    alone = constant(call.argument(-1, "no_dist")) is True
    return None if alone else collective(call.name, call.receiver)


STARTS = re.compile(
    r"(?:init|setup|initialize|prepare|launch|start|create|set_up)_?(?:for_)?(?:torch_|pytorch_)?(?:ddp|dist|distributed|process_group|parallel|distributed_mode"
    r"|dist_pytorch|distributed_training|fsdp|distributed_device|distributed_environment|distributed_backend|torch_distributed)"
    r"|(?:ddp|dist|distributed|fsdp)_?(?:init|setup|initialize)|init_process_group|init_distributed.*|init_dist.*|setup_ddp.*|setup_dist.*"
)
"""Functions that join the ranks; who calls one runs on every rank."""

HOOKED = re.compile(r"(?:^|\.)(?:LightningModule|(?:pl|L|callbacks)\.Callback|TrainerCallback)$")
"""Classes whose hooks a trainer calls on every rank."""
HOOKS = frozenset(
    [
        "on_epoch_end",
        "on_evaluate",
        "on_fit_end",
        "on_fit_start",
        "on_save",
        "on_save_checkpoint",
        "on_test_epoch_end",
        "on_train_begin",
        "on_train_end",
        "on_train_epoch_end",
        "on_train_start",
        "on_validation_end",
        "on_validation_epoch_end",
        "training_epoch_end",
        "validation_epoch_end",
    ]
)
"""Those in which no single batch is at hand, so that a file that is written is one for all."""
