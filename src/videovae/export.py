"""A trained model as a folder that others can load."""

from pathlib import Path

from videovae.errors import WeightsError
from videovae.reconstruct import Weights, is_exported, load_model


def export(run: Path, directory: Path, weights: Weights = "ema") -> Path:
    """Write the model of a run folder or checkpoint in the layout of diffusers.

    Args:
        directory: new or empty.
    Returns:
        The checkpoint that was exported.
    Raises:
        ConfigError, WeightsError, CheckpointError: there is no whole checkpoint, or `directory` holds something.
    """
    if is_exported(run):
        raise WeightsError(f"{run} is an exported folder already. Give a run folder or one of its checkpoints.")
    model, source = load_model(run, weights)
    model.save_pretrained(directory)
    return source
