"""What the checker knows of names: variables of launchers, functions that give ranks, guards.

A dotted name counts when it is imported under it. The last part alone counts where the file that defines it was not
given; then it is the only witness there is.
"""

from __future__ import annotations

import re

from rankwise.check.values import Atom, Kind, Many, Test, Value, of, testing

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
CONSTANTS: dict[str, Kind] = {
    "RANK": "rank",
    "GLOBAL_RANK": "rank",
    "LOCAL_RANK": "local_rank",
    "NODE_RANK": "node_rank",
    "WORLD_SIZE": "world_size",
    "LOCAL_WORLD_SIZE": "local_world_size",
}
"""Those of modules that were not given, read from the environment there."""

_MAIN = re.compile(
    r"_?(?:is_|on_|am_i_)*(?:global_|world_|the_)?(?:main|master|primary|chief|root|lead|leader|(?:rank|global|process)_?"
    r"(?:zero|0)|rank0)(?:_(?:process|rank|worker|proc|node|ordinal))?_?(?:only)?"
)
_LOCAL_MAIN = re.compile(
    r"_?is_(?:local|node)_?(?:main|master|primary|chief|root|lead|leader|(?:rank|process)_?(?:zero|0)|zero|rank0)"
    r"(?:_(?:process|rank|worker|proc|node|ordinal))?"
)
_MAYBE_MAIN = frozenset({"should_save", "should_log", "is_first_rank", "is_first_worker", "is_last_rank"})
_NOT_MAIN = frozenset(
    {"main", "master", "root", "lead", "leader", "primary", "chief", "main_process", "rank0", "rank_0"}
)
_DISTRIBUTED = re.compile(
    r"_?(?:is_|use_|using_|enable_|do_)*(?:multi_?gpu|ddp|distributed|dist|distributed_run|multi_?node|multigpus?|parallel"
    r"|data_parallel|ddp_run|multiprocessing_distributed|horovod|fsdp)(?:_(?:run|mode|enabled|training|available|initialized|"
    r"is_initialized|avail_and_init|available_and_initialized))?_?"
)
_ONLY_MAIN = re.compile(
    r"_?(?:only_(?:on_)?|on_|run_on_|global_)*(?:main_process|master_process|rank_?(?:zero|0)|(?:main|master|root)(?=_only|_call))"
    r"(?:_(?:process|rank|worker))?(?:_only|_call|_fn)?"
)
_ONLY_LOCAL_MAIN = re.compile(
    r"_?(?:only_(?:on_)?|on_)?local_(?:main_process|master_process|rank_?(?:zero|0)|(?:main|master|root)(?=_only))(?:_(?:process|rank))?(?:_only)?"
)
_OTHER_RANK = re.compile(
    r"(?!.*(?:lora|low|max|min|matrix|adapter|page)_)\w+_rank|rank_in_\w+|\w+_parallel_rank|is_\w+_(?:first|last)_stage"
)
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

_VARYING_ANYWHERE = frozenset(
    {"uuid1", "uuid4", "getpid", "gethostname", "mkdtemp", "mkstemp", "token_hex", "NamedTemporaryFile"}
)
_SHARED_FOLDER = re.compile(
    r"_?(?:create|make|set_?up|prepare|init|initialize)_(?:\w+_)?(?:exp|experiment|output|log|run|work|save|checkpoint)s?_?"
    r"(?:folder|dir|directory|directories|path|paths|space|logger)?s?"
)


def named_test(name: str) -> Value | None:
    """What a helper or attribute says by its name alone: true on the main process; None where it says nothing."""
    if _LOCAL_MAIN.fullmatch(name):
        return testing(Atom("local_rank", "main"))
    if name in _MAYBE_MAIN:
        atom = Atom("rank", "main", sure=False)
        return Value("", True, Test((atom,), (atom.opposite,)))
    if _MAIN.fullmatch(name) and name not in _NOT_MAIN and not name.endswith("only"):
        return testing(Atom("rank", "main"))
    return None


def is_other_rank(name: str) -> bool:
    """Whether a name says that it is a rank among some of the processes, such as `dp_rank`."""
    return _OTHER_RANK.fullmatch(name) is not None


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
    return name in _VARYING or name.rpartition(".")[2] in _VARYING_ANYWHERE


def makes_shared_folder(name: str) -> bool:
    """Whether a function of this name takes a rank to know who makes the folder, and tells all of it."""
    return _SHARED_FOLDER.fullmatch(name) is not None


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
