"""Who started this process is read from recorded and documented environments; contradictions are named."""

import json
import re
from pathlib import Path

import pytest

from rankwise.errors import LaunchError
from rankwise.identity import Identity
from rankwise.launchers import LAUNCHERS, find_launcher

ENVIRONMENTS = Path(__file__).parent / "environments"
PAGE = Path(__file__).parents[2] / "docs" / "launchers.md"
MACHINE = "given"  # the host name that the machine itself has

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
}
BY_HAND = {name: value for name, value in TORCHRUN.items() if name != "TORCHELASTIC_RUN_ID"}

# What each recorded command implies: the launcher, then for every rank its node's name, local rank, node rank and
# local world size.
TWO_BY_TWO = [("n1", 0, 0, 2), ("n1", 1, 0, 2), ("n2", 0, 1, 2), ("n2", 1, 1, 2)]
TWO_BY_ONE = [("n1", 0, 0, 1), ("n2", 0, 1, 1)]
THREE_HERE = [(MACHINE, 0, 0, 3), (MACHINE, 1, 0, 3), (MACHINE, 2, 0, 3)]
PLACES = {
    "srun": ("slurm", TWO_BY_TWO),
    "srun_in_batch": ("slurm", TWO_BY_TWO),
    "srun_three_tasks": ("slurm", [("n1", 0, 0, 2), ("n1", 1, 0, 2), ("n2", 0, 1, 1)]),
    "srun_cyclic": ("slurm", [("n1", 0, 0, 3), ("n2", 0, 1, 1), ("n1", 1, 0, 3), ("n1", 2, 0, 3)]),
    "srun_cyclic_even": ("slurm", [("n1", 0, 0, 2), ("n2", 0, 1, 2), ("n1", 1, 0, 2), ("n2", 1, 1, 2)]),
    "srun_plane": (
        "slurm",
        [("n1", 0, 0, 5), ("n1", 1, 0, 5), ("n2", 0, 1, 1), ("n1", 2, 0, 5), ("n1", 3, 0, 5), ("n1", 4, 0, 5)],
    ),
    "srun_arbitrary": ("slurm", [("n2", 0, 1, 2), ("n1", 0, 0, 1), ("n2", 1, 1, 2)]),
    "srun_heterogeneous": ("slurm", [("n1", 0, 0, 2), ("n1", 1, 0, 2), ("n2", 0, 1, 1)]),
    "srun_heterogeneous_reversed": ("slurm", [("n2", 0, 0, 1), ("n1", 0, 1, 2), ("n1", 1, 1, 2)]),
    "srun_heterogeneous_part": ("slurm", [("n2", 0, 0, 2), ("n2", 1, 0, 2), ("n1", 0, 1, 1)]),
    "srun_heterogeneous_direct": ("slurm", [("n3", 0, 0, 1), ("n1", 0, 1, 1), ("n2", 0, 2, 1)]),
    "srun_pmi2": ("slurm", TWO_BY_ONE),
    "srun_preserve_env": ("slurm", TWO_BY_ONE),
    "srun_one_task": ("slurm", [("n1", 0, 0, 1)]),
    "salloc_shell": ("single", [(MACHINE, 0, 0, 1)]),
    "salloc_shell_heterogeneous": ("single", [(MACHINE, 0, 0, 1)]),
    "sbatch_script": ("single", [("n1", 0, 0, 1)]),
    "interactive_step": ("single", [("n1", 0, 0, 1)]),
    "openmpi": ("openmpi", THREE_HERE),
    "openmpi_in_salloc": ("openmpi", TWO_BY_TWO),
    "openmpi_in_sbatch": ("openmpi", TWO_BY_TWO),
    "mpich": ("mpich", THREE_HERE),
    "mpich_in_salloc": ("mpich", TWO_BY_TWO),
    "mpich_in_sbatch": ("mpich", TWO_BY_TWO),
    "torchrun_in_srun": ("torchrun", TWO_BY_TWO),
    "torchrun_in_openmpi": ("torchrun", [(MACHINE, 0, 0, 1), (MACHINE, 0, 1, 1)]),
}
CONTRADICTIONS = {"srun_exported_rank", "sbatch_script_from_step"}


def recorded(name: str) -> list[dict[str, str]]:
    """The environment of every process of one launch, in the order of ranks."""
    launch = json.loads((ENVIRONMENTS / f"{name}.json").read_text())
    return [launch["every_process"] | process for process in launch["processes"]]


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def numbers(identity: Identity) -> tuple[int, int, int, int, int, int]:
    places = (identity.rank, identity.local_rank, identity.node_rank)
    return (*places, identity.world_size, identity.local_world_size, identity.num_nodes)


