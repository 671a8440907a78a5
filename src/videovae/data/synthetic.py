"""Clips made on the spot, where there are no videos: textures that move, as real H.264 files."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from rankwise.files import write_atomic
from videovae.data.ffmpeg import printable, reason_of
from videovae.data.video import write_video
from videovae.errors import DataError

Image = Float[np.ndarray, "h w c"]
Scene = Callable[[float], Image]
"""The picture at a moment between 0 and 1, values 0 to 1."""

_MANIFEST = ".make-clips.json"
_TEXTURE_SIZE = 256


def make_clips(
    directory: str | os.PathLike[str],
    *,
    num_clips: int = 8,
    num_frames: int = 49,
    height: int = 96,
    width: int = 96,
    fps: float = 8,
    seed: int = 0,
) -> list[Path]:
    """Write H.264 clips of panning and rotating textures, gratings, and shapes that cover each other.

    The same arguments give the same pixels. A folder that holds clips of the same arguments keeps them, and gets
    those that are missing.

    Raises:
        DataError: the folder holds anything else, or cannot be written.
    Ranks: main process only.
    """
    folder = Path(directory)
    counts = {"num_clips": num_clips, "num_frames": num_frames, "height": height, "width": width}
    for name, value in counts.items():
        if value < 1:
            raise DataError(f"make_clips: {name}={value}; give 1 or more.")
    if seed < 0:
        raise DataError(f"make_clips: seed={seed}; give 0 or more.")
    settings = json.dumps({**counts, "fps": fps, "seed": seed})
    paths = [folder / f"clip-{number:05d}.mp4" for number in range(num_clips)]
    _claim(folder, settings, {path.name for path in paths})
    for number, path in enumerate(paths):
        if not path.exists():
            write_video(path, clip_frames(number, num_frames, height, width, seed), fps)
    return paths


def clip_frames(
    number: int, num_frames: int, height: int, width: int, seed: int
) -> Iterator[UInt8[np.ndarray, "h w c"]]:
    """The frames of clip `number`: one of four kinds of scene, under a light that changes slowly."""
    rng = np.random.default_rng([seed, number])
    scene = (_panning, _gratings, _rotating, _shapes)[number % 4](rng, height, width)
    depth, cycles, phase = rng.uniform(0.0, 0.3), rng.uniform(0.5, 2), rng.uniform(0, 2 * np.pi)
    for moment in np.linspace(0, 1, num_frames):
        light = 1 - depth * (0.5 + 0.5 * np.sin(2 * np.pi * cycles * moment + phase))
        yield (scene(float(moment)) * light * 255).round().clip(0, 255).astype(np.uint8)


def _claim(folder: Path, settings: str, own_names: set[str]) -> None:
    """Make the folder ours, or refuse: nothing of somebody else's is overwritten or mixed with."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = {name for name in os.listdir(folder) if not name.startswith(".")}
        manifest = folder / _MANIFEST
        is_ours = manifest.exists() and manifest.read_text() == settings
        if present and not (is_ours and present <= own_names):
            what = sorted(present - own_names or present)[0]
            raise DataError(
                f"{printable(folder)} is not empty: it holds {printable(what)}, which is not a clip of these settings. "
                "Give a new or an empty folder."
            )
        if not is_ours:
            write_atomic(manifest, settings)
    except OSError as error:
        raise DataError(f"{printable(folder)} cannot take clips ({reason_of(error)}). Give another folder.") from error


def _panning(rng: np.random.Generator, height: int, width: int) -> Scene:
    """A texture that drifts along a gently curved path."""
    texture = _texture(rng)
    velocity, bend = rng.uniform(-80, 80, 2), rng.uniform(-15, 15, 2)
    y, x = np.mgrid[:height, :width].astype(np.float64)

    def scene(moment: float) -> Image:
        shift = velocity * moment + bend * np.sin(2 * np.pi * moment)
        return _sample(texture, y + shift[0], x + shift[1])

    return scene


