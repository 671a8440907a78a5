"""The videos of a run: which there are, and which are held out, the same on every rank."""

import rankwise
from rankwise.logs import FILE_ONLY
from videovae.config import TrainConfig
from videovae.data.index import VideoEntry, VideoIndex, build_index, check_failures, split, usable
from videovae.data.synthetic import make_clips

NUM_NAMED = 5

logger = rankwise.get_logger(__name__)


def open_videos(config: TrainConfig) -> tuple[list[VideoEntry], list[VideoEntry]]:
    """Videos to train on and videos to evaluate on; the main process alone looks at the folder.

    Without `config.data` the main process makes clips of moving textures first. Videos that cannot be used are named
    in the log.

    Raises:
        DataError: there is no folder, no video in it, or more of them fail than `clips.max_failed_fraction` admits.
    Ranks: every rank must call.
    """
    return rankwise.on_main_process(_open_videos, config)


def _open_videos(config: TrainConfig) -> tuple[list[VideoEntry], list[VideoEntry]]:
    index = _build_index(config)
    num_spanned = config.clips.num_spanned_frames
    videos, skipped = usable(index, num_spanned)
    check_failures(skipped, len(index.entries), config.clips.max_failed_fraction)
    for name, reason in skipped:
        logger.info(f"skipped {name}: {reason}", extra=FILE_ONLY)
    if skipped:
        named = "; ".join(f"{name}: {reason}" for name, reason in skipped[:NUM_NAMED])
        more = f"; and {len(skipped) - NUM_NAMED} more" if len(skipped) > NUM_NAMED else ""
        logger.warning(f"skipped {len(skipped)} of {len(index.entries)} videos ({named}{more})")
    return split(videos, config.clips.num_heldout_clips, min_frames=num_spanned)


def _build_index(config: TrainConfig) -> VideoIndex:
    folder = config.data
    if folder is None:
        folder = config.run_dir / "clips"
        make_clips(folder)
    return build_index(folder, config.run_dir / "index.json")
