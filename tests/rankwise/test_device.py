"""The device comes from the local rank, too few devices are an error, and a device that two ranks use is found."""

import re
import uuid
from types import SimpleNamespace

import pytest
import torch

from rankwise.device import (
    DeviceRow,
    device_index,
    device_uuid,
    find_shared_devices,
    pci_address,
    select_device,
)
from rankwise.errors import DeviceError
from rankwise.identity import Identity


def identity(rank: int, local_rank: int, local_world_size: int = 8, launcher: str = "torchrun") -> Identity:
    return Identity(rank, local_rank, rank // local_world_size, 16, local_world_size, 2, launcher, "node-b")


class FakeAccelerator:
    """Stands in for torch.accelerator on a machine that has none."""

    def __init__(self, num_devices: int) -> None:
        self.num_devices = num_devices
        self.device_type = "cuda"
        self.is_busy = False
        self.current: int | None = None
        self.calls: list[str] = []

    def current_accelerator(self, check_available: bool = False) -> torch.device | None:
        self.calls.append("current_accelerator")
        return torch.device(self.device_type) if self.num_devices else None

    def device_count(self) -> int:
        self.calls.append("device_count")
        if self.num_devices < 0:
            raise RuntimeError("HIP_VISIBLE_DEVICES contains more devices than ROCR_VISIBLE_DEVICES")
        return self.num_devices

    def set_device_index(self, index: int) -> None:
        self.calls.append("set_device_index")
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


def test_device_is_set_after_counting_and_before_anything_else(
    accelerator: FakeAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(*arguments: object) -> None:
        raise AssertionError("this would leave a context on device 0")

    monkeypatch.setattr(torch, "get_device_module", touch)
    monkeypatch.setattr(torch.cuda, "init", touch)
    monkeypatch.setattr(torch, "zeros", touch)
    select_device(identity(13, 5), environ={})
    assert accelerator.calls == ["current_accelerator", "device_count", "set_device_index"]


def test_cpu_on_request_touches_no_accelerator(accelerator: FakeAccelerator) -> None:
    assert select_device(identity(13, 5), "cpu") == torch.device("cpu")
    assert accelerator.calls == []


def test_devices_that_cannot_be_counted_are_an_error_of_this_rank(accelerator: FakeAccelerator) -> None:
    accelerator.num_devices = -1
    with pytest.raises(DeviceError, match=r"rank 13 cannot count the devices of node-b: HIP_VISIBLE.*ROCR_VISIBLE_DEV"):
        select_device(identity(13, 5))


def test_hidden_devices_are_named_in_the_error(accelerator: FakeAccelerator) -> None:
    accelerator.num_devices = 0
    with pytest.raises(
        DeviceError, match=r"'cuda' was asked for.* sees no accelerator here with CUDA_VISIBLE_DEVICES="
    ):
        select_device(identity(13, 5), "cuda", {"CUDA_VISIBLE_DEVICES": ""})


def test_sharing_happens_only_when_asked_for(accelerator: FakeAccelerator) -> None:
    accelerator.num_devices = 2
    with pytest.raises(DeviceError, match=r"outside the 2 visible cuda devices.*share_devices=True"):
        select_device(identity(13, 5), environ={})
    assert select_device(identity(13, 5), environ={}, share=True) == torch.device("cuda", 1)
    assert device_index(identity(13, 5), 1, "cuda", {}, share=True) == 0
    assert device_index(identity(13, 5, launcher="slurm"), 4, "cuda", {"SLURM_NTASKS_PER_GPU": "2"}) == 1
    with pytest.raises(DeviceError, match="outside"):
        device_index(identity(13, 5, launcher="slurm"), 4, "cuda", {"SLURM_NTASKS_PER_GPU": "1"})


def test_the_one_device_of_a_mac_is_for_one_process(accelerator: FakeAccelerator) -> None:
    accelerator.num_devices, accelerator.device_type = 1, "mps"
    assert select_device(identity(0, 0, 1), environ={}) == torch.device("mps", 0)
    with pytest.raises(DeviceError, match=r"2 processes on node-b would share its one mps device\. Launch with"):
        select_device(identity(1, 1, 2), environ={"CUDA_VISIBLE_DEVICES": "0"})
    assert select_device(identity(1, 1, 2), environ={}, share=True) == torch.device("mps", 0)


def test_slurm_task_takes_the_first_of_its_own_devices() -> None:
    environ = {"SLURM_GPUS_PER_TASK": "2", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert device_index(identity(3, 3, 4, "slurm"), 2, "cuda", environ) == 0
    assert device_index(identity(3, 3, 4, "slurm"), 1, "cuda", {"SLURM_GPUS_PER_TASK": "1"}) == 0
    with pytest.raises(
        DeviceError, match=r"2 visible cuda devices \(4 processes on node-b, CUDA_VISIBLE_DEVICES=0,1\)"
    ):
        device_index(identity(3, 3, 4), 2, "cuda", environ)


@pytest.mark.parametrize(
    ("launcher", "advice"),
    [
        ("torchrun", r"Launch with --nproc-per-node=4 at most, give each process devices of its own \(CUDA_VISIBLE"),
        ("slurm", "Start at most 4 with --ntasks-per-node=4,"),
        ("openmpi", "Start at most 4 on each node,"),
    ],
)
def test_too_few_devices_say_what_to_do_under_this_launcher(launcher: str, advice: str) -> None:
    with pytest.raises(DeviceError, match=advice):
        device_index(identity(13, 5, launcher=launcher), 4, "cuda", {})


def test_too_few_devices_name_the_variable_of_the_local_rank() -> None:
    place = Identity(13, 5, 1, 16, 8, 2, "slurm", "node-b", sources={"local_rank": "SLURM_LOCALID"})
    with pytest.raises(DeviceError, match=r"^SLURM_LOCALID=5 is outside the 4 visible"):
        device_index(place, 4, "cuda", {})
    place = Identity(13, 5, 1, 16, 8, 2, "slurm", "node-b", sources={"local_rank": "assumed"})
    with pytest.raises(DeviceError, match=r"^LOCAL_RANK=5 is outside the 4 visible"):
        device_index(place, 4, "cuda", {})


def test_cpu_where_there_is_no_accelerator(accelerator: FakeAccelerator) -> None:
    accelerator.num_devices = 0
    assert select_device(identity(13, 5)) == torch.device("cpu")


@pytest.mark.parametrize(("num_devices", "seen"), [(0, "no accelerator"), (8, "cuda")])
def test_device_type_that_is_not_here_is_an_error(accelerator: FakeAccelerator, num_devices: int, seen: str) -> None:
    accelerator.num_devices = num_devices
    with pytest.raises(DeviceError, match=f"'xpu' was asked for, but torch .* sees {seen} here"):
        select_device(identity(13, 5), "xpu")


class Properties(SimpleNamespace):
    name = "A GPU"
    pci_domain_id, pci_bus_id, pci_device_id = 0, 0x3B, 0


@pytest.fixture
def properties(monkeypatch: pytest.MonkeyPatch) -> list[Properties]:
    found: list[Properties] = []
    module = SimpleNamespace(get_device_properties=lambda index: found[index])
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return found


NUMBER = uuid.UUID("8932f937-d72c-4106-c12f-20bd9faed9f6")


def test_uuid_is_written_as_the_driver_writes_it(properties: list[Properties]) -> None:
    properties += [Properties(uuid=NUMBER), Properties(uuid=str(NUMBER).upper()), Properties(uuid=NUMBER.bytes)]
    assert device_uuid(torch.device("cuda", 0), {}) == f"GPU-{NUMBER}"
    assert device_uuid(torch.device("cuda", 1), {}) == f"GPU-{NUMBER}"
    assert device_uuid(torch.device("xpu", 2), {}) == f"GPU-{NUMBER.hex}"


def test_pci_address_stands_in_for_a_missing_uuid(properties: list[Properties]) -> None:
    properties += [Properties(), Properties(uuid=uuid.UUID(int=0)), Properties(pci_bus_id=None)]
    assert device_uuid(torch.device("cuda", 0), {}) == "0000:3b:00.0"
    assert device_uuid(torch.device("cuda", 1), {}) == "0000:3b:00.0"
    assert device_uuid(torch.device("cuda", 2), {}) is None
    assert pci_address(torch.device("cuda", 2)) is None


def test_mig_slice_is_named_by_itself_and_not_by_its_gpu(properties: list[Properties]) -> None:
    properties += [Properties(uuid=NUMBER, name="NVIDIA A100-SXM4-40GB MIG 1g.5gb")]
    assert device_uuid(torch.device("cuda", 0), {"CUDA_VISIBLE_DEVICES": "MIG-77,MIG-78"}) == "MIG-77"
    assert device_uuid(torch.device("cuda", 0), {"CUDA_VISIBLE_DEVICES": "0"}) is None


@pytest.mark.parametrize("device", ["cpu", "mps:0", "cuda:99"])
def test_device_that_torch_cannot_describe_has_no_uuid(device: str) -> None:
    assert device_uuid(torch.device(device), {}) is None
    assert pci_address(torch.device(device)) is None


def row(
    rank: int, local_rank: int, index: int, visible: str | None = None, uuid: str | None = "GPU-a", host: str = "node-b"
) -> DeviceRow:
    return DeviceRow(rank, local_rank, host, f"cuda:{index}", uuid, visible)


def test_devices_of_their_own_are_no_error() -> None:
    assert find_shared_devices([]) is None
    assert find_shared_devices([row(0, 0, 0), row(1, 1, 1, uuid="GPU-b"), row(2, 0, 0, host="node-c")]) is None


def test_devices_without_a_name_are_not_compared() -> None:
    assert find_shared_devices([row(0, 0, 0, uuid=None), row(1, 1, 0, uuid=None)]) is None


def test_two_numbers_of_one_list_are_two_devices() -> None:
    assert find_shared_devices([row(0, 0, 0), row(1, 1, 1)]) is None


@pytest.mark.parametrize(
    ("rows", "cause"),
    [
        (
            [row(0, 0, 3, None), row(3, 1, 3, None)],
            "Rank 3 took the device with the number of its global rank: .*cuda:1",
        ),
        ([row(0, 0, 0, "CUDA_VISIBLE_DEVICES=0,1"), row(2, 0, 0, "CUDA_VISIBLE_DEVICES=0,1")], "two launchers"),
        ([row(0, 0, 0, None), row(2, 0, 0, None)], r"two launchers .*\(all of the node\)"),
        (
            [row(0, 0, 0, "CUDA_VISIBLE_DEVICES=3"), row(1, 1, 0, "CUDA_VISIBLE_DEVICES=3")],
            "Both were started with CUDA",
        ),
        (
            [row(0, 0, 1, "CUDA_VISIBLE_DEVICES=0,3"), row(1, 1, 0, "CUDA_VISIBLE_DEVICES=3")],
            r"overlap \(CUDA_V.*=0,3; CUDA_V.*=3\)",
        ),
        ([row(0, 0, 3, None), row(5, 1, 0, "CUDA_VISIBLE_DEVICES=3")], r"overlap \(all of the node; CUDA_V.*=3\)"),
        (
            [row(0, 0, 0, "CUDA_VISIBLE_DEVICES=MIG-a,MIG-b"), row(1, 1, 0, "CUDA_VISIBLE_DEVICES=MIG-a,MIG-b")],
            "MIG slice",
        ),
        ([row(0, 0, 0, None), row(1, 1, 0, None)], "Neither used its local rank"),
    ],
)
def test_shared_device_names_the_likely_cause(rows: list[DeviceRow], cause: str) -> None:
    text = find_shared_devices(rows)
    assert text is not None
    assert re.search(cause, text)
    assert text == find_shared_devices([tuple(row) for row in reversed(rows)])


def test_shared_device_names_both_ranks_the_host_and_the_device() -> None:
    rows = [row(rank, rank % 2, rank % 2, uuid=f"GPU-{rank % 2}") for rank in range(8)]
    assert (find_shared_devices(rows) or "").startswith(
        "rank 0 (local rank 0, cuda:0) and rank 2 (local rank 0, cuda:0) compute on one device of node-b, GPU-0 "
        "(6 more ranks share devices). Both are local rank 0: two launchers"
    )
