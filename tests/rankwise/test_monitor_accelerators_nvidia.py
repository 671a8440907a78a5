"""NVML is asked about the device that torch computes on, however devices are hidden, reordered or sliced."""

import ast
import importlib
import importlib.util
import inspect
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from rankwise.monitor.accelerators import find_sensor, nvidia
from rankwise.monitor.accelerators.nvidia import find_nvidia, throttle_words
from rankwise.telemetry import DEVICE_READINGS

GIB = 2**30
NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, TIMEOUT, FUNCTION_NOT_FOUND, LOST, UNKNOWN = 3, 4, 6, 10, 13, 15, 999


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__({LOST: "GPU is lost", NOT_FOUND: "Not Found"}.get(value, f"error {value}"))
        self.value = value


class Gpu:
    """What NVML tells of GPU `number`: every reading of another GPU is another number."""

    def __init__(self, number: int, speed: int = 0) -> None:
        self.uuid = f"GPU-{number:08x}-0000-4000-8000-00000000000{number}"
        self.bus = 0x10 + number
        self.speed = speed
        self.name = f"NVIDIA H100 #{number}"
        self.parent: Gpu | None = None
        self.slices: dict[int, Gpu] = {}
        self.instance = 0
        self.errors: dict[str, int] = {}
        self.events: list[tuple[int, int]] = []
        self.reasons = 0
        self.told = {
            "Utilization": 10 + number,
            "Used": (number + 1) * GIB,
            "Total": 80 * GIB,
            "PowerUsage": 300_000 + number * 1000,
            "EnforcedPowerLimit": 700_000,
            "Temperature": 40 + number,
            "Clock": 1000 + number,
            "MaxClock": 1980,
            "Corrected": 5 + number,
            "Uncorrected": number,
        }

    def slice(self, place: int, profile: str, uuid: str) -> "Gpu":
        part = Gpu(0)
        part.parent, part.uuid, part.name, part.instance = self, uuid, f"{self.name} MIG {profile}", 7 + place
        part.told = {"Used": (place + 1) * GIB // 2, "Total": 10 * GIB}
        self.slices[place] = part
        return part


class FakeNvml(ModuleType):
    """NVML over some GPUs, in the order of their PCI addresses."""

    NVMLError = NVMLError
    NVML_ERROR_INVALID_ARGUMENT = 2
    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NO_PERMISSION = NOT_SUPPORTED, NO_PERMISSION
    NVML_ERROR_NOT_FOUND, NVML_ERROR_TIMEOUT = NOT_FOUND, TIMEOUT
    NVML_ERROR_FUNCTION_NOT_FOUND, NVML_ERROR_GPU_IS_LOST = FUNCTION_NOT_FOUND, LOST
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU, NVML_VOLATILE_ECC = 1, 2, 0, 0
    NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 0, 1
    nvmlEventTypeXidCriticalError, nvmlMemory_v2 = 8, 0x02000028

    def __init__(self, gpus: list[Gpu]) -> None:
        super().__init__("pynvml")
        self.gpus = gpus
        self.num_open = 0
        self.num_event_sets = 0
        self.init_error: int | None = None
        self.calls: list[str] = []

    def _tell(self, gpu: Gpu, what: str) -> Any:
        self.calls.append(what)
        if "*" in gpu.errors or what in gpu.errors:
            raise NVMLError(gpu.errors.get(what, gpu.errors.get("*", 0)))
        if what not in gpu.told:
            raise NVMLError(NOT_SUPPORTED)
        return gpu.told[what]

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise NVMLError(self.init_error)
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:
        parts = [part for gpu in self.gpus for part in gpu.slices.values()]
        for handle in [*self.gpus, *parts]:
            if handle.uuid == uuid:
                return handle
        raise NVMLError(NOT_FOUND)

    def nvmlDeviceGetHandleByPciBusId(self, address: str) -> Gpu:
        for gpu in self.gpus:
            if f"0000:{gpu.bus:02x}:00.0" == address:
                return gpu
        raise NVMLError(NOT_FOUND)

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetName(self, gpu: Gpu) -> str:
        return gpu.name

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, part: Gpu) -> Gpu:
        assert part.parent is not None
        return part.parent

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: Gpu) -> int:
        return 7 if gpu.slices else 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: Gpu, place: int) -> Gpu:
        if place not in gpu.slices:
            raise NVMLError(NOT_FOUND)
        return gpu.slices[place]

    def nvmlDeviceGetGpuInstanceId(self, part: Gpu) -> int:
        return part.instance

    def nvmlDeviceGetUtilizationRates(self, gpu: Gpu) -> Any:
        if gpu.slices:
            raise NVMLError(NOT_SUPPORTED)
        return SimpleNamespace(gpu=self._tell(gpu, "Utilization"), memory=99)

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu, version: int | None = None) -> Any:
        used, total = self._tell(gpu, "Used"), self._tell(gpu, "Total")
        if version is None:  # the first version counts in what the driver reserves
            return SimpleNamespace(used=used + GIB, total=total)
        if "MemoryV2" in gpu.errors:
            raise NVMLError(gpu.errors["MemoryV2"])
        return SimpleNamespace(used=used, total=total)

    def nvmlDeviceGetPowerUsage(self, gpu: Gpu) -> int:
        return int(self._tell(gpu, "PowerUsage"))

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: Gpu) -> int:
        return int(self._tell(gpu, "EnforcedPowerLimit"))

    def nvmlDeviceGetPowerManagementLimit(self, gpu: Gpu) -> int:
        return int(self._tell(gpu, "PowerManagementLimit"))

    def nvmlDeviceGetTemperature(self, gpu: Gpu, sensor: int) -> int:
        return int(self._tell(gpu, "Temperature"))

    def nvmlDeviceGetClockInfo(self, gpu: Gpu, kind: int) -> int:
        return int(self._tell(gpu, "Clock")) + (1000 if kind == self.NVML_CLOCK_MEM else 0)

    def nvmlDeviceGetMaxClockInfo(self, gpu: Gpu, kind: int) -> int:
        return int(self._tell(gpu, "MaxClock"))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: Gpu) -> int:
        return gpu.reasons

    def nvmlDeviceGetTotalEccErrors(self, gpu: Gpu, kind: int, counter: int) -> int:
        return int(self._tell(gpu, "Uncorrected" if kind else "Corrected"))

    def nvmlEventSetCreate(self) -> Any:
        self.num_event_sets += 1
        return SimpleNamespace(gpu=None)

    def nvmlDeviceRegisterEvents(self, gpu: Gpu, kinds: int, events: Any) -> None:
        assert gpu.parent is None, "NVML reports no events of a slice's handle"
        if "Events" in gpu.errors:
            raise NVMLError(gpu.errors["Events"])
        events.gpu = gpu

    def nvmlEventSetWait_v2(self, events: Any, timeout_ms: int) -> Any:
        assert timeout_ms == 0, "the sampler must not wait"
        if events.gpu.events:
            xid, instance = events.gpu.events.pop(0)
            return SimpleNamespace(eventData=xid, gpuInstanceId=instance)
        raise NVMLError(LOST if "*" in events.gpu.errors else TIMEOUT)

    def nvmlEventSetFree(self, events: Any) -> None:
        self.num_event_sets -= 1


