"""`train(config)`: the training run, read top to bottom."""

import json
import math
from contextlib import ExitStack, closing

import torch

import rankwise
from rankwise.checkpoint import CheckpointManager
from rankwise.files import write_atomic
from videovae.config import MonitorConfig, TrainConfig, fixed_settings
from videovae.data.index import check_failures, heldout_ranges
from videovae.data.video import to_model_range
from videovae.errors import DataError, DivergedError, RunDirError
from videovae.evaluate import Share, evaluate, heldout_share, save_samples
from videovae.losses import is_discriminator_step
from videovae.resume import choose_checkpoint, restore
from videovae.state import TrainState, build_state, check_precision
from videovae.steps import discriminator_step, generator_step
from videovae.tracking import ProgressLine, Tracker, build_trackers
from videovae.videos import open_videos
from videovae.weights import start_from

logger = rankwise.get_logger(__name__)

ON_CONSOLE = ("nll", "wavelet", "adversarial", "discriminator")
"""Losses of the progress line; the metrics file and TensorBoard have all."""


def train(config: TrainConfig) -> int:
    """Train until `config.num_steps`, or until a rank is asked to stop (SIGTERM, Ctrl-C), and save.

    A run that is started again goes on from its newest checkpoint, to the same weights and losses.

    Returns:
        The step that was reached; below `config.num_steps` where the run was asked to stop.
    Raises:
        ConfigError, DataError, WeightsError: the settings, the videos or the weights cannot be used.
        RunDirError, CheckpointError: the run folder cannot be written; earlier checkpoints are untouched.
        DivergedError: the losses are no numbers any more; earlier checkpoints are untouched.
        RankFailedError: another rank failed first.
    Ranks: every rank must call.
    """
    with ExitStack() as stack:
        # Who am I, where do I compute, and the group: identity -> device from local_rank -> process group.
        session = stack.enter_context(rankwise.init(config.run_dir, timeout_seconds=config.timeout_seconds))
        identity, device, is_main = session.identity, session.device, session.identity.is_main_process
        rankwise.seed_all(config.seed, identity)
        rankwise.on_main_process(check_precision, config.precision, device)

        # The main process looks at the folders, and every rank gets the same answer: where to go on, which videos.
        origin = rankwise.on_main_process(choose_checkpoint, config)
        opened = open_videos(config, session, origin.heldout if origin else None)
        if opened is None:
            logger.info("stopped before the first step", ranks="main")
            return origin.step if origin else 0
        videos, heldout_videos = opened

        # The model on the device, DDP, this rank's share of the clips; then the checkpoint over all of it.
        kept_out = origin.heldout if origin else heldout_ranges(heldout_videos)
        state = build_state(config, session, videos, kept_out)
        stack.enter_context(closing(state.loader))
        heldout = heldout_share(heldout_videos, config, identity)
        checkpoints = stack.enter_context(
            CheckpointManager(
                config.run_dir / "checkpoints",
                keep_last=config.keep_last,
                async_save=config.async_save,
                on_failure=config.on_save_failure,
                config=fixed_settings(config),
            )
        )
        checkpoints.acquire()
        if origin is not None:
            restore(origin, state, config, checkpoints)
            if state.step >= config.num_steps:
                logger.info(f"step {config.num_steps} is reached already: nothing to train", ranks="main")
        elif config.init_from is not None:
            start_from(config.init_from, state)
        saved_step = state.step if origin and origin.is_own else None
        rankwise.on_main_process(write_config, config)
        monitor = stack.enter_context(build_monitor(session, state, config.monitor))
        reported = set(state.loader.failures)
        num_clips = config.clips.batch_size * config.accumulate * identity.world_size
        if is_main:
            tracker = stack.enter_context(Tracker(config.run_dir, state.step, build_trackers(config)))
            progress = stack.enter_context(closing(ProgressLine(config.num_steps, state.step, rankwise.console())))

        @monitor.phase("validation")
        def measure_quality() -> None:
            """Held-out PSNR with the raw and the averaged weights. Every rank must call."""
            # A run that is stopped is evaluated once more, and must go on to the same numbers.
            with state.undone():
                quality, frames = evaluate(state, heldout, config, device)
            if is_main and quality:
                tracker.log(state.step, quality)
                if frames is not None:
                    tracker.clip(state.step, "heldout", frames)
                logger.info(
                    f"step {state.step}: held-out PSNR {quality['heldout/psnr_db']:.2f} dB, "
                    f"with averaged weights {quality['heldout/psnr_ema_db']:.2f} dB"
                )
                progress.skip_pause()

        @monitor.phase("checkpoint")
        def save() -> None:
            """Every rank copies its part; the checkpoint appears when all have written theirs."""
            nonlocal saved_step
            share_losses(state, config)
            checkpoints.save(state.step, state.items(config))
            saved_step = state.step
            if is_main:
                progress.skip_pause()

        stopped = session.agree_to_stop()
        if state.step == 0 and not stopped:
            measure_quality()
        while state.step < config.num_steps and not (stopped := session.agree_to_stop()):
            with monitor.phase("data"):
                clips = [next(state.loader).video for _ in range(config.accumulate)]
                batches = [to_model_range(video.to(device, non_blocking=True)) for video in clips]
            if is_discriminator_step(state.step, config.loss.disc_start):
                discriminator_step(batches, state, config)
            else:
                generator_step(batches, state, config)
            state.step += 1
            session.set_step(state.step)
            if is_main:
                clips_per_second = progress.advance(state.step, num_clips)

            if _due(state.step, config.log_every, config.num_steps):
                losses = share_losses(state, config)
                num_skipped = share_failures(state, reported, len(videos), config)
                if is_main:
                    speed = {"clips_per_second": clips_per_second, "skipped_videos": num_skipped}
                    tracker.log(state.step, losses | speed)
                    shown = {name: losses[name] for name in ON_CONSOLE if name in losses}
                    progress.show(state.step, shown, clips_per_second, num_clips)
            if _due(state.step, config.eval_every, config.num_steps):
                measure_quality()
            if _due(state.step, config.save_every, config.num_steps):
                save()
            monitor.step(state.step)

        if saved_step != state.step and not (stopped and state.step == 0):
            save()
        if state.step < config.num_steps:
            logger.info(f"stopped at step {state.step}; the same command goes on from here", ranks="main")
        elif is_main and heldout:
            # The others have left: a phase of its own, that nobody takes this for a step that does not end.
            with monitor.phase("samples"):
                write_samples(state, heldout, config, device)
        return state.step


