"""Clips: which frames and which crop of which video, as a function of (seed, epoch, index) and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from videovae.data.ffmpeg import printable
from videovae.data.index import VideoEntry
from videovae.data.video import read_clip
from videovae.errors import ConfigError, DataError

if TYPE_CHECKING:  # loader workers import this file, and start ten times faster without torch
    from torch import Tensor

logger = logging.getLogger(__name__)

MAX_TRIES = 64
"""Videos that are tried for one clip; so many drawn at random fail only where nearly all do."""

# The last word of every seed, so that no two kinds of choice share a stream.
_TRAINING, _HELDOUT = 0, 1


@dataclass(frozen=True)
class ClipsConfig:
    """How clips are cut from videos, and how they are fed."""

    num_frames: int = 17
    """Frames of a clip: 1, 5, 9, 13, 17, ..."""
    height: int = 64
    """Pixels; divisible by 8. The frame is scaled to cover the clip, and the rest is cropped."""
    width: int = 64
    """Pixels; divisible by 8."""
    frame_stride: int = 1
    """Every so many frames of the video one frame of the clip."""
    random_crop: bool = True
    """Crop at random; else in the middle."""
    random_flip: bool = True
    """Mirror half of the clips, left to right."""
    clips_per_video: int = 1
    """Clips that are cut from each video in an epoch."""
    batch_size: int = 1
    """Clips per rank and step."""
    num_workers: int | None = None
    """Processes per rank that decode; 0 decodes in the training process, between the steps. None: this node's cores
    divided by its ranks, less the one that trains, at most 8."""
    num_heldout_clips: int = 8
    """Clips that are evaluated and never trained on, of all ranks together."""
    max_failed_fraction: float = 0.5
    """Share of the videos that may be undecodable or too short before the run ends."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "frame_stride", "clips_per_video", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"clips.{name} is {getattr(self, name)}; give 1 or more.")
        for name in ("num_workers", "num_heldout_clips"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"clips.{name} is {getattr(self, name)}; give 0 or more.")
        if self.num_frames % 4 != 1:
            below = self.num_frames - (self.num_frames - 1) % 4
            raise ConfigError(
                f"clips.num_frames is {self.num_frames}, and the first frame stands alone before groups of 4: "
                f"give {below} or {below + 4}."
            )
        for name in ("height", "width"):
            if getattr(self, name) % 8:
                size = getattr(self, name)
                nearest = f"{size - size % 8} or {size - size % 8 + 8}" if size > 8 else "8"
                raise ConfigError(f"clips.{name} is {size}, and is divided by 8: give {nearest}.")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ConfigError(
                f"clips.max_failed_fraction is {self.max_failed_fraction}, but it is a share: give 0 to 1."
            )

    @property
    def num_spanned_frames(self) -> int:
        """Frames of the video from the first to the last of a clip, both included."""
        return (self.num_frames - 1) * self.frame_stride + 1


@dataclass(frozen=True)
class ClipSpec:
    """Where a clip lies: drawn, but not decoded."""

    video: VideoEntry
    start_frame: int
    crop_y: float = 0.5
    crop_x: float = 0.5
    is_flipped: bool = False


@dataclass(frozen=True)
class Clip:
    """A decoded clip, and the videos that were tried for it in vain."""

    pixels: UInt8[np.ndarray, "c t h w"]
    spec: ClipSpec
    failures: tuple[tuple[str, str], ...]
    """(name, reason) of each video that could not be decoded."""