def _rotating(rng: np.random.Generator, height: int, width: int) -> Scene:
    """A texture that turns around a point while it comes nearer or goes away."""
    texture = _texture(rng)
    turn, zoom = rng.uniform(-2, 2), rng.uniform(-0.5, 0.5)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    y, x = y - height * rng.uniform(0.2, 0.8), x - width * rng.uniform(0.2, 0.8)

    def scene(moment: float) -> Image:
        scale = np.exp(zoom * moment)
        cos, sin = scale * np.cos(turn * moment), scale * np.sin(turn * moment)
        return _sample(texture, cos * y - sin * x, sin * y + cos * x)

    return scene


def _gratings(rng: np.random.Generator, height: int, width: int) -> Scene:
    """Two moving gratings of different direction, colour and pitch, one over the other."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    waves = [
        (rng.uniform(0, np.pi), 2 * np.pi / rng.uniform(8, 32), rng.uniform(-25, 25), rng.uniform(0, 0.5, 3))
        for _ in range(2)
    ]

    def scene(moment: float) -> Image:
        image = np.zeros((height, width, 3))
        for angle, frequency, speed, colour in waves:
            phase = frequency * (np.cos(angle) * y + np.sin(angle) * x) - speed * moment
            image += colour * (1 + np.sin(phase))[..., None]
        return image

    return scene


def _shapes(rng: np.random.Generator, height: int, width: int) -> Scene:
    """Discs and boxes that swing in front of a drifting texture and cover each other."""
    background = _panning(rng, height, width)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    side = min(height, width)
    shapes = [
        {
            "centre": rng.uniform(0.2, 0.8, 2) * (height, width),
            "swing": rng.uniform(-0.4, 0.4, 2) * (height, width),
            "cycles": rng.uniform(0.5, 2, 2),
            "radius": rng.uniform(0.08, 0.25) * side,
            "norm": rng.choice([2.0, np.inf]),
            "colour": rng.uniform(0, 1, 3),
        }
        for _ in range(5)
    ]

    def scene(moment: float) -> Image:
        image = background(moment)
        for shape in shapes:
            place = shape["centre"] + shape["swing"] * np.sin(2 * np.pi * shape["cycles"] * moment)
            distance = np.linalg.norm(np.stack([y - place[0], x - place[1]]), ord=shape["norm"], axis=0)
            cover = (shape["radius"] - distance + 0.5).clip(0, 1)[..., None]  # a soft edge, one pixel wide
            image = image * (1 - cover) + shape["colour"] * cover
        return image

    return scene


def _texture(rng: np.random.Generator) -> Image:
    """Noise without sharp detail that repeats seamlessly, in random colours."""
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(_TEXTURE_SIZE)] * 2))
    low, high = rng.uniform(0.01, 0.03), rng.uniform(0.05, 0.12)
    band = np.exp(-((frequency / high) ** 2)) / (1 + (frequency / low) ** 2)
    spectrum = np.fft.fft2(rng.standard_normal((3, _TEXTURE_SIZE, _TEXTURE_SIZE))) * band
    layers = np.fft.ifft2(spectrum).real
    layers = layers / layers.std(axis=(1, 2), keepdims=True)
    mixed = np.einsum("dc,chw->hwd", rng.uniform(-0.2, 0.2, (3, 3)) + 0.12 * np.eye(3), layers)
    return np.asarray(np.clip(mixed + rng.uniform(0.35, 0.65, 3), 0, 1))


def _sample(texture: Image, y: Float[np.ndarray, "h w"], x: Float[np.ndarray, "h w"]) -> Image:
    """The texture, repeated without end, at these points; linear between its pixels."""
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    down, right = (y - top)[..., None], (x - left)[..., None]
    y0, y1, x0, x1 = (index % _TEXTURE_SIZE for index in (top, top + 1, left, left + 1))
    above = texture[y0, x0] * (1 - right) + texture[y0, x1] * right
    below = texture[y1, x0] * (1 - right) + texture[y1, x1] * right
    return np.asarray(above * (1 - down) + below * down)
