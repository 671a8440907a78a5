"""What videovae raises. Every class is a `rankwise.RankwiseError`, so one `except` at the door catches them all.

RankwiseError
  VideoVAEError
    ConfigError   (also a ValueError)  settings that contradict each other, or a resume with other ones
    DataError                          no usable video where some was promised
    WeightsError                       weights or a model folder that is missing, broken or of another model
    RunDirError                        the run folder cannot be written
    DivergedError                      the losses are no numbers any more
"""

from rankwise.errors import RankwiseError


class VideoVAEError(RankwiseError):
    """Root of everything that videovae raises on purpose."""


class ConfigError(VideoVAEError, ValueError):
    """Settings that contradict each other or what a run directory already holds."""


class DataError(VideoVAEError):
    """No usable video where some was promised."""


class WeightsError(VideoVAEError):
    """Weights or a model folder that is missing, broken, or belongs to another model."""


class RunDirError(VideoVAEError):
    """The run folder cannot be written: a full disk, or one that is read-only."""


class DivergedError(VideoVAEError):
    """The losses are no numbers any more, and nothing that follows would be worth a checkpoint."""
