"""A process counts its share of the node's cores, and can be kept on cores near its device."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rankwise.threads
from rankwise.identity import Identity
from rankwise.threads import bind_cpus, cores_per_process, loader_workers, threads_per_process, usable_cores


def identity(local_rank: int, local_world_size: int, launcher: str = "torchrun") -> Identity:
    return Identity(local_rank, local_rank, 0, local_world_size, local_world_size, 1, launcher, "node-b")


class Machine:
    """A node with as many cores as wanted, its control groups and its PCI devices in a folder."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.bound: list[frozenset[int]] = []
        self.keeps_bindings = False
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(os, "sched_setaffinity", self._set_affinity)
        monkeypatch.setattr(rankwise.threads, "_binding", None)
        self.cores(64)

    def _set_affinity(self, thread: int, cores: frozenset[int]) -> None:
        self.bound.append(frozenset(cores))
        if self.keeps_bindings:
            self._mask = set(cores)

    def cores(self, num_cores: int, affinity: range | None = None) -> None:
        self._monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
        self._mask = set(affinity if affinity is not None else range(num_cores))
        self._monkeypatch.setattr(os, "sched_getaffinity", lambda process: self._mask)

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def siblings(self, distance: int) -> None:
        for core in range(2 * distance):
            first = core % distance
            path = f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
            self.write(path, f"{first},{first + distance}\n")

    def gpus(self, *local_cores: str) -> None:
        for number, text in enumerate(local_cores):
            self.write(f"sys/bus/pci/devices/0000:{0x1A + number:02x}:00.0/local_cpulist", f"{text}\n")
        module = SimpleNamespace(
            get_device_properties=lambda index: SimpleNamespace(
                pci_domain_id=0, pci_bus_id=0x1A + index, pci_device_id=0
            )
        )
        self._monkeypatch.setattr(torch, "get_device_module", lambda device: module)
        self._monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(local_cores))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_cores_are_divided_by_the_processes_of_the_node(machine: Machine) -> None:
    assert [threads_per_process(num, {}, root=machine.root) for num in (1, 8, 48, 64, 100)] == [64, 8, 1, 1, 1]


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("4,2", 4), (" 06 ", 6)])
def test_omp_num_threads_wins(machine: Machine, value: str, threads: int) -> None:
    assert threads_per_process(8, {"OMP_NUM_THREADS": value}, root=machine.root) == threads


@pytest.mark.parametrize("value", ["", "0", "-2", "many", "2.5", "9" * 5000])
def test_omp_num_threads_that_is_no_positive_number_is_passed_over(machine: Machine, value: str) -> None:
    assert threads_per_process(8, {"OMP_NUM_THREADS": value}, root=machine.root) == 8


def test_processes_of_torchrun_share_their_affinity_mask(machine: Machine) -> None:
    machine.cores(64, range(8, 16))
    assert threads_per_process(4, {}, launcher="torchrun", root=machine.root) == 2


@pytest.mark.parametrize("launcher", ["slurm", "openmpi", "mpich", "intelmpi", "jsrun"])
def test_process_that_is_bound_to_its_own_cores_uses_all_of_them(machine: Machine, launcher: str) -> None:
    machine.cores(64, range(8, 16))
    assert threads_per_process(4, {}, launcher=launcher, root=machine.root) == 8


def test_processes_that_are_bound_to_one_socket_divide_the_node(machine: Machine) -> None:
    machine.cores(64, range(32))
    assert threads_per_process(8, {}, launcher="openmpi", root=machine.root) == 8


def test_slurm_tasks_that_are_not_bound_divide_what_slurm_gave_the_step(machine: Machine) -> None:
    machine.cores(64, range(8))
    assert threads_per_process(4, {"SLURM_CPUS_ON_NODE": "8"}, launcher="slurm", root=machine.root) == 2
    machine.cores(64)
    assert threads_per_process(4, {"SLURM_CPUS_ON_NODE": "8"}, launcher="torchrun", root=machine.root) == 2


@pytest.mark.parametrize("value", ["", "0", "x", "9" * 5000])
def test_malformed_count_of_slurm_is_passed_over(machine: Machine, value: str) -> None:
    assert threads_per_process(4, {"SLURM_CPUS_ON_NODE": value}, launcher="slurm", root=machine.root) == 16


