"""One thread of a Monitor: once a second it looks where the rank is, reads its device, and passes that on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rankwise.identity import Identity
from rankwise.logs import get_logger
from rankwise.monitor.accelerators import ALARMING_REASONS
from rankwise.monitor.phases import FinishedStep, Timeline
from rankwise.monitor.recorder import Recorder, batches
from rankwise.telemetry import End, Event, Start, Tick

logger = get_logger(__name__)

CLOSE_SECONDS = 3.0
"""How long the end of a run waits for this thread, which a driver or a disk may hold."""

FORGET_SECONDS = 600.0
"""A device that is held back is told of again after so long without."""


class Sensor(Protocol):
    """What reads an accelerator."""

    def identify(self) -> dict[str, str | None]: ...
    def read(self, *, allocator: bool = True) -> dict[str, Any]: ...
    def note_allocator(self) -> None: ...
    def close(self) -> None: ...


class ProcessReader(Protocol):
    """What reads the process."""

    def read(self) -> dict[str, Any]: ...


class Exporter(Protocol):
    """What serves the newest tick to others."""

    def update(self, tick: Tick) -> None: ...
    def tell(self, event: Event) -> None: ...
    def close(self) -> None: ...


class Sampler:
    """The thread. What its parts raise is logged once and never reaches the training.

    Args:
        exporter: gets each tick.
        on_step: called for each finished step.
        on_look: called once in each look, after the steps.
        tell: called for events of the device.
    Ranks: local.
    """

    def __init__(
        self,
        identity: Identity,
        device: str,
        timeline: Timeline,
        recorder: Recorder,
        *,
        clock_kind: str,
        every_seconds: float,
        sensor: Sensor,
        process: ProcessReader,
        exporter: Exporter | None,
        on_step: Callable[[FinishedStep], None],
        on_look: Callable[[], None],
        tell: Callable[[Event], None],
    ) -> None:
        self._identity = identity
        self._device = device
        self._timeline = timeline
        self._recorder = recorder
        self._clock_kind = clock_kind
        self._every_seconds = every_seconds
        self._sensor = sensor
        self._process = process
        self._exporter = exporter
        self._on_step = on_step
        self._on_look = on_look
        self._tell = tell
        self._last_readings: Mapping[str, Any] = {}
        self._reasons: dict[str, float] = {}
        self.is_allocator_due = True
        """Whether the training thread should call `note_allocator` at the end of its step."""
        self._told: set[str] = set()
        self._is_failed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rankwise-monitor", daemon=True)
        self._thread.start()

    def note_allocator(self) -> None:
        """Have the allocator's numbers for the next line, once for each.

        Ranks: local; by the thread that allocates.
        """
        self.is_allocator_due = False
        self._sensor.note_allocator()

    def close(self, *, failed: bool) -> None:
        """Take a last look, and end the thread; after a few seconds it is left behind.

        Ranks: local.
        """
        self._is_failed = failed
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning(
                "the monitor's thread did not end within %g s and is left behind: the disk or %s's driver holds it",
                CLOSE_SECONDS,
                self._device,
            )

    def _run(self) -> None:
        self._tolerate("start", self._open)
        while True:
            is_last = self._closing.wait(self._every_seconds)
            self._tolerate("monitor", self._sample)
            if is_last:
                break
        if not self._is_failed:
            end = End(time.time(), self._timeline.position().step)
            self._tolerate("monitor", lambda: self._recorder.write([end]))
        for part in (self._exporter, self._sensor):
            if part is not None:
                self._tolerate("end", part.close)

    def _open(self) -> None:
        identity, labels = self._identity, self._sensor.identify()
        start = Start(
            time=time.time(),
            rank=identity.rank,
            local_rank=identity.local_rank,
            node_rank=identity.node_rank,
            world_size=identity.world_size,
            host=identity.hostname,
            pid=os.getpid(),
            device=self._device,
            device_name=labels.get("device_name"),
            device_uuid=labels.get("device_uuid"),
            clock=self._clock_kind,
        )
        self._recorder.write([start])

    def _sample(self) -> None:
        steps = self._timeline.take()
        # What cannot judge the steps, or read the device, must not keep them from the file.
        self._tolerate("slow and stuck ranks", lambda: [self._on_step(step) for step in steps])
        self._tolerate("slow ranks", self._on_look)
        position, now = self._timeline.position(), time.time()
        readings: dict[str, Any] = {}
        process: dict[str, Any] = {}
        self._tolerate("readings", lambda: readings.update(self._sensor.read(allocator=False)))
        self.is_allocator_due = True
        self._tolerate("readings", lambda: process.update(self._process.read()))
        seconds = max(0.0, time.monotonic() - position.since)
        done = batches(steps)
        # Only a gap in the numbers, as a resumed or rewound loop has, makes more than one line.
        ticks = [Tick(now, position.step, position.phase, seconds, batch) for batch in done[:-1]]
        last = done[-1] if done else None
        ticks.append(Tick(now, position.step, position.phase, seconds, last, readings, process))
        self._recorder.write(ticks)
        for event in device_events(self._before(), readings, self._device, self._identity, position.step):
            self._tell(event)
        self._remember(readings)
        if self._exporter is not None:
            for tick in ticks:
                self._exporter.update(tick)
        if self._timeline.num_untimed and "untimed" not in self._told:
            self._told.add("untimed")
            logger.info("some steps have no times: the device was far behind, or a graph was captured in them")

    def _before(self) -> dict[str, Any]:
        """What is known of the device from before; a reason that comes and goes is not new each time."""
        recent = time.monotonic() - FORGET_SECONDS
        reasons = [reason for reason, seen in self._reasons.items() if seen > recent]
        return {**self._last_readings, "throttle_reasons": reasons}

    def _remember(self, readings: Mapping[str, Any]) -> None:
        self._last_readings = {**self._last_readings, **readings}
        self._reasons |= dict.fromkeys(readings.get("throttle_reasons", ()), time.monotonic())

    def _tolerate(self, what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            if what not in self._told:
                self._told.add(what)
                logger.warning("the monitor cannot do all it should (%s), training goes on", what, exc_info=error)


def device_events(
    before: Mapping[str, Any], now: Mapping[str, Any], device: str, identity: Identity, step: int
) -> list[Event]:
    """What a person should hear of a device: errors that are new, and that it has begun to be held back by heat.

    Ranks: local.
    """
    said: list[tuple[str, dict[str, Any]]] = []
    if now.get("xid_errors"):
        numbers = ", ".join(map(str, now["xid_errors"]))
        said.append((f"the driver reports XID {numbers}", {"xid_errors": list(now["xid_errors"])}))
    errors = now.get("ecc_uncorrected", 0)
    num_new = errors - before.get("ecc_uncorrected", errors)
    if num_new > 0:
        said.append((f"{num_new} uncorrected memory errors more", {"ecc_uncorrected": errors}))
    new = _bad(now) - _bad(before)
    if new:
        at = f" at {now['temperature_celsius']:g} C" if "temperature_celsius" in now else ""
        said.append((f"it is held back ({', '.join(sorted(new))}){at}", {"throttle_reasons": sorted(new)}))
    place = f"rank {identity.rank} ({identity.hostname}, {device})"
    return [
        Event("device", time.time(), step, f"{place}: {text}", (identity.rank,), None, details)
        for text, details in said
    ]


def _bad(readings: Mapping[str, Any]) -> frozenset[str]:
    return ALARMING_REASONS.intersection(readings.get("throttle_reasons", ()))
