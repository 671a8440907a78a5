"""What a Prometheus server finds at a rank's port, fetched over HTTP and read by Prometheus's own parser."""

import math
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from rankwise.errors import RankwiseError
from rankwise.identity import Identity
from rankwise.monitor.exporters import PrometheusExporter, serve_prometheus
from rankwise.monitor.exporters.families import DEVICE_GAUGES, ECC_READINGS, PROCESS_GAUGES, RANK_LABELS
from rankwise.monitor.exporters.prometheus import MAX_NAMED_RANKS, MAX_PHASES
from rankwise.telemetry import DEVICE_READINGS, PROCESS_READINGS, Event, Steps, Tick

RANK_5 = Identity(5, 1, 2, 8, 2, 4, launcher="torchrun", hostname="node-c", job_id="j1")
LABELS = {"device": "cuda:1", "device_name": "H100", "device_uuid": "GPU-5"}
OF_RANK = {"rank": "5", "local_rank": "1", "node": "node-c"}

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def exporter() -> Iterator[PrometheusExporter]:
    served = serve_prometheus(RANK_5, LABELS, 0)
    yield served
    served.close()


def fetch(exporter: PrometheusExporter, accept: str = "text/plain") -> str:
    assert exporter.port is not None
    request = urllib.request.Request(f"http://127.0.0.1:{exporter.port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def samples(exporter: PrometheusExporter) -> Samples:
    """By name and labels, without those that every sample of the rank must have."""
    found: Samples = {}
    for family in text_string_to_metric_families(fetch(exporter)):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert {name: labels.pop(name) for name in RANK_LABELS} == OF_RANK, sample
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


def value(exporter: PrometheusExporter, name: str, **labels: str) -> float | None:
    return samples(exporter).get((name, tuple(sorted(labels.items()))))


def tick(**fields: Any) -> Tick:
    return Tick(**{"time": 1e9, "step": 7, "phase": "forward", "seconds": 0.5, **fields})


def test_before_the_first_tick_it_says_who_it_is_and_claims_nothing_else(exporter: PrometheusExporter) -> None:
    about = {**LABELS, "node_rank": "2", "world_size": "8", "launcher": "torchrun", "job_id": "j1"}
    assert value(exporter, "rankwise_rank_info", **about) == 1
    names = {name for name, _ in samples(exporter)}
    assert not {
        name for name in names if name.startswith(("rankwise_device", "rankwise_process", "rankwise_heartbeat"))
    }
    assert "rankwise_step" not in names


def test_a_device_without_a_name_has_no_empty_labels() -> None:
    served = serve_prometheus(RANK_5, {"device": "cpu", "device_name": None, "device_uuid": None}, 0)
    try:
        assert 'device="cpu"' in fetch(served)
        assert "device_uuid" not in fetch(served)
    finally:
        served.close()


def test_steps_become_a_histogram_and_phases_add_up(exporter: PrometheusExporter) -> None:
    phases = {"data": [0.01, 0.02], "other": [0.03, 0.28]}
    exporter.update(tick(steps=Steps(6, [0.04, 0.3], phases)))
    exporter.update(tick(step=8, steps=Steps(8, [500.0], {"data": [400.0], "other": [100.0]})))
    found = samples(exporter)
    buckets = {dict(labels)["le"]: count for (name, labels), count in found.items() if name.endswith("_bucket")}
    assert (buckets["0.025"], buckets["0.05"], buckets["0.25"], buckets["0.5"]) == (0, 1, 1, 2)
    assert (buckets["120.0"], buckets["+Inf"]) == (2, 3)
    assert list(buckets.values()) == sorted(buckets.values())
    assert found["rankwise_step_duration_seconds_count", ()] == 3
    assert found["rankwise_step_duration_seconds_sum", ()] == pytest.approx(500.34)
    assert found["rankwise_phase_seconds_total", (("phase", "data"),)] == pytest.approx(400.03)
    assert found["rankwise_step", ()] == 8


def test_a_step_on_a_bound_counts_into_its_bucket(exporter: PrometheusExporter) -> None:
    exporter.update(tick(steps=Steps(1, [0.1], {"other": [0.1]})))
    assert value(exporter, "rankwise_step_duration_seconds_bucket", le="0.1") == 1
    assert value(exporter, "rankwise_step_duration_seconds_bucket", le="0.05") == 0


def test_the_phase_of_now_is_marked_among_those_that_were_seen(exporter: PrometheusExporter) -> None:
    exporter.update(tick(phase="data"))
    exporter.update(tick(phase="backward"))
    assert value(exporter, "rankwise_phase_active", phase="data") == 0
    assert value(exporter, "rankwise_phase_active", phase="backward") == 1
    exporter.update(tick(phase=None))
    assert value(exporter, "rankwise_phase_active", phase="backward") == 0


def test_ages_grow_while_no_tick_comes(exporter: PrometheusExporter) -> None:
    exporter.update(tick(seconds=100.0))
    time.sleep(0.2)
    age = value(exporter, "rankwise_heartbeat_age_seconds")
    progress = value(exporter, "rankwise_progress_age_seconds")
    assert age is not None
    assert progress is not None
    assert 0.2 <= age < 60
    assert 100.2 <= progress < 160


def test_readings_are_in_base_units(exporter: PrometheusExporter) -> None:
    device = {"utilisation_percent": 87.5, "memory_used_gib": 2.0, "clock_mhz": 1500, "temperature_celsius": 71}
    process = {"cpu_percent": 250.0, "rss_gib": 0.5, "read_mib_per_second": 3.0, "num_threads": 12}
    exporter.update(tick(device=device, process=process))
    expected = {
        "device_utilization_ratio": 0.875,
        "device_memory_used_bytes": 2**31,
        "device_clock_hertz": 1.5e9,
        "device_temperature_celsius": 71,
        "process_cpu_ratio": 2.5,
        "process_resident_memory_bytes": 2**29,
        "process_read_bytes_per_second": 3 * 2**20,
        "process_threads": 12,
    }
    found = samples(exporter)
    assert {name: found[f"rankwise_{name}", ()] for name in expected} == expected


def test_a_reading_that_is_not_given_any_more_is_absent_and_not_zero(exporter: PrometheusExporter) -> None:
    exporter.update(tick(device={"power_watts": 300.0, "temperature_celsius": 70}))
    exporter.update(tick(device={"temperature_celsius": 71, "power_watts": None}))
    assert value(exporter, "rankwise_device_power_watts") is None
    assert value(exporter, "rankwise_device_temperature_celsius") == 71


def test_every_reading_of_the_telemetry_is_served(exporter: PrometheusExporter) -> None:
    lists = {"throttle_reasons", "xid_errors"}
    assert set(DEVICE_READINGS) == set(DEVICE_GAUGES) | set(ECC_READINGS) | lists
    assert set(PROCESS_READINGS) == set(PROCESS_GAUGES)
    before = len(samples(exporter))
    device: dict[str, Any] = dict.fromkeys(DEVICE_READINGS, 1.0)
    exporter.update(tick(device=device | {"throttle_reasons": ["power"], "xid_errors": [79]}))
    exporter.update(
        tick(
            device=device | {"throttle_reasons": ["power"], "xid_errors": []},
            process=dict.fromkeys(PROCESS_READINGS, 1.0),
        )
    )
    # Besides those: the step, two ages, and the phase.
    assert len(samples(exporter)) - before == len(DEVICE_READINGS) + len(PROCESS_READINGS) + 4


def test_a_reason_that_is_over_is_zero_and_errors_of_the_driver_add_up(exporter: PrometheusExporter) -> None:
    exporter.update(tick(device={"throttle_reasons": ["thermal"], "xid_errors": [79, 79, 31], "ecc_uncorrected": 0}))
    assert value(exporter, "rankwise_device_throttled", reason="thermal") == 1
    exporter.update(tick(device={"throttle_reasons": [], "xid_errors": [79], "ecc_uncorrected": 2}))
    assert value(exporter, "rankwise_device_throttled", reason="thermal") == 0
    assert value(exporter, "rankwise_device_xid_errors_total", xid="79") == 3
    assert value(exporter, "rankwise_device_xid_errors_total", xid="31") == 1
    assert value(exporter, "rankwise_device_ecc_errors_total", kind="uncorrected") == 2


def test_stragglers_and_stuck_ranks_are_named_until_it_is_over(exporter: PrometheusExporter) -> None:
    exporter.tell(Event("straggler", 1.0, 10, "slow", [3, 4], "data"))
    exporter.tell(Event("hang", 1.0, 10, "stuck", [6]))
    assert value(exporter, "rankwise_stragglers") == 2
    assert value(exporter, "rankwise_straggler_info", slow_rank="3", phase="data") == 1
    assert value(exporter, "rankwise_hung_rank_info", stuck_rank="6", phase="other") == 1
    exporter.tell(Event("straggler_over", 2.0, 20, "well", [3], "data"))
    assert value(exporter, "rankwise_straggler_info", slow_rank="3", phase="data") is None
    assert value(exporter, "rankwise_stragglers") == 1
    exporter.tell(Event("hang_over", 2.0, 20, "goes on"))
    assert value(exporter, "rankwise_hung_ranks") == 0
    assert value(exporter, "rankwise_events_total", kind="straggler") == 1
    exporter.tell(Event("checkpoint", 2.0, 20, "saved"))
    assert value(exporter, "rankwise_events_total", kind="checkpoint") == 1


def test_the_number_of_series_is_bounded(exporter: PrometheusExporter) -> None:
    exporter.tell(Event("hang", 1.0, 10, "stuck", range(10_240)))
    for number in range(1000):
        exporter.update(tick(phase=f"p{number}", steps=Steps(number, [0.1], {f"p{number}": [0.1]})))
    found = samples(exporter)
    assert value(exporter, "rankwise_hung_ranks") == 10_240
    assert len([1 for name, _ in found if name == "rankwise_hung_rank_info"]) == MAX_NAMED_RANKS
    assert len([1 for name, _ in found if name == "rankwise_phase_active"]) == MAX_PHASES
    assert len([1 for name, _ in found if name == "rankwise_phase_seconds_total"]) == MAX_PHASES


def full(exporter: PrometheusExporter) -> None:
    """Let it serve one of everything."""
    device: dict[str, Any] = dict.fromkeys(DEVICE_READINGS, 1.0)
    device |= {"throttle_reasons": ["power"], "xid_errors": [79]}
    steps = Steps(1, [0.1], {"data": [0.1]})
    exporter.update(tick(steps=steps, device=device, process=dict.fromkeys(PROCESS_READINGS, 1.0)))
    exporter.tell(Event("straggler", 1.0, 10, "slow", [3], "data"))
    exporter.tell(Event("hang", 1.0, 10, "stuck", [6], "data"))


def test_names_and_kinds_follow_the_conventions(exporter: PrometheusExporter) -> None:
    full(exporter)
    families = list(text_string_to_metric_families(fetch(exporter)))
    assert len({family.name for family in families}) == len(families) > 30
    units = ("_seconds", "_bytes", "_ratio", "_celsius", "_watts", "_hertz", "_per_second")
    plain = {"rankwise_step", "rankwise_stragglers", "rankwise_hung_ranks", "rankwise_process_threads"}
    for family in families:
        assert family.name.startswith("rankwise_")
        assert family.documentation.endswith(".")
        assert family.type in ("gauge", "counter", "histogram")
        names = {sample.name for sample in family.samples}
        assert family.samples, f"{family.name} has no samples"
        if family.type == "counter":
            assert all(name.endswith("_total") for name in names)
        elif family.type == "gauge":
            marks = ("_info", "_active", "_throttled")
            assert family.name.endswith((*units, *marks)) or family.name in plain
            assert not family.name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert all(math.isfinite(sample.value) for sample in family.samples)


def test_openmetrics_is_served_to_those_who_ask_for_it(exporter: PrometheusExporter) -> None:
    full(exporter)
    text = fetch(exporter, "application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")
    assert len(list(read_openmetrics(text))) > 30


def test_odd_names_come_through(exporter: PrometheusExporter) -> None:
    odd = 'a "b"\\\n\u00e4'
    exporter.update(tick(phase=odd))
    assert value(exporter, "rankwise_phase_active", phase=odd) == 1


def test_it_listens_on_this_machine_alone(exporter: PrometheusExporter) -> None:
    assert exporter.port is not None
    with socket.socket() as other:
        # Another address of this host, also where it has no network: nobody answers there.
        other.settimeout(10)
        with pytest.raises(OSError, match=r"refused|unreachable"):
            other.connect(("127.0.0.2", exporter.port))


def test_two_ranks_of_a_node_serve_side_by_side(exporter: PrometheusExporter) -> None:
    rank_4 = Identity(4, 0, 2, 8, 2, 4, hostname="node-c")
    second = serve_prometheus(rank_4, {}, 0)
    try:
        assert second.port != exporter.port
        assert 'rank="4"' in fetch(second)
        assert 'rank="4"' not in fetch(exporter)
    finally:
        second.close()


def test_a_taken_port_is_a_warning_and_all_else_goes_on(
    exporter: PrometheusExporter, caplog: pytest.LogCaptureFixture
) -> None:
    assert exporter.port is not None
    second = serve_prometheus(RANK_5, LABELS, exporter.port)
    second.update(tick())
    second.tell(Event("hang", 1.0, 10, "stuck", [6]))
    second.close()
    assert second.port is None
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"no Prometheus endpoint for rank 5: 127.0.0.1:{exporter.port} cannot be had" in told


def test_a_host_that_is_none_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    # An address of nobody's: made for documentation.
    assert serve_prometheus(RANK_5, LABELS, 0, host="192.0.2.1").port is None
    assert "cannot be had" in caplog.text


@pytest.mark.parametrize("port", [-1, 65_536])
def test_a_port_that_can_be_none_is_refused(port: int) -> None:
    with pytest.raises(RankwiseError, match=f"port of rank 5 is {port}"):
        serve_prometheus(RANK_5, LABELS, port)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RankwiseError, match=r"rankwise\[monitor\]"):
        serve_prometheus(RANK_5, LABELS, 0)


