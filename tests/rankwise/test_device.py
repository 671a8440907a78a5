"""The device comes from the local rank, and too few devices are an error."""

import pytest
import torch

from rankwise.device import device_index, select_device
from rankwise.errors import DeviceError
from rankwise.identity import Identity


def identity(rank: int, local_rank: int, local_world_size: int = 8) -> Identity:
    return Identity(rank, local_rank, rank // local_world_size, 16, local_world_size, 2, hostname="node-b")


class FakeAccelerator:
    """Stands in for torch.accelerator on a machine that has none."""

    def __init__(self, num_devices: int) -> None:
        self.num_devices = num_devices
        self.is_busy = False
        self.current: int | None = None

    def current_accelerator(self, check_available: bool = False) -> torch.device | None:
        return torch.device("cuda") if self.num_devices else None

    def device_count(self) -> int:
        return self.num_devices

    def set_device_index(self, index: int) -> None:
        if self.is_busy:
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with ...")
        self.current = index


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> FakeAccelerator:
    fake = FakeAccelerator(8)
    monkeypatch.setattr(torch, "accelerator", fake)
    return fake


def test_local_rank_picks_among_all_devices_of_the_node() -> None:
    assert [device_index(identity(8 + local, local), 8) for local in range(8)] == list(range(8))


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"])
def test_the_only_visible_device_is_the_process_s_own(name: str) -> None:
    assert device_index(identity(13, 5), 1, environ={name: "5"}) == 0


def test_the_only_device_of_a_node_is_for_one_process() -> None:
    assert device_index(identity(1, 0, local_world_size=1), 1, environ={}) == 0
    with pytest.raises(DeviceError, match=r"8 processes on node-b would share its one cuda device.*--nproc-per-node=1"):
        device_index(identity(13, 5), 1, "cuda", {})


def test_the_environment_that_is_given_decides_about_sharing(accelerator: FakeAccelerator) -> None:
    accelerator.num_devices = 1
    assert select_device(identity(13, 5), environ={"CUDA_VISIBLE_DEVICES": "5"}) == torch.device("cuda", 0)
    with pytest.raises(DeviceError, match="would share"):
        select_device(identity(13, 5), environ={})


def test_device_that_cannot_be_used_is_an_error_of_this_rank(accelerator: FakeAccelerator) -> None:
    accelerator.is_busy = True
    with pytest.raises(DeviceError, match=r"rank 13 cannot use cuda:5 on node-b: .* busy or unavailable\. See"):
        select_device(identity(13, 5))


def test_too_few_devices_are_an_error_with_both_numbers() -> None:
    with pytest.raises(
        DeviceError, match=r"LOCAL_RANK=5 is outside the 4 visible cuda devices \(8 processes on node-b"
    ):
        device_index(identity(13, 5), 4, "cuda")


def test_accelerator_is_selected_and_made_current(accelerator: FakeAccelerator) -> None:
    assert select_device(identity(13, 5)) == torch.device("cuda", 5)
    assert accelerator.current == 5


def test_cpu_on_request_touches_no_accelerator(accelerator: FakeAccelerator) -> None:
    assert select_device(identity(13, 5), "cpu") == torch.device("cpu")
    assert accelerator.current is None


def test_cpu_where_there_is_no_accelerator(accelerator: FakeAccelerator) -> None:
    accelerator.num_devices = 0
    assert select_device(identity(13, 5)) == torch.device("cpu")


@pytest.mark.parametrize(("num_devices", "seen"), [(0, "no accelerator"), (8, "cuda")])
def test_device_type_that_is_not_here_is_an_error(accelerator: FakeAccelerator, num_devices: int, seen: str) -> None:
    accelerator.num_devices = num_devices
    with pytest.raises(DeviceError, match=f"'xpu' was asked for, but torch .* sees {seen} here"):
        select_device(identity(13, 5), "xpu")
