"""The videos of a run: which there are, and which are held out, the same on every rank."""

from collections.abc import Generator, Sequence
from contextlib import closing

import rankwise
from rankwise.logs import FILE_ONLY
from videovae.config import TrainConfig
from videovae.data.index import HeldoutRange, VideoEntry, VideoIndex, check_failures, split, usable
from videovae.data.index_builder import IndexBuilder
from videovae.data.synthetic import make_clips
from videovae.errors import DataError

NUM_NAMED = 5
SLICE_SECONDS = 5.0

logger = rankwise.get_logger(__name__)

Videos = tuple[list[VideoEntry], list[VideoEntry]]
"""Those to train on, and those to evaluate on."""


def open_videos(
    config: TrainConfig, session: rankwise.Session, heldout: Sequence[HeldoutRange] | None = None
) -> Videos | None:
    """Videos to train on and videos to evaluate on; the main process alone looks at the folder.

    Without `config.data` the main process makes clips of moving textures first. Videos that cannot be used are named
    in the log. However large the folder is, the ranks hear of each other every few seconds.

    Args:
        heldout: what this run held out before, of its checkpoint; stays held out.
    Returns:
        None where a rank was asked to stop before the folder was known; most of what is known by then is kept for the
        next start.
    Raises:
        DataError: there is no folder, no video in it, or more of them fail than `clips.max_failed_fraction` admits.
    Ranks: every rank must call.
    """
    with closing(_slices(config, heldout)) as slices:  # runs on the main process only
        while (videos := rankwise.on_main_process(slices.__next__)) is None:
            if session.agree_to_stop():
                return None
        return videos


def _slices(config: TrainConfig, heldout: Sequence[HeldoutRange] | None) -> Generator[Videos | None, None, None]:
    """None after each slice of the work, and at last the videos."""
    folder = config.data
    if folder is None:
        folder = config.run_dir / "clips"
        make_clips(folder)
    # The others wait for one slice at a time, which must be shorter than their patience.
    seconds = min(SLICE_SECONDS, config.timeout_seconds / 4)
    with IndexBuilder(folder, config.run_dir / "index.json") as builder:
        while not builder.step(seconds):
            yield None
        index = builder.index
    yield _choose(index, config, heldout)


def _choose(index: VideoIndex, config: TrainConfig, heldout: Sequence[HeldoutRange] | None) -> Videos:
    num_spanned = config.clips.num_spanned_frames
    videos, skipped = usable(index, num_spanned)
    check_failures(skipped, len(index.entries), config.clips.max_failed_fraction)
    if skipped:
        named = "; ".join(f"{name}: {reason}" for name, reason in skipped[:NUM_NAMED])
        more = f"; and {len(skipped) - NUM_NAMED} more" if len(skipped) > NUM_NAMED else ""
        logger.warning(f"skipped {len(skipped)} of {len(index.entries)} videos ({named}{more})")
    for name, reason in skipped[NUM_NAMED:]:
        logger.info(f"skipped {name}: {reason}", extra=FILE_ONLY)
    train, kept_out = split(videos, config.clips.num_heldout_clips, min_frames=num_spanned, previous=heldout)
    if not train:
        raise DataError(
            "every video that can be used is held out; there is none to train on. Add videos to the folder."
        )
    return train, kept_out