def test_launcher_is_found_in_the_environment(machine: Machine) -> None:
    machine.cores(64, range(8))
    by_hand = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}
    assert threads_per_process(4, by_hand, root=machine.root) == 2
    assert threads_per_process(4, by_hand | {"RANK": "9"}, root=machine.root) == 2


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
                "sys/fs/cgroup/job/cpu.max": "800000 100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "3:cpuset:/\n2:cpu,cpuacct:/of/the/host\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "1200000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "2:cpu,cpuacct:/pod\n",
                "sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/pod/cpu.cfs_period_us": "100000\n",
            },
            16,
        ),
        ({"proc/self/cgroup": "nonsense\n", "sys/fs/cgroup/cpu.max": "1 2 3\n"}, 16),
    ],
    ids=["v2", "v2 unlimited", "v2 half a core", "v2 parent", "v1 in a container", "v1 unlimited", "malformed"],
)
def test_time_limit_of_the_control_group_is_shared(machine: Machine, files: dict[str, str], cores: int) -> None:
    for path, text in files.items():
        machine.write(path, text)
    assert cores_per_process(4, {}, root=machine.root) == cores


@pytest.mark.parametrize(
    ("line", "path"),
    [("0::/", "cpuset.cpus.effective"), ("4:cpuset:/docker/x", "cpuset/cpuset.cpus")],
)
def test_cores_of_a_container_are_not_taken_for_a_binding(machine: Machine, line: str, path: str) -> None:
    machine.cores(64, range(8))
    machine.write("proc/self/cgroup", f"{line}\n")
    machine.write(f"sys/fs/cgroup/{path}", "0-3,4-7\n")
    assert cores_per_process(4, {}, launcher="openmpi", root=machine.root) == 2


def test_loader_workers_leave_a_core_to_the_training_thread(machine: Machine) -> None:
    assert [loader_workers(num, environ={}, root=machine.root) for num in (1, 8, 16, 32, 64)] == [8, 7, 3, 1, 1]
    assert loader_workers(1, maximum=20, environ={"OMP_NUM_THREADS": "1"}, root=machine.root) == 20


