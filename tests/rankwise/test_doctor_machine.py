"""Checks of what the ranks run on, on rows made by hand."""

from dataclasses import replace
from typing import Any

from rankwise.doctor.facts import DeviceFacts, RankFacts, Space
from rankwise.doctor.machine import (
    check_devices,
    check_disk,
    check_limits,
    check_shared_devices,
    check_shared_memory,
)

GIB = 1 << 30
ROOM = Space("/data", 100 * GIB, 50 * GIB)


def job(num_ranks: int = 16, per_node: int = 8, **same: Any) -> list[RankFacts]:
    rows = []
    for rank in range(num_ranks):
        host, local_rank = f"node-{rank // per_node}", rank % per_node
        device = DeviceFacts(f"cuda:{local_rank}", "H100", f"GPU-{host}-{local_rank}", 80 * GIB, 79 * GIB)
        values: dict[str, Any] = {"device": device, "directory": ROOM, "temporary": ROOM, "shared_memory": ROOM}
        rows.append(
            RankFacts(rank=rank, local_rank=local_rank, host=host, local_world_size=per_node, **(values | same))
        )
    return rows


def test_one_device_for_each_rank_passes_with_a_row_for_each() -> None:
    check = check_devices(job())
    assert (check.status, check.message) == ("pass", "H100")
    assert check.rows is not None
    assert check.rows[9] == {
        "rank": 9,
        "host": "node-1",
        "local_rank": 1,
        "device": "cuda:1",
        "name": "H100",
        "uuid": "GPU-node-1-1",
        "memory_bytes": 80 * GIB,
        "free_bytes": 79 * GIB,
    }
    assert check_shared_devices(job()).status == "pass"


def test_a_job_on_the_cpu_passes_and_shares_nothing() -> None:
    rows = job(device=DeviceFacts())
    assert check_devices(rows).status == "pass"
    assert check_shared_devices(rows).status == "pass"


def test_a_rank_without_a_device_fails_with_its_reason() -> None:
    rows = job()
    rows[3] = replace(rows[3], device=DeviceFacts("none", error="LOCAL_RANK=3 is outside the 2 visible devices"))
    check = check_devices(rows)
    assert check.status == "fail"
    assert check.message == "rank 3: LOCAL_RANK=3 is outside the 2 visible devices"


def test_a_node_that_computes_on_the_cpu_beside_others_fails() -> None:
    rows = job()
    rows[8:] = [replace(row, device=DeviceFacts()) for row in rows[8:]]
    check = check_devices(rows)
    assert check.status == "fail"
    assert "ranks 0-7: cuda; ranks 8-15: cpu" in check.message


def test_devices_of_different_models_are_a_warning() -> None:
    rows = job()
    rows[0] = replace(rows[0], device=replace(rows[0].device, name="A100"))
    assert check_devices(rows).status == "warn"


def test_memory_that_somebody_else_holds_is_a_warning() -> None:
    rows = job()
    rows[2] = replace(rows[2], device=replace(rows[2].device, free_bytes=GIB))
    check = check_devices(rows)
    assert check.status == "warn"
    assert "rank 2: 1.0 GiB of 80.0 GiB free" in check.message


def test_two_ranks_on_one_device_fail() -> None:
    rows = job()
    rows[1] = replace(rows[1], device=rows[0].device)
    check = check_shared_devices(rows)
    assert check.status == "fail"
    assert "rank 0" in check.message
    assert "rank 1" in check.message


def test_equal_uuids_on_two_hosts_are_two_devices() -> None:
    rows = [replace(row, device=replace(row.device, uuid=f"GPU-{row.local_rank}")) for row in job()]
    assert check_shared_devices(rows).status == "pass"


def test_little_shared_memory_is_a_warning_that_names_the_host() -> None:
    rows = job()
    rows[8:] = [replace(row, shared_memory=Space("/dev/shm", 64 << 20, 64 << 20)) for row in rows[8:]]
    check = check_shared_memory(rows)
    assert check.status == "warn"
    assert "node-1 (ranks 8-15): 64 MiB free of 64 MiB" in check.message
    assert "node-0" not in check.message


def test_shared_memory_that_is_full_is_a_warning() -> None:
    assert check_shared_memory(job(shared_memory=Space("/dev/shm", 64 * GIB, 1 << 20))).status == "warn"


def test_a_system_without_dev_shm_passes() -> None:
    assert check_shared_memory(job(shared_memory=None)).status == "pass"


def test_few_open_files_are_a_warning() -> None:
    assert check_limits(job(max_open_files=1024)).status == "warn"
    assert check_limits(job(max_open_files=4096)).status == "pass"
    assert check_limits(job(max_open_files=None)).status == "pass"


def test_locked_memory_matters_with_infiniband_alone() -> None:
    assert check_limits(job(max_locked_bytes=64 << 10)).status == "pass"
    check = check_limits(job(max_locked_bytes=64 << 10, has_infiniband=True))
    assert check.status == "warn"
    assert check.advice is not None
    assert "ulimit -l" in check.advice


def test_room_on_every_disk_passes_with_the_least_of_all_hosts() -> None:
    rows = job()
    rows[15] = replace(rows[15], directory=Space("/data", 100 * GIB, 20 * GIB))
    check = check_disk(rows)
    assert check.status == "pass"
    assert "20.0 GiB free of 100.0 GiB in /data" in check.message
    assert "the least of 2 hosts" in check.message


def test_little_room_is_a_warning_and_none_a_failure() -> None:
    assert check_disk(job(directory=Space("/data", 100 * GIB, GIB))).status == "warn"
    assert check_disk(job(temporary=Space("/tmp", 100 * GIB, 1 << 20))).status == "fail"


def test_a_disk_that_does_not_answer_fails_and_is_told_once_for_a_host() -> None:
    rows = job()
    rows[8:] = [replace(row, directory=Space("/data", error="it does not answer")) for row in rows[8:]]
    check = check_disk(rows)
    assert check.status == "fail"
    assert check.message == "node-1 (ranks 8-15): /data: it does not answer"


def test_every_message_stays_short_at_1024_ranks() -> None:
    broken = {"device": DeviceFacts("none", error="gone"), "directory": Space("/data", error="gone")}
    rows = job(1024, max_open_files=64, shared_memory=Space("/dev/shm", 1, 1), **broken)
    for check in (check_devices, check_shared_devices, check_shared_memory, check_limits, check_disk):
        assert len(check(rows).message) < 700
