"""The ranks of a job find one meeting point, each from its own environment, or are told what to set."""

import json
from pathlib import Path

import pytest

from rankwise.errors import LaunchError
from rankwise.identity import Identity
from rankwise.rendezvous import MeetingPoint, find_meeting_point

ENVIRONMENTS = Path(__file__).parent / "environments"
BY_HAND = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
HERE = BY_HAND | {"WORLD_SIZE": "2"}


def recorded(name: str) -> list[dict[str, str]]:
    """The environment of every process of one launch, in the order of ranks."""
    launch = json.loads((ENVIRONMENTS / f"{name}.json").read_text())
    return [launch["every_process"] | process for process in launch["processes"]]


def meet(environ: dict[str, str]) -> MeetingPoint:
    return find_meeting_point(Identity.resolve(environ), environ)


def meet_all(name: str, **changed: str) -> MeetingPoint:
    """The point that all processes of a recorded launch find, which must be one."""
    points = {meet(environ | changed) for environ in recorded(name)}
    assert len(points) == 1, points
    return points.pop()


def test_given_address_and_port_come_first() -> None:
    for name in ("srun", "openmpi", "mpich_in_salloc", "torchrun_in_srun"):
        point = meet_all(name, MASTER_ADDR="10.0.0.1", MASTER_PORT="29501")
        assert (point.address, point.port, point.how) == ("10.0.0.1", 29501, "MASTER_ADDR and MASTER_PORT")


@pytest.mark.parametrize("port", ["", "0", "65536", "-1", "port", "\u0661", "9" * 5000, "29500 "])
def test_port_that_is_none_is_an_error_with_its_value(port: str) -> None:
    with pytest.raises(LaunchError, match=r"MASTER_PORT=.* is no port\. Set a number in 1\.\.65535"):
        meet(BY_HAND | {"MASTER_ADDR": "a", "MASTER_PORT": port})


@pytest.mark.parametrize("address", ["", " ", "a b", "a" * 300, "h\u00f6st"])
def test_address_that_is_none_is_an_error_with_its_value(address: str) -> None:
    with pytest.raises(LaunchError, match=r"MASTER_ADDR=.* is no host name or address"):
        meet(BY_HAND | {"MASTER_ADDR": address, "MASTER_PORT": "29500"})


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("srun", "n1"),
        ("srun_three_tasks", "n1"),
        ("srun_cyclic", "n1"),
        ("srun_plane", "n1"),
        ("srun_heterogeneous", "n1"),
        ("srun_heterogeneous_reversed", "n2"),
        ("srun_heterogeneous_part", "n2"),
        ("srun_heterogeneous_direct", "n3"),
        ("srun_preserve_env", "n1"),
        ("openmpi_in_salloc", "n1"),
        ("openmpi_in_sbatch", "n1"),
        ("mpich_in_salloc", "n1"),
        ("mpich_in_sbatch", "n1"),
    ],
)
def test_ranks_in_slurm_meet_on_the_node_of_rank_0(name: str, address: str) -> None:
    point = meet_all(name)
    assert (point.address, point.how) == (address, "slurm node list")
    assert Identity.resolve(recorded(name)[0]).hostname == address
    assert point.port is not None
    assert 10240 <= point.port <= 32767


def test_ports_of_neighbouring_jobs_and_steps_differ() -> None:
    environ = recorded("srun")[0]
    jobs = [(str(job), str(step)) for job in range(100, 120) for step in range(20)]
    ports = {meet(environ | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).port for job, step in jobs}
    assert len(ports) == len(jobs)


def test_arbitrary_distribution_needs_an_address() -> None:
    environs = recorded("srun_arbitrary")
    for environ in environs:
        with pytest.raises(LaunchError, match=r"SLURM_DISTRIBUTION=arbitrary: .*Set MASTER_ADDR"):
            meet(environ)
    (point,) = {meet(environ | {"MASTER_ADDR": "n2"}) for environ in environs}
    assert point.address == "n2"
    assert point.port is not None


def test_unknown_component_needs_an_address() -> None:
    environ = recorded("srun_heterogeneous_part")[0]
    environ = {name: value for name, value in environ.items() if "_GROUP_" not in name}
    with pytest.raises(LaunchError, match=r"SLURM_STEP_NODELIST=n\[1-2\] SLURM_HET_SIZE=3: .*Set MASTER_ADDR"):
        meet(environ)


def test_processes_of_one_node_meet_on_loopback_and_agree_on_a_port_by_token() -> None:
    point = meet_all("openmpi")
    assert (point.address, point.port, point.how) == ("127.0.0.1", None, "one node")
    other = meet_all("openmpi", PMIX_NAMESPACE="other")
    again = meet_all("openmpi", OMPI_MCA_orte_precondition_transports="other")
    assert None not in (point.token, other.token, again.token)
    assert len({point.token, other.token, again.token}) == 3
    assert meet_all("mpich") == MeetingPoint("127.0.0.1", None, None, "one node")


def test_steps_of_one_node_have_tokens_of_their_own() -> None:
    environ = recorded("srun_heterogeneous_reversed")[1]
    environ |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    point, other = meet(environ), meet(environ | {"SLURM_STEP_ID": "1"})
    assert (point.address, point.port) == ("127.0.0.1", None)
    assert point.token
    assert point.token != other.token


def test_one_of_address_and_port_is_enough_where_the_other_can_be_derived() -> None:
    assert meet(HERE | {"MASTER_PORT": "29500"}) == MeetingPoint("127.0.0.1", 29500, None, "one node")
    assert meet(HERE | {"MASTER_ADDR": "a"}) == MeetingPoint("a", None, None, "MASTER_ADDR")
    default = meet_all("srun")
    assert meet_all("srun", MASTER_ADDR="a").port == default.port
    with_port = meet_all("srun", MASTER_PORT="29500")
    assert (with_port.address, with_port.port) == ("n1", 29500)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (BY_HAND, ["4 processes on 2 nodes", "neither MASTER_ADDR nor MASTER_PORT is set", "torchrun"]),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, ["2 processes", "neither MASTER_ADDR"]),
        (BY_HAND | {"MASTER_ADDR": "a"}, ["MASTER_ADDR=a", "Set MASTER_ADDR", "MASTER_PORT"]),
        (BY_HAND | {"MASTER_PORT": "29500"}, ["MASTER_PORT=29500", "Set MASTER_ADDR"]),
    ],
)
def test_nobody_says_where_to_meet_is_an_error_that_says_what_to_set(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(LaunchError) as raised:
        meet(environ)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(
    ("name", "changed", "option"),
    [
        ("openmpi", {"OMPI_COMM_WORLD_SIZE": "6"}, "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=PORT"),
        ("mpich", {"PMI_SIZE": "6"}, "mpiexec -genv MASTER_ADDR HOST -genv MASTER_PORT PORT"),
        ("mpich", {"PMI_SIZE": "6", "I_MPI_MPIRUN": "mpirun"}, "mpirun -genv MASTER_ADDR HOST -genv MASTER_PORT PORT"),
    ],
)
def test_mpi_on_several_nodes_outside_slurm_is_told_its_options(
    name: str, changed: dict[str, str], option: str
) -> None:
    with pytest.raises(LaunchError) as raised:
        meet(recorded(name)[0] | changed)
    assert option in str(raised.value)


def test_one_process_needs_no_meeting_point_and_refuses_nothing() -> None:
    for environ in ({}, {"MASTER_PORT": "nonsense"}, recorded("srun_one_task")[0]):
        point = meet(environ)
        assert (point.address, point.port) == ("127.0.0.1", None)
