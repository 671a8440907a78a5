"""The `videovae` command: `train`, `make-clips`, `reconstruct`, `export`."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

import rankwise
from rankwise.errors import RankwiseError

if TYPE_CHECKING:
    from videovae.config import TrainConfig

USAGE = """usage: videovae COMMAND [OPTION ...]

train         train a causal video VAE; starts the ranks of this node itself, or joins those of torchrun
make-clips    write H.264 clips of moving textures, to train on where there are no videos
reconstruct   a video through the model and back, with its PSNR
export        a trained model as a folder in the layout of diffusers

`videovae COMMAND --help` lists the options of each."""

DESCRIPTION = (
    "Train a causal video VAE. --preset {presets} (here: {preset}) gives the defaults below; --nproc N starts N ranks "
    "on this node (default: all accelerators, or 2 on a CPU; for more nodes use torchrun)."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 when it is done; 2 when the input cannot be used or a rank failed, with the reason on stderr.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if given else 2
    if given[0] not in COMMANDS:
        print(f"{USAGE}\n\nerror: {given[0]!r} is no command", file=sys.stderr)
        return 2
    try:
        return COMMANDS[given[0]](given[1:])
    except RankwiseError as error:
        if not error.on_every_rank or _is_main_process():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def train_command(arguments: Sequence[str]) -> int:
    """`videovae train`: start the ranks, or, inside a launcher, be one."""
    from videovae.presets import PRESETS

    parser = argparse.ArgumentParser("videovae train", add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="debug")
    parser.add_argument("--nproc", type=int)
    own, rest = parser.parse_known_args(arguments)
    config = _parse_config(own.preset, rest)

    identity = rankwise.Identity.resolve(os.environ)
    if identity.launcher == "single":
        num_processes = own.nproc if own.nproc is not None else _default_processes()
        if num_processes < 1:
            raise rankwise.LaunchError(f"--nproc is {num_processes}; give 1 or more.")
        _check_before_launch(config)
        if num_processes > 1:
            return _launch(num_processes, arguments)
    elif own.nproc not in (None, identity.local_world_size):
        raise rankwise.LaunchError(
            f"--nproc is {own.nproc}, but {identity.launcher} has started {identity.local_world_size} processes on "
            "this node. Leave --nproc away under a launcher."
        )

    from videovae.train import train

    train(config)
    return 0


def _parse_config(preset: str, arguments: Sequence[str]) -> "TrainConfig":
    from videovae.config import TrainConfig
    from videovae.errors import ConfigError
    from videovae.presets import PRESETS

    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            return tyro.cli(
                TrainConfig,
                default=PRESETS[preset](),
                args=list(arguments),
                prog="videovae train",
                description=DESCRIPTION.format(presets="|".join(sorted(PRESETS)), preset=preset),
            )
    except SystemExit as error:
        # Settings that contradict each other say so themselves; tyro would frame it in a box of five lines.
        cause = error.__context__
        while cause is not None:
            if isinstance(cause, ConfigError):
                raise cause from None
            cause = cause.__context__
        sys.stderr.write(refusal.getvalue())
        raise


def _check_before_launch(config: "TrainConfig") -> None:
    """What can be seen to be wrong without starting a rank."""
    from rankwise.checkpoint import CheckpointManager
    from videovae.data.index import find_videos
    from videovae.resume import choose_checkpoint

    if config.data is not None:
        find_videos(config.data)
    choose_checkpoint(config, CheckpointManager(config.run_dir / "checkpoints"))


def _launch(num_processes: int, arguments: Sequence[str]) -> int:
    from rankwise.launch import launch

    status = launch(["--nproc-per-node", str(num_processes), "-m", "videovae", "train", *arguments])
    if status == KILLED_BY_SIGTERM:
        # A rank that trains answers SIGTERM by saving; only one that was still starting is killed by it.
        print("stopped before the first step", file=sys.stderr)
        return 0
    return status


def _default_processes() -> int:
    import torch

    return torch.accelerator.device_count() or 2


def make_clips_command(arguments: Sequence[str]) -> int:
    """`videovae make-clips`."""

    def make_clips(
        directory: tyro.conf.Positional[Path],
        num_clips: int = 16,
        num_frames: int = 49,
        height: int = 96,
        width: int = 96,
        fps: int = 8,
        seed: int = 0,
    ) -> None:
        """Write H.264 clips of moving textures.

        Args:
            directory: New or empty folder.
            num_clips: How many files.
            num_frames: Frames of each.
            height: Pixels.
            width: Pixels.
            fps: Frames per second.
            seed: Decides the pictures.
        """
        from videovae.data.synthetic import make_clips

        paths = make_clips(
            directory,
            num_clips=num_clips,
            num_frames=num_frames,
            height=height,
            width=width,
            fps=fps,
            seed=seed,
        )
        print(f"wrote {len(paths)} clips of {num_frames} frames, {width}x{height}, to {directory}")

    tyro.cli(make_clips, args=list(arguments), prog="videovae make-clips")
    return 0


def reconstruct_command(arguments: Sequence[str]) -> int:
    """`videovae reconstruct`."""

    def reconstruct(
        weights: tyro.conf.Positional[Path],
        source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IN.mp4")],
        target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT.mp4")],
    ) -> None:
        """Encode a video, decode it, write the result and print its PSNR.

        Args:
            weights: A run folder (its newest checkpoint), one checkpoint, or an exported folder; the averaged
                weights are taken where there are two kinds.
            source: Any video, of any size; 400 frames of 320x180 at most, for now.
            target: Where the H.264 file goes.
        """
        from videovae.reconstruct import load_model, reconstruct

        model, origin = load_model(weights)
        psnr_db = reconstruct(model, source, target)
        print(f"{target}: PSNR {psnr_db:.2f} dB, weights of {origin}")

    tyro.cli(reconstruct, args=list(arguments), prog="videovae reconstruct")
    return 0


def export_command(arguments: Sequence[str]) -> int:
    """`videovae export`."""

    def export(
        run: tyro.conf.Positional[Path], directory: tyro.conf.Positional[Path], weights: Literal["ema", "raw"] = "ema"
    ) -> None:
        """Write a trained model as a folder in the layout of diffusers.

        Args:
            run: A run folder (its newest checkpoint) or one checkpoint.
            directory: New or empty folder.
            weights: The averaged ones, or those of the last step.
        """
        from videovae.export import export

        print(f"wrote the {weights} weights of {export(run, directory, weights)} to {directory}")

    tyro.cli(export, args=list(arguments), prog="videovae export")
    return 0


def _is_main_process() -> bool:
    return rankwise.Identity.resolve(os.environ).is_main_process


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train_command,
    "make-clips": make_clips_command,
    "reconstruct": reconstruct_command,
    "export": export_command,
}
KILLED_BY_SIGTERM = 143
