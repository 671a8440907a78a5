"""FFmpeg: opened containers, decoded frames, and frames as RGB arrays, with every error turned into ours."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import av
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import UInt8

from videovae.errors import DataError

_SCALE_FLAGS = "bicubic+accurate_rnd+full_chroma_int+bitexact"
# By the angle that a frame is to be turned, counterclockwise.
_ROTATIONS = {90: ("transpose=cclock",), 180: ("hflip", "vflip"), 270: ("transpose=clock",)}


@contextmanager
def open_video(path: str | os.PathLike[str], num_threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first real video stream, closed at the end.

    Nothing of the stream may be touched after the end: its memory belongs to the container.

    Raises:
        DataError: FFmpeg or the file system failed in here, or there is no video stream.
    """
    try:
        # Without an absolute path FFmpeg reads "12:30.mp4" as protocol "12"; without the whitelist a playlist
        # under a video's name could make it open addresses.
        with av.open(
            os.path.abspath(path), "r", options={"protocol_whitelist": "file"}, metadata_errors="replace"
        ) as container:
            stream = next((s for s in container.streams.video if not _is_cover(s)), None)
            if stream is None:
                raise DataError(f"{printable(path)}: it has no video stream. Replace or remove the file.")
            stream.codec_context.thread_count = num_threads
            yield container, stream
    except (av.FFmpegError, OSError, UnicodeError) as error:
        raise DataError(
            f"{printable(path)}: it cannot be decoded ({reason_of(error)}). Replace or remove the file."
        ) from error


def decode(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """The frames from where the container stands to its end, without the packet that a truncated file cuts."""
    for packet in container.demux(stream):
        if not packet.is_corrupt:
            yield from packet.decode()


def shown_size(frame: VideoFrame) -> tuple[int, int]:
    """Height and width of a frame after the rotation that players apply."""
    return (frame.width, frame.height) if frame.rotation % 180 == 90 else (frame.height, frame.width)


class Resizer:
    """Rotates, scales to cover, converts to RGB and crops inside FFmpeg; only the result becomes an array.

    Args:
        crop_y, crop_x: where the crop lies in what scaling left over; 0 is top or left, 1 bottom or right.
    """

    def __init__(self, height: int, width: int, crop_y: float = 0.5, crop_x: float = 0.5) -> None:
        self._size = (height, width)
        self._crop = (crop_y, crop_x)
        self._layout: tuple[object, ...] = ()
        self._graph = Graph()

    def __call__(self, frame: VideoFrame) -> UInt8[np.ndarray, "h w c"]:
        layout = (
            *(frame.width, frame.height, frame.rotation),
            *(frame.format.name, frame.colorspace, frame.color_range),
        )
        if layout != self._layout:  # at the first frame, and where a stream changes midway
            self._layout, self._graph = layout, self._build(frame)
        self._graph.vpush(frame)
        return np.asarray(self._graph.vpull().to_ndarray(), dtype=np.uint8)

    def _build(self, frame: VideoFrame) -> Graph:
        height, width = self._size
        shown_height, shown_width = shown_size(frame)
        scale = max(height / shown_height, width / shown_width)
        scaled_height = max(height, round(shown_height * scale))
        scaled_width = max(width, round(shown_width * scale))
        top = round((scaled_height - height) * self._crop[0])
        left = round((scaled_width - width) * self._crop[1])
        steps = [
            f"buffer=video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1000"
            f":colorspace={frame.colorspace}:range={frame.color_range}",
            *_ROTATIONS.get(frame.rotation % 360, ()),
            f"scale={scaled_width}:{scaled_height}:flags={_SCALE_FLAGS}",
            "format=rgb24",
            f"crop={width}:{height}:{left}:{top}:exact=1",
            "buffersink",
        ]
        graph = Graph()
        graph.threads = 1
        graph.link_nodes(*(graph.add(*step.split("=", 1)) for step in steps)).configure(auto_buffer=False)
        return graph


def printable(path: str | os.PathLike[str]) -> str:
    """A path as text that any log can hold: bytes that are not UTF-8 and control characters are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def reason_of(error: Exception) -> str:
    """What went wrong, in a few words and without the file's name."""
    return str(getattr(error, "strerror", None) or error)


def _is_cover(stream: VideoStream) -> bool:
    return bool(stream.disposition & stream.disposition.attached_pic)