def test_without_affinity_masks_every_core_counts(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(os, "sched_setaffinity")
    assert cores_per_process(8, {}, root=machine.root) == 8
    assert bind_cpus(identity(0, 2), "cpu", {}, root=machine.root) is None


def test_cpu_processes_get_equal_neighbouring_parts(machine: Machine) -> None:
    machine.cores(10)
    parts = [bind_cpus(identity(local, 4), "cpu", {}, root=machine.root) for local in range(4)]
    assert parts == [{0, 1}, {2, 3, 4}, {5, 6}, {7, 8, 9}]
    assert machine.bound == parts


def test_binding_twice_cuts_no_deeper_and_leaves_the_counts(machine: Machine) -> None:
    machine.keeps_bindings = True
    for _ in range(2):
        assert bind_cpus(identity(1, 4), "cpu", {}, root=machine.root) == set(range(16, 32))
        assert threads_per_process(4, {}, launcher="torchrun", root=machine.root) == 16
        assert loader_workers(4, 99, {}, launcher="torchrun", root=machine.root) == 15
    machine.cores(64, range(8))  # somebody else has bound it since
    assert bind_cpus(identity(1, 4), "cpu", {}, root=machine.root) == {2, 3}
    assert threads_per_process(4, {}, launcher="torchrun", root=machine.root) == 2


def test_binding_to_few_cores_near_the_device_limits_the_threads(machine: Machine) -> None:
    machine.keeps_bindings = True
    machine.gpus("0-3", "32-63")
    assert bind_cpus(identity(0, 2), "cuda:0", {}, root=machine.root) == set(range(4))
    assert threads_per_process(2, {}, launcher="torchrun", root=machine.root) == 4


def test_threads_of_one_physical_core_stay_together(machine: Machine) -> None:
    machine.cores(8)
    machine.siblings(4)
    assert bind_cpus(identity(0, 2), torch.device("cpu"), {}, root=machine.root) == {0, 1, 4, 5}
    assert bind_cpus(identity(1, 2), torch.device("cpu"), {}, root=machine.root) == {2, 3, 6, 7}
    assert bind_cpus(identity(5, 8), torch.device("cpu"), {}, root=machine.root) == {6}  # next to rank 4 on 2


def test_more_processes_than_cores_are_left_alone(machine: Machine) -> None:
    machine.cores(2)
    assert bind_cpus(identity(1, 3), "cpu", {}, root=machine.root) is None
    assert machine.bound == []


def test_cores_that_the_launcher_chose_are_kept(machine: Machine) -> None:
    machine.cores(64, range(8, 16))
    assert bind_cpus(identity(1, 4, "slurm"), "cpu", {}, root=machine.root) == set(range(8, 16))
    machine.gpus("0-31", "0-31", "32-63", "32-63")
    assert bind_cpus(identity(1, 4, "slurm"), "cuda:1", {}, root=machine.root) == set(range(8, 16))


def test_local_ranks_near_one_numa_node_divide_it(machine: Machine) -> None:
    machine.gpus("0-31", "32-63", "0-31", "32-63")
    parts = [bind_cpus(identity(local, 4), torch.device("cuda", local), {}, root=machine.root) for local in range(4)]
    assert parts == [set(range(16)), set(range(32, 48)), set(range(16, 32)), set(range(48, 64))]


def test_process_that_sees_its_own_device_alone_gets_the_numa_node(machine: Machine) -> None:
    machine.gpus("32-63")
    for local_rank in (0, 3):
        assert bind_cpus(identity(local_rank, 4), "cuda:0", {}, root=machine.root) == set(range(32, 64))


def test_slurm_task_with_several_devices_of_its_own_gets_the_numa_node(machine: Machine) -> None:
    machine.gpus("0-31", "0-31")
    environ = {"SLURM_GPUS_PER_TASK": "2"}
    assert bind_cpus(identity(0, 2, "slurm"), "cuda:0", environ, root=machine.root) == set(range(32))


def test_only_cores_that_may_be_used_are_bound(machine: Machine) -> None:
    machine.cores(64, range(24, 40))
    machine.gpus("0-31", "32-63")
    assert bind_cpus(identity(0, 2), "cuda:0", {}, root=machine.root) == set(range(24, 32))
    machine.cores(64, range(40, 64))
    assert bind_cpus(identity(0, 2), "cuda:0", {}, root=machine.root) is None


def test_device_that_sysfs_does_not_know_binds_nothing(machine: Machine) -> None:
    machine.gpus()
    assert bind_cpus(identity(0, 1), "cuda:0", {}, root=machine.root) is None
    machine.write("sys/bus/pci/devices/0000:1a:00.0/local_cpulist", "everywhere\n")
    assert bind_cpus(identity(0, 1), "cuda:0", {}, root=machine.root) is None
    assert bind_cpus(identity(0, 1), "no-device", {}, root=machine.root) is None
    assert machine.bound == []


def test_refused_mask_is_no_error(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: int, cores: frozenset[int]) -> None:
        raise PermissionError("not allowed")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    assert bind_cpus(identity(0, 2), "cpu", {}, root=machine.root) is None


BIND_AND_SHOW = """
import os, threading
from rankwise.identity import Identity
from rankwise.threads import bind_cpus

leave = threading.Event()
thread = threading.Thread(target=leave.wait)
thread.start()
before = os.sched_getaffinity(0)
bound = bind_cpus(Identity(1, 1, 0, 2, 2, 1, "torchrun"), "cpu", {})
masks = [os.sched_getaffinity(int(entry)) for entry in os.listdir("/proc/self/task")]
leave.set()
thread.join()
wanted = before if bound is None else bound
assert len(masks) >= 2 and all(mask == wanted for mask in masks), (before, bound, masks)
assert bound is None or bound < before, (before, bound)
assert "torch" not in __import__("sys").modules
print("bound" if bound else "one core alone")
"""


def test_every_thread_of_a_real_process_is_bound() -> None:
    ran = subprocess.run([sys.executable, "-c", BIND_AND_SHOW], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == ("bound" if len(usable_cores()) > 1 else "one core alone")


def test_real_system_gives_a_sane_number() -> None:
    assert 1 <= threads_per_process(1, {}) <= (os.cpu_count() or 1)
    assert rankwise.threads.loader_workers(1000, environ={}) == 1
