"""The `videovae` command: `train`, `make-clips`, `reconstruct`, `export`, `import`."""

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

import rankwise
from rankwise.errors import CheckpointCorruptError, RankwiseError
from rankwise.lastwords import last_words

if TYPE_CHECKING:
    from videovae.config import TrainConfig

USAGE = """usage: videovae COMMAND [OPTION ...]

train         train a causal video VAE; starts the ranks of this node itself, or joins those of torchrun
make-clips    write H.264 clips of moving textures, to train on where there are no videos
reconstruct   a video through the model and back, with its PSNR
export        a trained model as a folder in the layout of diffusers
import        published weights, or a checkpoint of Open-Sora-Plan or WF-VAE, as such a folder

`videovae COMMAND --help` lists the options of each."""

STOPPED_EARLY = "stopped before the first step"
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
    except (RankwiseError, OSError) as error:
        words = last_words(error)
        if words is None and _is_said_here(error):
            words = f"error: {error}"
        if words:
            print(words.rstrip(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _is_said_here(error: RankwiseError | OSError) -> bool:
    """Whether this rank has to tell of an error, so that a console shows it once."""
    if not isinstance(error, RankwiseError):
        return True
    try:
        identity = rankwise.Identity.resolve(os.environ)
    except rankwise.LaunchError:
        return True
    if error.on_every_rank:
        return identity.is_main_process
    if isinstance(error, rankwise.LaunchError):
        return identity.is_local_main_process  # nodes may differ in it
    return True


def train_command(arguments: Sequence[str]) -> int:
    """`videovae train`: start the ranks, or, inside a launcher, be one."""
    identity = rankwise.Identity.resolve(os.environ)
    if identity.launcher != "single":
        return _train_as_rank(arguments, identity)
    with _stopping_early():
        config, num_processes = _parse(arguments)
        _check_before_launch(config)
        if num_processes is None:
            num_processes = _default_processes()
        importlib.import_module("videovae.train" if num_processes == 1 else "rankwise.launch")
    if num_processes == 1:
        return _train(config)
    from rankwise.launch import launch

    # A rank that trains answers SIGTERM by saving. One that is killed by it was still starting: nothing is lost.
    return launch(["--nproc-per-node", str(num_processes), "-m", "videovae", "train", *arguments], stopped_status=0)


def _train_as_rank(arguments: Sequence[str], identity: rankwise.Identity) -> int:
    try:
        config, num_processes = _parse(arguments)
    except RankwiseError as error:
        error.on_every_rank = True  # every rank has the same words
        raise
    if num_processes not in (None, identity.local_world_size):
        raise rankwise.LaunchError(
            f"--nproc is {num_processes}, but {identity.launcher} has started {identity.local_world_size} processes on "
            "this node. Leave --nproc away under a launcher."
        )
    return _train(config)


def _train(config: "TrainConfig") -> int:
    from videovae.train import train

    try:
        train(config)
    except rankwise.StoppedError:
        print(STOPPED_EARLY, file=sys.stderr)
    except rankwise.RankFailedError as error:
        if error.failures[0].error_type != rankwise.StoppedError.__name__:
            raise
    return 0


@contextlib.contextmanager
def _stopping_early() -> Iterator[None]:
    """Stop signals end in status 0 until the ranks or the session answer them: importing torch takes seconds."""

    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        raise SystemExit(0)

    # Signals that this process was started to ignore, as behind nohup, stay ignored.
    wanted = [each for each in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, stop) for each in wanted}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        if asked:
            print(STOPPED_EARLY, file=sys.stderr)
    if asked:  # the exception was lost in code that may not raise, such as a finalizer amid the imports
        raise SystemExit(0)


def _parse(arguments: Sequence[str]) -> tuple["TrainConfig", int | None]:
    """The config, and the number of processes that was asked for."""
    from videovae.presets import PRESETS

    parser = argparse.ArgumentParser("videovae train", add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="debug")
    parser.add_argument("--nproc", type=int)
    own, rest = parser.parse_known_args(arguments)
    config = _parse_config(own.preset, rest)
    if own.nproc is not None and own.nproc < 1:
        raise rankwise.LaunchError(f"--nproc is {own.nproc}; give 1 or more.")
    return config, own.nproc


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
    from videovae.data.index import find_videos
    from videovae.errors import ConfigError, RunDirError
    from videovae.resume import choose_checkpoint
    from videovae.weights import check_start

    try:
        (config.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(f"run folder {config.run_dir} cannot be written ({error.strerror}). Give another.") from error

    if config.data is not None:
        find_videos(config.data)
    weights = config.loss.perceptual_weights
    if weights is not None and not weights.exists():
        raise ConfigError(f"loss.perceptual_weights is {weights}, which does not exist. Give a file or folder.")
    # The ranks look at all of a checkpoint, and go on to an older one where the newest is damaged.
    with contextlib.suppress(CheckpointCorruptError):
        if choose_checkpoint(config, verified=False) is None and config.init_from is not None:
            check_start(config.init_from, config.model)


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
        weights: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WEIGHTS")],
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
        run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
        directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")],
        weights: Literal["ema", "raw"] = "ema",
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


def import_command(arguments: Sequence[str]) -> int:
    """`videovae import`."""

    def import_(
        source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")],
        directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")],
        weights: Literal["auto", "ema", "raw"] = "auto",
        config: Path | None = None,
    ) -> None:
        """Write weights that others trained as a folder that the other commands take. Nothing in them is executed.

        Args:
            source: A folder in the layout of diffusers, or a .ckpt file of the trainers of Open-Sora-Plan and WF-VAE.
            directory: New or empty folder.
            weights: The averaged ones, or those of the last step; auto takes the averaged ones where there are some.
            config: The model's config.json, where it does not lie beside the weights.
        """
        from videovae.published import import_weights

        found = import_weights(source, directory, weights=weights, config=config)
        kind = {"ema": "averaged ", "raw": "raw ", None: ""}[found.kind]
        step = "" if found.step is None else f" (step {found.step})"
        print(f"wrote the {kind}weights of {source}{step} to {directory}")

    tyro.cli(import_, args=list(arguments), prog="videovae import")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train_command,
    "make-clips": make_clips_command,
    "reconstruct": reconstruct_command,
    "export": export_command,
    "import": import_command,
}
