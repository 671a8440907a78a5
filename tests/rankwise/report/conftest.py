"""A simulated run, its report, and a browser to open it in."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from rankwise.report import make_report
from rankwise.simulation import make_run

# A machine with other work on it is slow now and then.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 ranks on two nodes, 400 steps, with a slow rank, a hot device, a hang and a restart."""
    folder = tmp_path_factory.mktemp("runs") / "simulated"
    make_run(folder, 16, 400, seed=3)
    return folder


@pytest.fixture(scope="session")
def report(run_dir: Path) -> Path:
    """The report on that run."""
    path = run_dir.parent / "simulated.html"
    path.write_text(make_report(run_dir))
    return path


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium; the test skips where there is none."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None or importlib.util.find_spec("playwright") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("needs Chromium and playwright")
        pytest.skip("needs a Chromium on PATH and playwright (install rankwise[test])")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield started
        started.close()
