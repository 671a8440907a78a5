"""One video file: what is in it, some of its frames as pixels, and pixels as a file.

Frames are numbered in the order in which they are shown. A container's frame count and its seeks are hints;
what holds is each frame's timestamp. So `probe` records how timestamps map to frame numbers, and `read_clip`
checks the number of every frame that it takes. Where timestamps cannot be trusted, frames are counted from the
start.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import Float, UInt8

from videovae.data.ffmpeg import Resizer, decode, open_video, printable, reason_of, shown_size
from videovae.errors import DataError

if TYPE_CHECKING:  # loader workers import this file, and start ten times faster without torch
    from torch import Tensor

# Codecs whose packets hold exactly one shown frame each; elsewhere (vp8's hidden frames, mpeg4's skipped
# ones) only decoding tells how many frames there are.
_ONE_FRAME_PER_PACKET = frozenset({"av1", "ffv1", "h264", "hevc", "libdav1d", "mjpeg", "prores", "vp9"})
# AVI stores no presentation times: what FFmpeg reports is a guess that shifts with B-frames and after seeks.
_UNTIMED_CONTAINERS = frozenset({"avi"})
_WRITE_FORMATS = {".mkv": "matroska", ".mov": "mov", ".mp4": "mp4"}
# Nearly lossless. mbtree is off because its decisions vary: with it up to a tenth of repeated encodes differed,
# without it none of 1900.
_X264_OPTIONS = {"crf": "12", "preset": "fast", "mbtree": "0"}
_BT709, _LIMITED_RANGE, _FULL_RANGE = 1, 1, 2  # FFmpeg's numbers


@dataclass(frozen=True)
class VideoInfo:
    """What a video holds, found by reading its packets and not from what its header claims."""

    num_frames: int
    """Frames that a full decode shows."""
    width: int
    """Pixels, after the rotation that players apply."""
    height: int
    """Pixels, after the rotation that players apply."""
    fps: float
    """Average frames per second; 0 where the file does not say."""
    first_pts: int | None
    """Timestamp of the first frame; None where timestamps cannot be trusted and frames must be counted."""
    last_pts: int | None
    """Timestamp of the last frame."""
    irregular_pts: tuple[int, ...] = ()
    """Every timestamp, where they are not evenly spaced (variable frame rate)."""

    def frame_number(self, pts: int | None) -> int | None:
        """The number of the frame with this timestamp; None where no frame has it."""
        if pts is None or self.first_pts is None or self.last_pts is None:
            return None
        if self.irregular_pts:
            number = bisect_left(self.irregular_pts, pts)
            return number if number < self.num_frames and self.irregular_pts[number] == pts else None
        elapsed, duration, num_steps = (
            pts - self.first_pts,
            self.last_pts - self.first_pts,
            self.num_frames - 1,
        )
        if duration == 0:
            return 0 if elapsed == 0 else None
        number = round(Fraction(elapsed * num_steps, duration))
        on_grid = _is_on_grid(elapsed, number, duration, num_steps)
        return number if on_grid and 0 <= number < self.num_frames else None

    def seek_pts(self, number: int) -> int:
        """A timestamp not before that of frame `number`, and before that of the next frame."""
        assert self.first_pts is not None
        assert self.last_pts is not None
        if self.irregular_pts:
            return self.irregular_pts[number]
        # Timestamps are whole and lie within a quarter step of the grid, so this one is at or below the sum.
        step = Fraction(self.last_pts - self.first_pts, max(1, self.num_frames - 1))
        return math.floor(self.first_pts + step * number + step / 4)


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Frame count, size, rate and timestamps of a video, from one pass over its packets.

    Packets are counted without decoding where the codec allows it; the first frame is always decoded, so a
    file that passes has a decoder. A truncated file has the frames before its cut.

    Raises:
        DataError: no video stream, or nothing in it can be decoded.
    Ranks: local.
    """
    return _scan_packets(path) or _scan_frames(path)


