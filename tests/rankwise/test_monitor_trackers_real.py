"""W&B's and MLflow's own libraries under the guard: what arrives, and how long a process takes whose server is away."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

# They need `rankwise[trackers]`, some 180 MB, which `make test-all` installs and `make test` does not.
pytestmark = pytest.mark.slow


def require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"needs {package}, of rankwise[trackers]")


def run_program(program: str, *, seconds: float = 100.0, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the libraries start threads and processes, and have their say in how it ends."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_"))}
    environ |= {"WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env=environ | variables,
    )
    assert done.returncode == 0, done.stderr
    return done


LOG_AND_CLOSE = """
import logging, sys, time
from pathlib import Path
from rankwise.monitor import trackers
from rankwise.monitor.guard import Guarded
logging.basicConfig(format="%(message)s")
guarded = Guarded({tracker}, close_seconds={close_seconds})
slowest = 0.0
for step in range(1, 201):
    began = time.perf_counter()
    guarded.log(step, {{"nll": 1.0 / step, "odd name (dB)": 2.0}})
    slowest = max(slowest, time.perf_counter() - began)
guarded.close()
print("slowest", slowest)
"""


def slowest_seconds(done: subprocess.CompletedProcess[str]) -> float:
    return float(done.stdout.split()[-1])


def test_the_real_wandb_keeps_an_offline_run(tmp_path: Path) -> None:
    require("wandb")
    tracker = f"trackers.wandb('videos', folder=Path({str(tmp_path)!r}))"
    done = run_program(LOG_AND_CLOSE.format(tracker=tracker, close_seconds=60.0), WANDB_MODE="offline")
    assert "training goes on" not in done.stderr
    assert "have not reached" not in done.stderr
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    assert b"odd name (dB)" in content
    assert content.count(b'"nll"') + content.count(b"nll") >= 200


@pytest.fixture(params=["refuses", "never answers"])
def absent_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a server that is none."""
    with socket.socket() as waiting:
        waiting.bind(("127.0.0.1", 0))
        if request.param == "never answers":
            waiting.listen(50)
        yield f"http://127.0.0.1:{waiting.getsockname()[1]}"


def test_the_real_wandb_whose_server_is_away_holds_up_nothing(tmp_path: Path, absent_server: str) -> None:
    require("wandb")
    program = LOG_AND_CLOSE.format(tracker=f"trackers.wandb('v', folder=Path({str(tmp_path)!r}))", close_seconds=1.0)
    # The key has the form of one.
    done = run_program(program, seconds=60.0, WANDB_BASE_URL=absent_server, WANDB_API_KEY="0" * 40)
    assert "W&B did not finish within 1 s and is left alone" in done.stderr
    assert slowest_seconds(done) < 1.0


INFO = {"run_id": "r1", "run_uuid": "r1", "experiment_id": "7", "status": "RUNNING", "artifact_uri": "file:///none"}


class MlflowServer:
    """What MLflow's client needs of a server: experiments, runs, and batches of metrics.

    Source: https://mlflow.org/docs/latest/api_reference/rest-api.html
    """

    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []
        self.experiments: list[str] = []
        self.updates: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if "/runs/get?" in self.path:
                    self._answer(200, {"run": {"info": INFO, "data": {}}})
                else:
                    self._answer(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"})

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                self._answer(200, outer.handle(self.path, json.loads(self.rfile.read(length))))

            def _answer(self, status: int, content: dict[str, Any]) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def handle(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        call = path.partition("/mlflow/")[2]
        if call == "experiments/create":
            self.experiments.append(body["name"])
            return {"experiment_id": "7"}
        if call == "runs/create":
            return {"run": {"info": INFO, "data": {}}}
        if call == "runs/log-batch":
            self.metrics += body["metrics"]
        if call == "runs/update":
            self.updates.append(body)
            return {"run_info": INFO}
        return {}

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def mlflow_server() -> Iterator[MlflowServer]:
    server = MlflowServer()
    yield server
    server.stop()


def test_the_real_mlflow_client_sends_values_and_the_end(mlflow_server: MlflowServer) -> None:
    require("mlflow")
    tracker = "trackers.mlflow('videos', run_name='first')"
    program = LOG_AND_CLOSE.format(tracker=tracker, close_seconds=60.0)
    done = run_program(program, MLFLOW_TRACKING_URI=mlflow_server.url)
    assert "have not reached" not in done.stderr
    assert mlflow_server.experiments == ["videos"]
    sent = [(metric["key"], metric["step"], metric["value"]) for metric in mlflow_server.metrics]
    assert sent[:2] == [("nll", 1, 1.0), ("odd name _dB_", 1, 2.0)]
    assert len(sent) == 400
    assert [update["status"] for update in mlflow_server.updates] == ["FINISHED"]


def test_the_real_mlflow_client_goes_on_with_a_run(mlflow_server: MlflowServer) -> None:
    require("mlflow")
    program = LOG_AND_CLOSE.format(tracker=f"trackers.mlflow(uri={mlflow_server.url!r})", close_seconds=60.0)
    run_program(program.replace("guarded.close()", "guarded.close(failed=True)"), MLFLOW_RUN_ID="r1")
    assert mlflow_server.experiments == []
    assert [update["status"] for update in mlflow_server.updates] == ["RUNNING", "FAILED"]


def test_the_real_mlflow_client_whose_server_is_away_holds_up_nothing(absent_server: str) -> None:
    require("mlflow")
    program = LOG_AND_CLOSE.format(tracker=f"trackers.mlflow(uri={absent_server!r})", close_seconds=1.0)
    # One try of MLflow's takes minutes, and it makes several.
    done = run_program(program, seconds=60.0)
    assert "MLflow did not finish within 1 s and is left alone" in done.stderr
    assert slowest_seconds(done) < 1.0
