"""Metrics are whole lines of numbers, or a warning and no line."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankwise.errors import RankwiseError
from rankwise.monitor.metrics import MetricsFile, append_bytes, append_line, end_last_line, plain_numbers


def rows(run_dir: Path, suffix: str = "") -> list[dict[str, Any]]:
    path = run_dir / "metrics" / f"rank-00000.jsonl{suffix}"
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(run_dir: Path, suffix: str = "") -> list[int]:
    return [row["step"] for row in rows(run_dir, suffix)]


def test_values_are_kept_by_step_and_what_is_no_number_is_null(tmp_path: Path) -> None:
    MetricsFile(tmp_path).write(3, {"nll": 1.5, "broken": float("nan"), "endless": float("inf")})
    (row,) = rows(tmp_path)
    assert (row["step"], row["nll"], row["broken"], row["endless"]) == (3, 1.5, None, None)
    assert row["time"] > 1e9


def test_a_fresh_run_sets_aside_the_lines_of_an_earlier_one(tmp_path: Path) -> None:
    for _ in range(3):
        metrics = MetricsFile(tmp_path, 0)
        metrics.write(10, {"nll": 1.0})
    assert steps(tmp_path) == steps(tmp_path, ".1") == steps(tmp_path, ".2") == [10]


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    MetricsFile(tmp_path, 0).write(10, {"nll": 1.0})
    MetricsFile(tmp_path, 10).write(10, {"nll": 2.0})
    assert [row["nll"] for row in rows(tmp_path)] == [1.0, 2.0]


def test_without_a_first_step_lines_that_are_all_made_again_are_set_aside(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.write(10, {"nll": 1.0})
    metrics.write(20, {"nll": 1.0})
    MetricsFile(tmp_path).write(10, {"nll": 3.0})
    assert steps(tmp_path, ".1") == [10, 20]
    assert [row["nll"] for row in rows(tmp_path)] == [3.0]


def test_without_a_first_step_lines_before_the_first_new_one_stay(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.write(10, {"nll": 1.0})
    metrics.write(20, {"nll": 1.0})
    MetricsFile(tmp_path).write(20, {"nll": 3.0})
    assert steps(tmp_path) == [10, 20, 20]


def test_half_a_line_of_a_killed_run_is_ended_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "rank-00000.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1}\n{"ste')
    MetricsFile(tmp_path).write(2, {"nll": 1.0})
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 2


def test_a_first_line_that_is_no_row_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "rank-00000.jsonl"
    path.parent.mkdir()
    path.write_text('[1]\n{"step": null}\nnonsense\n{"step": 5}\n')
    MetricsFile(tmp_path).write(5, {"nll": 1.0})
    assert steps(tmp_path) == [5]
    assert path.with_name("rank-00000.jsonl.1").read_text().startswith("[1]")


def test_what_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics" / "rank-00000.jsonl").mkdir(parents=True)
    metrics = MetricsFile(tmp_path, 1)
    metrics.write(1, {"nll": 1.0})
    metrics.write(2, {"nll": 1.0})
    assert len([record for record in caplog.records if "no longer complete" in record.getMessage()]) == 1


def test_a_run_folder_that_is_a_file_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("")
    metrics = MetricsFile(tmp_path / "run")
    metrics.write(1, {"nll": 1.0})
    metrics.write(2, {"nll": 1.0})
    assert len(caplog.records) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_on_a_full_disk_lines_stay_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        metrics = MetricsFile(tmp_path)
        for step in range(2000):
            metrics.write(step, {"nll": 1.0})
        kept = steps(tmp_path)
        assert 10 < len(kept) < 2000
        assert kept == sorted(set(kept))
        assert len(caplog.records) == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_tensors_and_numpy_values_become_numbers() -> None:
    given = {"tensor": torch.tensor(1.5), "array": np.float32(2.5), "count": 3, "flag": True}
    assert plain_numbers(given) == {"tensor": 1.5, "array": 2.5, "count": 3, "flag": True}


@pytest.mark.parametrize("value", ["high", None, torch.zeros(2), np.zeros(3), [1.0]])
def test_a_value_that_is_no_number_is_named(value: object) -> None:
    with pytest.raises(RankwiseError, match=r"'nll' is a .* that is no single number"):
        plain_numbers({"nll": value})


@pytest.mark.parametrize("name", ["step", "time"])
def test_names_that_every_line_has_are_refused(name: str) -> None:
    with pytest.raises(RankwiseError, match=f"called '{name}'"):
        plain_numbers({name: 1.0})


def test_append_line_adds_one_line(tmp_path: Path) -> None:
    for word in ("one", "two"):
        append_line(tmp_path / "lines", word)
    assert (tmp_path / "lines").read_text() == "one\ntwo\n"


def test_append_bytes_adds_bytes_as_they_are(tmp_path: Path) -> None:
    append_bytes(tmp_path / "file", b"\x00")
    append_bytes(tmp_path / "file", b"\n\xff")
    assert (tmp_path / "file").read_bytes() == b"\x00\n\xff"


@pytest.mark.parametrize(("before", "after"), [("", ""), ("whole\n", "whole\n"), ("whole\nha", "whole\nha\n")])
def test_end_last_line_ends_half_lines_only(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "lines"
    path.write_text(before)
    end_last_line(path)
    assert path.read_text() == after


def test_end_last_line_makes_no_file(tmp_path: Path) -> None:
    end_last_line(tmp_path / "none")
    assert not (tmp_path / "none").exists()
