"""Logs are set up once, whole, and taken away whole."""

import json
import logging
from pathlib import Path

import pytest

from rankwise import RankwiseError, logs
from rankwise.identity import Identity

IDENTITY = Identity(0, 0, 0, 1, 1, 1, hostname="node-a")


def test_second_set_up_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    handle = logs.configure(IDENTITY, tmp_path / "one")
    handlers = list(logging.getLogger().handlers)
    with pytest.raises(RankwiseError, match=r"set up already in this process \(to .*rank-00000.jsonl\).*Close the"):
        logs.configure(IDENTITY, tmp_path / "two")
    assert logging.getLogger().handlers == handlers
    assert not (tmp_path / "two").exists()
    logging.getLogger("a").info("once")
    handle.close()
    lines = (tmp_path / "one/logs/rank-00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["message"] for line in lines] == ["once"]


def test_after_close_logs_can_be_set_up_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        handle = logs.configure(IDENTITY, tmp_path / name)
        logging.getLogger("a").info(name)
        handle.close()
        (line,) = (tmp_path / name / "logs/rank-00000.jsonl").read_text().splitlines()
        assert json.loads(line)["message"] == name


def test_set_up_that_failed_does_not_stand_in_the_way_of_the_next(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        logs.configure(IDENTITY, tmp_path / "file")
    logs.configure(IDENTITY, tmp_path / "folder").close()
