"""Log files of many ranks, as a run leaves them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A machine with other work on it is slow now and then.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

START = datetime(2026, 5, 1, 12, tzinfo=UTC)


class LogMaker:
    """Writes into one run directory."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.folder = run / "logs"
        self.folder.mkdir(parents=True)

    def record(
        self,
        rank: int,
        seconds: float,
        message: str,
        *,
        level: str = "INFO",
        logger: str = "train",
        step: int | None = None,
        error: tuple[str, str, str] | None = None,
    ) -> dict[str, Any]:
        """One record, its keys in the order of docs/design/run-directory.md; `error` is type, message, traceback."""
        fields: dict[str, Any] = {
            "time": (START + timedelta(seconds=seconds)).isoformat(timespec="microseconds"),
            "monotonic_ns": int((1000 + seconds) * 1e9),
            "level": level,
            "logger": logger,
            "message": message,
            "rank": rank,
            "local_rank": rank % 8,
            "node_rank": rank // 8,
            "host": f"node-{rank // 8:03d}",
            "pid": 4000 + rank,
        }
        if step is not None:
            fields["step"] = step
        if error is not None:
            fields["exception"] = dict(zip(("type", "message", "traceback"), error, strict=True))
        return fields

    def line(self, rank: int, seconds: float, message: str, **more: Any) -> bytes:
        """One record as it stands in a file, with its end."""
        return json.dumps(self.record(rank, seconds, message, **more)).encode() + b"\n"

    def write(self, rank: int, seconds: float, message: str, **more: Any) -> None:
        """Append one record to the file of its rank."""
        self.append(f"rank-{rank:05d}.jsonl", self.line(rank, seconds, message, **more))

    def append(self, name: str, content: bytes) -> None:
        """Append bytes to a file."""
        with (self.folder / name).open("ab") as file:
            file.write(content)

    def write_training(self, num_ranks: int, num_records: int) -> None:
        """Ranks that say their losses ten times a second, milliseconds off each other, and warn now and then."""
        for rank in range(num_ranks):
            with (self.folder / f"rank-{rank:05d}.jsonl").open("wb") as file:
                for step in range(num_records):
                    seconds = step / 10 + (rank * 37 % 101) / 1e4
                    if step % 1000 == 500 and rank % 64 == 5:
                        warning = f"gradient norm {rank + step} is above 100"
                        file.write(self.line(rank, seconds, warning, level="WARNING", step=step))
                    else:
                        loss = f"step {step}: loss {7 / (step + 1) + rank / 1e5:.5f}"
                        file.write(self.line(rank, seconds, loss, step=step))


@pytest.fixture
def logs(tmp_path: Path) -> LogMaker:
    """An empty run directory and what fills it."""
    return LogMaker(tmp_path / "run")
