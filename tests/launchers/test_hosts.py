"""On two hosts that share no network but a wire between them: each has a name and processes of its own."""

import os
import signal
import subprocess

import pytest

ADDRESS = "10.213.77.1"
NAMES = ["host-a", "host-b"]


def test_torchrun_over_two_hosts(hosts) -> None:
    first, second = (hosts[name] for name in NAMES)
    both = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-id", "job-7", "--master-addr", ADDRESS]
    both += ["--master-port", first.free_port()]
    agents = [
        host.start(*host.torchrun, *both, "--node-rank", str(node), *host.whoami_module)
        for node, host in enumerate((first, second))
    ]
    ended = [agent.ended() for agent in agents]
    ended[0].stdout += ended[1].stdout
    ended[0].assert_places([[0, 1], [2, 3]], launcher="torchrun", hostnames=NAMES, job_id="job-7")


def test_ranks_of_torchrun_meet_over_two_hosts(hosts) -> None:
    first, second = (hosts[name] for name in NAMES)
    both = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-id", "job-7", "--master-addr", ADDRESS]
    both += ["--master-port", first.free_port()]
    agents = [
        host.start(*host.torchrun, *both, "--node-rank", str(node), host.program("gather.py"))
        for node, host in enumerate((first, second))
    ]
    ended = [agent.ended() for agent in agents]
    ended[0].assert_places([[0, 1], [2, 3]], launcher="torchrun", hostnames=NAMES, job_id="job-7", devices=["cpu"] * 2)
    assert (ended[1].status, ended[1].stdout) == (0, ""), str(ended[1])


def test_pods_that_know_their_rank_alone_meet(hosts) -> None:
    """As a PyTorchJob starts its pods: RANK is the pod's, and there is no LOCAL_RANK."""
    port = hosts["host-a"].free_port()
    pod = {"WORLD_SIZE": "2", "MASTER_ADDR": ADDRESS, "MASTER_PORT": port, "KUBERNETES_SERVICE_HOST": "10.96.0.1"}
    pods = [
        hosts[name].start(*hosts[name].python, hosts[name].program("gather.py"), RANK=str(rank), **pod)
        for rank, name in enumerate(NAMES)
    ]
    ended = [running.ended() for running in pods]
    ended[0].assert_places([[0], [1]], launcher="kubernetes", hostnames=NAMES, job_id=None, devices=["cpu"])
    assert (ended[1].status, ended[1].stdout) == (0, ""), str(ended[1])
    # Nothing in a pod's environment proves that it is alone on its node; together the ranks do.
    assert {row["sources"]["local_world_size"] for row in ended[0].rows} == {"store"}


def test_ranks_meet_where_host_names_mean_nothing(hosts) -> None:
    """As in containers: a host's own name resolves to nothing, and the addresses alone are true."""
    nameless = ("unshare", "--mount", "bash", "-c", 'umount /etc/hosts; exec "$@"', "bash")
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": ADDRESS, "MASTER_PORT": hosts["host-a"].free_port()}
    running = [
        hosts[name].start(*nameless, *hosts[name].python, hosts[name].program("gather.py"), "20", RANK=str(rank), **job)
        for rank, name in enumerate(NAMES)
    ]
    ended = [process.ended() for process in running]
    ended[0].assert_places([[0], [1]], launcher="env", hostnames=NAMES, job_id=None, devices=["cpu"])
    assert (ended[1].status, ended[1].stdout) == (0, ""), str(ended[1])


@pytest.mark.slow
def test_host_whose_network_is_gone_holds_nobody(hosts, host_pids) -> None:
    """No connection is closed: nothing comes any more, as when a node loses its power."""
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": ADDRESS, "MASTER_PORT": hosts["host-a"].free_port()}
    first, second = (
        hosts[name].start(
            *hosts[name].python, hosts[name].program("lose_a_rank.py"), "1", "asleep", RANK=str(rank), **job
        )
        for rank, name in enumerate(NAMES)
    )
    assert second.process.stdout.readline() == "asleep\n"
    wire = ["nsenter", "--target", str(host_pids["host-b"]), "--net", "ip", "link", "set", "wire"]
    subprocess.run([*wire, "down"], check=True)
    try:
        ended = first.ended(60)
    finally:
        subprocess.run([*wire, "up"], check=True)
        os.killpg(second.process.pid, signal.SIGKILL)  # it would sleep through a polite request
    assert ended.told["seconds"] < 40
    assert "rank 1 (host-b" in ended.told["error"]
    assert "rank 1 (host-b" in ended.stderr
