"""Under a real torchrun: one agent, two agents on one host, and agents that mpirun started."""

import socket

HOST = socket.gethostname()


def test_one_agent_places_its_workers(launch) -> None:
    agent = ["--nnodes", "1", "--nproc-per-node", "2", "--master-port", launch.free_port(), "--rdzv-id", "job-7"]
    done = launch(*launch.torchrun, *agent, *launch.whoami_module)
    done.assert_places([[0, 1]], launcher="torchrun", hostnames=[HOST], job_id="job-7")
    for row in done.rows:
        assert row["sources"]["rank"] == "RANK"
        assert row["sources"]["node_rank"] == "GROUP_RANK"
        assert "assumed" not in row["sources"].values()


def test_two_agents_on_one_host_are_two_nodes(launch) -> None:
    both = ["--nnodes", "2", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    both += ["--master-port", launch.free_port()]
    agents = [launch.start(*launch.torchrun, *both, "--node-rank", str(node), *launch.whoami_module) for node in (0, 1)]
    first, second = (agent.ended() for agent in agents)
    first.stdout += second.stdout
    first.assert_places([[0, 1], [2, 3]], launcher="torchrun", hostnames=[HOST, HOST], job_id=None)


def test_ranks_of_torchrun_find_each_other(launch) -> None:
    done = launch(*launch.torchrun, "--standalone", "--nproc-per-node", "2", launch.program("gather.py"))
    done.assert_places(
        [[0, 1]], launcher="torchrun", hostnames=[HOST], job_id=done.rows[0]["job_id"], devices=["cpu", "cpu"]
    )
    assert {row["sources"]["rank"] for row in done.rows} == {"RANK"}
