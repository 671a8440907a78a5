"""Where else a run's numbers may go: TensorBoard, Weights & Biases, MLflow; one function each.

What they give connects to nothing until `rankwise.monitor.guard.Guarded` has it, on a thread of its own.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import RankwiseError
from rankwise.monitor.guard import CLOSE_SECONDS, Tracker
from rankwise.monitor.metrics import append_bytes

__all__ = ["Tracker", "mlflow", "tensorboard", "wandb"]

_NO_MLFLOW_NAME = re.compile(r"[^\w\-. :/]")


def tensorboard(folder: Path, *, first_step: int | None = None) -> Tracker:
    """Scalars and pictures for `tensorboard --logdir FOLDER`.

    Args:
        first_step: the step that this session begins at; TensorBoard hides what earlier sessions logged after it, and
            all that they logged where it is 0. None: it hides what they logged from our first logged step on.
    Ranks: local; only the main process's is ever opened.
    """
    return _TensorBoard(folder, first_step)


def wandb(
    project: str | None = None,
    *,
    folder: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tracker:
    """A run of its own at Weights & Biases; runs that the program itself has begun there are left alone.

    The account, the server and the mode come from W&B's own variables (`WANDB_API_KEY`, `WANDB_BASE_URL`,
    `WANDB_MODE=offline`) and files. It never asks for a key in the terminal. Unless `settings` say otherwise, it does
    not copy the console to W&B, and what is not uploaded a few seconds after the end stays on disk for `wandb sync`.

    Args:
        project: None is `WANDB_PROJECT`, or W&B's own choice.
        folder: where its files go, in a folder `wandb`; None is `WANDB_DIR`, or the current one.
        settings: of `wandb.Settings`.
        options: of `wandb.init`: `name`, `group`, `tags`, `config`; `id` and `resume="allow"` go on with a run.
    Ranks: local; only the main process's is ever opened.
    """
    return _Wandb({"project": project, "dir": folder and str(folder), **options}, settings or {})


def mlflow(
    experiment: str | None = None,
    *,
    uri: str | None = None,
    run_name: str | None = None,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Tracker:
    """A run at an MLflow server, or in a folder; the program's own active run is left alone.

    Args:
        experiment: made where there is none of that name. None is `MLFLOW_EXPERIMENT_NAME`, or MLflow's "Default".
        uri: of the server. None is `MLFLOW_TRACKING_URI`, or MLflow's own choice.
        run_id: goes on with that run in place of a new one. None is `MLFLOW_RUN_ID`, or a new one.
    Ranks: local; only the main process's is ever opened.
    """
    return _Mlflow(experiment, uri, run_name, run_id, dict(tags or {}))


class _TensorBoard(Tracker):
    """Writes the event file itself: torch's SummaryWriter adds a thread, which a full disk ends with a traceback."""

    name = "TensorBoard"
    package = "tensorboard"

    def __init__(self, folder: Path, first_step: int | None) -> None:
        self._folder = folder
        self._first_step = first_step
        self._is_begun = False

    def open(self) -> None:
        # Imports tensorboard, for most of a second.
        self._summary = importlib.import_module("torch.utils.tensorboard.summary")
        self._events = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._records = importlib.import_module("tensorboard.summary.writer.record_writer")
        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names, which are distinct also within a second.
        moment = f"{time.time():017.6f}"
        self._path = self._folder / f"events.out.tfevents.{moment}.{socket.gethostname()}.{os.getpid()}"

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        parts = [self._summary.scalar(name, float(value)).value[0] for name, value in values.items()]
        self._write(step, self._summary.Summary(value=parts), seconds)

    def image(self, step: int, name: str, pixels: NDArray[np.uint8], seconds: float) -> None:
        self._write(step, self._summary.image(name, pixels, dataformats="HWC"), seconds)

    def _write(self, step: int, summary: Any, seconds: float) -> None:
        if not self._is_begun:
            self._append(file_version="brain.Event:2", wall_time=seconds)
            # An event of this kind hides those of earlier files from its step on.
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._append(step=self._hidden_from(step), session_log=start, wall_time=seconds)
            self._is_begun = True
        self._append(step=step, summary=summary, wall_time=seconds)

    def _hidden_from(self, step: int) -> int:
        if self._first_step is None:
            return step
        return self._first_step + 1 if self._first_step else 0

    def _append(self, **fields: Any) -> None:
        record = io.BytesIO()
        self._records.RecordWriter(record).write(self._events.Event(**fields).SerializeToString())
        # Whole or not at all: after half a record TensorBoard reads no more of the file.
        append_bytes(self._path, record.getvalue())


class _Wandb(Tracker):
    name = "W&B"
    package = "wandb"

    def __init__(self, options: dict[str, Any], settings: Mapping[str, Any]) -> None:
        self._options = {name: value for name, value in options.items() if value is not None}
        # Its default waits for the upload without end, again when the process exits.
        self._settings = {"console": "off", "finish_timeout": CLOSE_SECONDS - 1.0, **settings}
        self._run: Any = None

    def open(self) -> None:
        library = importlib.import_module("wandb")
        if "dir" in self._options:
            Path(self._options["dir"]).mkdir(parents=True, exist_ok=True)
        self._require_key(library)
        # "create_new": a run that the program has begun is neither ended nor written into.
        options = {"reinit": "create_new", **self._options}
        self._run = library.init(settings=library.Settings(**self._settings), **options)
        # Our steps as its axis: its own must grow, and a resumed run makes some steps again.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._picture = library.Image

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        self._run.log({**values, "step": step})

    def image(self, step: int, name: str, pixels: NDArray[np.uint8], seconds: float) -> None:
        self._run.log({name: self._picture(pixels), "step": step})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _require_key(self, library: Any) -> None:
        """Refuse to go online without a key: `init` would ask for one in the terminal, amid the training's lines."""
        mode = self._options.get("mode") or self._settings.get("mode") or library.setup().settings.mode
        if mode == "online" and library.run is None and not library.login(prompt=False, verify=False):
            raise RankwiseError("there is no API key: set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline.")


class _Mlflow(Tracker):
    """By MLflow's client: its functions without one share a run with the program, and end it when the process exits."""

    name = "MLflow"
    package = "mlflow"
    distribution = "mlflow-skinny"

    def __init__(
        self, experiment: str | None, uri: str | None, run_name: str | None, run_id: str | None, tags: dict[str, str]
    ) -> None:
        self._experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
        self._uri = uri
        self._run_name = run_name
        self._run_id = run_id or os.environ.get("MLFLOW_RUN_ID")
        self._tags = tags

    def open(self) -> None:
        library = importlib.import_module("mlflow")
        self._metric = importlib.import_module("mlflow.entities").Metric
        client = library.MlflowClient(tracking_uri=self._uri)
        if self._run_id is None:
            found = client.get_experiment_by_name(self._experiment)
            experiment_id = found.experiment_id if found else client.create_experiment(self._experiment)
            self._run_id = client.create_run(experiment_id, run_name=self._run_name, tags=self._tags).info.run_id
        else:
            client.update_run(self._run_id, status="RUNNING")
        self._client = client

    def log(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        # Other characters would have it refuse the whole step.
        metrics = [
            self._metric(_NO_MLFLOW_NAME.sub("_", name), float(value), int(seconds * 1000), step)
            for name, value in values.items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run_id, status="FAILED" if failed else "FINISHED")