class FakeCuda:
    """torch.cuda over the same GPUs, in the order that CUDA gives them."""

    def __init__(self, gpus: list[Gpu], *, has_uuid: bool = True) -> None:
        order = os.environ.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
        ordered = gpus if order == "PCI_BUS_ID" else sorted(gpus, key=lambda gpu: -gpu.speed)
        parts = {part.uuid: part for gpu in gpus for part in gpu.slices.values()}
        asked = [text for text in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if text]
        self.visible = [self._choose(text, ordered, parts) for text in asked] or ordered
        self.has_uuid = has_uuid
        self.tells_slice = False

    @staticmethod
    def _choose(text: str, ordered: list[Gpu], parts: dict[str, Gpu]) -> Gpu:
        if text.isdecimal():
            return ordered[int(text)]
        return next(gpu for gpu in [*ordered, *parts.values()] if gpu.uuid.startswith(text))

    def get_device_properties(self, device: torch.device | int) -> Any:
        gpu = self.visible[device if isinstance(device, int) else device.index or 0]
        whole = gpu.parent or gpu
        told = SimpleNamespace(name=gpu.name, pci_domain_id=0, pci_bus_id=whole.bus, pci_device_id=0)
        if self.has_uuid:
            told.uuid = (gpu if self.tells_slice else whole).uuid[4:]
        return told

    def get_device_name(self, device: torch.device) -> str:
        return str(self.get_device_properties(device).name)

    def is_initialized(self) -> bool:
        return False


