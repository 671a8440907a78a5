"""What TensorBoard shows, and what W&B and MLflow are given; those two by stand-ins."""

import importlib.machinery
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rankwise.monitor import trackers
from rankwise.monitor.guard import Guarded


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_reads_scalars_and_pictures(tmp_path: Path) -> None:
    guarded = Guarded(trackers.tensorboard(tmp_path / "board"))
    guarded.log(1, {"nll": 1.5, "heldout/psnr_db": 20.0})
    guarded.log(2, {"nll": float("nan")})
    guarded.image(2, "heldout", np.full((4, 6, 3), 255, np.uint8))
    guarded.close()
    assert scalars(tmp_path / "board", "heldout/psnr_db") == [(1, 20.0)]
    (first, second) = scalars(tmp_path / "board", "nll")
    assert first == (1, 1.5)
    assert second[0] == 2
    assert second[1] != second[1]
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    (picture,) = events.Images("heldout")
    assert (picture.step, picture.height, picture.width) == (2, 4, 6)


@pytest.mark.parametrize(
    ("first_step", "new_steps", "shown"),
    [(None, [20, 30], [10, 20, 30]), (0, [20], [20]), (5, [10, 15], [10, 15]), (15, [20], [10, 20])],
)
def test_tensorboard_hides_what_an_earlier_session_logged_after_the_first_step(
    tmp_path: Path, first_step: int | None, new_steps: list[int], shown: list[int]
) -> None:
    for first, steps in ((None, [10, 20, 30]), (first_step, new_steps)):
        guarded = Guarded(trackers.tensorboard(tmp_path, first_step=first))
        for step in steps:
            guarded.log(step, {"nll": float(step)})
        guarded.close()
    assert [step for step, _ in scalars(tmp_path, "nll")] == shown


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_tensorboard_reads_on_after_a_full_disk_has_room_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        tracker = trackers.tensorboard(tmp_path / "board")
        tracker.open()
        tracker.log(0, {"nll": 0.0}, 1.0)
        ballast = tmp_path / "ballast"
        with pytest.raises(OSError, match="No space"):
            ballast.write_bytes(bytes(1 << 17))
        with pytest.raises(OSError, match="No space"):
            [tracker.log(step, {"nll": float(step)}, 1.0) for step in range(1, 1000)]
        ballast.unlink()
        tracker.log(1000, {"nll": 1000.0}, 1.0)
        found = scalars(tmp_path / "board", "nll")
        assert found[0] == (0, 0.0)
        assert found[-1] == (1000, 1000.0)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


class FakeRun:
    """A W&B run that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str | None]] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str | None = None, hidden: bool = False) -> None:
        self.metrics.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for `wandb`, as far as we use it; `has_key`, `mode` and `run` are for the test to set."""
    fake: Any = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.begun, fake.options, fake.prompts = FakeRun(), {}, []
    fake.has_key, fake.run, fake.mode = True, None, "online"
    fake.Settings = dict
    fake.Image = lambda pixels: ("picture", pixels.shape)
    fake.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=fake.mode))

    def login(*, prompt: bool, verify: bool) -> bool:
        fake.prompts.append(prompt)
        return bool(fake.has_key)

    def init(**options: Any) -> FakeRun:
        fake.options = options
        run: FakeRun = fake.begun
        return run

    fake.login, fake.init = login, init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_values_with_our_steps_as_their_axis(fake_wandb: Any, tmp_path: Path) -> None:
    guarded = Guarded(trackers.wandb("videos", folder=tmp_path / "run", name="first", settings={"console": "wrap"}))
    guarded.log(3, {"nll": 1.0})
    guarded.image(3, "clip", np.zeros((2, 4, 3), np.uint8))
    guarded.log(2, {"nll": 2.0})
    guarded.close(failed=True)
    run = fake_wandb.begun
    assert run.rows == [{"nll": 1.0, "step": 3}, {"clip": ("picture", (2, 4, 3)), "step": 3}, {"nll": 2.0, "step": 2}]
    assert ("*", "step") in run.metrics
    assert run.exit_code == 1
    options = fake_wandb.options
    assert (options["project"], options["dir"], options["name"]) == ("videos", str(tmp_path / "run"), "first")
    assert options["reinit"] == "create_new", "a run of the program's own must not be ended"
    assert options["settings"]["console"] == "wrap"
    assert 0 < options["settings"]["finish_timeout"] < 5
    assert (tmp_path / "run").is_dir()
    assert fake_wandb.prompts == [False]


