"""The visible-device variables are read as their runtimes read them, and the device is predicted from them alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.identity import Identity
from rankwise.visible import (
    VISIBLE_VARIABLES,
    choose_index,
    predict_device,
    visible_by_type,
    visible_devices,
    visible_text,
)

UUID = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
MIG = "MIG-3d6dbb2f-45f2-5e63-b1a6-5b8f4c1c3e5a"


def identity(local_rank: int, local_world_size: int = 8, launcher: str = "torchrun") -> Identity:
    return Identity(8 + local_rank, local_rank, 1, 16, local_world_size, 2, launcher, "node-b")


def test_nothing_set_restricts_nothing() -> None:
    assert visible_devices({"PATH": "/bin"}) is None
    assert visible_by_type({}) == {}
    assert visible_text({}) is None


@pytest.mark.parametrize(
    ("value", "devices"),
    [
        ("0,1,2,3", ("0", "1", "2", "3")),
        (" 2 , 3", ("2", "3")),
        ("5", ("5",)),
        ("03,+4", ("3", "4")),
        ("00", ("0",)),
        ("1gpu,2ampere", ("1", "2")),
        ("0,1,-1,2", ("0", "1")),
        ("0,,1", ("0",)),
        ("", ()),
        (" ", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("none", ()),
        ("0,1,0", ()),
        ("1,01", ()),
        (UUID, (UUID,)),
        (f"{UUID},GPU-77", (UUID, "GPU-77")),
        (f"{UUID},1", (UUID,)),
        (f"1,{UUID}", ("1",)),
        (f"{UUID},{UUID}", ()),
        (MIG, (MIG,)),
        ("MIG-GPU-8932f937/7/0", ("MIG-GPU-8932f937/7/0",)),
        (f"{MIG},{UUID}", (MIG,)),
        ("9" * 5000, ("9" * 5000,)),
        ("\u0663", ()),
        ("\u00b2", ()),
    ],
)
def test_list_is_read_as_cuda_reads_it(value: str, devices: tuple[str, ...]) -> None:
    assert visible_devices({"CUDA_VISIBLE_DEVICES": value}) == devices


@pytest.mark.parametrize("name", ["HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"])
def test_rocm_devices_are_cuda_devices(name: str) -> None:
    assert visible_by_type({name: "2,3"}) == {"cuda": ("2", "3")}
    assert predict_device(identity(1), {name: "2,3"}) == "cuda:1"


def test_hip_numbers_what_rocr_leaves() -> None:
    assert visible_devices({"ROCR_VISIBLE_DEVICES": "4,5,6", "HIP_VISIBLE_DEVICES": "2,0"}) == ("6", "4")
    assert visible_devices({"ROCR_VISIBLE_DEVICES": "4", "HIP_VISIBLE_DEVICES": "0,4,0"}) == ()
    assert visible_devices({"ROCR_VISIBLE_DEVICES": "4,5", "HIP_VISIBLE_DEVICES": "1,4,0"}) == ("5",)
    assert visible_devices({"ROCR_VISIBLE_DEVICES": "4,5", "HIP_VISIBLE_DEVICES": "GPU-77"}) == ("GPU-77",)


def test_one_list_that_slurm_sets_for_every_vendor_is_one_list() -> None:
    everywhere = {"CUDA_VISIBLE_DEVICES": "2,3", "ROCR_VISIBLE_DEVICES": "2,3", "ZE_AFFINITY_MASK": "2,3"}
    assert visible_devices(everywhere) == ("2", "3")
    del everywhere["ZE_AFFINITY_MASK"]
    assert predict_device(identity(1, 2), everywhere) == "cuda:1"


@pytest.mark.parametrize(
    ("environ", "devices"),
    [
        ({"ZE_AFFINITY_MASK": "0,1"}, ("0", "1")),
        ({"ZE_AFFINITY_MASK": "0.0,0.1"}, ("0.0", "0.1")),
        ({"ZE_AFFINITY_MASK": "0.0,0.1,1.1", "ZE_FLAT_DEVICE_HIERARCHY": "composite"}, ("0", "1.1")),
        ({"ZE_AFFINITY_MASK": "0,0,x"}, ("0",)),
        ({"ZE_AFFINITY_MASK": ""}, None),
        ({"ZE_AFFINITY_MASK": "default"}, None),
    ],
)
def test_level_zero_mask_counts_devices(environ: dict[str, str], devices: tuple[str, ...] | None) -> None:
    assert visible_devices(environ) == devices


def test_each_vendor_has_its_type_in_torch() -> None:
    assert predict_device(identity(0, 1), {"ZE_AFFINITY_MASK": "3"}) == "xpu:0"
    assert predict_device(identity(1, 2), {"ASCEND_RT_VISIBLE_DEVICES": "4,5"}) == "npu:1"


def test_text_shows_the_variables_of_one_type_or_of_all() -> None:
    environ = {"ZE_AFFINITY_MASK": "0", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "1"}
    assert visible_text(environ) == "CUDA_VISIBLE_DEVICES= HIP_VISIBLE_DEVICES=1 ZE_AFFINITY_MASK=0"
    assert visible_text(environ, "xpu") == "ZE_AFFINITY_MASK=0"
    assert visible_text(environ, "npu") is None


@pytest.mark.parametrize(
    ("environ", "device"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles", "ZE_AFFINITY_MASK": "x"}, "cpu"),
        ({"CUDA_VISIBLE_DEVICES": "7"}, "cuda:0"),
        ({"CUDA_VISIBLE_DEVICES": UUID}, "cuda:0"),
        ({"CUDA_VISIBLE_DEVICES": MIG}, "cuda:0"),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, "cuda:2"),
        ({"CUDA_VISIBLE_DEVICES": "4,5"}, None),
        ({"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b,MIG-c"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2", "ZE_AFFINITY_MASK": "0,1,2"}, None),
        ({"CUDA_VISIBLE_DEVICES": "", "ZE_AFFINITY_MASK": "0,1,2"}, "xpu:2"),
    ],
)
def test_device_is_predicted_where_the_environment_says_it(environ: dict[str, str], device: str | None) -> None:
    assert predict_device(identity(2), environ) == device


@pytest.mark.parametrize(
    "given",
    [
        {"SLURM_GPUS_PER_TASK": "2"},
        {"SLURM_GPUS_PER_TASK": "a100:2"},
        {"SLURM_GPUS_PER_TASK": "gpu:a100:1,v100:1"},
        {"SLURM_TRES_PER_TASK": "cpu:4,gres:gpu:2"},
        {"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu:a100=2"},
    ],
)
def test_slurm_task_that_sees_its_own_several_takes_the_first(given: dict[str, str]) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_LOCALID": "3"} | given
    assert predict_device(identity(3, 4, "slurm"), environ) == "cuda:0"
    assert predict_device(identity(3, 4, "env"), environ) == "cuda:0"


def test_slurm_task_that_sees_more_than_its_own_takes_its_local_rank() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "1"}
    assert predict_device(identity(3, 4, "slurm"), environ) == "cuda:3"


def test_processes_that_share_one_slurm_task_divide_what_it_sees() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "4", "SLURM_LOCALID": "0"}
    assert predict_device(identity(3, 4, "torchrun"), environ) == "cuda:3"
    assert predict_device(identity(3, 4, "env"), environ) == "cuda:3"


def test_local_rank_beyond_the_devices_has_no_index() -> None:
    assert [choose_index(identity(local), 3, {}) for local in (0, 2, 3)] == [0, 2, None]


NAMES = [*(name for names in VISIBLE_VARIABLES.values() for name in names), "ZE_FLAT_DEVICE_HIERARCHY"]
SLURM = ["SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_LOCALID"]
LISTS = st.lists(st.sampled_from(["0", "1", "-1", "", UUID, MIG, "gpu:2", "gres/gpu", "0.1", "9" * 5000])).map(",".join)


@settings(max_examples=300, deadline=None)
@given(
    environ=st.dictionaries(st.sampled_from(NAMES + SLURM), st.text() | LISTS),
    local_rank=st.integers(0, 7),
    launcher=st.sampled_from(["torchrun", "slurm", "env", "single"]),
)
def test_any_strings_give_an_answer_of_the_right_form(environ: dict[str, str], local_rank: int, launcher: str) -> None:
    devices = visible_devices(environ)
    assert devices is None or all(device and device.isascii() for device in devices if not device[0].isalpha())
    assert devices is None or len(set(devices)) == len(devices)
    device = predict_device(identity(local_rank, launcher=launcher), environ)
    device_type, _, index = (device or "cpu").partition(":")
    assert device_type in ("cpu", *VISIBLE_VARIABLES)
    assert device_type == "cpu" or int(index) in (0, local_rank)
