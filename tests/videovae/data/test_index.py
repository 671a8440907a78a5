import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from videovae.data import index as module
from videovae.data.index import (
    VideoEntry,
    VideoIndex,
    build_index,
    check_failures,
    find_videos,
    split,
    usable,
)
from videovae.data.video import VideoInfo, probe
from videovae.errors import DataError

MakeVideo = Callable[..., Path]


@pytest.fixture
def data_dir(make_video: MakeVideo, tmp_path: Path) -> Path:
    """Three videos of 5, 9 and 17 frames, one of them in a subfolder."""
    for name, num_frames in (("data/b.mp4", 9), ("data/a.mkv", 5), ("data/sub/c d\u00e9.MP4", 17)):
        make_video(name, num_frames=num_frames)
    return tmp_path / "data"


@pytest.fixture
def cache_file(tmp_path: Path) -> Path:
    return tmp_path / "run" / "videos.json"


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are opened."""
    names: list[str] = []

    def recording(path: Path) -> VideoInfo:
        names.append(path.name)
        return probe(path)

    monkeypatch.setattr(module, "probe", recording)
    return names


def entry(name: str, num_frames: int = 49) -> VideoEntry:
    info = VideoInfo(num_frames, 64, 48, 8.0, 0, num_frames - 1)
    return VideoEntry(name, Path("/data") / name, 1, 1, info, stop_frame=num_frames)


def named(entries: list[VideoEntry]) -> list[str]:
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
            build_index(tmp_path / name, tmp_path / "run" / "videos.json")
    assert not (tmp_path / "run").exists()


def test_index_says_what_is_in_each_file(data_dir: Path, cache_file: Path) -> None:
    index = build_index(data_dir, cache_file)
    assert [(e.name, e.num_frames, e.error) for e in index.entries] == [
        ("a.mkv", 5, None),
        ("b.mp4", 9, None),
        ("sub/c d\u00e9.MP4", 17, None),
    ]
    assert all(
        e.info is not None and (e.info.width, e.info.height, e.info.fps) == (64, 48, 25.0) for e in index.entries
    )
    assert [p.name for p in cache_file.parent.iterdir()] == ["videos.json"]


def test_second_start_opens_no_file_and_gives_the_same(data_dir: Path, cache_file: Path, probed: list[str]) -> None:
    first = build_index(data_dir, cache_file)
    written = cache_file.stat().st_mtime_ns
    probed.clear()
    assert build_index(data_dir, cache_file) == first
    assert probed == []
    assert cache_file.stat().st_mtime_ns == written


def test_index_follows_files_that_are_added_removed_and_changed(
    data_dir: Path, cache_file: Path, probed: list[str], make_video: MakeVideo
) -> None:
    build_index(data_dir, cache_file)
    probed.clear()
    (data_dir / "a.mkv").unlink()
    make_video("data/b.mp4", num_frames=13)
    make_video("data/d.mov", num_frames=5)
    for _ in range(2):
        index = build_index(data_dir, cache_file)
        assert [(e.name, e.num_frames) for e in index.entries] == [
            ("b.mp4", 13),
            ("d.mov", 5),
            ("sub/c d\u00e9.MP4", 17),
        ]
    assert sorted(probed) == ["b.mp4", "d.mov"]


def test_a_file_of_equal_size_and_another_time_is_opened_again(
    data_dir: Path, cache_file: Path, probed: list[str]
) -> None:
    build_index(data_dir, cache_file)
    probed.clear()
    os.utime(data_dir / "b.mp4", ns=(1, 1))
    build_index(data_dir, cache_file)
    assert probed == ["b.mp4"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04pickle",
        b"[]",
        b'{"version": 1}',
        b'{"version": 0, "data_dir": "", "videos": []}',
        b'{"version": 1, "data_dir": "DIR", "videos": [{"name": "b.mp4"}]}',
        b'{"version": 1, "data_dir": "DIR", "videos": [7]}',
    ],
)
def test_a_damaged_or_foreign_cache_is_made_anew(data_dir: Path, cache_file: Path, content: bytes) -> None:
    expected = build_index(data_dir, cache_file)
    good = cache_file.read_bytes()
    cache_file.write_bytes(content.replace(b"DIR", os.fsencode(data_dir)))
    assert build_index(data_dir, cache_file) == expected
    assert cache_file.read_bytes() == good


def test_rows_with_foreign_content_are_made_anew(data_dir: Path, cache_file: Path) -> None:
    expected = build_index(data_dir, cache_file)
    content = json.loads(cache_file.read_text())
    content["videos"][0]["info"]["codec"] = "h264"
    content["videos"][1]["info"] = 3
    cache_file.write_text(json.dumps(content))
    assert build_index(data_dir, cache_file) == expected


def test_the_cache_of_another_folder_is_not_used(
    data_dir: Path, cache_file: Path, tmp_path: Path, probed: list[str]
) -> None:
    build_index(data_dir, cache_file)
    probed.clear()
    shutil.copytree(data_dir, tmp_path / "copy")
    index = build_index(tmp_path / "copy", cache_file)
    assert len(probed) == 3
    assert index.entries[0].path == tmp_path / "copy" / "a.mkv"


def test_a_read_only_data_folder_is_enough(data_dir: Path, cache_file: Path) -> None:
    before = sorted(data_dir.rglob("*"))
    for folder in (data_dir, data_dir / "sub"):
        folder.chmod(0o555)
    try:
        assert len(build_index(data_dir, cache_file).entries) == 3
    finally:
        for folder in (data_dir, data_dir / "sub"):
            folder.chmod(0o755)
    assert sorted(data_dir.rglob("*")) == before


def test_files_that_cannot_be_used_stand_in_the_index_with_the_reason(data_dir: Path, cache_file: Path) -> None:
    (data_dir / "zero.mp4").touch()
    (data_dir / "gone.mp4").symlink_to(data_dir / "nowhere.mp4")
    os.mkfifo(data_dir / "pipe.mp4")
    index = build_index(data_dir, cache_file)
    good, skipped = usable(index, min_frames=9)
    assert named(good) == ["b.mp4", "sub/c d\u00e9.MP4"]
    assert [name for name, _ in skipped] == ["a.mkv", "gone.mp4", "pipe.mp4", "zero.mp4"]
    reasons = dict(skipped)
    assert reasons["a.mkv"] == "5 frames, and a clip needs 9"
    assert reasons["gone.mp4"] == "it cannot be read (No such file or directory)"
    assert reasons["pipe.mp4"] == "it is not a regular file"
    assert reasons["zero.mp4"].startswith("it cannot be decoded (Invalid data")


def test_a_file_that_failed_is_tried_again(data_dir: Path, cache_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path) -> VideoInfo:
        raise DataError(f"{path}: the network is down")

    with monkeypatch.context() as patch:
        patch.setattr(module, "probe", failing)
        index = build_index(data_dir, cache_file)
    assert [e.error for e in index.entries] == ["the network is down"] * 3
    assert [e.error for e in build_index(data_dir, cache_file).entries] == [None] * 3


def test_names_that_are_not_utf8_are_kept_and_shown_escaped(data_dir: Path, cache_file: Path) -> None:
    strange = os.fsdecode(b"\xff\n.mp4")
    shutil.copy(data_dir / "b.mp4", data_dir / strange)
    for _ in range(2):
        index = build_index(data_dir, cache_file)
        assert strange in named(list(index.entries))
        assert usable(index, 1)[1] == []
    assert r"\xff\n.mp4" in [name for name, _ in usable(index, 100)[1]]


def test_a_run_folder_that_cannot_be_written_is_named(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"video index .*videos\.json cannot be written"):
        build_index(data_dir, tmp_path / "file" / "videos.json")


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
        assert sorted(train + heldout, key=entries.index) == entries


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
    assert "nothing to hold out" in caplog.text


def test_shared_videos_are_all_usable(shared_dir: Path, cache_file: Path) -> None:
    index = build_index(shared_dir / "videos", cache_file)
    good, skipped = usable(index, min_frames=17)
    assert isinstance(index, VideoIndex)
    assert (sorted(e.num_frames for e in good), skipped) == ([49, 49, 49, 49, 325], [])
    assert [len(part) for part in split(good, 8, min_frames=17)] == [4, 1]
