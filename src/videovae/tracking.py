"""Where a run's numbers go: a JSON line per logged step, TensorBoard, and one progress line on the console."""

import errno
import itertools
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxtyping import UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from rankwise import get_logger

logger = get_logger(__name__)


class Tracker:
    """Writes what was measured at a step under the run folder. The main process has the only one.

    A resumed run appends: where `metrics/rank-00000.jsonl` holds a step twice, the later line counts. What cannot be
    written (a full disk, say) is dropped, and the log says so once: training goes on, and the next checkpoint decides.

    Ranks: main process only.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self._failed = False
        # TensorBoard writes in a thread of its own; what fails there would end in a traceback on the console.
        self._thread_hook = threading.excepthook
        threading.excepthook = self._thread_failed
        self._path = run_dir / "metrics" / "rank-00000.jsonl"
        self._board: SummaryWriter | None = None
        with self._tolerated():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if first_step == 0:
                _set_aside(self._path)
            _end_last_line(self._path)
        with self._tolerated():
            # Steps after the checkpoint are made again; a fresh run hides whatever an earlier one left.
            purge_step = first_step + 1 if first_step else 0
            # rankwise: ignore[RW302] train() makes this object on the main process alone
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the values of one step; those that are no finite numbers are null in the file."""
        row = {"step": step, "time": time.time(), **values}
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        with self._tolerated():
            append_line(self._path, json.dumps(finite, allow_nan=False))
        with self._tolerated(), self._board_or_none() as board:
            for name, value in values.items():
                if board:
                    board.add_scalar(name, value, step)

    def clip(self, step: int, name: str, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Show one row of frames in TensorBoard."""
        sheet = frames.permute(1, 0, 2, 3).flatten(1, 2)
        with self._tolerated(), self._board_or_none() as board:
            if board:
                board.add_image(name, sheet, step, dataformats="HWC")

    def close(self) -> None:
        with self._tolerated():
            if self._board:
                self._board.close()
        threading.excepthook = self._thread_hook

    def _thread_failed(self, args: threading.ExceptHookArgs) -> None:
        if isinstance(args.exc_value, OSError):
            self._warn(args.exc_value)
        else:
            self._thread_hook(args)

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            logger.warning(f"metrics are no longer complete: {error}")
        self._failed = True

    @contextmanager
    def _board_or_none(self) -> Iterator[SummaryWriter | None]:
        """TensorBoard's writer; once its thread has failed it fails for good, and is given up."""
        try:
            yield self._board
        except OSError:
            self._board = None
            raise

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._warn(error)


def append_line(path: Path, line: str) -> None:
    """Add one line to a file, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there is unchanged.
    Ranks: local; no two ranks may write one path.
    """
    content = (line + "\n").encode()
    with path.open("ab", buffering=0) as lines:
        size = lines.tell()
        try:
            if lines.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            with suppress(OSError):
                lines.truncate(size)
            raise


def _set_aside(path: Path) -> None:
    """Keep the lines of an earlier run that left no checkpoint, but not among those of this one."""
    if path.exists() and path.stat().st_size:
        numbers = (number for number in itertools.count(1) if not path.with_suffix(f".jsonl.{number}").exists())
        path.rename(path.with_suffix(f".jsonl.{next(numbers)}"))


def _end_last_line(path: Path) -> None:
    """A killed run may have left half a line; what follows must not be glued to it."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as lines:
            lines.seek(-1, os.SEEK_END)
            if lines.read() != b"\n":
                lines.write(b"\n")


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