def test_wandb_without_a_key_never_asks_in_the_terminal(fake_wandb: Any, caplog: pytest.LogCaptureFixture) -> None:
    fake_wandb.has_key = False
    guarded = Guarded(trackers.wandb())
    guarded.log(1, {"nll": 1.0})
    guarded.close()
    assert "there is no API key: set WANDB_API_KEY" in caplog.text
    assert fake_wandb.options == {}


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_needs_no_key_where_it_does_not_go_online(fake_wandb: Any, mode: str) -> None:
    fake_wandb.has_key, fake_wandb.mode = False, mode
    guarded = Guarded(trackers.wandb())
    guarded.log(1, {"nll": 1.0})
    guarded.close()
    assert fake_wandb.begun.rows == [{"nll": 1.0, "step": 1}]
    assert fake_wandb.begun.exit_code == 0


class FakeClient:
    """An MLflow client that keeps what it is given."""

    def __init__(self, tracking_uri: str | None) -> None:
        self.uri = tracking_uri
        self.calls: list[tuple[Any, ...]] = []
        clients.append(self)

    def get_experiment_by_name(self, name: str) -> Any:
        return types.SimpleNamespace(experiment_id="3") if name == "known" else None

    def create_experiment(self, name: str) -> str:
        self.calls.append(("create_experiment", name))
        return "4"

    def create_run(self, experiment_id: str, run_name: str | None, tags: dict[str, str]) -> Any:
        self.calls.append(("create_run", experiment_id, run_name, tags))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r9"))

    def update_run(self, run_id: str, status: str) -> None:
        self.calls.append(("update_run", run_id, status))

    def log_batch(self, run_id: str, metrics: list[tuple[str, float, int, int]]) -> None:
        self.calls.append(("log_batch", run_id, [(key, value, step) for key, value, _, step in metrics]))

    def set_terminated(self, run_id: str, status: str) -> None:
        self.calls.append(("set_terminated", run_id, status))


clients: list[FakeClient] = []


@pytest.fixture
def fake_mlflow(monkeypatch: pytest.MonkeyPatch) -> list[FakeClient]:
    """Stands in for `mlflow`, as far as we use it; gives the clients that are made."""
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    fake: Any = types.ModuleType("mlflow")
    entities: Any = types.ModuleType("mlflow.entities")
    fake.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
    fake.MlflowClient, entities.Metric = FakeClient, lambda *fields: fields
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    clients.clear()
    return clients


@pytest.mark.parametrize(
    ("experiment", "made"),
    [("known", [("create_run", "3", "n", {})]), ("new", [("create_experiment", "new"), ("create_run", "4", "n", {})])],
)
def test_mlflow_makes_the_experiment_only_where_there_is_none(
    fake_mlflow: list[FakeClient], experiment: str, made: list[tuple[Any, ...]]
) -> None:
    guarded = Guarded(trackers.mlflow(experiment, uri="http://host", run_name="n"))
    guarded.log(5, {"psnr@db": 1.0})
    guarded.close(failed=True)
    (client,) = fake_mlflow
    assert client.uri == "http://host"
    assert client.calls == [
        *made,
        ("log_batch", "r9", [("psnr_db", 1.0, 5)]),
        ("set_terminated", "r9", "FAILED"),
    ]


def test_mlflow_goes_on_with_a_run_that_is_named(fake_mlflow: list[FakeClient]) -> None:
    guarded = Guarded(trackers.mlflow(run_id="r5"))
    guarded.close()
    (client,) = fake_mlflow
    assert client.calls == [("update_run", "r5", "RUNNING"), ("set_terminated", "r5", "FINISHED")]


def test_making_a_tracker_imports_and_connects_nothing() -> None:
    program = (
        "import sys; from rankwise.monitor import trackers; from pathlib import Path; trackers.wandb(); "
        "trackers.mlflow(); trackers.tensorboard(Path('x')); "
        "print([name for name in ('wandb', 'mlflow', 'tensorboard', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
