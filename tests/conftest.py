"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference tensors and clips beside the checkout; the test skips where there is none."""
    directory = Path(os.environ.get("RANKWISE_SHARED", Path(__file__).parents[2] / "shared"))
    if not directory.is_dir():
        pytest.skip(f"no folder of reference data at {directory} (set RANKWISE_SHARED)")
    return directory
