from pathlib import Path

import numpy as np
import pytest

from videovae.data.index import usable
from videovae.data.index_builder import build_index
from videovae.data.synthetic import clip_frames, make_clips
from videovae.data.video import iter_frames, probe
from videovae.errors import DataError

SMALL = {"num_clips": 4, "num_frames": 9, "height": 32, "width": 48}


def test_clips_are_real_videos_of_the_size_asked_for(tmp_path: Path) -> None:
    paths = make_clips(tmp_path / "clips", **SMALL, fps=12)
    assert [path.name for path in paths] == [f"clip-{i:05d}.mp4" for i in range(4)]
    for path in paths:
        info = probe(path)
        assert (info.num_frames, info.height, info.width, info.fps) == (9, 32, 48, 12.0)
    good, skipped = usable(build_index(tmp_path / "clips", tmp_path / "videos.json"), 9)
    assert (len(good), skipped) == (4, [])


def test_equal_arguments_give_equal_files_and_another_seed_others(tmp_path: Path) -> None:
    first, again = (make_clips(tmp_path / name, **SMALL, seed=1) for name in ("a", "b"))
    other = make_clips(tmp_path / "c", **SMALL, seed=2)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("number", range(8))
def test_every_clip_moves_has_detail_and_keeps_its_range(number: int) -> None:
    frames = np.stack(list(clip_frames(number, 17, 64, 64, seed=0))).astype(float)
    assert frames.shape == (17, 64, 64, 3)
    assert frames.std(axis=(1, 2)).max() > 10
    assert np.abs(np.diff(frames, axis=0)).mean() > 0.5
    assert 20 < frames.mean() < 235


def test_the_encoded_clip_is_close_to_what_was_drawn(tmp_path: Path) -> None:
    path = make_clips(tmp_path / "clips", **SMALL)[0]
    drawn = np.stack(list(clip_frames(0, 9, 32, 48, seed=0))).astype(int)
    assert np.abs(np.stack(list(iter_frames(path))) - drawn).mean() < 4


def test_a_folder_of_the_same_clips_is_kept_and_completed(tmp_path: Path) -> None:
    paths = make_clips(tmp_path, **SMALL)
    times = [path.stat().st_mtime_ns for path in paths]
    content = paths[2].read_bytes()
    paths[2].unlink()
    assert make_clips(tmp_path, **SMALL) == paths
    assert [path.stat().st_mtime_ns == time for path, time in zip(paths, times, strict=True)] == [
        True,
        True,
        False,
        True,
    ]
    assert paths[2].read_bytes() == content


def test_a_folder_with_anything_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "clip-00000.mp4").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"mine is not empty: it holds clip-00000\.mp4"):
        make_clips(tmp_path / "mine", **SMALL)
    assert (tmp_path / "mine" / "clip-00000.mp4").read_bytes() == b"precious"
    make_clips(tmp_path / "clips", **SMALL)
    (tmp_path / "clips" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"clips is not empty: it holds notes\.txt"):
        make_clips(tmp_path / "clips", **SMALL)
    (tmp_path / "clips" / "notes.txt").unlink()
    with pytest.raises(DataError, match="not a clip of these settings"):
        make_clips(tmp_path / "clips", **SMALL, seed=5)


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file cannot take clips \(File exists\)"):
        make_clips(tmp_path / "file", **SMALL)
    with pytest.raises(DataError, match="num_clips=0; give 1 or more"):
        make_clips(tmp_path / "new", num_clips=0)