class ClipDataset:
    """The clips of training: `dataset[epoch, index]` is the same clip whoever asks, and whenever.

    Args:
        videos: each long enough for a clip.
        seed: 0 or more.
    """

    def __init__(self, videos: Sequence[VideoEntry], config: ClipsConfig, seed: int) -> None:
        if not videos:
            raise DataError("there is no video to train on. Give a folder with videos that can be decoded.")
        self.videos = tuple(videos)
        self.config = config
        self.seed = seed

    def __len__(self) -> int:
        """Clips per epoch."""
        return len(self.videos) * self.config.clips_per_video

    def __getitem__(self, key: tuple[int, int]) -> Clip:
        """Clip number `index` of an epoch.

        A video that cannot be decoded is replaced by another one, drawn at random, and named in the clip's failures.

        Raises:
            DataError: so many videos failed for this clip that more would not help.
        """
        return read_first(self.draw(*key), self.config)

    def draw(self, epoch: int, index: int) -> Iterator[ClipSpec]:
        """The clip of (epoch, index), then what replaces it where its video fails."""
        for video, rng in _draw_videos(self.videos, index, (self.seed, epoch, index), _TRAINING):
            start = _draw_start(video, self.config, rng)
            crop_y, crop_x = rng.random(2).tolist() if self.config.random_crop else (0.5, 0.5)
            is_flipped = self.config.random_flip and rng.random() < 0.5
            yield ClipSpec(video, start, crop_y, crop_x, is_flipped)


@dataclass(frozen=True)
class HeldoutClip:
    """One clip of the evaluation; decoded when it is read."""

    specs: tuple[ClipSpec, ...]
    """The clip, then what replaces it where its video fails."""
    config: ClipsConfig

    def read(self) -> UInt8[Tensor, "c t h w"]:
        """The pixels; a video that fails is named in the log.

        Raises:
            DataError: none of the videos could be decoded.
        Ranks: local.
        """
        import torch  # only here: see the top of the file

        clip = read_first(iter(self.specs), self.config)
        for name, reason in clip.failures:
            logger.warning(f"held-out video {name} is replaced: {reason}")
        return torch.from_numpy(clip.pixels)


def heldout_clips(videos: Sequence[VideoEntry], config: ClipsConfig, seed: int = 0) -> list[HeldoutClip]:
    """The `config.num_heldout_clips` fixed clips of the evaluation, cropped in the middle, spread over the videos.

    Args:
        seed: which starts are drawn; one for all runs makes them comparable.
    Ranks: local, and equal on every rank.
    """
    clips = []
    for number in range(config.num_heldout_clips if videos else 0):
        drawn = _draw_videos(videos, number, (seed, number), _HELDOUT)
        specs = tuple(ClipSpec(video, _draw_start(video, config, rng)) for video, rng in drawn)
        clips.append(HeldoutClip(specs, config))
    return clips


def read_first(specs: Iterator[ClipSpec], config: ClipsConfig) -> Clip:
    """The first of these clips that can be decoded.

    Raises:
        DataError: none can.
    Ranks: local.
    """
    failures = []
    for spec in specs:
        path = spec.video.path
        try:
            pixels = read_clip(
                path,
                spec.start_frame,
                config.num_frames,
                frame_stride=config.frame_stride,
                height=config.height,
                width=config.width,
                crop_y=spec.crop_y,
                crop_x=spec.crop_x,
                info=spec.video.info,
            )
        except DataError as error:
            failures.append((printable(spec.video.name), str(error).removeprefix(f"{printable(path)}: ")))
            continue
        if spec.is_flipped:
            pixels = np.ascontiguousarray(pixels[..., ::-1])
        return Clip(pixels, spec, tuple(failures))
    first = "; ".join(f"{name}: {reason}" for name, reason in failures[:3])
    raise DataError(f"no clip can be read: all of {len(failures)} videos that were tried failed ({first}).")


def generator(*words: int) -> np.random.Generator:
    """Random numbers that depend on these words only."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def _draw_videos(
    videos: Sequence[VideoEntry], first: int, words: tuple[int, ...], kind: int
) -> Iterator[tuple[VideoEntry, np.random.Generator]]:
    """Video number `first`, then others drawn at random, none twice; each with the stream of its further choices.

    Names that follow each other often fail together, so the next one would be a bad replacement.
    """
    tried: set[int] = set()
    for attempt in range(min(len(videos), MAX_TRIES)):
        rng = generator(*words, attempt, kind)
        number = first % len(videos)
        while number in tried:
            number = int(rng.integers(len(videos)))
        tried.add(number)
        yield videos[number], rng


def _draw_start(video: VideoEntry, config: ClipsConfig, rng: np.random.Generator) -> int:
    """A first frame such that the clip lies within the video; every one is equally likely, the last too."""
    return int(rng.integers(video.start_frame, video.stop_frame - config.num_spanned_frames, endpoint=True))
