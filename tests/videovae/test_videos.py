"""Every rank gets the same videos, however long the main process looks at the folder."""

import dataclasses
import logging
import shutil
import time
from pathlib import Path

import pytest

import rankwise
from rankwise import waiting
from rankwise.testing import on_ranks
from videovae import videos as module
from videovae.config import TrainConfig
from videovae.data import index_builder
from videovae.data.index import heldout_ranges
from videovae.data.video import VideoInfo, probe
from videovae.errors import DataError
from videovae.videos import open_videos

TIMEOUT_SECONDS = 2.0


def opened(config: TrainConfig, heldout: list[tuple[str, int, int]] | None = None) -> module.Videos:
    with rankwise.init() as session:
        videos = open_videos(config, session, heldout)
    assert videos is not None
    return videos


def look_slowly(path: Path) -> VideoInfo:
    """One of five videos takes longer than the ranks wait for each other."""
    if path.name == "clip-00001.mp4":
        time.sleep(1.5 * TIMEOUT_SECONDS)
    return probe(path)


@on_ranks(2)
def test_a_folder_may_take_longer_than_the_ranks_wait_for_each_other(tiny: TrainConfig) -> None:
    index_builder.probe = look_slowly
    config = dataclasses.replace(tiny, timeout_seconds=TIMEOUT_SECONDS)
    with rankwise.init() as session:
        waiting.link()._timeout_seconds = TIMEOUT_SECONDS
        videos = open_videos(config, session)
        assert videos is not None
        assert [len(part) for part in videos] == [4, 1]
        everybody = rankwise.gather_objects(videos)
        assert everybody[0] == everybody[1]


@on_ranks(2)
def test_an_unusable_folder_is_an_error_on_every_rank(tiny: TrainConfig, tmp_path: Path) -> None:
    with rankwise.init() as session, pytest.raises(DataError, match="nowhere does not exist") as caught:
        open_videos(dataclasses.replace(tiny, data=tmp_path / "nowhere"), session)
    assert caught.value.on_every_rank


@on_ranks(2)
def test_a_stop_of_any_rank_ends_the_search(tiny: TrainConfig) -> None:
    module.SLICE_SECONDS = 0.0
    with rankwise.init() as session:
        if session.identity.rank == 1:
            session.request_stop()
        assert open_videos(tiny, session) is None


def test_without_a_folder_clips_are_made(tiny: TrainConfig) -> None:
    train, heldout = opened(dataclasses.replace(tiny, data=None))
    assert len(train) + len(heldout) == 8
    assert {entry.path.parent for entry in train + heldout} == {tiny.run_dir.absolute() / "clips"}


def test_what_was_held_out_stays_so_when_videos_are_added(tiny: TrainConfig, clips_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "growing"
    shutil.copytree(clips_dir, folder)
    config = dataclasses.replace(tiny, data=folder)
    ranges = heldout_ranges(opened(config)[1])
    for number in range(8):
        shutil.copy(folder / "clip-00000.mp4", folder / f"more-{number}.mp4")
    train, heldout = opened(config, ranges)
    assert heldout_ranges(heldout) == ranges
    assert len(train) == 12
    assert len(opened(config)[1]) == 3


def test_each_unusable_video_stands_in_the_log_once(
    tiny: TrainConfig, clips_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(clips_dir, folder)
    clips = dataclasses.replace(tiny.clips, max_failed_fraction=0.9)
    for number in range(7):
        (folder / f"bad-{number}.mp4").write_bytes(b"no video")
    with caplog.at_level(logging.INFO):
        opened(dataclasses.replace(tiny, data=folder, clips=clips))
    for number in range(7):
        assert sum(f"bad-{number}.mp4" in record.getMessage() for record in caplog.records) == 1
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("skipped 7 of 12 videos (bad-0.mp4: it cannot be decoded")
    assert warnings[0].endswith("and 2 more)")
    quiet = [record for record in caplog.records if getattr(record, "rankwise_file_only", False)]
    assert [record.getMessage().split(":")[0] for record in quiet] == ["skipped bad-5.mp4", "skipped bad-6.mp4"]
