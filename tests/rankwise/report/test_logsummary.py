"""Warnings of a whole run, equal ones as one."""

import json
from pathlib import Path
from typing import Any

from rankwise.report.logsummary import as_row, ranks_text, shortened, summarise_logs


def record(rank: int, second: int, message: str, level: str = "WARNING", **more: Any) -> str:
    return json.dumps(
        {
            "time": f"2026-05-01T12:00:{second:02d}.000000+00:00",
            "monotonic_ns": second,
            "level": level,
            "logger": "train",
            "message": message,
            "rank": rank,
            **more,
        }
    )


def write(run_dir: Path, rank: int, *lines: str) -> None:
    (run_dir / "logs").mkdir(exist_ok=True)
    (run_dir / "logs" / f"rank-{rank:05d}.jsonl").write_text("".join(line + "\n" for line in lines))


def test_messages_that_differ_in_numbers_are_one_over_ranks_and_the_whole_run(tmp_path: Path) -> None:
    write(tmp_path, 0, record(0, 1, "clip 7 is short", step=3), record(0, 40, "clip 8 is short", step=9))
    write(tmp_path, 2, record(2, 20, "clip 9 is short"), record(2, 21, "all is well", "INFO"))
    found = summarise_logs(tmp_path)
    assert found is not None
    assert found.levels == {"WARNING": 3, "INFO": 1}
    (said,) = found.said
    row = as_row(said)
    assert (row["count"], row["ranks"], row["step"], row["differs"]) == (3, "0, 2", 3, True)
    assert (row["message"], row["first"], row["last"]) == (
        "clip 7 is short",
        "2026-05-01 12:00:01",
        "2026-05-01 12:00:40",
    )


def test_the_most_serious_comes_first_then_the_most_frequent(tmp_path: Path) -> None:
    error = {"type": "ValueError", "message": "no", "traceback": "Traceback ..."}
    lines = [
        record(0, 1, "rare"),
        record(0, 2, "often"),
        record(0, 30, "often"),
        record(0, 3, "end", "ERROR", exception=error),
    ]
    write(tmp_path, 0, *lines)
    found = summarise_logs(tmp_path)
    assert found is not None
    rows = [as_row(said) for said in found.said]
    assert [row["message"].split("\n")[0] for row in rows] == ["end", "often", "rare"]
    assert rows[0]["traceback"] == "Traceback ..."


def test_lines_that_are_no_records_are_counted(tmp_path: Path) -> None:
    write(tmp_path, 0, record(0, 1, "a"), "half a li")
    found = summarise_logs(tmp_path)
    assert found is not None
    assert found.num_foreign == 1


def test_a_run_without_logs_has_no_summary(tmp_path: Path) -> None:
    assert summarise_logs(tmp_path) is None


def test_a_long_list_of_ranks_is_cut_and_counted() -> None:
    assert ranks_text(0b1011) == "0-1, 3"
    text = ranks_text(sum(1 << rank for rank in range(0, 200, 2)))
    assert text.startswith("100 ranks: 0, 2, 4")
    assert text.endswith(", ...")
    assert len(text) < 90


def test_long_texts_are_cut_and_half_characters_replaced() -> None:
    assert shortened("abcdef", 4) == "abcd ... (2 more characters)"
    assert shortened("\ud800", 4) == "?"
