"""The server that forks the jobs, chains of jobs in one folder, and the tally that is printed at the end."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "programs"))

from crash_chain import Tally
from crash_jobs import Hatchery

TALLIES = pytest.StashKey[dict[str, Tally]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLIES] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave time for a busy machine: a job is a second of work."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            seconds = 1800 if item.get_closest_marker("slow") else 300
            item.add_marker(pytest.mark.timeout(seconds))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, tally in config.stash[TALLIES].items():
        terminalreporter.section(f"tally of {name}")
        for line in tally.lines():
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def hatchery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hatchery]:
    server = Hatchery(tmp_path_factory.mktemp("hatchery"))
    yield server
    server.close()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """What this test counts; it stands at the end of the output of pytest."""
    return request.config.stash[TALLIES].setdefault(request.node.name, Tally())
