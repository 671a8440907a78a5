"""Checkpoints that appear only when whole: `CheckpointManager` and `PerRank`."""

from rankwise.checkpoint.manager import CheckpointManager
from rankwise.checkpoint.state import PerRank

__all__ = ["CheckpointManager", "PerRank"]
