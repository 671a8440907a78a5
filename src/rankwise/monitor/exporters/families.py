"""What the Prometheus endpoint of a rank serves: names, units and kinds.

Names follow Prometheus's conventions: the prefix `rankwise_`, base units (seconds, bytes, ratio, celsius, hertz), and
`_total` at the end of counters.
Source: https://prometheus.io/docs/practices/naming/ and https://prometheus.io/docs/practices/instrumentation/
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2.0**30
MIB = 2.0**20

STEP_BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds of the buckets of step durations."""

RANK_LABELS = ("rank", "local_rank", "node")
"""On every sample: what graphs are split by. They add no series, since each rank is a target of its own.

The device's UUID and name, which a restart may change, stand on `rankwise_rank_info` alone, to be joined by `rank`.
"""


@dataclass(frozen=True)
class Reading:
    """How a reading of `rankwise.telemetry` is served as a gauge."""

    name: str
    help: str
    factor: float = 1.0
    """From the reading's unit to the base unit."""


DEVICE_GAUGES = {
    "utilisation_percent": Reading(
        "rankwise_device_utilization_ratio", "Share of the last sampling period in which a kernel ran.", 0.01
    ),
    "memory_used_gib": Reading("rankwise_device_memory_used_bytes", "Device memory in use, by everybody.", GIB),
    "memory_total_gib": Reading("rankwise_device_memory_size_bytes", "Memory of the device.", GIB),
    "memory_allocated_gib": Reading(
        "rankwise_device_memory_allocated_bytes", "Device memory in tensors of this process.", GIB
    ),
    "memory_reserved_gib": Reading(
        "rankwise_device_memory_reserved_bytes", "Device memory held by this process's allocator.", GIB
    ),
    "memory_peak_gib": Reading(
        "rankwise_device_memory_peak_bytes", "Most device memory that was in tensors of this process.", GIB
    ),
    "power_watts": Reading("rankwise_device_power_watts", "Power drawn by the device."),
    "power_limit_watts": Reading("rankwise_device_power_limit_watts", "Power allowed to the device."),
    "temperature_celsius": Reading("rankwise_device_temperature_celsius", "Temperature of the chip."),
    "clock_mhz": Reading("rankwise_device_clock_hertz", "Clock of the compute units.", 1e6),
    "clock_max_mhz": Reading("rankwise_device_clock_max_hertz", "Highest clock of the compute units.", 1e6),
    "memory_clock_mhz": Reading("rankwise_device_memory_clock_hertz", "Clock of the memory.", 1e6),
}
"""By name in `telemetry.DEVICE_READINGS`; the rest of those are no plain gauges."""

PROCESS_GAUGES = {
    "cpu_percent": Reading("rankwise_process_cpu_ratio", "Cores that the process keeps busy; 2 are two cores.", 0.01),
    "rss_gib": Reading("rankwise_process_resident_memory_bytes", "Resident memory of the process.", GIB),
    "read_mib_per_second": Reading(
        "rankwise_process_read_bytes_per_second", "What the process reads from storage.", MIB
    ),
    "write_mib_per_second": Reading(
        "rankwise_process_write_bytes_per_second", "What the process writes to storage.", MIB
    ),
    "num_threads": Reading("rankwise_process_threads", "Threads of the process."),
}
"""By name in `telemetry.PROCESS_READINGS`."""

ECC_READINGS = {"ecc_corrected": "corrected", "ecc_uncorrected": "uncorrected"}
"""Counted by the driver since it started."""
