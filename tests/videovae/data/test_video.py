from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from hypothesis import given
from hypothesis import strategies as st

from videovae.data.ffmpeg import decode
from videovae.data.video import (
    VideoInfo,
    check_writable,
    iter_frames,
    probe,
    read_clip,
    to_model_range,
    to_pixels,
    write_video,
)
from videovae.errors import DataError

MakeVideo = Callable[..., Path]

UNEVEN = [0, 33, 70, 71, 140, 500, 533, 600, 601, 1000, 1040, 1100, *range(2000, 2028)]
KINDS = {
    "h264.mp4": {"num_b_frames": 3},
    "one-keyframe.mp4": {"gop": 300, "num_b_frames": 3},
    "open-groups.mp4": {"options": {"x264-params": "open-gop=1:keyint=10:bframes=3:scenecut=0"}},
    "short-groups.mp4": {"options": {"x264-params": "keyint=2:bframes=1:scenecut=0"}},
    "h264.MOV": {"num_b_frames": 2},
    "ntsc.mkv": {"rate": Fraction(30000, 1001), "num_b_frames": 2},
    "uneven.mkv": {"times": UNEVEN},
    "uneven-b.mp4": {"times": UNEVEN, "num_b_frames": 2},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "12"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4-b.avi": {"codec": "mpeg4", "num_b_frames": 2},
    "mpeg4-b.mp4": {"codec": "mpeg4", "num_b_frames": 2},
    "h264-b.avi": {"num_b_frames": 2},
    "mjpeg.avi": {"codec": "mjpeg"},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_read_by_seeking_equals_that_of_a_full_decode(name: str, make_video: MakeVideo) -> None:
    path = make_video(name, **KINDS[name])
    info = probe(path)
    whole = read_clip(path, 0, 40, height=48, width=64, info=info)
    assert info.num_frames == 40
    assert (info.height, info.width) == (48, 64)
    for start in range(38):
        clip = read_clip(path, start, 2, frame_stride=2, height=48, width=64, info=info)
        np.testing.assert_array_equal(clip, whole[:, start : start + 3 : 2])
    np.testing.assert_array_equal(np.stack(list(iter_frames(path))).transpose(3, 0, 1, 2), whole)


def test_frames_are_numbered_from_the_first_one_shown(make_video: MakeVideo) -> None:
    clip = read_clip(make_video("b.mp4", num_b_frames=3), 0, 40, height=48, width=64)
    bars = [clip[:, number, 2:10, 2 + 8 * bit : 6 + 8 * bit].mean() > 128 for number in range(40) for bit in range(8)]
    assert bars == [bool(number >> bit & 1) for number in range(40) for bit in range(8)]


def test_reading_stops_after_the_last_frame_needed(make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    def counting(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
        for frame in decode(container, stream):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr("videovae.data.video.decode", counting)
    path = make_video("v.mp4", num_frames=120, gop=12)
    info = probe(path)
    read_clip(path, 62, 5, height=48, width=64, info=info)
    assert 5 <= len(decoded) <= 5 + 12


def test_shared_clips_are_read_exactly(shared_dir: Path) -> None:
    nasa = shared_dir / "videos" / "nasa_13013.mp4"
    info = probe(nasa)
    assert (info.num_frames, info.width, info.height, info.fps) == (325, 320, 180, 25.0)
    frames = dict(enumerate(iter_frames(nasa)))
    for start in (0, 1, 100, 249, 321):
        clip = read_clip(nasa, start, 4, height=180, width=320, info=info)
        np.testing.assert_array_equal(clip, np.stack([frames[start + i] for i in range(4)]).transpose(3, 0, 1, 2))
    kitten = shared_dir / "videos" / "kitten.mp4"
    assert read_clip(kitten, 32, 17, height=64, width=64).shape == (3, 17, 64, 64)


def test_the_picture_covers_the_clip_and_the_crop_goes_from_edge_to_edge(make_video: MakeVideo) -> None:
    path = make_video("wide.mp4", width=128, height=48)
    left, right = (read_clip(path, 0, 1, height=48, width=48, crop_x=x) for x in (0.0, 1.0))
    full = read_clip(path, 0, 1, height=48, width=128)
    np.testing.assert_array_equal(left, full[..., :48])
    np.testing.assert_array_equal(right, full[..., -48:])
    assert read_clip(path, 0, 1, height=24, width=80).shape == (3, 1, 24, 80)
    assert read_clip(path, 0, 1, height=200, width=200).shape == (3, 1, 200, 200)


def test_rotation_is_applied_as_players_do(make_video: MakeVideo) -> None:
    upright = read_clip(make_video("a.mp4"), 0, 1, height=48, width=64)
    for angle, turns in ((90, 1), (180, 2), (-90, -1)):
        path = make_video(f"r{angle}.mp4", rotation=angle)
        info = probe(path)
        height, width = (64, 48) if turns % 2 else (48, 64)
        assert (info.height, info.width) == (height, width)
        turned = read_clip(path, 0, 1, height=height, width=width)
        expected = np.rot90(upright, turns, axes=(2, 3))
        assert np.abs(turned.astype(int) - expected).mean() < 2
        assert next(iter_frames(path)).shape == (height, width, 3)


def test_frames_outside_the_video_are_refused(make_video: MakeVideo) -> None:
    path = make_video("v.mp4")
    for start, num_frames, stride in ((24, 17, 1), (-1, 2, 1), (0, 11, 4), (0, 0, 1)):
        with pytest.raises(DataError, match=r"v\.mp4: it has 40 frames"):
            read_clip(path, start, num_frames, frame_stride=stride, height=48, width=64)


def test_files_that_are_no_video_are_named(tmp_path: Path, make_video: MakeVideo) -> None:
    whole = make_video("whole.mp4").read_bytes()
    contents = {"empty.mp4": b"", "text.mp4": b"hello\n" * 500, "cut.mp4": whole[: len(whole) // 2]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:1,\nwhole.mp4\n#EXT-X-ENDLIST\n")
    for name in (*contents, "folder.mp4", "missing.mp4", "playlist.mp4"):
        for read in (probe, lambda path: list(iter_frames(path))):
            with pytest.raises(DataError, match=rf"{name}: it cannot be decoded \(.+\)"):
                read(tmp_path / name)


def test_a_file_with_sound_only_is_named(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(DataError, match=r"sound\.mp4: it has no video stream"):
        probe(path)


def test_a_truncated_file_has_the_frames_before_its_cut(tmp_path: Path, make_video: MakeVideo) -> None:
    source = make_video("v.mkv", num_b_frames=2)
    whole = read_clip(source, 0, 40, height=48, width=64)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    num_frames = probe(cut).num_frames
    assert 5 < num_frames < 35
    clip = read_clip(cut, 0, num_frames - 4, height=48, width=64)
    np.testing.assert_array_equal(clip, whole[:, : num_frames - 4])


def test_damage_in_the_middle_is_an_error_where_it_is_and_nowhere_else(tmp_path: Path, make_video: MakeVideo) -> None:
    source = make_video("v.mp4", gop=10)
    content = bytearray(source.read_bytes())
    middle, length = len(content) // 2, len(content) // 5
    content[middle : middle + length] = bytes(length)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(content)
    info = probe(damaged)
    assert info.num_frames == 40
    np.testing.assert_array_equal(
        read_clip(damaged, 0, 5, height=48, width=64, info=info), read_clip(source, 0, 5, height=48, width=64)
    )
    with pytest.raises(DataError, match=r"damaged\.mp4"):
        read_clip(damaged, 0, 40, height=48, width=64, info=info)


def test_a_file_that_changed_since_it_was_probed_is_an_error(make_video: MakeVideo) -> None:
    info = probe(make_video("v.mp4", num_frames=80))
    path = make_video("v.mp4", num_frames=20)
    with pytest.raises(DataError, match="cannot all be decoded; the file is damaged or has changed"):
        read_clip(path, 60, 5, height=48, width=64, info=info)


def test_names_with_colons_spaces_and_foreign_letters_are_read(
    make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("12:30.mp4", "a b\u00e9\u4e2d.mp4", "100%d.mp4", "concat:x.mp4"):
        make_video(name, num_frames=5)
        assert probe(name).num_frames == 5


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("size", [(48, 64), (45, 64), (48, 63), (1, 1)])
def test_written_video_has_the_size_rate_and_nearly_the_pixels(
    tmp_path: Path, suffix: str, size: tuple[int, int]
) -> None:
    y, x = np.mgrid[: size[0], : size[1]]
    frames = np.stack([np.stack([x * 2 + t, y * 3, 200 - x - t], axis=-1) for t in range(12)]).astype(np.uint8)
    path = tmp_path / f"out{suffix}"
    write_video(path, frames, fps=29.97)
    info = probe(path)
    assert (info.num_frames, info.height, info.width) == (12, *size)
    assert info.fps == pytest.approx(29.97, abs=0.01)
    seen = np.stack(list(iter_frames(path))).astype(int)
    assert np.abs(seen - frames).mean() < 2.5
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_flat_colours_survive_writing_and_reading(tmp_path: Path) -> None:
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 100, 50], [0, 0, 0], [255, 255, 255]]
    frames = np.zeros((6, 32, 32, 3), np.uint8) + np.array(colours, np.uint8)[:, None, None]
    write_video(tmp_path / "c.mp4", frames, fps=5)
    seen = np.stack(list(iter_frames(tmp_path / "c.mp4"))).astype(int)
    assert np.abs(seen[:, 8:24, 8:24] - frames[:, 8:24, 8:24]).max() <= 3


def test_equal_frames_give_equal_files(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, fps=8)
    write_video(tmp_path / "b.mp4", iter(frames), fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")
    image = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(DataError, match=r"shape \(8, 16, 3\) follows one of shape \(16, 16, 3\)"):
        write_video(path, [image, image[:8]], fps=8)
    with pytest.raises(DataError, match="there are no frames"):
        write_video(path, [], fps=8)
    with pytest.raises(DataError, match="fps=nan"):
        write_video(path, [image], fps=float("nan"))
    with pytest.raises(DataError, match=r"Use \.mkv, \.mov, \.mp4"):
        write_video(tmp_path / "out.webm", [image], fps=8)
    with pytest.raises(DataError, match=r"cannot be written \(there is no folder"):
        write_video(tmp_path / "nowhere" / "out.mp4", [image], fps=8)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]


def test_what_cannot_be_written_is_known_before_there_are_frames(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "old.mp4").write_bytes(b"old")
    for name, message in (
        ("out.gif", r"out\.gif: cannot write this kind of file\. Use \.mkv, \.mov, \.mp4"),
        ("out", "cannot write this kind of file"),
        ("nowhere/out.mp4", r"out\.mp4: it cannot be written \(there is no folder .*nowhere\)\. Make it"),
        ("file/out.mp4", "there is no folder .*file"),
        ("folder.mp4", r"it cannot be written \(a folder has this name\)"),
    ):
        with pytest.raises(DataError, match=message):
            check_writable(tmp_path / name)
    for name in ("new.mp4", "new.MKV", "old.mp4"):
        check_writable(tmp_path / name)
    assert (tmp_path / "old.mp4").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.mp4", "old.mp4"]


def test_a_file_system_that_fails_while_writing_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("videovae.data.video._encode", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        write_video(tmp_path / "out.mp4", [np.zeros((16, 16, 3), np.uint8)], fps=8)


def test_iter_frames_ends_at_max_frames(make_video: MakeVideo) -> None:
    path = make_video("v.mp4")
    assert len(list(iter_frames(path, 7))) == 7
    assert len(list(iter_frames(path, 100))) == 40


@given(st.integers(2, 400), st.fractions(Fraction(1), Fraction(3000)), st.integers(-5000, 5000))
def test_even_timestamps_map_to_their_frames(num_frames: int, step: Fraction, first: int) -> None:
    # Timestamps are rounded to ticks; with fewer than three ticks per frame that would leave the grid.
    step = step if step.denominator == 1 else step + 3
    times = [first + round(number * step) for number in range(num_frames)]
    info = VideoInfo(num_frames, 8, 8, 25.0, times[0], times[-1])
    assert [info.frame_number(pts) for pts in times] == list(range(num_frames))
    assert info.frame_number(times[-1] + 10_000) is None
    for number in range(num_frames - 1):
        assert times[number] <= info.seek_pts(number) < times[number + 1]


def test_pixels_go_to_the_model_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_model_range(pixels)
    assert (x.dtype, x[0].item(), x[-1].item()) == (torch.float32, -1.0, 1.0)
    assert torch.equal(to_pixels(x), pixels)
    assert to_pixels(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
