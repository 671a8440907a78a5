"""The checks as people and programs read them."""

import json

from rankwise.doctor.table import MAX_TABLE_ROWS, as_json, as_lines, as_table
from rankwise.doctor.verdict import Check, Finding, judge

PASS = Check("versions", "pass", "torch 2.13.0")
WARN = Check("threads", "warn", "64 threads", "Set OMP_NUM_THREADS=8.")
FAIL = Check("shared-devices", "fail", "rank 0 and rank 1 share one", "Give each its own.")


def devices(num_ranks: int) -> Check:
    rows = [
        {"rank": rank, "host": "h", "local_rank": rank, "device": f"cuda:{rank}", "name": "H100", "uuid": f"GPU-{rank}"}
        | {"memory_bytes": 80 << 30, "free_bytes": 1}
        for rank in range(num_ranks)
    ]
    return Check("devices", "pass", "H100", None, rows)


def test_the_worst_finding_decides_and_stands_first() -> None:
    findings = [Finding("warn", "small.", "Do a."), Finding("fail", "broken", "Do b."), Finding("warn", "old", "Do a.")]
    assert judge("x", findings, "fine") == Check("x", "fail", "broken; small; old", "Do b. Do a.")
    assert judge("x", [], "fine") == Check("x", "pass", "fine")


def test_json_is_one_object_with_ranks_checks_and_ok() -> None:
    text = as_json([PASS, WARN, devices(2)], 2)
    assert "\n" not in text
    said = json.loads(text)
    assert (said["ranks"], said["ok"]) == (2, True)
    assert said["checks"][0] == {"name": "versions", "status": "pass", "message": "torch 2.13.0", "advice": None}
    assert said["checks"][2]["rows"][1]["uuid"] == "GPU-1"
    assert json.loads(as_json([PASS, FAIL], 2))["ok"] is False


def test_lines_are_aligned_and_advice_stands_below() -> None:
    lines = as_lines([PASS, FAIL]).splitlines()
    assert lines[0] == "pass  versions        torch 2.13.0"
    assert lines[1] == "fail  shared-devices  rank 0 and rank 1 share one"
    assert lines[2].strip() == "-> Give each its own."
    assert lines[-1] == "1 failed, 0 with a warning, of 2 checks"
    assert as_lines([PASS]).endswith("all 1 checks pass")


def test_a_message_of_several_lines_or_with_control_characters_stays_one_plain_line() -> None:
    lines = as_lines([Check("devices", "fail", "first\nsecond\x1b[31m")]).splitlines()
    assert lines[0] == "fail  devices  first second\\x1b[31m"


def test_devices_get_a_table_of_their_own() -> None:
    text = as_lines([devices(2)])
    assert "rank  host  local rank  device  name  memory    uuid" in text
    assert "1     h     1           cuda:1  H100  80.0 GiB  GPU-1" in text


def test_a_table_of_very_many_devices_is_cut() -> None:
    text = as_lines([devices(MAX_TABLE_ROWS + 960)])
    assert "960 more" in text
    assert len(text.splitlines()) < MAX_TABLE_ROWS + 10


def test_a_terminal_gets_a_coloured_table_and_markup_in_messages_is_text() -> None:
    text = as_table([WARN, Check("variables", "fail", "[red]NCCL_ALGO[/red]")], width=100)
    assert "\x1b[" in text
    assert "[red]NCCL_ALGO[/red]" in text
    assert "-> Set OMP_NUM_THREADS=8." in text
