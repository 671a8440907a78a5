"""Checks of what the ranks were started with, on rows made by hand."""

from dataclasses import replace
from typing import Any

import pytest

from rankwise.doctor.environment import (
    check_identity,
    check_threads,
    check_variables,
    check_versions,
    missing_for_gloo,
    missing_for_nccl,
)
from rankwise.doctor.facts import DeviceFacts, RankFacts

VERSIONS = {"python": "3.11.9", "torch": "2.13.0", "rankwise": "0.1.0", "nccl": "2.29.3", "driver": "570.86.15"}
CUDA = DeviceFacts("cuda:0", "accelerator", "GPU-0", 80 << 30, 79 << 30)


def job(num_ranks: int = 64, per_node: int = 8, **same: Any) -> list[RankFacts]:
    return [
        RankFacts(
            rank=rank,
            local_rank=rank % per_node,
            node_rank=rank // per_node,
            local_world_size=min(per_node, num_ranks),
            num_nodes=-(-num_ranks // per_node),
            host=f"node-{rank // per_node}",
            launcher="slurm",
            interfaces=("lo", "eth0", "ib0"),
            **same,
        )
        for rank in range(num_ranks)
    ]


def test_equal_versions_pass_and_are_told() -> None:
    check = check_versions(job(versions=VERSIONS))
    assert check.status == "pass"
    assert "torch 2.13.0" in check.message
    assert check.advice is None


def test_one_rank_with_another_torch_fails_and_is_named() -> None:
    rows = job(versions=VERSIONS)
    rows[40] = replace(rows[40], versions=VERSIONS | {"torch": "2.12.1"})
    check = check_versions(rows)
    assert check.status == "fail"
    assert check.message == "torch differs: ranks 0-39, 41-63: 2.13.0; rank 40: 2.12.1"
    assert check.advice


@pytest.mark.parametrize(
    ("name", "version", "status"),
    [
        ("python", "3.11.2", "warn"),
        ("python", "3.12.9", "fail"),
        ("driver", "535.104.05", "warn"),
        ("nccl", "", "fail"),
    ],
)
def test_how_bad_a_difference_is_depends_on_what_differs(name: str, version: str, status: str) -> None:
    rows = job(16, versions=VERSIONS)
    rows[8:] = [replace(row, versions=VERSIONS | {name: version}) for row in rows[8:]]
    assert check_versions(rows).status == status


def test_what_a_rank_lacks_is_a_difference() -> None:
    rows = job(2, versions=VERSIONS)
    rows[1] = replace(rows[1], versions={name: VERSIONS[name] for name in VERSIONS if name != "nccl"})
    assert check_versions(rows).message == "nccl differs: rank 0: 2.29.3; rank 1: none"


def test_places_that_fit_together_pass() -> None:
    check = check_identity(job())
    assert check.status == "pass"
    assert "64 ranks on 8 nodes" in check.message
    assert "slurm" in check.message


def test_where_each_field_comes_from_is_told() -> None:
    sources = {"rank": "RANK", "local_rank": "LOCAL_RANK", "world_size": "WORLD_SIZE", "num_nodes": "store"}
    message = check_identity(job(2, sources=sources)).message
    assert "known from RANK, LOCAL_RANK, WORLD_SIZE; found out together: num_nodes" in message
    assert message.endswith("assumed: node_rank, local_world_size")


def test_ranks_of_different_launchers_fail() -> None:
    rows = job(4)
    rows[3] = replace(rows[3], launcher="env")
    check = check_identity(rows)
    assert check.status == "fail"
    assert "ranks 0-2: slurm; rank 3: env" in check.message


def test_two_processes_with_one_local_rank_fail() -> None:
    rows = job(16)
    rows[9] = replace(rows[9], local_rank=0)
    check = check_identity(rows)
    assert check.status == "fail"
    assert "node 1 (node-1) has ranks 8-9: local rank 0" in check.message


def test_a_node_that_is_two_hosts_fails() -> None:
    rows = job(16)
    rows[9] = replace(rows[9], host="other")
    assert "node 1 is said to be 2 hosts: node-1, other" in check_identity(rows).message


def test_a_wrong_local_world_size_fails() -> None:
    rows = [replace(row, local_world_size=4) for row in job(8)]
    assert "node 0 has 8 ranks, but local_world_size on ranks 0-7: 4" in check_identity(rows).message


def test_a_job_without_special_variables_passes() -> None:
    assert check_variables(job()).status == "pass"
    assert check_variables(job(variables={"NCCL_SOCKET_IFNAME": "ib", "GLOO_SOCKET_IFNAME": "eth0"})).status == "pass"


def test_an_interface_that_one_host_lacks_fails_and_names_what_it_has() -> None:
    rows = job(16, variables={"GLOO_SOCKET_IFNAME": "ib0"})
    rows[8:] = [replace(row, interfaces=("lo", "ens3")) for row in rows[8:]]
    check = check_variables(rows)
    assert check.status == "fail"
    assert "ranks 8-15: GLOO_SOCKET_IFNAME=ib0 on node-1, which has lo, ens3" in check.message


def test_an_interface_of_nccl_matters_where_there_are_devices_for_it() -> None:
    variables = {"NCCL_SOCKET_IFNAME": "bond"}
    assert check_variables(job(2, variables=variables)).status == "warn"
    assert check_variables(job(2, variables=variables, device=CUDA)).status == "fail"


@pytest.mark.parametrize(
    ("value", "is_missing"),
    [
        ("eth", False),
        ("eth0", False),
        ("=eth", True),
        ("=eth0", False),
        ("bond,ib", False),
        ("bond", True),
        ("^lo,docker", False),
        ("^lo,eth,ib", True),
        ("^=lo,eth0", False),
        ("^=lo,eth0,ib0", True),
        ("", False),
    ],
)
def test_interfaces_are_matched_as_nccl_does(value: str, is_missing: bool) -> None:
    assert missing_for_nccl(value, ("lo", "eth0", "ib0")) is is_missing


def test_interfaces_are_matched_as_gloo_does() -> None:
    assert not missing_for_gloo("eth0,lo", ("lo", "eth0"))
    assert missing_for_gloo("eth", ("lo", "eth0"))
    assert missing_for_gloo("eth0,eth1", ("lo", "eth0"))


def test_a_switch_left_from_a_search_for_a_fault_is_a_warning() -> None:
    rows = job(8, device=CUDA)
    rows[5] = replace(rows[5], variables={"CUDA_LAUNCH_BLOCKING": "1"})
    check = check_variables(rows)
    assert check.status == "warn"
    assert "CUDA_LAUNCH_BLOCKING=1 on rank 5" in check.message


def test_a_variable_of_nccl_that_differs_is_a_warning() -> None:
    rows = job(8, variables={"NCCL_ALGO": "Ring"})
    rows[7] = replace(rows[7], variables={})
    check = check_variables(rows)
    assert check.status == "warn"
    assert "NCCL_ALGO differs: ranks 0-6: Ring; rank 7: not set" in check.message


def test_interface_names_may_differ_between_hosts() -> None:
    rows = job(16)
    names = ["eth0"] * 8 + ["ib0"] * 8
    rows = [replace(row, variables={"NCCL_SOCKET_IFNAME": name}) for row, name in zip(rows, names, strict=True)]
    assert check_variables(rows).status == "pass"


def test_one_rank_that_may_see_no_device_is_a_warning_and_a_job_on_the_cpu_is_none() -> None:
    rows = job(2, variables={"CUDA_VISIBLE_DEVICES": ""})
    assert check_variables(rows).status == "pass"
    rows[0] = replace(rows[0], variables={"CUDA_VISIBLE_DEVICES": "0"})
    check = check_variables(rows)
    assert check.status == "warn"
    assert "rank 1: CUDA_VISIBLE_DEVICES= lets it see no device" in check.message


def test_processes_that_each_take_all_cores_are_a_warning_that_says_what_to_set() -> None:
    variables = {"OMP_NUM_THREADS": "64"}
    check = check_threads(job(8, num_cores=64, num_threads=64, fair_threads=8, variables=variables))
    assert check.status == "warn"
    assert "whose share is 8 of 64 cores (OMP_NUM_THREADS=64)" in check.message
    assert check.advice == "Set OMP_NUM_THREADS=8."


def test_where_nobody_sets_threads_the_session_does() -> None:
    check = check_threads(job(8, num_cores=64, num_threads=64, fair_threads=8))
    assert (check.status, check.message) == ("pass", "init() computes with 8 of 64 cores for each rank")
    alone = check_threads(job(1, num_cores=1, num_threads=1, fair_threads=1))
    assert (alone.status, alone.message) == ("pass", "init() computes with 1 of 1 core")


def test_threads_that_fit_pass() -> None:
    variables = {"OMP_NUM_THREADS": "8"}
    check = check_threads(job(8, num_cores=64, num_threads=8, fair_threads=8, variables=variables))
    assert (check.status, check.message) == ("pass", "torch computes with 8 of 64 cores")
    assert check_threads(job(1, num_cores=64, num_threads=64, fair_threads=64)).status == "pass"