@pytest.mark.parametrize("name", PLACES)
def test_every_process_of_a_recorded_launch_knows_its_place(name: str) -> None:
    launcher, places = PLACES[name]
    identities = [Identity.resolve(environ, hostname=MACHINE) for environ in recorded(name)]
    num_nodes = len({node_rank for _, _, node_rank, _ in places})
    assert [(identity.launcher, identity.hostname, *numbers(identity)) for identity in identities] == [
        (launcher, host, rank, local_rank, node_rank, len(places), local_world_size, num_nodes)
        for rank, (host, local_rank, node_rank, local_world_size) in enumerate(places)
    ]


def test_every_recording_is_tested() -> None:
    assert {path.stem for path in ENVIRONMENTS.glob("*.json")} == PLACES.keys() | CONTRADICTIONS


def test_rank_exported_in_the_shell_of_srun_is_an_error_on_the_ranks_that_it_is_not() -> None:
    first, *others = recorded("srun_exported_rank")
    assert Identity.resolve(first).launcher == "slurm"
    for rank, environ in enumerate(others, start=1):
        with pytest.raises(LaunchError, match=f"RANK=0 SLURM_PROCID={rank}: .*Unset RANK"):
            Identity.resolve(environ)


def test_batch_script_that_kept_another_steps_variables_is_an_error() -> None:
    (environ,) = recorded("sbatch_script_from_step")
    with pytest.raises(LaunchError, match=r"SLURM_GTIDS=0 SLURM_STEP_TASKS_PER_NODE=2: .*unset SLURM_STEP_ID"):
        Identity.resolve(environ)
    with pytest.raises(LaunchError, match=r"SLURM_STEP_TASKS_PER_NODE=1,1 SLURM_TASKS_PER_NODE=1: "):
        Identity.resolve(environ | {"SLURM_STEP_TASKS_PER_NODE": "1,1", "SLURM_STEP_NUM_NODES": "2"})


def test_job_level_variables_serve_where_an_old_slurm_sets_no_others() -> None:
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_STEP_TASKS_PER_NODE")
    found = [Identity.resolve(without(environ, *names)) for environ in recorded("srun_three_tasks")]
    assert [numbers(identity) for identity in found] == [(0, 0, 0, 3, 2, 2), (1, 1, 0, 3, 2, 2), (2, 0, 1, 3, 1, 2)]
    assert found[0].sources["world_size"] == "SLURM_NTASKS"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"SLURM_PROCID": "4"}, ["SLURM_PROCID=4", "SLURM_STEP_NUM_TASKS=4", "0..3"]),
        ({"SLURM_LOCALID": "2"}, ["SLURM_LOCALID=2", "SLURM_STEP_TASKS_PER_NODE=2(x2)", "0..1"]),
        ({"SLURM_NODEID": "2"}, ["SLURM_NODEID=2", "SLURM_STEP_TASKS_PER_NODE=2(x2)"]),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, ["SLURM_STEP_TASKS_PER_NODE=2(x3)", "SLURM_STEP_NUM_TASKS=4"]),
        ({"SLURM_STEP_NUM_NODES": "4"}, ["SLURM_STEP_NUM_NODES=4", "SLURM_STEP_TASKS_PER_NODE=2(x2)"]),
        ({"SLURM_STEP_TASKS_PER_NODE": "two"}, ["SLURM_STEP_TASKS_PER_NODE='two'"]),
        ({"SLURM_PROCID": ""}, ["SLURM_PROCID=''", "not a whole number from 0 on"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "SLURM_STEP_NUM_TASKS=4"]),
        ({"WORLD_SIZE": "8"}, ["WORLD_SIZE=8", "SLURM_STEP_NUM_TASKS=4"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK=1", "SLURM_LOCALID=0"]),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, ["RANK=1", "SLURM_PROCID=0"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["WORLD_SIZE=2", "SLURM_STEP_NUM_TASKS=4"]),
    ],
)
def test_contradiction_under_slurm_names_variables_and_values(changed: dict[str, str], words: list[str]) -> None:
    with pytest.raises(LaunchError) as raised:
        Identity.resolve(recorded("srun")[0] | changed)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_torchs_variables_that_repeat_what_the_launcher_says_change_nothing() -> None:
    for name, prefix in (("srun", "SLURM_PROCID"), ("openmpi", "OMPI_COMM_WORLD_RANK"), ("mpich", "PMI_RANK")):
        for environ in recorded(name):
            identity = Identity.resolve(environ)
            by_hand = {"RANK": identity.rank, "LOCAL_RANK": identity.local_rank, "WORLD_SIZE": identity.world_size}
            repeated = Identity.resolve(environ | {key: str(value) for key, value in by_hand.items()})
            assert repeated == identity
            assert repeated.sources["rank"] == prefix


