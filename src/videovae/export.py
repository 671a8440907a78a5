"""A trained model as a folder that others can load."""

from pathlib import Path

from videovae.reconstruct import Weights, load_model


def export(run: Path, directory: Path, weights: Weights = "ema") -> Path:
    """Write the model of a run folder or checkpoint in the layout of diffusers.

    Args:
        directory: new or empty.
    Returns:
        The checkpoint that was exported.
    Raises:
        ConfigError, WeightsError, CheckpointError: there is no whole checkpoint, or `directory` holds something.
    """
    model, source = load_model(run, weights)
    model.save_pretrained(directory)
    return source
