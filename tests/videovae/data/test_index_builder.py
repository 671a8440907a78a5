import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from videovae.data import index_builder as module
from videovae.data.index import VideoEntry, VideoIndex, split, usable
from videovae.data.index_builder import IndexBuilder, build_index
from videovae.data.video import VideoInfo, probe
from videovae.errors import DataError

MakeVideo = Callable[..., Path]


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


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch, probed: list[str]) -> Iterator[threading.Event]:
    """Until this is set, looking into the video of the subfolder takes for ever."""
    event, probe_now = threading.Event(), module.probe

    def waiting(path: Path) -> VideoInfo:
        if path.suffix == ".MP4":
            assert event.wait(30)
        return probe_now(path)

    monkeypatch.setattr(module, "probe", waiting)
    yield event
    event.set()


def step_until(builder: IndexBuilder, condition: Callable[[], bool]) -> None:
    for _ in range(400):
        if condition():
            return
        builder.step(0.05)
    pytest.fail("it never came to it in 400 slices")


def named(entries: Sequence[VideoEntry]) -> list[str]:
    return [e.name for e in entries]


def names_in(cache_file: Path) -> list[str]:
    return [row["name"] for row in json.loads(cache_file.read_text())["videos"]] if cache_file.exists() else []


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
        assert strange in named(index.entries)
        assert usable(index, 1)[1] == []
    assert r"\xff\n.mp4" in [name for name, _ in usable(index, 100)[1]]


def test_a_run_folder_that_cannot_be_written_is_named(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"video index .*videos\.json cannot be written"):
        build_index(data_dir, tmp_path / "file" / "videos.json")


def test_a_folder_without_videos_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty is empty\. Put videos there"):
        build_index(tmp_path / "empty", tmp_path / "run" / "videos.json")
    assert not (tmp_path / "run").exists()


def test_a_slice_ends_in_time_while_a_slow_video_is_looked_into(
    data_dir: Path, cache_file: Path, release: threading.Event, probed: list[str]
) -> None:
    with IndexBuilder(data_dir, cache_file) as builder:
        step_until(builder, lambda: names_in(cache_file) == ["a.mkv", "b.mp4"])
        assert not builder.step(0.05)
        release.set()
        step_until(builder, lambda: builder.step(0.05))
        assert [e.num_frames for e in builder.index.entries] == [5, 9, 17]
    assert sorted(probed) == ["a.mkv", "b.mp4", "c d\u00e9.MP4"]
    assert names_in(cache_file) == named(builder.index.entries)


def test_what_was_known_when_the_work_was_interrupted_is_used_again(
    data_dir: Path, cache_file: Path, release: threading.Event, probed: list[str]
) -> None:
    with IndexBuilder(data_dir, cache_file) as interrupted:
        step_until(interrupted, lambda: names_in(cache_file) == ["a.mkv", "b.mp4"])
    assert sorted(probed) == ["a.mkv", "b.mp4"]
    probed.clear()
    release.set()
    index = build_index(data_dir, cache_file)
    assert [e.num_frames for e in index.entries] == [5, 9, 17]
    assert not {"a.mkv", "b.mp4"} & set(probed)


def test_progress_is_told(
    data_dir: Path, cache_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_PROGRESS_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        build_index(data_dir, cache_file)
    assert caplog.messages[0].startswith("looking into 3 of 3 videos in ")
    assert caplog.messages[-1] == "looked into 3 of 3 videos"
    caplog.clear()
    build_index(data_dir, cache_file)
    assert caplog.messages == []


def test_shared_videos_are_all_usable(shared_dir: Path, cache_file: Path) -> None:
    index = build_index(shared_dir / "videos", cache_file)
    good, skipped = usable(index, min_frames=17)
    assert isinstance(index, VideoIndex)
    assert (sorted(e.num_frames for e in good), skipped) == ([49, 49, 49, 49, 325], [])
    assert [len(part) for part in split(good, 8, min_frames=17)] == [4, 1]
