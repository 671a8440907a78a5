"""A script that `rankwise run` starts sees what it would see under python itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

OURS, PYTHONS = ["-m", "rankwise.as_rank"], []

PROGRAM = """
import json, multiprocessing, os, pickle, sys

class Thing:
    pass

def double(x):
    return 2 * x

if __name__ == "__main__":
    import __main__
    print(json.dumps({
        "argv": sys.argv, "path": sys.path[0], "file": __file__, "main": __main__.__file__, "name": __name__,
        "pickled": type(pickle.loads(pickle.dumps(Thing()))) is Thing,
        "spawned": multiprocessing.get_context("spawn").Pool(1).map(double, [3]),
        "annotations": __builtins__ is not None,
    }))
"""


def run(*command: str, cwd: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=60, cwd=cwd, env=os.environ | environ
    )


def test_script_sees_what_python_would_show_it(tmp_path: Path) -> None:
    script = tmp_path / "folder" / "script.py"
    script.parent.mkdir()
    script.write_text(PROGRAM)
    for arguments in (["folder/script.py", "-m", "x"], [str(script)]):
        ours, pythons = (
            json.loads(run(*how, *arguments, cwd=tmp_path).stdout) for how in (["-m", "rankwise.as_rank"], [])
        )
        assert ours == pythons
        assert ours["spawned"] == [6]


def test_module_sees_what_python_would_show_it(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "module.py").write_text(PROGRAM)
    arguments = ["-m", "package.module", "--flag"]
    ours, pythons = (json.loads(run(*how, *arguments, cwd=tmp_path).stdout) for how in (OURS, PYTHONS))
    assert ours == pythons


def test_script_that_cannot_be_read_is_one_line_and_status_two(tmp_path: Path) -> None:
    done = run("-m", "rankwise.as_rank", "nothing.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: cannot read nothing.py: No such file")
    assert done.stderr.count("\n") == 1


def test_traceback_shows_the_script_alone(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("def fall():\n    raise ValueError('down')\n\nfall()\n")
    done = run("-m", "rankwise.as_rank", "script.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: down\n")
    assert "as_rank.py" not in done.stderr
    assert "runpy" not in done.stderr


def test_rank_that_is_told_to_bind_keeps_to_its_share_of_the_cores(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import os; print(sorted(os.sched_getaffinity(0)))")
    cores = sorted(os.sched_getaffinity(0))
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANKWISE_BIND": "1"}
    done = run("-m", "rankwise.as_rank", "script.py", cwd=tmp_path, **place)
    bound = json.loads(done.stdout)
    assert len(bound) == max(1, len(cores) // 2)
    assert set(bound) <= set(cores)