def test_it_ends_and_frees_its_port(exporter: PrometheusExporter) -> None:
    port = exporter.port
    assert port is not None
    exporter.close()
    exporter.close()
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_clients_that_hang_or_break_off_hold_up_nothing(
    exporter: PrometheusExporter, capfd: pytest.CaptureFixture[str]
) -> None:
    assert exporter.port is not None
    idle = [socket.create_connection(("127.0.0.1", exporter.port)) for _ in range(5)]
    try:
        for _ in range(5):
            rude = socket.create_connection(("127.0.0.1", exporter.port))
            rude.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            # Closed with a reset.
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            rude.close()
        full(exporter)
        assert value(exporter, "rankwise_step") == 7
        began = time.monotonic()
        exporter.close()
        assert time.monotonic() - began < 10
    finally:
        for client in idle:
            client.close()
    assert capfd.readouterr().err == ""


def test_ticks_come_in_while_others_fetch(exporter: PrometheusExporter) -> None:
    stop = threading.Event()
    errors: list[BaseException] = []

    def fetch_on() -> None:
        try:
            while not stop.is_set():
                found = samples(exporter)
                count = found["rankwise_step_duration_seconds_count", ()]
                assert found["rankwise_step_duration_seconds_bucket", (("le", "+Inf"),)] == count
        except BaseException as error:
            errors.append(error)

    fetching = threading.Thread(target=fetch_on)
    fetching.start()
    for number in range(300):
        exporter.update(tick(phase=f"p{number % 9}", steps=Steps(number + 1, [0.1], {f"p{number % 9}": [0.1]})))
    stop.set()
    fetching.join()
    assert not errors
    assert value(exporter, "rankwise_step_duration_seconds_count") == 300