def read_clip(
    path: str | os.PathLike[str],
    start_frame: int,
    num_frames: int,
    *,
    frame_stride: int = 1,
    height: int,
    width: int,
    crop_y: float = 0.5,
    crop_x: float = 0.5,
    info: VideoInfo | None = None,
    num_threads: int = 1,
) -> UInt8[np.ndarray, "c t h w"]:
    """Every `frame_stride`-th frame from `start_frame` on, as RGB, scaled to cover the size and then cropped.

    Decoding starts at the keyframe before and ends with the last frame needed. Scaling and cropping run
    inside FFmpeg, on the frames that are kept.

    Args:
        crop_y, crop_x: where the crop lies in what scaling left over; 0 is top or left, 1 bottom or right.
        info: what `probe` says of this file; without it the file is probed first.
        num_threads: decoder threads; one, so that many workers do not fight over the cores.
    Raises:
        DataError: a frame asked for is not in the file or cannot be decoded undamaged.
    Ranks: local.
    """
    info = info or probe(path)
    wanted = range(start_frame, start_frame + num_frames * frame_stride, frame_stride)
    if start_frame < 0 or not wanted or wanted[-1] >= info.num_frames:
        raise DataError(
            f"{printable(path)}: it has {info.num_frames} frames, and {num_frames} from number {start_frame} "
            f"with stride {frame_stride} were asked for. Ask for fewer frames or another start."
        )
    # A seek may land past its target (an index that ignores reordering): then one farther back, then none.
    seek_frames = [start_frame, start_frame - 16, 0] if info.first_pts is not None else [0]
    for seek_frame in seek_frames:
        resize = Resizer(height, width, crop_y, crop_x)
        with open_video(path, num_threads) as (container, stream):
            if seek_frame > 0 and not _seek(container, stream, info.seek_pts(seek_frame)):
                continue
            kept = [resize(frame) for frame in _pick(container, stream, info, wanted)]
        if len(kept) == num_frames:
            return np.ascontiguousarray(np.stack(kept).transpose(3, 0, 1, 2))
    raise DataError(
        f"{printable(path)}: frames {wanted[0]} to {wanted[-1]} cannot all be decoded; the file is damaged "
        "or has changed. Replace or remove it."
    )


def iter_frames(
    path: str | os.PathLike[str], max_frames: int | None = None, *, num_threads: int = 0
) -> Iterator[UInt8[np.ndarray, "h w c"]]:
    """Each frame as RGB at the video's own size, rotated as players show it, at most `max_frames` of them.

    Args:
        num_threads: decoder threads; 0 takes what the machine has.
    Raises:
        DataError: no video stream, or a frame cannot be decoded.
    """
    resize = None
    with open_video(path, num_threads) as (container, stream):
        for number, frame in enumerate(decode(container, stream)):
            if number == max_frames:
                return
            if resize is None:
                resize = Resizer(*shown_size(frame))  # a later change of size is scaled back to this
            yield resize(frame)
    if resize is None:
        raise DataError(f"{printable(path)}: no frame can be decoded. Replace or remove the file.")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse now what `write_video` would refuse after all the work.

    Raises:
        DataError: an unknown suffix, a folder that does not exist or takes no files, or a folder in the file's place.
    Ranks: local.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITE_FORMATS:
        raise DataError(f"{printable(path)}: cannot write this kind of file. Use {', '.join(_WRITE_FORMATS)}.")
    if not path.parent.is_dir():
        raise DataError(
            f"{printable(path)}: it cannot be written (there is no folder {printable(path.parent)}). "
            "Make it, or give another place."
        )
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        reason = "a folder has this name" if path.is_dir() else "its folder takes no files from this user"
        raise DataError(f"{printable(path)}: it cannot be written ({reason}). Give another place.")


def write_video(
    path: str | os.PathLike[str], frames: Iterable[UInt8[np.ndarray, "h w c"]], fps: float | Fraction
) -> None:
    """Write RGB frames (an array of them, or an iterator) as H.264; the file appears only when whole.

    Pixels are stored as yuv420p. Where a side is odd, which yuv420p cannot hold, they are stored as yuv444p:
    the size is kept, at the price of players that know only the common profiles. Equal frames give equal
    files.

    Raises:
        DataError: nothing to write, frames of different sizes, what `check_writable` refuses, or the disk refuses.
    Ranks: local; no two ranks may write one path.
    """
    check_writable(path)
    path = Path(path)
    container_format = _WRITE_FORMATS[path.suffix.lower()]
    if not 0 < fps < math.inf:
        raise DataError(f"{printable(path)}: fps={fps} is no frame rate. Give frames per second above 0.")
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise DataError(f"{printable(path)}: there are no frames to write.")
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _encode(staged, container_format, first, remaining, Fraction(fps).limit_denominator(1001))
        staged.replace(path)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{printable(path)}: it cannot be written ({reason_of(error)}).") from error
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)


