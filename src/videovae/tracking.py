"""Where a run's numbers go: a JSON line per logged step, TensorBoard, and one progress line on the console."""

import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from jaxtyping import UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch import Tensor

from rankwise import get_logger
from rankwise.monitor import trackers
from rankwise.monitor.guard import Guarded, close_all
from rankwise.monitor.metrics import MetricsFile
from videovae.config import TrainConfig

logger = get_logger(__name__)


class Tracker:
    """Writes what was measured at a step under the run folder, and passes it on. The main process has the only one.

    A resumed run appends: where `metrics/rank-00000.jsonl` holds a step twice, the later line counts. What cannot be
    written (a full disk, say) is dropped, and the log says so once: training goes on, and the next checkpoint decides.
    TensorBoard and the others work on threads of their own, and nobody waits for them.

    Args:
        others: where else the values go; see `rankwise.monitor.trackers`.
    Ranks: main process only.
    """

    def __init__(self, run_dir: Path, first_step: int, others: Sequence[trackers.Tracker] = ()) -> None:
        self._file = MetricsFile(run_dir, first_step)
        board = trackers.tensorboard(run_dir / "tensorboard", first_step=first_step)
        self._others = [Guarded(tracker) for tracker in (board, *others)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close_all(self._others, failed=error is not None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the values of one step; those that are no finite numbers are null in the file."""
        self._file.write(step, values)
        for tracker in self._others:
            tracker.log(step, values)

    def clip(self, step: int, name: str, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Show one row of frames where pictures are shown."""
        sheet = frames.permute(1, 0, 2, 3).flatten(1, 2).numpy(force=True)
        for tracker in self._others:
            tracker.image(step, name, sheet)

    def close(self) -> None:
        """Give the others a few seconds for what they have not written yet."""
        close_all(self._others)


def build_trackers(config: TrainConfig) -> list[trackers.Tracker]:
    """What `config.trackers` names. Servers, accounts and projects come from the libraries' own variables.

    Ranks: local; nothing is connected to.
    """
    name = config.run_dir.name
    built = []
    for tracker in config.trackers:
        if tracker == "wandb":
            project = os.environ.get("WANDB_PROJECT", "videovae")
            built.append(trackers.wandb(project, folder=config.run_dir, name=name, config=config.to_dict()))
        else:
            built.append(trackers.mlflow(os.environ.get("MLFLOW_EXPERIMENT_NAME", "videovae"), run_name=name))
    return built


class ProgressLine:
    """Step, losses, clips per second and time left: a live bar in a terminal, a log line elsewhere.

    Ranks: main process only.
    """

    def __init__(self, num_steps: int, first_step: int, console: Console) -> None:
        self._num_steps = num_steps
        self._recent = deque([(first_step, time.monotonic())], maxlen=20)
        self._bar: Progress | None = None
        if console.is_terminal:
            # What has to be seen comes first; a narrow terminal cuts the losses.
            losses = Column(ratio=1, no_wrap=True, overflow="ellipsis")
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=10),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[speed]:.1f} clips/s"),
                TextColumn("{task.fields[losses]}", table_column=losses),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=num_steps, completed=first_step, losses="", speed=0.0)
            self._bar.start()

    def advance(self, step: int, num_clips: int) -> float:
        """One more step is done, over `num_clips` clips of all ranks; gives the recent clips per second."""
        self._recent.append((step, time.monotonic()))
        (old_step, old_time), (_, now) = self._recent[0], self._recent[-1]
        speed = (step - old_step) * num_clips / max(now - old_time, 1e-9)
        if self._bar:
            self._bar.update(self._task, completed=step, speed=speed)
        return speed

    def show(self, step: int, losses: Mapping[str, float], clips_per_second: float, num_clips: int) -> None:
        """The losses of a logged step."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        if self._bar:
            self._bar.update(self._task, losses=text)
            return
        seconds = (self._num_steps - step) * num_clips / max(clips_per_second, 1e-9)
        eta = f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
        logger.info(f"step {step}/{self._num_steps}  {text}  {clips_per_second:.2f} clips/s  ETA {eta}")

    def skip_pause(self) -> None:
        """What came between two steps (an evaluation, a save) does not count into the speed."""
        step = self._recent[-1][0]
        self._recent.clear()
        self._recent.append((step, time.monotonic()))

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
