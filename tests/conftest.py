"""Fixtures that every test may use, and the check of every tensor's axes while tests run."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Before torch is imported: two processes that each take every core are many times slower than one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Every connection of torch's store asks the name service for a name, and waits 5 s where it does not answer.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

# Modules that hold settings are left out: a value of the wrong type has to meet their own message.
install_import_hook(
    [
        "videovae.data.video",
        "videovae.evaluate",
        "videovae.losses.adversarial",
        "videovae.losses.perceptual",
        "videovae.losses.reconstruction",
        "videovae.models.blocks",
        "videovae.models.causal_conv",
        "videovae.models.posterior",
        "videovae.models.wavelet",
        "videovae.models.wfvae",
        "videovae.quality",
        "videovae.reconstruct",
        "videovae.steps",
        "videovae.train",
    ],
    # An int is a float, as in any signature.
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference tensors and clips beside the checkout; the test skips where there is none."""
    directory = Path(os.environ.get("RANKWISE_SHARED", Path(__file__).parents[2] / "shared"))
    if not directory.is_dir():
        pytest.skip(f"no folder of reference data at {directory} (set RANKWISE_SHARED)")
    return directory