def test_own_launcher_inside_a_task_wins_where_its_job_is_the_bigger_one() -> None:
    environ = recorded("srun_pmi2")[1] | BY_HAND | {"WORLD_SIZE": "8", "RANK": "7"}
    identity = Identity.resolve(environ)
    assert (identity.launcher, identity.rank, identity.world_size, identity.hostname) == ("env", 7, 8, "n2")


def test_torchrun_gives_every_field_and_its_source() -> None:
    identity = Identity.resolve(TORCHRUN | {"TORCHELASTIC_RUN_ID": "job-7"})
    assert (identity.launcher, identity.job_id, *numbers(identity)) == ("torchrun", "job-7", 3, 1, 1, 4, 2, 2)
    assert identity.sources["node_rank"] == "GROUP_RANK"
    assert identity.sources["launcher"] == "TORCHELASTIC_RUN_ID"


def test_nodes_of_unequal_size_are_right_under_torchrun() -> None:
    assert numbers(Identity.resolve(TORCHRUN | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"})) == (3, 0, 1, 4, 1, 2)


PYTORCH_JOB = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
DOCUMENTED = [
    (
        "deepspeed",
        {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"},
        (3, 1, 1, 4, 2, 2),
    ),
    (
        "ray",
        {"RAY_JOB_ID": "0a000000", "NODE_RANK": "1", **without(BY_HAND, "GROUP_RANK", "GROUP_WORLD_SIZE")},
        (3, 1, 1, 4, 2, 2),
    ),
    (
        "horovod",
        {"HOROVOD_RANK": "2", "HOROVOD_SIZE": "3", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "1"}
        | {"HOROVOD_CROSS_RANK": "1", "HOROVOD_CROSS_SIZE": "2"},
        (2, 0, 1, 3, 1, 2),
    ),
    (  # local rank 1 is on one of two nodes only, so its cross size does not count nodes
        "horovod",
        {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "3", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"}
        | {"HOROVOD_CROSS_RANK": "0", "HOROVOD_CROSS_SIZE": "1"},
        (1, 1, 0, 3, 2, 2),
    ),
    (
        "jsrun",
        {"JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_LOCAL_RANK": "1"}
        | {"JSM_NAMESPACE_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
        (3, 1, 1, 4, 2, 2),
    ),
    (
        "mvapich",
        {"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_RANK": "1"}
        | {"MV2_COMM_WORLD_LOCAL_SIZE": "2"},
        (3, 1, 1, 4, 2, 2),
    ),
    (
        "mvapich",
        {"MVP_COMM_WORLD_RANK": "3", "MVP_COMM_WORLD_SIZE": "4", "MVP_COMM_WORLD_LOCAL_RANK": "1"},
        (3, 1, 1, 4, 2, 2),
    ),
    (
        "pals",
        {"PALS_RANKID": "1", "PALS_LOCAL_RANKID": "0", "PALS_NODEID": "1", "PMI_RANK": "1", "PMI_SIZE": "2"}
        | {"PMI_LOCAL_SIZE": "1"},
        (1, 0, 1, 2, 1, 2),
    ),
    (
        "intelmpi",
        {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "I_MPI_MPIRUN": "mpirun"},
        (3, 1, 1, 4, 2, 2),
    ),
    ("pmix", {"PMIX_RANK": "1", "PMIX_NAMESPACE": "job", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 1, 0, 2, 2, 1)),
    (
        "sagemaker",
        {"SM_HOSTS": '["algo-1", "algo-2"]', "SM_CURRENT_HOST": "algo-2", "SM_NUM_GPUS": "0"},
        (1, 0, 1, 2, 1, 2),
    ),
    ("kubernetes", PYTORCH_JOB | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, (2, 0, 2, 4, 1, 4)),
    ("kubernetes", PYTORCH_JOB | {"PET_NNODES": "4", "PET_NODE_RANK": "2"}, (2, 0, 2, 4, 1, 4)),
    ("env", PYTORCH_JOB, (2, 0, 2, 4, 1, 4)),
]


@pytest.mark.parametrize(("launcher", "environ", "expected"), DOCUMENTED)
def test_documented_environment_is_recognised(
    launcher: str, environ: dict[str, str], expected: tuple[int, ...]
) -> None:
    identity = Identity.resolve(environ)
    assert (identity.launcher, *numbers(identity)) == (launcher, *expected)


def test_variables_of_pals_that_slurm_sets_are_slurms() -> None:
    first, second = recorded("srun_pmi2")
    pals = {"PALS_RANKID": "1", "PALS_LOCAL_RANKID": "0", "PALS_NODEID": "1"}
    assert Identity.resolve(second | pals) == Identity.resolve(second)
    assert Identity.resolve(first | {"PALS_RANKID": "0"}).launcher == "slurm"


def test_pod_marks_what_it_cannot_prove() -> None:
    sources = Identity.resolve(PYTORCH_JOB | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}).sources
    assert {name for name, source in sources.items() if source == "assumed"} == {
        "local_rank",
        "local_world_size",
        "num_nodes",
        "hostname",
    }
    assert sources["node_rank"] == "RANK"


def test_pod_that_should_run_torchrun_says_so() -> None:
    with pytest.raises(LaunchError, match=r"WORLD_SIZE=8 PET_NNODES=4 PET_NPROC_PER_NODE=2: .*torchrun"):
        find_launcher(PYTORCH_JOB | {"WORLD_SIZE": "8", "PET_NNODES": "4", "PET_NPROC_PER_NODE": "2"})


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (without(TORCHRUN, "LOCAL_RANK", "GROUP_RANK"), ["TORCHELASTIC_RUN_ID", "LOCAL_RANK, GROUP_RANK"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "RANK is not set"]),
        ({"WORLD_SIZE": "1"}, ["WORLD_SIZE=1", "RANK is not set"]),
        ({"RANK": "0"}, ["RANK=0", "WORLD_SIZE is not set"]),
        ({"LOCAL_RANK": "0"}, ["LOCAL_RANK=0", "RANK and WORLD_SIZE are not set"]),
        (
            {"OMPI_COMM_WORLD_RANK": "0"},
            [
                "OMPI_COMM_WORLD_RANK=0",
                "OMPI_COMM_WORLD_SIZE is not set",
                "Start with the MPI launcher, or unset OMPI_COMM_WORLD_RANK.",
            ],
        ),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, ["SLURM_PROCID=0", "Start with srun, or unset SLURM_PROCID."]),
        ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "job"}, ["PMIX_RANK=0", "WORLD_SIZE is not set"]),
        ({"SM_HOSTS": '["algo-1"]', "SM_CURRENT_HOST": "algo-2"}, ["SM_CURRENT_HOST=algo-2", "SM_HOSTS="]),
    ],
)
def test_what_is_missing_is_named(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(LaunchError) as raised:
        find_launcher(environ)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_world_size_alone_in_the_shell_of_an_allocation_is_an_error() -> None:
    with pytest.raises(LaunchError, match="WORLD_SIZE=4 but RANK is not set"):
        find_launcher(recorded("salloc_shell")[0] | {"WORLD_SIZE": "4"})


def test_every_launcher_function_names_its_source() -> None:
    for name, launcher in LAUNCHERS.items():
        assert launcher.__doc__, name
        assert "Source:" in launcher.__doc__ or name in ("env", "single"), name


def test_page_and_table_of_launchers_agree() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == list(LAUNCHERS)


def test_page_names_every_variable_that_a_field_was_read_from() -> None:
    rows = {line.split("`")[1]: line for line in PAGE.read_text().splitlines() if line.startswith("| `")}
    environs = [environ for name in PLACES for environ in recorded(name)] + [environ for _, environ, _ in DOCUMENTED]
    for identity in map(Identity.resolve, environs):
        fields = identity.sources.keys() - {"hostname", "job_id", "launcher"}
        read = {identity.sources[name].replace("MVP_", "MV2_") for name in fields} - {"assumed"}
        assert {name for name in read if f"`{name}`" not in rows[identity.launcher]} == set()


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_RANK=1 PMI_SIZE=2: something started several processes"),
        ({"FLUX_TASK_RANK": "0", "FLUX_JOB_SIZE": "4"}, "FLUX_TASK_RANK=0 FLUX_JOB_SIZE=4: something started"),
        ({"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4"),
        ({"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "3"}, "GROUP_RANK=1 GROUP_WORLD_SIZE=3"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": ""}, "SLURM_STEP_ID=''"),
    ],
)
def test_variables_of_many_processes_that_nobody_explains_are_refused(environ: dict[str, str], words: str) -> None:
    with pytest.raises(LaunchError) as raised:
        Identity.resolve(environ)
    assert words in str(raised.value)


def test_process_manager_of_one_process_is_a_single_process() -> None:
    assert Identity.resolve({"PMI_RANK": "0", "PMI_SIZE": "1", "SLURM_JOB_ID": "7"}).launcher == "single"
