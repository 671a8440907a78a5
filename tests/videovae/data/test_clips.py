import dataclasses
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from videovae.data.clips import MAX_TRIES, ClipDataset, ClipsConfig, heldout_clips
from videovae.data.index import VideoEntry
from videovae.data.index_builder import build_index
from videovae.data.video import VideoInfo, read_clip
from videovae.errors import ConfigError, DataError

MakeVideo = Callable[..., Path]
SMALL = ClipsConfig(num_frames=5, height=24, width=24)


@pytest.fixture
def videos(make_video: MakeVideo, tmp_path: Path) -> list[VideoEntry]:
    for name in "abcd":
        make_video(f"data/{name}.mp4", num_frames=12)
    return list(build_index(tmp_path / "data", tmp_path / "videos.json").entries)


def unreal(num_videos: int, num_frames: int) -> list[VideoEntry]:
    """Videos to draw from that need no file."""
    info = VideoInfo(num_frames, 64, 48, 8.0, 0, num_frames - 1)
    return [
        VideoEntry(f"{i}.mp4", Path(f"/nowhere/{i}.mp4"), 1, 1, info, stop_frame=num_frames) for i in range(num_videos)
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 16}, "num_frames is 16, .* give 13 or 17"),
        ({"num_frames": 0}, "num_frames is 0; give 1 or more"),
        ({"height": 60}, "height is 60, and is divided by 8: give 56 or 64"),
        ({"width": 4}, "width is 4, and is divided by 8: give 8"),
        ({"frame_stride": 0}, "frame_stride is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"clips_per_video": -1}, "clips_per_video is -1"),
        ({"num_workers": -1}, "num_workers is -1; give 0 or more"),
        ({"num_heldout_clips": -1}, "num_heldout_clips is -1"),
        ({"max_failed_fraction": 1.5}, "max_failed_fraction is 1.5"),
    ],
)
def test_config_refuses_what_contradicts_itself(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClipsConfig(**settings)  # type: ignore[arg-type]


def test_clip_has_the_size_of_the_config(videos: list[VideoEntry]) -> None:
    clip = ClipDataset(videos, SMALL, seed=0)[0, 2]
    assert (clip.pixels.shape, clip.pixels.dtype, clip.failures) == ((3, 5, 24, 24), np.uint8, ())
    assert clip.spec.video == videos[2]


def test_clip_depends_on_seed_epoch_and_index_alone(videos: list[VideoEntry]) -> None:
    keys = [(epoch, index) for epoch in range(2) for index in range(4)]
    forwards = {key: ClipDataset(videos, SMALL, seed=3)[key] for key in keys}
    dataset = ClipDataset(videos, SMALL, seed=3)
    for key in reversed(keys):
        clip = dataset[key]
        assert clip.spec == forwards[key].spec
        np.testing.assert_array_equal(clip.pixels, forwards[key].pixels)


def test_seed_and_epoch_and_index_each_change_the_draw() -> None:
    videos = unreal(2, 1000)
    config = dataclasses.replace(SMALL, clips_per_video=2)
    base = next(ClipDataset(videos, config, seed=0).draw(0, 0))
    others = [
        next(ClipDataset(videos, config, seed=1).draw(0, 0)),
        next(ClipDataset(videos, config, seed=0).draw(1, 0)),
        next(ClipDataset(videos, config, seed=0).draw(0, 2)),
    ]
    assert all(other.video == base.video and other.start_frame != base.start_frame for other in others)


def test_every_start_is_drawn_equally_often_the_last_too() -> None:
    dataset = ClipDataset(unreal(1, 12), dataclasses.replace(SMALL, frame_stride=2), seed=0)
    starts = Counter(next(dataset.draw(epoch, 0)).start_frame for epoch in range(2000))
    assert sorted(starts) == [0, 1, 2, 3]
    assert all(400 < count < 600 for count in starts.values())


def test_half_of_the_clips_are_mirrored_and_crops_cover_the_range() -> None:
    dataset = ClipDataset(unreal(1, 12), SMALL, seed=0)
    specs = [next(dataset.draw(epoch, 0)) for epoch in range(500)]
    assert 200 < sum(spec.is_flipped for spec in specs) < 300
    assert min(spec.crop_x for spec in specs) < 0.05
    assert max(spec.crop_y for spec in specs) > 0.95
    still = ClipDataset(unreal(1, 12), dataclasses.replace(SMALL, random_crop=False, random_flip=False), seed=0)
    assert {(s.crop_y, s.crop_x, s.is_flipped) for s in (next(still.draw(e, 0)) for e in range(9))} == {
        (0.5, 0.5, False)
    }


def test_a_mirrored_clip_is_the_clip_read_backwards(videos: list[VideoEntry]) -> None:
    dataset = ClipDataset(videos, SMALL, seed=0)
    clip = next(clip for clip in (dataset[epoch, 0] for epoch in range(50)) if clip.spec.is_flipped)
    spec = clip.spec
    plain = read_clip(spec.video.path, spec.start_frame, 5, height=24, width=24, crop_y=spec.crop_y, crop_x=spec.crop_x)
    np.testing.assert_array_equal(clip.pixels, plain[..., ::-1])


def test_clips_stay_within_the_frames_that_training_may_use() -> None:
    videos = [dataclasses.replace(unreal(1, 100)[0], start_frame=40, stop_frame=47)]
    dataset = ClipDataset(videos, SMALL, seed=0)
    assert {next(dataset.draw(epoch, 0)).start_frame for epoch in range(60)} == {40, 41, 42}


def test_an_epoch_has_clips_per_video_of_each_video() -> None:
    dataset = ClipDataset(unreal(3, 12), dataclasses.replace(SMALL, clips_per_video=4), seed=0)
    names = Counter(next(dataset.draw(0, index)).video.name for index in range(len(dataset)))
    assert names == {"0.mp4": 4, "1.mp4": 4, "2.mp4": 4}


def test_a_video_that_fails_is_replaced_and_named(videos: list[VideoEntry]) -> None:
    for video in videos[1:3]:
        video.path.unlink()
    clips = [ClipDataset(videos, SMALL, seed=0)[epoch, 1] for epoch in range(8)]
    assert clips[0].spec == ClipDataset(videos, SMALL, seed=0)[0, 1].spec
    assert {clip.spec.video.name for clip in clips} == {"a.mp4", "d.mp4"}
    assert {clip.failures[0][0] for clip in clips} == {"b.mp4"}
    assert {name for clip in clips for name, _ in clip.failures} == {"b.mp4", "c.mp4"}
    reason = "it cannot be decoded (No such file or directory). Replace or remove the file."
    assert {reason for clip in clips for _, reason in clip.failures} == {reason}


def test_neighbours_that_fail_together_cost_no_clip_and_no_video_stands_in_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = {f"{number}.mp4" for number in range(40, 110)}

    def read(path: Path, *arguments: object, **settings: object) -> np.ndarray:
        if path.name in bad:
            raise DataError(f"{path}: it is empty")
        return np.zeros((3, 5, 24, 24), np.uint8)

    monkeypatch.setattr("videovae.data.clips.read_clip", read)
    dataset = ClipDataset(unreal(160, 12), SMALL, seed=0)
    clips = [dataset[0, index] for index in range(160)]
    assert {name for clip in clips for name, _ in clip.failures} == bad
    stand_ins = Counter(clip.spec.video.name for clip in clips if clip.failures)
    assert stand_ins.total() == 70
    assert stand_ins.most_common(1)[0][1] <= 5


def test_no_video_is_tried_twice_for_a_clip_and_tries_end() -> None:
    for num_videos in (1, 3, 1000):
        dataset = ClipDataset(unreal(num_videos, 12), SMALL, seed=0)
        for epoch in range(20):
            names = [spec.video.name for spec in dataset.draw(epoch, 0)]
            assert names[0] == "0.mp4"
            assert len(names) == len(set(names)) == min(num_videos, MAX_TRIES)


def test_where_all_videos_fail_the_error_names_some() -> None:
    with pytest.raises(DataError, match=r"all of 3 videos that were tried failed \(1\.mp4: .*No such file"):
        ClipDataset(unreal(3, 12), SMALL, seed=0)[0, 1]


def test_no_video_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="no video to train on"):
        ClipDataset([], SMALL, seed=0)


