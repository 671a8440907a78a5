"""What the checker knows of launchers and libraries: names of variables, functions and attributes.

A dotted name counts when it is imported under it. The last part alone counts where the file that defines it was not
given; then it is the only witness there is.
"""

from __future__ import annotations

import re

from rankwise.check.values import Atom, Kind, Many, Thing, Value, of, testing

ENVIRONMENT: dict[str, Kind] = {
    "RANK": "rank",
    "LOCAL_RANK": "local_rank",
    "GROUP_RANK": "node_rank",
    "NODE_RANK": "node_rank",
    "CROSS_RANK": "node_rank",
    "WORLD_SIZE": "world_size",
    "LOCAL_WORLD_SIZE": "local_world_size",
    "LOCAL_SIZE": "local_world_size",
    "GROUP_WORLD_SIZE": "num_nodes",
    "SLURM_PROCID": "rank",
    "SLURM_LOCALID": "local_rank",
    "SLURM_NODEID": "node_rank",
    "SLURM_NTASKS": "world_size",
    "SLURM_NPROCS": "world_size",
    "SLURM_STEP_NUM_TASKS": "world_size",
    "SLURM_NTASKS_PER_NODE": "local_world_size",
    "SLURM_TASKS_PER_NODE": "local_world_size",
    "SLURM_GPUS_ON_NODE": "local_world_size",
    "SLURM_GPUS_PER_NODE": "local_world_size",
    "SLURM_NNODES": "num_nodes",
    "SLURM_JOB_NUM_NODES": "num_nodes",
    "PMI_RANK": "rank",
    "PMI_SIZE": "world_size",
    "PMIX_RANK": "rank",
    "PMIX_LOCAL_RANK": "local_rank",
    "MPI_LOCALRANKID": "local_rank",
    "MPI_LOCALNRANKS": "local_world_size",
    "PALS_RANKID": "rank",
    "PALS_LOCAL_RANKID": "local_rank",
    "PALS_NODEID": "node_rank",
    "FLUX_TASK_RANK": "rank",
    "FLUX_TASK_LOCAL_ID": "local_rank",
}
_MPI_NAMES: dict[str, Kind] = {
    "RANK": "rank",
    "LOCAL_RANK": "local_rank",
    "SIZE": "world_size",
    "LOCAL_SIZE": "local_world_size",
}
for _prefix in ("OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "MVP_COMM_WORLD_", "HOROVOD_", "JSM_NAMESPACE_"):
    ENVIRONMENT |= {_prefix + _name: _kind for _name, _kind in _MPI_NAMES.items()}

# Where the defining file was not given.
CALLED: dict[str, Kind] = {
    "get_rank": "rank",
    "get_global_rank": "rank",
    "global_rank": "rank",
    "Get_rank": "rank",
    "get_ordinal": "rank",
    "global_ordinal": "rank",
    "get_world_rank": "rank",
    "get_local_rank": "local_rank",
    "get_node_local_rank": "local_rank",
    "local_rank": "local_rank",
    "get_local_ordinal": "local_rank",
    "get_local_process_index": "local_rank",
    "get_world_size": "world_size",
    "Get_size": "world_size",
    "xrt_world_size": "world_size",
    "get_local_world_size": "local_world_size",
    "get_local_size": "local_world_size",
    "local_size": "local_world_size",
    "device_count": "local_world_size",
    "get_nproc_per_node": "local_world_size",
    "get_num_gpus": "local_world_size",
    "get_node_rank": "node_rank",
    "get_nnodes": "num_nodes",
}
PAIRS: dict[str, tuple[Kind, Kind]] = {
    "get_dist_info": ("rank", "world_size"),
    "get_world_size_and_rank": ("world_size", "rank"),
}
NAMED: dict[str, Kind] = {
    "local_rank": "local_rank",
    "local_process_index": "local_rank",
    "global_rank": "rank",
    "process_index": "rank",
    "rank": "some_rank",
    "world_size": "world_size",
    "num_processes": "world_size",
    "local_world_size": "local_world_size",
    "ngpus_per_node": "local_world_size",
    "gpus_per_node": "local_world_size",
    "nproc_per_node": "local_world_size",
    "num_gpus_per_node": "local_world_size",
    "node_rank": "node_rank",
    "nnodes": "num_nodes",
}
"""Attribute or parameter of which nothing else is known -> what its name says."""

_MAIN = re.compile(
    r"_?(?:is_|on_|am_i_)*(?:global_|world_|the_)?(?:main|master|primary|chief|root|lead|leader|(?:rank|global|process)_?"
    r"(?:zero|0)|rank0)(?:_(?:process|rank|worker|proc|node|ordinal))?_?(?:only)?"
)
_LOCAL_MAIN = re.compile(
    r"_?is_(?:local|node)_?(?:main|master|primary|chief|root|lead|leader|rank_?(?:zero|0)|zero|rank0)"
    r"(?:_(?:process|rank|worker|proc|node|ordinal))?"
)
_NOT_MAIN = frozenset(
    {"main", "master", "root", "lead", "leader", "primary", "chief", "main_process", "rank0", "rank_0"}
)
_DISTRIBUTED = re.compile(
    r"_?(?:is_|use_|using_|enable_|do_)*(?:multi_?gpu|ddp|distributed|dist|distributed_run|multi_?node|multigpus?|parallel"
    r"|data_parallel|ddp_run|multiprocessing_distributed|horovod|fsdp)(?:_(?:run|mode|enabled|training|available|initialized|"
    r"is_initialized|avail_and_init|available_and_initialized))?_?"
)
_ONLY_MAIN = re.compile(
    r"_?(?:(?:only_)?on_)?(?:global_)?(?:main|master|rank_?(?:zero|0)|root)(?:_(?:process|rank|worker))?(?:_only|_call)?"
)
_ONLY_LOCAL_MAIN = re.compile(r"_?(?:on_)?local_(?:main|master|rank_?(?:zero|0)|root)(?:_(?:process|rank))?(?:_only)?")
_EXITS = frozenset({"sys.exit", "exit", "quit", "os._exit", "os.abort"})
_VARYING = frozenset(
    [
        "uuid.uuid1",
        "uuid.uuid4",
        "os.getpid",
        "socket.gethostname",
        "platform.node",
        "tempfile.mkdtemp",
        "tempfile.mkstemp",
        "tempfile.mktemp",
        "tempfile.NamedTemporaryFile",
        "tempfile.TemporaryDirectory",
        "tempfile.gettempdir",
        "time.time",
        "time.time_ns",
        "time.strftime",
        "datetime.datetime.now",
        "datetime.datetime.utcnow",
        "datetime.now",
        "threading.get_ident",
        "secrets.token_hex",
        "time.monotonic",
        "time.perf_counter",
        "torch.cuda.current_device",
        "os.uname",
        "random.random",
        "random.randint",
        "random.choice",
    ]
)


def named_test(name: str) -> Value | None:
    """What a helper or attribute says by its name alone: true on the main process; None where it says nothing."""
    if _LOCAL_MAIN.fullmatch(name):
        return testing(Atom("local_rank", "main"))
    if _MAIN.fullmatch(name) and name not in _NOT_MAIN and not name.endswith("only"):
        return testing(Atom("rank", "main"))
    return None


def says_distributed(name: str) -> bool:
    """Whether a flag of this name is true exactly where there are many processes."""
    return _DISTRIBUTED.fullmatch(name) is not None


def guard_of_decorator(name: str) -> Atom | None:
    """On which ranks alone a function under this decorator runs."""
    last = name.rpartition(".")[2].lower()
    if _ONLY_LOCAL_MAIN.fullmatch(last):
        return Atom("local_rank", "main")
    return Atom("rank", "main") if _ONLY_MAIN.fullmatch(last) else None


def is_exit(name: str) -> bool:
    return name in _EXITS


def is_varying(name: str) -> bool:
    """Whether a call gives something else on every rank, or may."""
    return name in _VARYING


def called(name: str) -> Value | None:
    """What a function outside of the given files returns; None where nothing is known."""
    last = name.rpartition(".")[2]
    if last in PAIRS:
        return Value(data=Many(tuple(of(kind) for kind in PAIRS[last])))
    if name.startswith("horovod.") and last in ("rank", "size"):
        return of("rank" if last == "rank" else "world_size")
    if name.startswith("torch_xla.") and last == "is_master_ordinal":
        return testing(Atom("local_rank", "main"))
    if last in CALLED:
        return of(CALLED[last])
    if name in ("torch.distributed.is_initialized", "torch.distributed.is_available") or says_distributed(last):
        return None
    return named_test(last)


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
}


def made(name: str, inner: Value, line: int) -> Thing | None:
    """The object that a constructor of a known library makes."""
    last = name.rpartition(".")[2]
    if last == "Trainer" and ("lightning" in name or name in ("pl.Trainer", "L.Trainer")):
        return Thing("lightning", inner, line)
    if name == "deepspeed.initialize":
        return Thing("deepspeed", inner, line)
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
    if name == "module" and thing.tag in ("ddp", "fsdp", "deepspeed"):
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


STARTS = re.compile(
    r"(?:init|setup|initialize|prepare|launch|start|create|set_up)_?(?:for_)?(?:torch_|pytorch_)?(?:ddp|dist|distributed|process_group|parallel|distributed_mode"
    r"|dist_pytorch|distributed_training|fsdp|distributed_device|distributed_environment|distributed_backend|torch_distributed)"
    r"|(?:ddp|dist|distributed|fsdp)_?(?:init|setup|initialize)|init_process_group|init_distributed.*|init_dist.*|setup_ddp.*|setup_dist.*"
)
"""Functions that join the ranks; who calls one runs on every rank."""
