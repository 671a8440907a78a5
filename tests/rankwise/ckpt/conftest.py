"""Checkpoints as training leaves them, and what people do to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise import CheckpointManager, PerRank


class RunMaker:
    """Saves into one run directory, in which nobody holds the lease afterwards."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.folder = run / "checkpoints"
        run.mkdir()

    def save(self, step: int, /, **state: Any) -> Path:
        """Save a step; without a state one with a module, its optimizer, values, and an item of single ranks."""
        with CheckpointManager(self.folder, config={"lr": 0.1}) as manager:
            manager.save(step, state or make_state(step))
            return manager.path(step)

    def names(self) -> list[str]:
        """What lies in the folder, but for lease files."""
        return sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("lease-"))


def make_state(step: int) -> dict[str, Any]:
    """A small training state, the same for the same step."""
    torch.manual_seed(step)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "step": step,
        "place": PerRank({"clip": step, "draw": torch.ones(2)}),
    }


def flip_byte(path: Path, position: int) -> None:
    """Change one byte of a file, and nothing of its size."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


@pytest.fixture
def run(tmp_path: Path) -> RunMaker:
    """An empty run directory and what fills it."""
    return RunMaker(tmp_path / "run")


@pytest.fixture
def flip() -> Any:
    """Changes one byte of a file."""
    return flip_byte
