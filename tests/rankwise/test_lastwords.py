"""The first failure of a job is printed once, by whoever a person reads last."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from rankwise import lastwords
from rankwise.errors import RankFailure

FAILURE = RankFailure(
    3, "gpu-7", "ValueError", "boom", "Traceback (most recent call last):\nValueError: boom\n", "cuda:1", 9
)


def end_of_process(code: str) -> str:
    program = f"import sys\nfrom rankwise import lastwords\n{code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60).stderr


def test_failure_in_words_names_rank_host_device_and_traceback() -> None:
    assert lastwords.in_words(FAILURE) == (
        "rankwise: rank 3 (gpu-7, cuda:1, pid 9) failed first:\nTraceback (most recent call last):\nValueError: boom\n"
    )
    assert (
        lastwords.in_words(RankFailure(0, "a", "RankLost", "gone"))
        == "rankwise: rank 0 (a) failed first:\nRankLost: gone"
    )


@pytest.mark.parametrize(("words", "printed"), [("these words", "these words\n"), ("", "")])
def test_last_words_stand_in_place_of_the_traceback(words: str, printed: str) -> None:
    code = f"error = ValueError(1)\nlastwords.set_last_words(error, {words!r})\nraise error"
    assert end_of_process(code) == printed


def test_error_without_last_words_is_printed_as_ever_whatever_hooks_came_between() -> None:
    code = """
def wrap(old):
    def hook(*exception):
        sys.stderr.write("wrapped ")
        old(*exception)
    return hook
for _ in range(3):
    lastwords.set_last_words(ValueError(1), "never said")
    sys.excepthook = wrap(sys.excepthook)
raise KeyError("mine")
"""
    printed = end_of_process(code)
    assert printed.count("KeyError: 'mine'") == 1
    assert printed.startswith("wrapped wrapped wrapped Traceback")


def test_first_failure_that_is_left_for_the_launcher_stays_and_the_last_restart_counts(tmp_path: Path) -> None:
    environ = {"RANKWISE_LAST_WORDS": str(tmp_path)}
    second = RankFailure(1, "b", "KeyError", "later")
    assert lastwords.tell_launcher(FAILURE, environ)
    assert lastwords.tell_launcher(second, environ)
    assert lastwords.told_to_launcher(tmp_path) == FAILURE
    restarted = {"TORCHELASTIC_RESTART_COUNT": "10", "TORCHELASTIC_MAX_RESTARTS": "10"}
    assert not lastwords.tell_launcher(second, environ | restarted | {"TORCHELASTIC_RESTART_COUNT": "9"})
    assert lastwords.tell_launcher(second, environ | restarted)
    assert lastwords.told_to_launcher(tmp_path) == second
    assert sorted(os.listdir(tmp_path)) == ["first-0.json", "first-10.json"]


def test_without_the_launcher_nobody_is_told(tmp_path: Path) -> None:
    assert not lastwords.tell_launcher(FAILURE, {})
    assert not lastwords.tell_launcher(FAILURE, {"RANKWISE_LAST_WORDS": str(tmp_path / "gone")})
    assert lastwords.told_to_launcher(tmp_path) is None
    (tmp_path / "first-0.json").write_text("{}")
    assert lastwords.told_to_launcher(tmp_path) is None


def test_torchrun_finds_what_ended_the_rank_without_the_values_of_secrets(tmp_path: Path) -> None:
    path = tmp_path / "error.json"
    secret = "do-not-tell-anybody"
    environ = {"TORCHELASTIC_ERROR_FILE": str(path), "HUB_TOKEN": secret}
    try:
        raise ValueError(f"refused {secret}")
    except ValueError as error:
        lastwords.tell_torchrun(error, environ)
    assert secret not in path.read_text()
    told = ProcessFailure(local_rank=0, pid=9, exitcode=1, error_file=str(path))
    assert told.message["message"] == "ValueError: refused ***"
    assert abs(told.timestamp - time.time()) < 60
    assert "test_lastwords.py" in told.message["extraInfo"]["py_callstack"]


def test_torchrun_is_told_nothing_where_it_did_not_ask_or_cannot_be_told(tmp_path: Path) -> None:
    lastwords.tell_torchrun(ValueError("boom"), {})
    lastwords.tell_torchrun(ValueError("boom"), {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "gone" / "error.json")})
    assert list(tmp_path.iterdir()) == []


def test_last_words_hold_no_secret() -> None:
    code = """
import os
os.environ["HUB_TOKEN"] = "do-not-tell-anybody"
lastwords.print_words("first: do-not-tell-anybody")
error = ValueError(1)
lastwords.set_last_words(error, "then: do-not-tell-anybody")
raise error
"""
    assert end_of_process(code) == "first: ***\nthen: ***\n"
