"""`Monitor`: what one rank tells of itself while it trains, and who speaks up when a rank is slow or stuck."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from torch import nn

from rankwise import session as sessions
from rankwise.errors import RankwiseError
from rankwise.group import at_session_end
from rankwise.logs import get_logger, set_step
from rankwise.monitor import current
from rankwise.monitor.accelerators import ProcessSensor, find_sensor
from rankwise.monitor.arguments import check_arguments, step_number
from rankwise.monitor.clocks import make_clock
from rankwise.monitor.ddp import DdpWaits, find_ddp
from rankwise.monitor.guard import Guarded, Tracker, close_all
from rankwise.monitor.metrics import MetricsFile, plain_numbers
from rankwise.monitor.phases import FinishedStep, Timeline
from rankwise.monitor.position import Position
from rankwise.monitor.recorder import Recorder
from rankwise.monitor.sampler import Exporter, Sampler
from rankwise.monitor.stragglers import StragglerWatch
from rankwise.monitor.watchdog import Watchdog
from rankwise.session import Session
from rankwise.telemetry import Event
from rankwise.waiting import observe_waiting

logger = get_logger(__name__)

DRAIN_SECONDS = 2.0
"""How long the end of a run waits for the accelerator to come to the end of the last step."""


class Monitor:
    """Measures the phases of each step, reads the device, and tells of slow and stuck ranks.

        with rankwise.init(run_dir) as session, rankwise.Monitor(session) as monitor:
            for batch in loader:
                with monitor.phase("forward"):
                    ...
                monitor.step()

    Everything but noting the time happens in threads of its own. With a run directory it writes `monitor/` and
    `events/` there; without one it writes nothing, and still tells of slow and stuck ranks.

    Args:
        session: the open one; the Monitor is closed with it at the latest.
        step: the last step that is done already, as a resumed run has.
        every_seconds: between two readings, and two lines in the run directory.
        straggler_steps: between two comparisons of all ranks; None compares none.
        hang_timeout_seconds: without a sign of progress a rank counts as stuck after so long; None learns it from the
            run's own steps, `math.inf` watches for nothing.
        on_hang: `tell` of a stuck rank, or tell and `end` the job.
        prometheus_port: serve the readings on this port plus the local rank; None serves nothing.
        prometheus_host: the address to serve on.
        trackers: where the main process sends what `log` is given; see `rankwise.monitor.trackers`.
    Raises:
        RankwiseError: an argument cannot be used, the session is not open, or a Monitor is open already.
    Ranks: every rank must call, with the same arguments.
    """

    def __init__(
        self,
        session: Session,
        *,
        step: int = 0,
        every_seconds: float = 1.0,
        straggler_steps: int | None = 50,
        hang_timeout_seconds: float | None = None,
        on_hang: Literal["tell", "end"] = "tell",
        prometheus_port: int | None = None,
        prometheus_host: str = "127.0.0.1",
        trackers: Sequence[Tracker] = (),
    ) -> None:
        _require_open(session)
        check_arguments(
            step=step,
            every_seconds=every_seconds,
            straggler_steps=straggler_steps,
            hang_timeout_seconds=hang_timeout_seconds,
            on_hang=on_hang,
            prometheus_port=prometheus_port,
        )
        identity, device = session.identity, session.device
        self._session = session
        self._clock = make_clock(device)
        self.timeline = Timeline(self._clock, step)
        self._recorder = Recorder(session.run_dir, identity.rank)
        self._exporter: Exporter | None = None
        self._ddp: list[DdpWaits] = []
        self._is_closed = False
        is_main = identity.is_main_process
        self._trackers = [Guarded(tracker) for tracker in trackers] if is_main else []
        self._metrics = MetricsFile(session.run_dir) if is_main and session.run_dir is not None else None
        self._stragglers: StragglerWatch | None = None
        if straggler_steps is not None:
            self._stragglers = StragglerWatch(
                identity, identity.hostname, str(device), every_steps=straggler_steps, tell=self.tell
            )
        self._watchdog: Watchdog | None = None
        if hang_timeout_seconds is None or math.isfinite(hang_timeout_seconds):
            self._watchdog = Watchdog(
                session, self.position, timeout_seconds=hang_timeout_seconds, on_hang=on_hang, tell=self.tell
            )

        sensor = find_sensor(device)
        if prometheus_port is not None:
            from rankwise.monitor.exporters import serve_prometheus

            labels = {"device": str(device), **sensor.identify()}
            self._exporter = serve_prometheus(
                identity, labels, prometheus_port + identity.local_rank, host=prometheus_host
            )
        self._sampler = Sampler(
            identity,
            str(device),
            self.timeline,
            self._recorder,
            clock_kind=self._clock.kind,
            every_seconds=every_seconds,
            sensor=sensor,
            process=ProcessSensor(),
            exporter=self._exporter,
            on_step=self._on_step,
            on_look=self._stragglers.poll if self._stragglers is not None else lambda: None,
            tell=self.tell,
        )
        if self._watchdog is not None:
            self._watchdog.start()
        observe_waiting(lambda what: _Waiting(self.timeline, what))
        self._forget = at_session_end(lambda failed: self.close(failed=failed))
        current.set_open(self)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_failed = error is not None and not (isinstance(error, SystemExit) and error.code in (0, None))
        self.close(failed=is_failed)

    def phase(self, name: str) -> current.AnyPhase:
        """What runs in the `with` block, or in the decorated function, counts as this phase of the step.

        Phases may lie in each other; each has its own time, without that of those inside. On an accelerator it is
        the time in which the device's stream was in the phase, and nobody waits for the device to know it. Names
        are free; `rankwise.telemetry.PHASES` are those that every reader knows. Phases in other threads than the one
        that calls `step` count nothing. Not for the inside of functions that torch.compile traces.

        Ranks: local.
        """
        return current.phase(name)

    def step(self, number: int | None = None) -> None:
        """The step is over. Log records carry its number from here on.

        Args:
            number: None: the one after the last.
        Raises:
            RankwiseError: it is no whole number, or below 0.
        Ranks: local; in the thread that trains.
        """
        if not self._is_closed:
            if number is not None:
                number = step_number(number)
            set_step(self.timeline.step(number))
            if self._sampler.is_allocator_due:
                self._sampler.note_allocator()

    def watch(self, *modules: nn.Module) -> None:
        """Count the time in which DDP waits for other ranks as `communication`.

        That is the end of a backward pass, when all is computed and gradients are still under way, and the broadcast of
        buffers before a forward pass. Gradients stay what they are, to the last bit. What is not in
        DistributedDataParallel has nothing to be measured here, and is left alone.

        Raises:
            RankwiseError: one of them is no module.
        Ranks: local.
        """
        for module in modules:
            if not isinstance(module, nn.Module):
                raise RankwiseError(
                    f"watch takes modules, and was given a {type(module).__name__}. Pass the DDP module."
                )
            ddp = find_ddp(module)
            if ddp is not None:
                self._ddp.append(DdpWaits(ddp, self.timeline))
            elif self._session.identity.world_size > 1:
                logger.info(
                    "%s is not in DistributedDataParallel: its waits for others are part of the phases around them",
                    type(module).__name__,
                    ranks="main",
                )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Keep losses or other numbers of a step: in the run directory, and in the trackers.

        Args:
            values: by name, whatever `float` takes.
        Raises:
            RankwiseError: one of them is no number.
        Ranks: every rank may call; the main process's are kept.
        """
        if self._is_closed or not self._session.identity.is_main_process:
            return
        numbers = plain_numbers(values)
        if self._metrics is not None:
            self._metrics.write(step, numbers)
        for tracker in self._trackers:
            tracker.log(step, numbers)

    def position(self) -> Position:
        """Where the training thread is.

        Ranks: local; from any thread.
        """
        return self.timeline.position()

    def tell(self, event: Event) -> None:
        """Put an event on the time line of the run, and its message on the console.

        Ranks: local; from any thread.
        """
        self._recorder.event(event)
        if self._exporter is not None:
            self._exporter.tell(event)
        logger.warning("%s", event.message)

    def close(self, *, failed: bool = False) -> None:
        """Write what is left and end the threads; a second call does nothing.

        Args:
            failed: the run ends by an error: wait for nothing, and do not say that it ended in good order.
        Ranks: local.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._forget()
        observe_waiting(None)
        if current.get_open() is self:
            current.set_open(None)
        for ddp in self._ddp:
            ddp.close()
        # First: the end of a run is no hang.
        if self._watchdog is not None:
            self._watchdog.close()
        if not failed:
            self.timeline.drain(DRAIN_SECONDS)
            if self.timeline.is_without_steps():
                logger.warning(
                    "phases were noted, but monitor.step() was never called: nothing is known of any step. Call it at "
                    "the end of each."
                )
        self._sampler.close(failed=failed)
        if self._stragglers is not None:
            self._stragglers.close()
        close_all(self._trackers, failed=failed)

    def _on_step(self, step: FinishedStep) -> None:
        if self._watchdog is not None:
            self._watchdog.finished(step.number, step.seconds, step.phases)
        if self._stragglers is not None:
            self._stragglers.add(step.number, step.seconds, step.phases)


class _Waiting:
    """Around one of our collectives: where the training thread calls it, it waits for other ranks."""

    __slots__ = ("_is_mine", "_timeline", "_what")

    def __init__(self, timeline: Timeline, what: str) -> None:
        self._timeline = timeline
        self._what = what
        self._is_mine = False

    def __enter__(self) -> None:
        self._is_mine = self._timeline.begin_wait(self._what)

    def __exit__(self, *exception: object) -> None:
        if self._is_mine:
            self._timeline.end_wait()


def _require_open(session: Any) -> None:
    if not isinstance(session, Session):
        raise RankwiseError(
            f"Monitor takes the session of `rankwise.init()`, and was given a {type(session).__name__}."
        )
    if sessions._open_session is not session:
        raise RankwiseError("the session is not open. Make the Monitor within the `with rankwise.init()` block.")
    if current.get_open() is not None:
        raise RankwiseError("a Monitor is open already in this process. Close it before the next one.")
