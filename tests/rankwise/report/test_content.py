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
