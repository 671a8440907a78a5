"""What one rank knows about itself."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rankwise.doctor import facts
from rankwise.doctor.facts import (
    DeviceFacts,
    RankFacts,
    Space,
    collect_facts,
    find_driver,
    find_variables,
    find_versions,
    is_any_probe_left,
    probe_device,
    probe_space,
    within,
)
from rankwise.errors import DeviceError
from rankwise.identity import Identity

IDENTITY = Identity(rank=1, local_rank=1, node_rank=0, world_size=2, local_world_size=2, num_nodes=1, hostname="here")


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """An event that probes wait for, set at the end so that none outlives its test."""
    event = threading.Event()
    yield event
    event.set()
    deadline = time.monotonic() + 10
    while is_any_probe_left() and time.monotonic() < deadline:
        time.sleep(0.01)


def collect(directory: Path, timeout_seconds: float = 30.0) -> RankFacts:
    return collect_facts(
        IDENTITY, directory, {"NCCL_ALGO": "Ring"}, wait_seconds=1.5, num_threads=3, timeout_seconds=timeout_seconds
    )


def test_a_rank_knows_its_place_and_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "999")
    found = collect(tmp_path)
    assert (found.rank, found.local_rank, found.host, found.wait_seconds) == (1, 1, "here", 1.5)
    assert found.versions["torch"] == torch.__version__
    assert found.variables == {"NCCL_ALGO": "Ring"}
    assert (found.num_threads, found.num_cores > 0) == (3, True)
    assert found.fair_threads <= found.num_cores  # the cores' share, whatever OMP_NUM_THREADS says
    assert found.directory.path == str(tmp_path)
    assert 0 < found.directory.free_bytes <= found.directory.total_bytes


def test_a_driver_that_does_not_answer_is_told_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: threading.Event
) -> None:
    def hang(identity: Identity) -> DeviceFacts:
        held.wait()
        return DeviceFacts()

    monkeypatch.setattr(facts, "probe_device", hang)
    found = collect(tmp_path, timeout_seconds=0.2)
    assert found.device.error is not None
    assert "does not answer" in found.device.error


def test_a_disk_that_does_not_answer_is_told_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: threading.Event
) -> None:
    def hang(path: str) -> facts.Space:
        held.wait()
        return facts.Space(path)

    monkeypatch.setattr(facts, "probe_space", hang)
    assert collect(tmp_path, timeout_seconds=0.2).directory == facts.Space(str(tmp_path), error="it does not answer")


def test_within_returns_raises_or_gives_up(held: threading.Event) -> None:
    assert within(30, lambda: 7) == 7
    with pytest.raises(KeyError):
        within(30, lambda: {}["a"])
    assert not is_any_probe_left()
    with pytest.raises(TimeoutError, match=r"within 0\.05 s"):
        within(0.05, held.wait)
    assert is_any_probe_left()


def test_a_device_that_is_refused_is_a_fact_and_no_exception() -> None:
    def refuse(identity: Identity) -> torch.device:
        raise DeviceError("LOCAL_RANK=1 is outside the 1 visible devices")

    assert probe_device(IDENTITY, refuse) == DeviceFacts("none", error="LOCAL_RANK=1 is outside the 1 visible devices")


def test_a_driver_that_raises_is_a_fact_and_no_exception() -> None:
    def fail(identity: Identity) -> torch.device:
        raise RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`")

    assert probe_device(IDENTITY, fail).error == "RuntimeError: CUDA error: out of memory"


def test_the_cpu_is_a_device_without_a_name() -> None:
    assert probe_device(IDENTITY, lambda identity: torch.device("cpu")) == DeviceFacts()


def test_a_device_that_is_chosen_but_does_not_compute_is_named() -> None:
    found = probe_device(IDENTITY, lambda identity: torch.device("xpu", 1))
    assert found.device == "xpu:1"
    assert found.error


def test_a_directory_that_is_yet_to_be_made_has_no_room(tmp_path: Path) -> None:
    missing = str(tmp_path / "runs")
    assert probe_space(missing) == Space(missing, error="there is no such folder")
    assert probe_space(str(tmp_path)).total_bytes > 0


def test_a_path_that_can_be_no_directory_is_a_fact(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert probe_space(str(tmp_path / "file" / "below")).error == "Not a directory"


def test_variables_that_do_not_concern_ranks_stay_here() -> None:
    environ = {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "lo", "WANDB_API_KEY": "secret", "HOME": "/root"}
    assert find_variables(environ) == {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "lo"}


def test_versions_of_what_is_not_here_are_left_out() -> None:
    versions = find_versions()
    assert {"python", "torch", "rankwise"} <= versions.keys()
    assert all(versions.values())


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 05:33:29 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (root@host)",
    ],
)
def test_the_driver_is_found_where_the_kernel_tells_it(line: str, tmp_path: Path) -> None:
    assert find_driver(tmp_path) is None
    (tmp_path / "sys/module/amdgpu").mkdir(parents=True)
    (tmp_path / "sys/module/amdgpu/version").write_text("6.10.5\n")
    assert find_driver(tmp_path) == "6.10.5"
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(f"{line}\nGCC version:  gcc version 12.3.0\n")
    assert find_driver(tmp_path) == "570.86.15"