def install(monkeypatch: pytest.MonkeyPatch, gpus: list[Gpu], *, has_uuid: bool = True) -> FakeNvml:
    nvml = FakeNvml(gpus)
    cuda = FakeCuda(gpus, has_uuid=has_uuid)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch, "get_device_module", lambda device: cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    return nvml


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def read(index: int) -> dict[str, Any]:
    return find_nvidia(torch.device("cuda", index)).readings.read()


@pytest.mark.parametrize(
    ("visible", "order", "index", "number"),
    [
        (None, "PCI_BUS_ID", 3, 3),
        (None, None, 0, 2),  # the fastest is first
        ("3,1", "PCI_BUS_ID", 0, 3),
        ("3,1", "PCI_BUS_ID", 1, 1),
        ("1", None, 0, 0),  # the second fastest
        ("GPU-00000003", None, 0, 3),
        ("GPU-00000001,GPU-00000003", "PCI_BUS_ID", 1, 3),
    ],
)
@pytest.mark.parametrize("has_uuid", [True, False])
def test_readings_are_those_of_the_device_that_torch_computes_on(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, order: str | None, index: int, number: int, has_uuid: bool
) -> None:
    gpus = [Gpu(0, speed=8), Gpu(1), Gpu(2, speed=9), Gpu(3)]
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if order is not None:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    install(monkeypatch, gpus, has_uuid=has_uuid)
    driver = find_nvidia(torch.device("cuda", index))
    assert driver.uuid == gpus[number].uuid
    assert driver.name == f"NVIDIA H100 #{number}"
    assert driver.readings.read() == {
        "xid_errors": [],
        "utilisation_percent": 10.0 + number,
        "memory_used_gib": number + 1.0,
        "memory_total_gib": 80.0,
        "power_watts": 300.0 + number,
        "power_limit_watts": 700.0,
        "temperature_celsius": 40.0 + number,
        "clock_mhz": 1000.0 + number,
        "clock_max_mhz": 1980.0,
        "memory_clock_mhz": 2000.0 + number,
        "throttle_reasons": [],
        "ecc_corrected": 5 + number,
        "ecc_uncorrected": number,
    }


def test_every_reading_has_a_name_of_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [Gpu(0)])
    assert read(0).keys() <= DEVICE_READINGS.keys()


def sliced() -> list[Gpu]:
    gpus = [Gpu(0), Gpu(1)]
    gpus[1].slice(0, "1g.10gb", "MIG-aaaa0000-1111")
    gpus[1].slice(2, "3g.40gb", "MIG-bbbb0000-2222")
    return gpus