def build_monitor(session: rankwise.Session, state: TrainState, config: MonitorConfig) -> rankwise.Monitor:
    """What tells where each rank's time goes, and which rank is slow or stuck.

    Raises:
        RankwiseError: a setting cannot be used.
    Ranks: every rank must call.
    """
    monitor = rankwise.Monitor(
        session,
        step=state.step,
        hang_timeout_seconds=config.hang_timeout_seconds,
        on_hang=config.on_hang,
        prometheus_port=config.prometheus_port,
    )
    if session.identity.world_size > 1:
        monitor.watch(state.parallel_vae, state.parallel_discriminator)
    return monitor


def share_losses(state: TrainState, config: TrainConfig) -> dict[str, float]:
    """The newest losses, averaged over the ranks.

    Raises:
        DivergedError: one of them is no number, on every rank. (In float16 single steps may overflow.)
    Ranks: every rank must call.
    """
    losses = rankwise.reduce_mean({name: value.item() for name, value in state.losses.items()})
    broken = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
    if broken and config.precision != "fp16":
        error = DivergedError(
            f"the run diverged: at step {state.step} {', '.join(broken)}. Start afresh in a "
            "new --run-dir, with a lower optimizer.learning_rate or with optimizer.max_grad_norm."
        )
        error.on_every_rank = True
        raise error
    return losses


def share_failures(state: TrainState, reported: set[str], num_videos: int, config: TrainConfig) -> int:
    """Name videos that any rank could not decode, once in the whole job.

    Returns:
        How many there are so far.
    Raises:
        DataError: more than `clips.max_failed_fraction` of the videos, on every rank.
    Ranks: every rank must call.
    """
    for failures in rankwise.gather_objects(state.loader.failures):
        state.loader.failures.update(failures)
    failed = sorted(state.loader.failures.items())
    for name, reason in failed:
        if name not in reported:
            logger.warning(f"skipped {name}: {reason}", ranks="main")
    reported.update(state.loader.failures)
    rankwise.on_main_process(check_failures, failed, num_videos, config.clips.max_failed_fraction)
    return len(failed)


def write_config(config: TrainConfig) -> None:
    """Keep the resolved config in the run folder.

    Raises:
        RunDirError: it cannot be written.
    Ranks: main process only.
    """
    path = config.run_dir / "config.json"
    try:
        write_atomic(path, json.dumps(config.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise RunDirError(
            f"{path} cannot be written ({error.strerror}). Make room, or give another --run-dir."
        ) from error


def write_samples(state: TrainState, heldout: Share, config: TrainConfig, device: torch.device) -> None:
    """Show what the finished run can do; it is finished and saved, whatever becomes of this.

    Ranks: main process only.
    """
    try:
        video, sheet = save_samples(state, heldout, config, device)
        logger.info(f"wrote {video} and {sheet}")
    except (DataError, OSError) as error:
        logger.warning(f"no samples were written: {error}")


def _due(step: int, every: int, num_steps: int) -> bool:
    return step % every == 0 or step == num_steps