def test_heldout_clips_are_fixed_central_and_spread_over_the_videos(videos: list[VideoEntry]) -> None:
    config = dataclasses.replace(SMALL, num_heldout_clips=6)
    clips = heldout_clips(videos[:2], config)
    assert clips == heldout_clips(videos[:2], config)
    specs = [clip.specs[0] for clip in clips]
    assert [spec.video.name for spec in specs] == ["a.mp4", "b.mp4"] * 3
    assert {(spec.crop_y, spec.crop_x, spec.is_flipped) for spec in specs} == {(0.5, 0.5, False)}
    assert len({spec.start_frame for spec in specs}) > 1
    pixels = clips[0].read()
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 5, 24, 24))
    assert torch.equal(pixels, clips[0].read())


def test_a_heldout_video_that_fails_is_replaced_and_logged(
    videos: list[VideoEntry], caplog: pytest.LogCaptureFixture
) -> None:
    videos[0].path.unlink()
    clips = heldout_clips(videos[:2], SMALL)
    with caplog.at_level(logging.WARNING):
        assert clips[0].read().shape == (3, 5, 24, 24)
    assert "held-out video a.mp4 is replaced: it cannot be decoded" in caplog.text


def test_one_bad_heldout_video_of_five_is_replaced_by_any_other() -> None:
    config = dataclasses.replace(SMALL, num_heldout_clips=40)
    clips = heldout_clips(unreal(5, 200), config)
    assert all(len({spec.video.name for spec in clip.specs}) == 5 for clip in clips)
    stand_ins = Counter(clip.specs[1].video.name for clip in clips if clip.specs[0].video.name == "2.mp4")
    assert stand_ins.total() == 8
    assert len(stand_ins) >= 2
    with pytest.raises(DataError, match="all of 5 videos that were tried failed"):
        clips[0].read()


def test_without_heldout_videos_there_are_no_heldout_clips() -> None:
    assert heldout_clips([], SMALL) == []