@pytest.mark.parametrize("name", ["MIG-bbbb0000-2222", "MIG-bbbb"])
def test_slice_tells_its_own_memory_the_power_of_its_gpu_and_no_utilisation(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    gpus = sliced()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", name)
    install(monkeypatch, gpus)
    driver = find_nvidia(torch.device("cuda", 0))
    told = driver.readings.read()
    assert driver.uuid == "MIG-bbbb0000-2222"
    assert driver.name == "NVIDIA H100 #1 MIG 3g.40gb"
    assert (told["memory_used_gib"], told["memory_total_gib"]) == (1.5, 10.0)
    assert told["power_watts"] == 301.0
    assert "utilisation_percent" not in told


def test_slice_without_a_name_is_found_by_its_size_alone_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = sliced()
    install(monkeypatch, gpus)
    monkeypatch.setattr(torch.get_device_module("cuda"), "visible", [gpus[1].slices[2]])
    assert read(0)["memory_used_gib"] == 1.5
    gpus[1].slice(3, "3g.40gb", "MIG-cccc0000-3333")
    driver = find_nvidia(torch.device("cuda", 0))
    told = driver.readings.read()
    assert told["temperature_celsius"] == 41.0
    assert not {"memory_used_gib", "memory_total_gib", "utilisation_percent"} & told.keys()
    assert driver.uuid is None


def test_slice_is_found_by_the_uuid_that_torch_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = sliced()
    gpus[0].slice(0, "1g.10gb", "MIG-dddd0000-4444")
    install(monkeypatch, gpus)
    cuda = torch.get_device_module("cuda")
    monkeypatch.setattr(cuda, "visible", [gpus[1].slices[0]])
    monkeypatch.setattr(cuda, "tells_slice", True)
    driver = find_nvidia(torch.device("cuda", 0))
    assert driver.uuid == "MIG-aaaa0000-1111"
    assert driver.readings.read()["memory_used_gib"] == 0.5


def test_errors_of_other_slices_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = sliced()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-bbbb0000-2222")
    install(monkeypatch, gpus)
    own, other = gpus[1].slices[2].instance, gpus[1].slices[0].instance
    gpus[1].events = [(31, other), (43, own), (79, 0xFFFFFFFF)]
    assert read(0)["xid_errors"] == [43, 79]


def test_driver_errors_are_told_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Gpu(0)]
    install(monkeypatch, gpus)
    readings = find_nvidia(torch.device("cuda", 0)).readings
    gpus[0].events = [(63, 0xFFFFFFFF), (94, 0xFFFFFFFF)]
    assert readings.read()["xid_errors"] == [63, 94]
    assert readings.read()["xid_errors"] == []


@pytest.mark.parametrize("error", [NOT_SUPPORTED, NO_PERMISSION])
def test_driver_errors_are_absent_where_listening_is_not_allowed(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    gpus = [Gpu(0)]
    gpus[0].errors["Events"] = error
    nvml = install(monkeypatch, gpus)
    assert "xid_errors" not in read(0)
    assert nvml.num_event_sets == 0


def test_reading_that_is_not_supported_is_absent_and_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Gpu(0)]
    gpus[0].errors["Corrected"] = NOT_SUPPORTED
    nvml = install(monkeypatch, gpus)
    readings = find_nvidia(torch.device("cuda", 0)).readings
    told = readings.read()
    assert "ecc_corrected" not in told
    assert told["ecc_uncorrected"] == 0
    readings.read()
    assert nvml.calls.count("Corrected") == 1
    assert nvml.calls.count("Uncorrected") == 2


def test_reading_that_fails_once_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Gpu(0)]
    install(monkeypatch, gpus)
    readings = find_nvidia(torch.device("cuda", 0)).readings
    gpus[0].errors["PowerUsage"] = UNKNOWN
    assert "power_watts" not in readings.read()
    gpus[0].errors.clear()
    assert readings.read()["power_watts"] == 300.0


