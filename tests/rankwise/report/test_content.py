"""The run as one object."""

import base64
import json
import zlib
from pathlib import Path
from typing import Any

from rankwise.report.content import build_content
from rankwise.report.loading import load_ranks
from rankwise.report.logsummary import summarise_logs
from rankwise.runreader import read_run
from rankwise.telemetry import Event, events_path, to_json


def told(run_dir: Path) -> dict[str, Any]:
    content = build_content(load_ranks(read_run(run_dir)), summarise_logs(run_dir))
    whole = zlib.decompress(base64.b64decode(content.packed))
    found: dict[str, Any] = json.loads(whole[4 : 4 + int.from_bytes(whole[:4], "little")])
    return found


def test_a_straggler_lasts_until_the_event_that_ends_it(run_dir: Path) -> None:
    events = told(run_dir)["events"]
    begun = next(event for event in events if event["kind"] == "straggler")
    over = next(event for event in events if event["kind"] == "straggler_over")
    assert begun["until"] == over["step"] > begun["step"]


def test_a_straggler_is_one_before_it_is_told_of_and_not_until_it_is_told_to_be_over(tmp_path: Path) -> None:
    path = events_path(tmp_path, 0)
    path.parent.mkdir(parents=True)
    began = Event("straggler", 1.0, 200, "slow", [1], "data", {"num_steps": 150})
    over = Event("straggler_over", 2.0, 450, "over", [1], "data", {"num_steps": 250})
    # Whatever else stands there, as in a file by somebody else.
    odd = [
        Event("straggler", 3.0, 500, "slow", [2], "data", {"num_steps": 9000}),
        Event("straggler_over", 4.0, 600, "over", [2], "data", {"num_steps": "many"}),
        Event("straggler", 5.0, 700, "slow", [3], "data"),
        Event("straggler_over", 6.0, 800, "over", [3], "data", {"num_steps": 50}),
    ]
    path.write_text("".join(to_json(event) + "\n" for event in (began, over, *odd)))
    events = [event for event in told(tmp_path)["events"] if event["kind"] == "straggler"]
    assert [(event.get("since"), event["until"]) for event in events] == [(51, 300), (None, 600), (None, 800)]


def test_checkpoints_are_those_that_are_there_and_those_that_were(run_dir: Path) -> None:
    checkpoints = told(run_dir)["checkpoints"]
    on_disk = sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").iterdir())
    assert [saved["step"] for saved in checkpoints if saved["isThere"]] == on_disk
    assert all(saved["bytes"] > 0 for saved in checkpoints)


def test_ranks_have_their_places(run_dir: Path) -> None:
    ranks = told(run_dir)["ranks"]
    assert ranks["rank"] == list(range(16))
    assert ranks["local_rank"][9] == 1
    assert ranks["node"][9] == 1
    assert ranks["uuid"][9].startswith("GPU-")
    assert set(ranks["state"]) == {"ended"}


def test_every_metric_is_there_with_how_often_it_was_logged(run_dir: Path) -> None:
    metrics = {metric["name"]: metric for metric in told(run_dir)["metrics"]}
    run = read_run(run_dir)
    assert set(metrics) == set(run.metrics)
    assert metrics["nll"]["logged"] == run.metrics["nll"].steps.size


def test_facts_say_that_a_simulated_run_never_ran(run_dir: Path) -> None:
    content = build_content(load_ranks(read_run(run_dir)), None)
    facts = dict(content.facts)
    assert "never ran" in facts["simulated"]
    assert facts["ranks"] == "16 on 2 nodes"
    assert facts["steps"] == "1 to 400 of 400"
