"""Which rank, node, device and phase holds the others up, told once it is certain and once it is over.

Every so many steps each rank sends the main process one small row of durations, past process groups and accelerators;
the main process judges the rows of all (`rankwise.monitor.verdicts`). Where all ranks communicate long and nobody is
late, they measure their links (`rankwise.monitor.probe`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rankwise import collectives
from rankwise.errors import RankwiseError
from rankwise.group import listen, tell_main, tell_others
from rankwise.identity import Identity
from rankwise.monitor.probe import Link, Prober
from rankwise.monitor.statistics import DEFAULT_LIMITS, Limits, Row
from rankwise.monitor.verdicts import Judge, Place
from rankwise.store import machine
from rankwise.telemetry import Event

EVERY_STEPS = 50

_ROWS, _PROBE, _LINKS = "stragglers/row", "stragglers/probe", "stragglers/links"


class StragglerWatch:
    """Sends this rank's rows, and on the main process judges those of all.

    Nothing here runs by itself but a probe of the network, which is seldom: `add` is called from whichever thread knows
    of finished steps, one on each rank.

    Args:
        host, device: of this rank, for messages.
        every_steps: how many steps make a row. All ranks are taken to do the same number of steps.
        tell: called on the main process with `straggler` and `straggler_over` events, from the thread of `add`.
    Raises:
        RankwiseError: `every_steps` is none.
    Ranks: every rank must create one, at the same place; a session is open.
    """

    def __init__(
        self,
        identity: Identity,
        host: str,
        device: str,
        *,
        every_steps: int = EVERY_STEPS,
        tell: Callable[[Event], None],
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        if every_steps < 1:
            raise RankwiseError(f"every_steps={every_steps} makes no rows of durations. Give 1 or more, such as 50.")
        self._identity = identity
        self._every_steps = every_steps
        self._step = self._num_sent = 0
        self._seconds: list[float] = []
        self._phases: dict[str, list[float]] = {}
        self._judge: Judge | None = None
        self._prober: Prober | None = None
        self._forget: list[Callable[[], None]] = []
        if identity.world_size == 1:
            return
        machines = collectives.gather_objects(machine())
        self._prober = Prober(identity.rank, self._report_links, loopback=len(set(machines)) == 1)
        if identity.is_main_process:
            self._forget = [listen(_ROWS, self._hear_row), listen(_LINKS, self._hear_links)]
        else:
            self._forget = [listen(_PROBE, lambda rank, content: self._probe())]
        told = collectives.gather_objects((Place(host, device, identity.node_rank), self._prober.endpoint))
        self._prober.know([endpoint for _, endpoint in told])
        if identity.is_main_process:
            self._judge = Judge([place for place, _ in told], machines, every_steps, tell, self._begin_probe, limits)

    @property
    def num_judged(self) -> int:
        """Windows that are judged so far; 0 on other ranks than the main process.

        Ranks: local.
        """
        return self._judge.num_judged if self._judge is not None else 0

    def add(self, step: int, seconds: float, phases: Mapping[str, float]) -> None:
        """Take in a finished step: how long it was, and of that each phase's own share.

        Ranks: local; on every rank for each of its steps, in order. Step numbers are for messages alone.
        """
        if self._prober is None:
            return
        num_before = len(self._seconds)
        self._seconds.append(seconds)
        for name, value in phases.items():
            self._phases.setdefault(name, [0.0] * num_before).append(value)
        for values in self._phases.values():
            if len(values) == num_before:
                values.append(0.0)
        if len(self._seconds) == self._every_steps:
            self._send()
        self._step = step
        self.poll()

    def poll(self) -> None:
        """On the main process: judge the rows that have come in, as every `add` does too.

        Ranks: local; from any thread that may write and log.
        """
        if self._judge is not None:
            self._judge.poll(self._step)

    def close(self) -> None:
        """Hear and answer nothing any more.

        Ranks: local.
        """
        for forget in self._forget:
            forget()
        self._forget = []
        if self._prober is not None:
            self._prober.close()
            self._prober = None

    def _send(self) -> None:
        row = Row.of(self._seconds, self._phases)
        self._seconds, self._phases = [], {}
        # A row that is lost is not sent again: the window is judged without it.
        phases = {name: (round(mean, 7), round(error, 7)) for name, (mean, error) in row.phases.items()}
        told = {"seconds": row.seconds, "own": row.own, "own_error": row.own_error}
        rounded = {name: round(value, 7) for name, value in told.items()}
        tell_main(_ROWS, {"window": self._num_sent, "phases": phases, **rounded})
        self._num_sent += 1

    def _hear_row(self, rank: int, content: dict[str, Any]) -> None:
        if self._judge is None:
            return
        phases = {str(name): (float(mean), float(error)) for name, (mean, error) in content["phases"].items()}
        row = Row(float(content["seconds"]), float(content["own"]), float(content["own_error"]), phases)
        if row.is_finite():
            self._judge.put(rank, int(content["window"]), row)

    def _begin_probe(self) -> None:
        tell_others(_PROBE, None)
        self._probe()

    def _probe(self) -> None:
        if self._prober is not None:
            self._prober.start()

    def _report_links(self, links: list[Link]) -> None:
        tell_main(_LINKS, [(link.target, link.transfer_seconds, link.round_trip_seconds) for link in links])

    def _hear_links(self, rank: int, content: list[Sequence[float]]) -> None:
        if self._judge is not None:
            self._judge.put_links(rank, [Link(rank, int(peer), float(one), float(two)) for peer, one, two in content])
