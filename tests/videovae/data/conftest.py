"""Small videos of every kind that people have, made with the encoders that PyAV brings."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

MakeVideo = Callable[..., Path]


def picture(number: int, height: int, width: int) -> np.ndarray:
    """A drifting pattern with the frame's number as bars of light along the top, so that no two are alike."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin((x + (2 + c) * number) / 9 + y / (7 + c)) for c in range(3)]
    image = np.stack(waves, axis=-1).astype(np.uint8)
    for bit in range(8):
        image[: height // 4, bit * width // 8 : (bit + 1) * width // 8] = 235 if number >> bit & 1 else 20
    return image


def encode(
    path: Path,
    codec: str = "libx264",
    *,
    num_frames: int = 40,
    height: int = 48,
    width: int = 64,
    rate: int | Fraction = 25,
    options: dict[str, str] | None = None,
    gop: int = 12,
    num_b_frames: int = 0,
    times: Sequence[int] | None = None,
    rotation: int = 0,
) -> Path:
    """Write a video of `picture` frames; `times` are their timestamps in milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size, stream.max_b_frames = gop, num_b_frames
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(number, height, width))
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def make_video(tmp_path: Path) -> MakeVideo:
    """`make_video(name, ...)` writes a video below `tmp_path`; other arguments as `encode` takes them."""

    def make(name: str, codec: str = "libx264", **settings: object) -> Path:
        return encode(tmp_path / name, codec, **settings)  # type: ignore[arg-type]

    return make


@pytest.fixture
def data_dir(make_video: MakeVideo, tmp_path: Path) -> Path:
    """Three videos of 5, 9 and 17 frames, one of them in a subfolder."""
    for name, num_frames in (("data/b.mp4", 9), ("data/a.mkv", 5), ("data/sub/c d\u00e9.MP4", 17)):
        make_video(name, num_frames=num_frames)
    return tmp_path / "data"
