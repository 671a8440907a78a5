import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from videovae.data.index import VideoEntry, VideoIndex, check_failures, find_videos, heldout_ranges, split, usable
from videovae.data.video import VideoInfo
from videovae.errors import DataError


def entry(name: str, num_frames: int = 49) -> VideoEntry:
    info = VideoInfo(num_frames, 64, 48, 8.0, 0, num_frames - 1)
    return VideoEntry(name, Path("/data") / name, 1, 1, info, stop_frame=num_frames)


def named(entries: Sequence[VideoEntry]) -> list[str]:
    return [e.name for e in entries]


def test_videos_are_found_at_any_depth_in_any_case_and_sorted(data_dir: Path, tmp_path: Path) -> None:
    for other in (".hidden.mp4", ".cache/x.mp4", "notes.txt", "mp4"):
        (data_dir / other).parent.mkdir(exist_ok=True)
        (data_dir / other).touch()
    shutil.copy(data_dir / "b.mp4", tmp_path / "elsewhere.mp4")
    (data_dir / "link.webm").symlink_to(tmp_path / "elsewhere.mp4")
    (data_dir / "sub" / "up").symlink_to(data_dir)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "e.avi").touch()
    (data_dir / "more").symlink_to(tmp_path / "more")
    assert find_videos(data_dir) == ["a.mkv", "b.mp4", "link.webm", "more/e.avi", "sub/c d\u00e9.MP4"]


def test_a_folder_without_videos_is_an_error_that_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    for name, seen in (
        ("missing", "missing does not exist. Give a folder"),
        ("file", "file is a file, not a folder"),
        ("empty", "empty is empty. Put videos there"),
        ("notes", r"notes holds 1 entries but no video. Put videos there \(.avi, .mkv"),
    ):
        with pytest.raises(DataError, match=seen):
            find_videos(tmp_path / name)


def test_videos_are_usable_where_they_decode_and_give_a_clip() -> None:
    broken = VideoEntry("x\n.mp4", Path("/data/x.mp4"), 1, 1, None, "it is empty")
    index = VideoIndex(Path("/data"), (entry("a.mp4", 17), entry("b.mp4", 16), broken))
    good, skipped = usable(index, min_frames=17)
    assert good == [index.entries[0]]
    assert skipped == [("b.mp4", "16 frames, and a clip needs 17"), ("x\\n.mp4", "it is empty")]


def test_too_many_failures_are_an_error_with_counts_and_names() -> None:
    failed = [(f"{i}.mp4", "it is empty") for i in range(5)]
    check_failures(failed, 10, 0.5)
    with pytest.raises(
        DataError, match=r"5 of 9 videos cannot be used, and at most 50% .*0\.mp4: it is empty.*and 2 more"
    ):
        check_failures(failed, 9, 0.5)
    with pytest.raises(DataError, match="5 of 5 videos"):
        check_failures(failed, 5, 1.0)


def test_whole_videos_are_held_out_where_there_are_four() -> None:
    for num_videos, num_heldout, expected in ((4, 8, 1), (5, 8, 1), (8, 8, 2), (100, 8, 8), (100, 1, 1), (5, 0, 0)):
        entries = [entry(f"{i}.mp4") for i in range(num_videos)]
        train, heldout = split(entries, num_heldout, min_frames=17)
        assert len(heldout) == expected
        assert sorted(named(train + heldout)) == sorted(named(entries))
        assert heldout_ranges(heldout) == [(e.name, 0, 49) for e in heldout]


def test_a_new_video_moves_at_most_one_other() -> None:
    entries = [entry(f"{i}.mp4") for i in range(40)]
    before = set(named(split(entries, 8, min_frames=17)[1]))
    for name in ("x.mp4", "y.mp4", "z.mp4"):
        after = set(named(split([*entries, entry(name)], 8, min_frames=17)[1]))
        assert len(before - after) <= 1


