"""What a rank's monitor knows, for a Prometheus server to fetch: a port per rank, off unless asked for."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from rankwise.errors import RankwiseError
from rankwise.identity import Identity
from rankwise.logs import get_logger
from rankwise.monitor.exporters.families import (
    DEVICE_GAUGES,
    ECC_READINGS,
    PROCESS_GAUGES,
    RANK_LABELS,
    STEP_BUCKETS_SECONDS,
    Reading,
)
from rankwise.telemetry import OTHER, Event, Steps, Tick

if TYPE_CHECKING:
    from prometheus_client.core import Metric

logger = get_logger(__name__)

MAX_NAMED_RANKS = 64
"""Stragglers, and stuck ranks, that have a series of their own at a time; all are counted."""
MAX_PHASES = 64
"""Phases that have series of their own; a program that makes up more names loses them here."""
MAX_PORT = 65_535
_CLOSE_SECONDS = 2.0


def serve_prometheus(
    identity: Identity, device_labels: Mapping[str, str | None], port: int, host: str = "127.0.0.1"
) -> PrometheusExporter:
    """Serve this rank's numbers at `http://HOST:PORT/metrics`; a taken port is a warning, and training goes on.

    Args:
        device_labels: `device`, `device_name`, `device_uuid`, as far as they are known.
        port: of this rank; no two ranks of a node may have the same. 0 is any free one.
        host: 127.0.0.1 is this machine alone; "0.0.0.0" is whoever reaches it, and there is no password.
    Raises:
        RankwiseError: the port cannot be one, or the package is not installed.
    Ranks: local.
    """
    if not 0 <= port <= MAX_PORT:
        raise RankwiseError(
            f"The Prometheus port of rank {identity.rank} is {port}. Give one that is, with the local rank added, "
            f"in 1..{MAX_PORT}."
        )
    if importlib.util.find_spec("prometheus_client") is None:
        raise RankwiseError(
            f"A Prometheus endpoint was asked for (port {port}), and the package prometheus-client is not installed. "
            "Install it (pip install 'rankwise[monitor]'), or leave the port out."
        )
    exporter = PrometheusExporter(identity, device_labels)
    exporter.serve(port, host)
    return exporter


class PrometheusExporter:
    """Holds a rank's newest numbers, and gives them to whoever asks over HTTP.

    A reading that the device does not give has no sample. All ages are by this host's clock alone.
    """

    def __init__(self, identity: Identity, device_labels: Mapping[str, str | None]) -> None:
        self._identity = identity
        self._device_labels = {name: value for name, value in device_labels.items() if value}
        self._labels = (str(identity.rank), str(identity.local_rank), identity.hostname)
        # Between the sampler's thread and those of the server; held for microseconds.
        self._lock = threading.Lock()
        self._tick: Tick | None = None
        self._ticked = 0.0
        self._bucket_counts = [0] * (len(STEP_BUCKETS_SECONDS) + 1)
        self._num_steps = 0
        self._step_seconds = 0.0
        self._phase_seconds: dict[str, float] = {}
        self._phases_seen: set[str] = set()
        self._reasons_seen: set[str] = set()
        self._xids: Counter[str] = Counter()
        self._events: Counter[str] = Counter()
        self._stragglers: dict[int, str] = {}
        self._stuck: dict[int, str] = {}
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self.port: int | None = None
        """Where it is served, None where it is not."""

    def serve(self, port: int, host: str) -> None:
        """Begin to answer; a port that cannot be had is a warning.

        Ranks: local.
        """
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except (OSError, OverflowError, RuntimeError) as error:
            logger.warning(
                f"no Prometheus endpoint for rank {self._identity.rank}: {host}:{port} cannot be had ({error}). "
                "Training goes on; give another port for the next run."
            )
            return
        # An answer that somebody does not read to its end must not hold up the program's, nor print a traceback.
        self._server.block_on_close = False
        self._server.handle_error = lambda request, client: None
        self.port = self._server.server_port

    def update(self, tick: Tick) -> None:
        """Take the newest line of this rank.

        Ranks: local.
        """
        with self._lock:
            self._tick, self._ticked = tick, time.monotonic()
            if tick.steps is not None:
                self._count(tick.steps)
            if tick.phase is not None and len(self._phases_seen) < MAX_PHASES:
                self._phases_seen.add(tick.phase)
            self._reasons_seen.update(tick.device.get("throttle_reasons", ()))
            self._xids.update(str(xid) for xid in tick.device.get("xid_errors", ()))

    def tell(self, event: Event) -> None:
        """Take an event: who is slow or stuck, until another says that it is over.

        Ranks: local; the rank that tells of them serves them.
        """
        named = {"straggler": self._stragglers, "hang": self._stuck}.get(event.kind.removesuffix("_over"))
        with self._lock:
            self._events[event.kind] += 1
            if named is None:
                return
            for rank in event.ranks:
                if event.kind.endswith("_over"):
                    named.pop(rank, None)
                else:
                    named[rank] = event.phase or OTHER
            if event.kind.endswith("_over") and not event.ranks:
                named.clear()

    def close(self) -> None:
        """Answer no more.

        Ranks: local.
        """
        server, self._server, self.port = self._server, None, None
        if server is None or self._thread is None:
            return
        # The server's loop looks up twice a second, or when somebody connects.
        stopping = threading.Thread(target=server.shutdown, name="rankwise-prometheus-end", daemon=True)
        stopping.start()
        with contextlib.suppress(OSError), socket.create_connection(server.server_address[:2], timeout=_CLOSE_SECONDS):
            stopping.join(_CLOSE_SECONDS)
        server.server_close()

    def collect(self) -> Iterator[Metric]:
        """All metrics as they are now; called by Prometheus's library for each request."""
        with self._lock:
            metrics = [*self._of_rank(), *self._of_steps(), *self._of_readings(), *self._of_events()]
        yield from metrics

    def _count(self, steps: Steps) -> None:
        for seconds in steps.seconds:
            self._bucket_counts[bisect_left(STEP_BUCKETS_SECONDS, seconds)] += 1
        self._num_steps += len(steps.seconds)
        self._step_seconds += sum(steps.seconds)
        for phase, seconds_each in steps.phases.items():
            if phase in self._phase_seconds or len(self._phase_seconds) < MAX_PHASES:
                self._phase_seconds[phase] = self._phase_seconds.get(phase, 0.0) + sum(seconds_each)

    def _of_rank(self) -> Iterator[Metric]:
        identity, tick = self._identity, self._tick
        about = {
            "node_rank": str(identity.node_rank),
            "world_size": str(identity.world_size),
            "launcher": identity.launcher,
            "job_id": identity.job_id or "",
            **self._device_labels,
        }
        yield self._gauge(
            "rankwise_rank_info", "Who this rank is, and its device.", [((*about.values(),), 1.0)], *about
        )
        if tick is None:
            return
        age = time.monotonic() - self._ticked
        yield self._gauge("rankwise_step", "Last step that was finished.", [((), tick.step)])
        yield self._gauge("rankwise_heartbeat_age_seconds", "Since the monitor's thread last ran.", [((), age)])
        yield self._gauge(
            "rankwise_progress_age_seconds", "Since the training last showed progress.", [((), tick.seconds + age)]
        )
        phases = [((phase,), float(phase == tick.phase)) for phase in sorted(self._phases_seen)]
        yield self._gauge("rankwise_phase_active", "Whether the training is in this phase now.", phases, "phase")

    def _of_steps(self) -> Iterator[Metric]:
        from prometheus_client.core import HistogramMetricFamily

        steps = HistogramMetricFamily(
            "rankwise_step_duration_seconds", "How long each finished step took.", labels=RANK_LABELS
        )
        bounds = [*(str(bound) for bound in STEP_BUCKETS_SECONDS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._bucket_counts), strict=True))
        steps.add_metric(self._labels, buckets=buckets, sum_value=self._step_seconds)
        yield steps
        seconds = [((phase,), value) for phase, value in sorted(self._phase_seconds.items())]
        yield self._counter(
            "rankwise_phase_seconds", "Time of finished steps by phase, without phases inside it.", seconds, "phase"
        )

    def _of_readings(self) -> Iterator[Metric]:
        if self._tick is None:
            return
        device = self._tick.device
        yield from self._gauges(DEVICE_GAUGES, device)
        yield from self._gauges(PROCESS_GAUGES, self._tick.process)
        if "throttle_reasons" in device:
            now = set(device["throttle_reasons"])
            reasons = [((reason,), float(reason in now)) for reason in sorted(self._reasons_seen)]
            yield self._gauge("rankwise_device_throttled", "Whether this holds the device back now.", reasons, "reason")
        errors = [((kind,), float(device[name])) for name, kind in ECC_READINGS.items() if device.get(name) is not None]
        if errors:
            yield self._counter(
                "rankwise_device_ecc_errors", "Memory errors of the device since its driver started.", errors, "kind"
            )
        if "xid_errors" in device or self._xids:
            xids = [((xid,), float(count)) for xid, count in sorted(self._xids.items())]
            yield self._counter("rankwise_device_xid_errors", "Errors that the driver reported.", xids, "xid")

    def _of_events(self) -> Iterator[Metric]:
        events = [((kind,), float(count)) for kind, count in sorted(self._events.items())]
        yield self._counter("rankwise_events", "Events that this rank told of.", events, "kind")
        yield from self._of_ranks("rankwise_stragglers", "rankwise_straggler_info", "slow", self._stragglers)
        yield from self._of_ranks("rankwise_hung_ranks", "rankwise_hung_rank_info", "stuck", self._stuck)

    def _of_ranks(self, name: str, info: str, meaning: str, named: Mapping[int, str]) -> Iterator[Metric]:
        yield self._gauge(name, f"How many ranks are {meaning} now, as far as this rank tells.", [((), len(named))])
        ranks = [((str(rank), phase), 1.0) for rank, phase in sorted(named.items())[:MAX_NAMED_RANKS]]
        yield self._gauge(info, f"A rank that is {meaning} now, and in which phase.", ranks, f"{meaning}_rank", "phase")

    def _gauges(self, known: Mapping[str, Reading], readings: Mapping[str, Any]) -> Iterator[Metric]:
        for name, gauge in known.items():
            if (value := readings.get(name)) is not None:
                yield self._gauge(gauge.name, gauge.help, [((), value * gauge.factor)])

    def _gauge(self, name: str, text: str, samples: Iterable[tuple[tuple[str, ...], float]], *labels: str) -> Metric:
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(name, text, labels=(*RANK_LABELS, *labels))
        for values, value in samples:
            family.add_metric((*self._labels, *values), value)
        return family

    def _counter(self, name: str, text: str, samples: Iterable[tuple[tuple[str, ...], float]], *labels: str) -> Metric:
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(name, text, labels=(*RANK_LABELS, *labels))
        for values, value in samples:
            family.add_metric((*self._labels, *values), value)
        return family
