"""Runs in which something is to be seen."""

from pathlib import Path

import pytest

from rankwise.telemetry import Event, Line, Start, Steps, Tick, events_path, monitor_path, to_json

PHASES = {"data": 0.05, "forward": 0.15, "backward": 0.2, "communication": 0.1}


class RunMaker:
    """Writes a run directory rank by rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "monitor").mkdir(parents=True)
        (folder / "events").mkdir()

    def append(self, rank: int, *lines: Line) -> None:
        with monitor_path(self.folder, rank).open("a") as file:
            file.writelines(to_json(line) + "\n" for line in lines)

    def start(self, rank: int, host: str = "node-a") -> None:
        self.append(rank, Start(0.0, rank, rank, 0, 4, host, 70 + rank, f"cuda:{rank}"))

    def tick(
        self,
        rank: int,
        step: int,
        *,
        phases: dict[str, float] | None = None,
        phase: str | None = "forward",
        seconds: float = 0.1,
        device: dict[str, object] | None = None,
        process: dict[str, object] | None = None,
    ) -> None:
        own = PHASES if phases is None else phases
        steps = Steps(step, [sum(own.values())], {name: [value] for name, value in own.items()})
        self.append(rank, Tick(float(step), step, phase, seconds, steps, device or {}, process or {}))

    def event(self, kind: str, rank: int, message: str) -> None:
        with events_path(self.folder, 0).open("a") as file:
            file.write(to_json(Event(kind, 1.8e9, 5, message, [rank])) + "\n")


@pytest.fixture
def maker(tmp_path: Path) -> RunMaker:
    """An empty run directory and what fills it."""
    return RunMaker(tmp_path / "run")


@pytest.fixture
def four(maker: RunMaker) -> RunMaker:
    """Four ranks on two nodes; the second has most to do, the last is a step behind, and the third is hot."""
    for rank in range(4):
        maker.start(rank, "node-a" if rank < 2 else "node-b")
        slow = {"data": 0.13, "communication": 0.02} if rank == 1 else {}
        device: dict[str, object] = {"utilisation_percent": 90 + rank, "temperature_celsius": 91 if rank == 2 else 60}
        device |= {"memory_used_gib": 40.2, "memory_total_gib": 79.6}
        for step in range(1, 10 - (rank == 3)):
            maker.tick(rank, step, phases=PHASES | slow, device=device)
    return maker
