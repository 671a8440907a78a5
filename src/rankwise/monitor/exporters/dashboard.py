"""The Grafana dashboard for the Prometheus endpoints of a run's ranks, as JSON to import.

    python -m rankwise.monitor.exporters.dashboard > rankwise.json

`docs/grafana/rankwise.json` is its output.
Source: https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/ (classic model)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_SELECTED = 'job=~"$job",node=~"$node",rank=~"$rank"'
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_OF_RANK = "rank {{rank}} ({{node}})"
_WIDTH = 24

Panel = dict[str, Any]


def dashboard() -> dict[str, Any]:
    """The dashboard, in Grafana's classic model.

    Ranks: local.
    """
    rows = {
        "Now": _now(),
        "Steps per rank": _steps(),
        "Slowest ranks": _slowest(),
        "Phases": _phases(),
        "Devices": _devices(),
        "Heartbeats and processes": _processes(),
    }
    return {
        "title": "rankwise: every rank of a run",
        "uid": "rankwise-ranks",
        "description": "Steps, phases, devices and heartbeats of each rank, from the endpoints of rankwise.Monitor.",
        "tags": ["rankwise", "pytorch"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": _laid_out(rows),
    }


def expressions() -> list[str]:
    """Every PromQL expression of the panels.

    Ranks: local.
    """
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]


def _variables() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    ]
    for name, within in (("job", ""), ("node", '{job=~"$job"}'), ("rank", '{job=~"$job",node=~"$node"}')):
        found.append(
            {
                "name": name,
                "label": name.capitalize(),
                "type": "query",
                "datasource": _SOURCE,
                "query": {"query": f"label_values(rankwise_step{within}, {name})", "refId": name},
                "definition": f"label_values(rankwise_step{within}, {name})",
                # On every change of the time range; as numbers where they are.
                "refresh": 2,
                "sort": 3,
                "multi": True,
                "includeAll": True,
                "current": {"text": "All", "value": "$__all"},
            }
        )
    return found


def _now() -> list[Panel]:
    return [
        _stat("Ranks that answer", f"count(rankwise_step{{{_SELECTED}}})"),
        _stat("Step of the last rank", f"min(rankwise_step{{{_SELECTED}}})"),
        _stat("Steps behind the first", f"max(rankwise_step{{{_SELECTED}}}) - min(rankwise_step{{{_SELECTED}}})", 2),
        # Every rank tells of what it knows, and the main process of all: whatever ranks are selected.
        _stat("Stragglers", 'max(rankwise_stragglers{job=~"$job"})', 1),
        _stat("Stuck ranks", 'max(rankwise_hung_ranks{job=~"$job"})', 1),
        _stat("Oldest sign of progress", f"max(rankwise_progress_age_seconds{{{_SELECTED}}})", 60, unit="s"),
    ]


def _steps() -> list[Panel]:
    duration = "rankwise_step_duration_seconds"
    return [
        _graph("Step", f"rankwise_step{{{_SELECTED}}}", "none"),
        _graph("Mean duration of a step", f"{_rate(duration + '_sum')} / {_rate(duration + '_count')}", "s"),
        {
            **_panel("Durations of all ranks", "heatmap"),
            "targets": [_target(f"sum by (le) ({_rate(duration + '_bucket')})", "{{le}}") | {"format": "heatmap"}],
            "options": {
                "calculate": False,
                "yAxis": {"unit": "s"},
                "color": {"mode": "scheme", "scheme": "Viridis", "steps": 64},
                "tooltip": {"mode": "single", "yHistogram": False},
            },
        },
    ]


def _slowest() -> list[Panel]:
    own = (
        'sum by (rank, node) (rate(rankwise_phase_seconds_total{phase!="communication",'
        f"{_SELECTED}}}[$__rate_interval]))"
        f" / sum by (rank, node) ({_rate('rankwise_step_duration_seconds_count')})"
    )
    return [
        {
            **_panel("Most time of their own in a step (without communication)", "bargauge", width=12),
            "targets": [_target(f"topk(10, {own})", _OF_RANK) | {"instant": True}],
            "fieldConfig": {"defaults": {"unit": "s", "color": {"mode": "continuous-YlBl"}}, "overrides": []},
            "options": {
                "orientation": "horizontal",
                "displayMode": "basic",
                "reduceOptions": {"calcs": ["lastNotNull"]},
            },
        },
        _table("Stragglers now", 'rankwise_straggler_info{job=~"$job"}', ("slow_rank", "phase")),
        _table("Stuck ranks now", 'rankwise_hung_rank_info{job=~"$job"}', ("stuck_rank", "phase")),
    ]


def _phases() -> list[Panel]:
    seconds = _rate("rankwise_phase_seconds_total")
    share = f"sum by (phase) ({seconds}) / scalar(sum({_rate('rankwise_step_duration_seconds_sum')}))"
    stacked = _graph("Share of the time, all selected ranks", share, "percentunit", legend="{{phase}}", width=12)
    stacked["fieldConfig"]["defaults"]["custom"] |= {"stacking": {"mode": "normal"}, "fillOpacity": 70}
    stacked["fieldConfig"]["defaults"]["max"] = 1
    by_rank = f"sum by (rank, node, phase) ({seconds})"
    return [
        stacked,
        _graph("Share of the time, by rank", by_rank, "percentunit", legend="rank {{rank}} {{phase}}", width=12),
    ]


def _devices() -> list[Panel]:
    def of(name: str) -> str:
        return f"rankwise_device_{name}{{{_SELECTED}}}"

    memory = _graph("Memory", of("memory_used_bytes"), "bytes", legend="rank {{rank}} used")
    for name, letter in (("reserved", "B"), ("allocated", "C")):
        memory["targets"].append(_target(of(f"memory_{name}_bytes"), f"rank {{{{rank}}}} {name}", letter))
    ecc = f"sum by (rank, node, kind) (increase({of('ecc_errors_total')}[1h]))"
    errors = _graph(
        "Memory errors of the last hour, XID errors of this run", ecc, "none", legend="rank {{rank}} memory, {{kind}}"
    )
    # As a plain count: an error's first sample is no increase.
    errors["targets"].append(_target(of("xid_errors_total"), "rank {{rank}} XID {{xid}}", "B"))
    table = _table(
        "Which device each rank has",
        f"rankwise_rank_info{{{_SELECTED}}}",
        ("rank", "local_rank", "node", "device", "device_name", "device_uuid"),
    )
    return [
        _graph("Utilisation", of("utilization_ratio"), "percentunit"),
        memory,
        _graph("Temperature", of("temperature_celsius"), "celsius"),
        _graph("Power", of("power_watts"), "watt"),
        _graph("Clock", of("clock_hertz"), "hertz"),
        _graph("Held back", f"{of('throttled')} == 1", "none", legend="rank {{rank}} {{reason}}"),
        errors,
        table | {"gridPos": {"w": 16}},
    ]


def _processes() -> list[Panel]:
    def of(name: str) -> str:
        return f"rankwise_{name}{{{_SELECTED}}}"

    files = _graph("Storage", of("process_read_bytes_per_second"), "Bps", legend="rank {{rank}} reads")
    files["targets"].append(_target(of("process_write_bytes_per_second"), "rank {{rank}} writes", "B"))
    return [
        _graph("Age of the heartbeat", of("heartbeat_age_seconds"), "s"),
        _graph("Time since progress", of("progress_age_seconds"), "s"),
        _graph("In phase now", f"{of('phase_active')} == 1", "none", legend="rank {{rank}} {{phase}}"),
        _graph("Cores that are busy", of("process_cpu_ratio"), "none"),
        _graph("Resident memory", of("process_resident_memory_bytes"), "bytes"),
        files,
    ]


def _rate(name: str) -> str:
    return f"rate({name}{{{_SELECTED}}}[$__rate_interval])"


def _target(expression: str, legend: str, name: str = "A") -> dict[str, Any]:
    return {"datasource": _SOURCE, "expr": expression, "legendFormat": legend, "refId": name}


def _panel(title: str, kind: str, *, width: int = 8, height: int = 8) -> Panel:
    return {"title": title, "type": kind, "datasource": _SOURCE, "gridPos": {"w": width, "h": height}}


def _stat(title: str, expression: str, alarming: float | None = None, *, unit: str = "none") -> Panel:
    steps: list[dict[str, Any]] = [{"color": "text", "value": None}]
    if alarming is not None:
        steps.append({"color": "orange", "value": alarming})
    defaults = {"unit": unit, "color": {"mode": "thresholds"}, "thresholds": {"mode": "absolute", "steps": steps}}
    return {
        **_panel(title, "stat", width=4, height=4),
        "targets": [_target(expression, "") | {"instant": True}],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "none"},
    }


def _graph(title: str, expression: str, unit: str, *, legend: str = _OF_RANK, width: int = 8) -> Panel:
    return {
        **_panel(title, "timeseries", width=width),
        "targets": [_target(expression, legend)],
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"lineWidth": 1}}, "overrides": []},
        "options": {
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def _table(title: str, expression: str, columns: Sequence[str]) -> Panel:
    shown = {"id": "filterFieldsByName", "options": {"include": {"names": list(columns)}}}
    return {
        **_panel(title, "table", width=6),
        "targets": [_target(expression, "") | {"instant": True, "format": "table"}],
        "transformations": [shown],
        "fieldConfig": {"defaults": {}, "overrides": []},
    }


def _laid_out(rows: dict[str, list[Panel]]) -> list[Panel]:
    """The panels in lines of 24 columns, each row under its heading."""
    panels: list[Panel] = []
    top = 0
    for title, members in rows.items():
        panels.append(
            {"title": title, "type": "row", "collapsed": False, "gridPos": {"x": 0, "y": top, "w": 24, "h": 1}}
        )
        top += 1
        left = height = 0
        for panel in members:
            size = {"h": 8, **panel["gridPos"]}
            if left + size["w"] > _WIDTH:
                top, left, height = top + height, 0, 0
            panels.append(panel | {"gridPos": {"x": left, "y": top, **size}})
            left, height = left + size["w"], max(height, size["h"])
        top += height
    return [panel | {"id": number} for number, panel in enumerate(panels, start=1)]


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
