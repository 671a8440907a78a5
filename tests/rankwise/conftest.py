"""A store that speaks S3, on this host, for tests of what lies behind URLs."""

import importlib.util
import io
import logging
import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

Handler = Callable[[dict[str, Any], Any], Iterable[bytes]]


class S3Server:
    """moto's S3, in a thread; may be stopped and started again, and be made to misbehave.

    Attributes:
        meddle: called with the method and path of every request and with what handles it; None handles it.
        num_requests: by method.
    """

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self.meddle: Callable[[str, str, Callable[[], list[bytes]]], list[bytes] | int | None] | None = None
        self.num_requests: dict[str, int] = {}
        self.port = 0
        self._app = DomainDispatcherApplication(create_backend_app)
        self.start()

    def start(self) -> None:
        from werkzeug.serving import make_server

        self._server = make_server("127.0.0.1", self.port, self._handle, threaded=True)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections from now on; what is stored stays."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handle(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.num_requests[method] = self.num_requests.get(method, 0) + 1
        if "HTTP_TRANSFER_ENCODING" not in environ:
            content = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            environ["wsgi.input"] = io.BytesIO(content)

        def proceed() -> list[bytes]:
            return list(self._app(environ, start_response))

        answer = self.meddle(method, path, proceed) if self.meddle is not None else None
        if isinstance(answer, int):
            start_response(f"{answer} Failure", [("Content-Length", "0")])
            return []
        return proceed() if answer is None else answer


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    missing = [name for name in ("s3fs", "moto", "flask", "flask_cors") if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("CI") != "true":
        pytest.skip(f"needs {', '.join(missing)} (install rankwise[test])")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[S3Server]:
    """The store, which this process and the ranks that it starts find by their environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_server.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access-of-tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-tests")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    # Ranks that are killed leave their temporary copies.
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("copies")))
    monkeypatch.setattr(tempfile, "tempdir", None)
    s3_server.meddle, s3_server.num_requests = None, {}
    yield s3_server
    s3_server.meddle = None


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """The URL of an empty bucket."""
    import fsspec

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(name)
    return f"s3://{name}"
