"""Under a real Open MPI and a real MPICH, on one host and on the nodes of a Slurm allocation; no mpi4py."""

import socket

import pytest

HOST = socket.gethostname()
STARTERS = {
    "openmpi": ("mpirun.openmpi", "--allow-run-as-root", "--oversubscribe"),
    "mpich": ("mpirun.mpich",),
}
RANK_VARIABLES = {"openmpi": "OMPI_COMM_WORLD_RANK", "mpich": "PMI_RANK"}


@pytest.fixture(params=STARTERS)
def launcher(request: pytest.FixtureRequest) -> str:
    """The name of an MPI that is here."""
    request.getfixturevalue("require")(STARTERS[request.param][0])
    return request.param


def test_every_process_has_its_place(launch, launcher) -> None:
    done = launch(*STARTERS[launcher], "-n", "3", *launch.whoami)
    done.assert_places([[0, 1, 2]], launcher=launcher, hostnames=[HOST], job_id=done.rows[0]["job_id"])
    assert {row["sources"]["rank"] for row in done.rows} == {RANK_VARIABLES[launcher]}


def test_mpirun_over_the_nodes_of_an_allocation(slurm, launcher) -> None:
    layout = ["-N2", "--ntasks-per-node=2"]
    done = slurm("salloc", "--quiet", *layout, *STARTERS[launcher], *slurm.whoami)
    done.assert_places([[0, 1], [2, 3]], launcher=launcher, hostnames=["n1", "n2"], job_id=done.rows[0]["job_id"])


def test_unequal_nodes_of_an_allocation_are_told_as_far_as_known(slurm, launcher) -> None:
    done = slurm("salloc", "--quiet", "-N2", "-n4", *STARTERS[launcher], *slurm.whoami)
    told = [(row["rank"], row["local_rank"], row["local_world_size"], row["world_size"]) for row in done.rows]
    assert told == [(0, 0, 3, 4), (1, 1, 3, 4), (2, 2, 3, 4), (3, 0, 1, 4)]
    assert [row["hostname"] for row in done.rows] == ["n1", "n1", "n1", "n2"]
    for row in done.rows:
        # What mpirun does not tell is either right or marked as a guess.
        node_rank = int(row["rank"] == 3)
        assert row["node_rank"] == node_rank or row["sources"]["node_rank"] == "assumed"
        assert row["num_nodes"] == 2 or row["sources"]["num_nodes"] == "assumed"


def test_variables_left_in_the_shell_are_a_contradiction(launch, launcher) -> None:
    done = launch(*STARTERS[launcher], "-n", "2", *launch.whoami, WORLD_SIZE="8")
    assert (done.status, done.stdout) == (2, ""), str(done)
    assert "Traceback" not in done.stderr
    assert "WORLD_SIZE=8" in done.stderr


def test_torchrun_inside_mpirun_is_torchrun(launch, launcher) -> None:
    agent = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-id", "job-7", "--master-port", launch.free_port()]
    agent += ["--master-addr", "127.0.0.1", "--node-rank", "NODE"]
    script = f'exec "${{@/NODE/${RANK_VARIABLES[launcher]}}}"'
    command = ["bash", "-c", script, "bash", *launch.torchrun, *agent, *launch.whoami_module]
    done = launch(*STARTERS[launcher], "-n", "2", *command)
    done.assert_places([[0, 1], [2, 3]], launcher="torchrun", hostnames=[HOST, HOST], job_id="job-7")


def test_ranks_find_each_other_without_an_address(launch, launcher) -> None:
    done = launch(*STARTERS[launcher], "-n", "3", *launch.python, launch.program("gather.py"))
    done.assert_places(
        [[0, 1, 2]], launcher=launcher, hostnames=[HOST], job_id=done.rows[0]["job_id"], devices=["cpu"] * 3
    )


def test_ranks_on_unequal_nodes_learn_their_places_from_each_other(slurm, launcher) -> None:
    """mpirun tells neither the number of nodes nor which one this is."""
    command = [*STARTERS[launcher], *slurm.python, slurm.program("gather.py"), "20"]
    done = slurm("salloc", "--quiet", "-N2", "-n4", *command)
    done.assert_places(
        [[0, 1, 2], [3]],
        launcher=launcher,
        hostnames=["n1", "n2"],
        job_id=done.rows[0]["job_id"],
        devices=["cpu"] * 3,
    )
