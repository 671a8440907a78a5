"""The dashboard that people import asks only for what the endpoints serve."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rankwise.identity import Identity
from rankwise.monitor.exporters import PrometheusExporter
from rankwise.monitor.exporters.dashboard import dashboard, expressions
from rankwise.telemetry import DEVICE_READINGS, PROCESS_READINGS, Event, Steps, Tick

COMMITTED = Path(__file__).parents[2] / "docs" / "grafana" / "rankwise.json"


def served() -> dict[str, set[str]]:
    """Labels by the name of a sample, where there is one of everything."""
    exporter = PrometheusExporter(Identity(0, 0, 0, 1, 1, 1), {"device": "d", "device_name": "n", "device_uuid": "u"})
    device: dict[str, Any] = dict.fromkeys(DEVICE_READINGS, 1.0)
    device |= {"throttle_reasons": ["power"], "xid_errors": [79]}
    steps = Steps(1, [0.1], {"data": [0.1]})
    exporter.update(Tick(time.time(), 1, "data", 0.1, steps, device, dict.fromkeys(PROCESS_READINGS, 1.0)))
    for kind in ("straggler", "hang"):
        exporter.tell(Event(kind, 1.0, 10, "", [3], "data"))
    return {sample.name: set(sample.labels) for family in exporter.collect() for sample in family.samples}


def test_the_committed_dashboard_is_the_one_that_is_generated() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rankwise.monitor.exporters.dashboard"], capture_output=True, text=True, check=True
    )
    assert COMMITTED.read_text() == done.stdout, "run: python -m rankwise.monitor.exporters.dashboard > " + str(
        COMMITTED.relative_to(COMMITTED.parents[2])
    )


def test_every_metric_that_it_asks_for_is_served() -> None:
    names = set(served())
    variables = [variable["query"]["query"] for variable in dashboard()["templating"]["list"][1:]]
    asked = {name for text in [*expressions(), *variables] for name in re.findall(r"\brankwise_\w+", text)}
    assert len(asked) > 20
    assert asked <= names


def test_every_label_that_it_selects_by_or_shows_is_served() -> None:
    labels = served()
    # Prometheus adds `job` itself.
    for expression in expressions():
        for name, selected in re.findall(r"(rankwise_\w+)\{([^}]*)\}", expression):
            chosen = set(re.findall(r"(\w+)(?:=|!)", selected))
            assert chosen <= labels[name] | {"job"}, expression
    everywhere = set.union(*labels.values())
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
            kept = set(re.split(r",\s*", grouped[0])) if grouped else everywhere
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, target
        for step in panel.get("transformations", ()):
            (name,) = re.findall(r"rankwise_\w+", panel["targets"][0]["expr"])
            assert set(step["options"]["include"]["names"]) <= labels[name]


def test_every_panel_uses_the_source_that_the_reader_chose() -> None:
    source, *others = dashboard()["templating"]["list"]
    assert (source["name"], source["type"]) == ("datasource", "datasource")
    assert [variable["name"] for variable in others] == ["job", "node", "rank"]
    for panel in dashboard()["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["targets"]
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_panels_lie_side_by_side_and_not_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + right, place["y"] + down) for right in range(place["w"]) for down in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_it_has_the_rows_that_answer_who_is_slow_and_why() -> None:
    rows = [panel["title"] for panel in dashboard()["panels"] if panel["type"] == "row"]
    assert rows == ["Now", "Steps per rank", "Slowest ranks", "Phases", "Devices", "Heartbeats and processes"]
    json.dumps(dashboard(), allow_nan=False)