def to_model_range(pixels: UInt8[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Pixels 0 to 255 as the -1 to 1 that models take."""
    return pixels.float().div_(127.5).sub_(1)


def to_pixels(x: Float[Tensor, "*axes"]) -> UInt8[Tensor, "*axes"]:
    """What a model gives, -1 to 1, as the nearest pixels 0 to 255; values outside are clipped."""
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().byte()


def _scan_packets(path: str | os.PathLike[str]) -> VideoInfo | None:
    """Count frames by their packets; None where only decoding can tell."""
    times: list[int | None] = []
    first: VideoFrame | None = None
    with open_video(path, num_threads=1) as (container, stream):
        if container.format.name in _UNTIMED_CONTAINERS or stream.codec_context.name not in _ONE_FRAME_PER_PACKET:
            return None
        for packet in container.demux(stream):
            if packet.is_corrupt:
                continue
            if packet.size and not packet.is_discard:
                times.append(packet.pts)
            if first is None:
                first = next((frame for frame in packet.decode() if not frame.is_corrupt), None)
        if first is None or first.pts is None or None in times:
            return None
        # Frames before the first that decodes (a stream cut inside its group) are no frames of this video.
        known = sorted(pts for pts in times if pts is not None and pts >= first.pts)
        return _describe(stream, first, known) if _is_increasing(known) else None


def _scan_frames(path: str | os.PathLike[str]) -> VideoInfo:
    """Count frames by decoding them all."""
    times: list[int | None] = []
    first: VideoFrame | None = None
    with open_video(path, num_threads=1) as (container, stream):
        for frame in decode(container, stream):
            first = first or frame
            times.append(frame.pts)
        if first is None:
            raise DataError(f"{printable(path)}: no frame can be decoded. Replace or remove the file.")
        known = [pts for pts in times if pts is not None]
        timed = container.format.name not in _UNTIMED_CONTAINERS
        if timed and len(known) == len(times) and _is_increasing(known):
            return _describe(stream, first, known)
        height, width = shown_size(first)
        return VideoInfo(len(times), width, height, _average_fps(stream), None, None)


def _describe(stream: VideoStream, first: VideoFrame, times: list[int]) -> VideoInfo:
    height, width = shown_size(first)
    duration, num_steps = times[-1] - times[0], len(times) - 1
    even = all(_is_on_grid(pts - times[0], number, duration, num_steps) for number, pts in enumerate(times))
    irregular = () if even else tuple(times)
    return VideoInfo(len(times), width, height, _average_fps(stream), times[0], times[-1], irregular)


def _is_on_grid(elapsed: int, number: int, duration: int, num_steps: int) -> bool:
    """Whether a timestamp lies within a quarter step of its grid point, as rounding to ticks leaves it."""
    return 4 * abs(elapsed * num_steps - number * duration) <= duration


def _is_increasing(times: list[int]) -> bool:
    return all(earlier < later for earlier, later in pairwise(times))


def _average_fps(stream: VideoStream) -> float:
    return float(stream.average_rate or stream.guessed_rate or 0)


def _seek(container: InputContainer, stream: VideoStream, pts: int) -> bool:
    with suppress(av.FFmpegError):
        container.seek(pts, stream=stream)
        return True
    return False


def _pick(container: InputContainer, stream: VideoStream, info: VideoInfo, wanted: range) -> Iterator[VideoFrame]:
    """The wanted frames in order, up to the first that is missing or damaged."""
    position = 0
    for count, frame in enumerate(decode(container, stream)):
        number = count if info.first_pts is None else info.frame_number(frame.pts)
        if number is None or number < wanted[position]:
            continue
        if number > wanted[position] or frame.is_corrupt:
            return
        yield frame
        position += 1
        if position == len(wanted):
            return


def _encode(
    path: Path,
    container_format: str,
    first: UInt8[np.ndarray, "h w c"],
    remaining: Iterator[UInt8[np.ndarray, "h w c"]],
    rate: Fraction,
) -> None:
    height, width = first.shape[:2]
    pixel_format = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"
    options = {} if container_format == "matroska" else {"movflags": "+faststart"}
    with av.open(os.path.abspath(path), "w", format=container_format, options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options=_X264_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        context = stream.codec_context
        context.thread_count = 1  # what x264 writes depends on how many threads it has
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        for pixels in chain([first], remaining):
            if pixels.shape != first.shape:
                raise DataError(
                    f"{printable(path)}: a frame of shape {pixels.shape} follows one of shape {first.shape}. "
                    "Give all frames one size."
                )
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels)).reformat(
                format=pixel_format,
                src_color_range=_FULL_RANGE,
                dst_colorspace=_BT709,
                dst_color_range=_LIMITED_RANGE,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