def test_older_driver_is_asked_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Gpu(0)]
    gpus[0].errors |= {"MemoryV2": FUNCTION_NOT_FOUND, "EnforcedPowerLimit": NOT_SUPPORTED}
    gpus[0].told["PowerManagementLimit"] = 350_000
    install(monkeypatch, gpus)
    told = read(0)
    assert told["memory_used_gib"] == 2.0  # with what the driver reserves, as that version counts
    assert told["power_limit_watts"] == 350.0


def test_lost_device_tells_its_last_error_and_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpus = [Gpu(0)]
    nvml = install(monkeypatch, gpus)
    sensor = find_sensor(torch.device("cuda", 0))
    assert sensor.read()["power_watts"] == 300.0
    gpus[0].errors["*"] = LOST
    gpus[0].events = [(79, 0xFFFFFFFF)]
    assert sensor.read() == {"xid_errors": [79]}
    assert sensor.read() == {}
    assert sensor.read() == {}
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert f"cuda:0 (NVIDIA H100 #0, {gpus[0].uuid}) is lost to its driver: GPU is lost." in warnings[0]
    sensor.close()
    assert (nvml.num_open, nvml.num_event_sets) == (0, 0)


@pytest.mark.parametrize("has_binding", [True, False])
def test_without_binding_or_driver_there_is_one_warning_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_binding: bool
) -> None:
    nvml = install(monkeypatch, [Gpu(0)])
    nvml.init_error = 18
    if not has_binding:
        monkeypatch.setitem(sys.modules, "pynvml", None)
    sensor = find_sensor(torch.device("cuda", 0))
    assert sensor.read() == {}
    assert sensor.identify() == {"device_name": "NVIDIA H100 #0", "device_uuid": Gpu(0).uuid}
    sensor.close()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("no readings of cuda:0 from its driver: ")
    assert "Install nvidia-ml-py" in warning


def test_device_that_the_driver_does_not_know_leaves_the_driver_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Gpu(0), Gpu(1)]
    nvml = install(monkeypatch, gpus)
    del nvml.gpus[1]
    with pytest.raises(NVMLError, match="Not Found"):
        find_nvidia(torch.device("cuda", 1))
    assert nvml.num_open == 0


def test_close_gives_back_what_was_opened_and_may_come_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = install(monkeypatch, [Gpu(0)])
    sensor = find_sensor(torch.device("cuda", 0))
    assert (nvml.num_open, nvml.num_event_sets) == (1, 1)
    sensor.close()
    sensor.close()
    assert (nvml.num_open, nvml.num_event_sets) == (0, 0)
    assert sensor.read() == {}


@pytest.mark.parametrize(
    ("reasons", "words"),
    [
        (0, []),
        (0x1, []),
        (0x4, ["power"]),
        (0x20 | 0x1, ["thermal"]),
        (0x8 | 0x40, ["hardware", "hardware_thermal"]),
        (0x80 | 0x400 | 0x8000, ["power_brake", "reliability", "0x8000"]),
    ],
)
def test_throttle_reasons_are_words(reasons: int, words: list[str]) -> None:
    assert throttle_words(reasons) == words


def real_binding() -> ModuleType:
    sys.modules.pop("pynvml", None)
    if importlib.util.find_spec("pynvml") is None and os.environ.get("CI") != "true":
        pytest.skip("needs nvidia-ml-py")
    return importlib.import_module("pynvml")


def test_official_binding_has_every_name_that_is_used() -> None:
    pynvml = real_binding()
    used = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(nvidia)))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nvml"
    }
    assert len(used) > 20
    assert not {name for name in used | set(nvidia._NEVER) | set(nvidia._LOST) if not hasattr(pynvml, name)}


def test_words_cover_every_reason_of_the_official_binding() -> None:
    pynvml = real_binding()
    named = [name for name in vars(pynvml) if name.startswith(("nvmlClocksEventReason", "nvmlClocksThrottleReason"))]
    bits = {getattr(pynvml, name) for name in named if not name.endswith(("All", "None"))}
    assert len(bits) >= 11
    assert bits == set(nvidia.REASONS)
