import os
import subprocess
import sys
from pathlib import Path

import pytest

import rankwise
from rankwise import monitor
from rankwise.monitor import current
from rankwise.monitor.monitor import Monitor


def test_without_a_monitor_everything_does_nothing() -> None:
    with monitor.phase("data"):
        monitor.step()
    monitor.watch(object())
    monitor.log(1, {"loss": 1.0})
    assert current.get_open() is None


def test_importing_it_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom rankwise import monitor\nwith monitor.phase('data'):\n    monitor.step()\n"
        "print('torch' in sys.modules)"
    )
    environ = os.environ | {"PYTHONPATH": str(Path(rankwise.__file__).parents[1])}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)
    assert said.stdout.strip() == "False"


def test_the_functions_act_on_the_open_monitor() -> None:
    @monitor.phase("forward")
    def forward(x: int) -> int:
        assert opened.position().phase == "forward"
        return x + 1

    with rankwise.init() as session, Monitor(session) as opened:
        assert current.get_open() is opened
        with monitor.phase("data"):
            assert opened.position().phase == "data"
        assert forward(1) == 2
        monitor.step()
        monitor.step(7)
        assert opened.position().step == 7
        assert forward.__name__ == "forward"
    assert current.get_open() is None
    with pytest.raises(AssertionError):
        forward(1)  # it is closed, so the phase is none


def test_an_error_passes_through_a_phase_and_ends_it() -> None:
    with rankwise.init() as session, Monitor(session) as opened:
        with pytest.raises(KeyError), monitor.phase("data"):
            raise KeyError("x")
        assert opened.position().phase is None


def test_a_forked_process_has_no_monitor() -> None:
    with rankwise.init() as session, Monitor(session):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writer, b"open" if current.get_open() is not None else b"none")
            os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(reader, 8) == b"none"
        os.close(reader)
        os.close(writer)
        assert current.get_open() is not None


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Monitro'"):
        monitor.Monitro  # noqa: B018
