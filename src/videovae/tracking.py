"""Where a run's numbers go: a JSON line per logged step, TensorBoard, and one progress line on the console."""

import json
import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from jaxtyping import UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from rankwise import get_logger

logger = get_logger(__name__)


class Tracker:
    """Writes what was measured at a step under the run folder. The main process has the only one.

    A resumed run appends: where `metrics/rank-00000.jsonl` holds a step twice, the later line counts.

    Raises:
        OSError: the folder cannot be written (a full disk, say); from `log`, `clip` and `close`.
    Ranks: main process only.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        path = run_dir / "metrics" / "rank-00000.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = path.open("ab", buffering=0)
        _end_last_line(path, self._lines.fileno())
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step or None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the values of one step; names are like `generator/nll`."""
        row = {"step": step, "time": time.time(), **values}
        self._lines.write((json.dumps(row) + "\n").encode())
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def clip(self, step: int, name: str, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Show one row of frames in TensorBoard."""
        sheet = frames.permute(1, 0, 2, 3).flatten(1, 2)
        self._board.add_image(name, sheet, step, dataformats="HWC")

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def _end_last_line(path: Path, descriptor: int) -> None:
    """A killed run may have left half a line; what follows must not be glued to it."""
    if path.stat().st_size:
        with path.open("rb") as lines:
            lines.seek(-1, os.SEEK_END)
            if lines.read() != b"\n":
                os.write(descriptor, b"\n")


class ProgressLine:
    """Step, losses, clips per second and time left: a live bar in a terminal, a log line elsewhere.

    Ranks: main process only.
    """

    def __init__(self, num_steps: int, first_step: int, console: Console) -> None:
        self._num_steps = num_steps
        self._recent = deque([(first_step, time.monotonic())], maxlen=20)
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[losses]}"),
                TextColumn("{task.fields[speed]:.2f} clips/s  ETA"),
                TimeRemainingColumn(),
                console=console,
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