def test_of_few_videos_the_last_part_is_held_out() -> None:
    train, heldout = split([entry("a.mp4", 325), entry("b.mp4", 34), entry("c.mp4", 33)], 8, min_frames=17)
    assert [(e.start_frame, e.stop_frame) for e in train] == [(0, 293), (0, 17), (0, 33)]
    assert [(e.name, e.start_frame, e.stop_frame) for e in heldout] == [("a.mp4", 293, 325), ("b.mp4", 17, 34)]


def test_one_short_video_is_its_own_evaluation_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train, heldout = split([entry("a.mp4", 20)], 8, min_frames=17)
    assert train == heldout == [entry("a.mp4", 20)]
    assert "nothing is held out of 1 videos: the evaluation uses training videos" in caplog.text
    assert heldout_ranges(heldout) == []


def test_what_was_held_out_stays_so_whatever_is_added() -> None:
    first = [entry(f"{i:02}.mp4") for i in range(20)]
    ranges = heldout_ranges(split(first, 8, min_frames=17)[1])
    more = [*(entry(f"+{i:02}.mp4") for i in range(30)), *first]
    train, heldout = split(more, 8, min_frames=17, previous=ranges)
    assert heldout_ranges(heldout) == ranges
    assert sorted(named(train)) == sorted({e.name for e in more} - set(named(heldout)))
    assert set(named(split(more, 8, min_frames=17)[1])) != set(named(heldout))


def test_a_partly_held_out_video_goes_on_training_on_the_frames_before() -> None:
    train, heldout = split([entry("a.mp4", 325), entry("b.mp4", 20)], 8, min_frames=17)
    ranges = json.loads(json.dumps(heldout_ranges(heldout)))
    assert ranges == [["a.mp4", 293, 325]]
    more = [entry("a.mp4", 325), *(entry(name) for name in ("b.mp4", "c.mp4", "d.mp4", "e.mp4"))]
    again_train, again = split(more, 8, min_frames=17, previous=ranges)
    assert again == heldout
    assert again_train[0] == train[0]
    assert named(again_train) == ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4"]


@pytest.mark.parametrize(
    ("num_frames", "trained", "evaluated"),
    [(400, (0, 100), (100, 150)), (130, (0, 100), (100, 130)), (110, (0, 100), None), (60, (0, 60), None)],
)
def test_a_heldout_range_of_a_file_that_changed_is_kept_as_far_as_it_goes(
    num_frames: int,
    trained: tuple[int, int],
    evaluated: tuple[int, int] | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        train, heldout = split([entry("a.mp4", num_frames)], 8, min_frames=17, previous=[("a.mp4", 100, 150)])
    assert [(e.start_frame, e.stop_frame) for e in train] == [trained]
    assert [(e.start_frame, e.stop_frame) for e in heldout] == ([evaluated] if evaluated else [])
    assert ("held-out videos that are gone or too short are not evaluated: a.mp4" in caplog.text) == (not evaluated)


def test_heldout_videos_that_are_gone_are_not_replaced_by_trained_ones(caplog: pytest.LogCaptureFixture) -> None:
    entries = [entry(f"{i}.mp4") for i in range(8)]
    with caplog.at_level(logging.WARNING):
        train, heldout = split(entries, 8, min_frames=17, previous=[("gone.mp4", 0, 49)])
    assert (train, heldout) == (entries, [])
    assert "gone.mp4" in caplog.text


def test_a_run_that_held_out_nothing_does_not_begin_to(caplog: pytest.LogCaptureFixture) -> None:
    entries = [entry(f"{i}.mp4") for i in range(8)]
    with caplog.at_level(logging.WARNING):
        train, heldout = split(entries, 8, min_frames=17, previous=[])
    assert train == heldout == entries
    assert "the evaluation uses training videos" in caplog.text
    assert heldout_ranges(heldout) == []
    assert split(entries, 0, min_frames=17, previous=[]) == (entries, [])


def test_what_was_held_out_is_not_trained_on_where_nothing_is_evaluated_any_more() -> None:
    entries = [entry(f"{i}.mp4") for i in range(8)]
    train, heldout = split(entries, 0, min_frames=17, previous=[("3.mp4", 0, 49)])
    assert "3.mp4" not in named(train)
    assert heldout_ranges(heldout) == [("3.mp4", 0, 49)]
