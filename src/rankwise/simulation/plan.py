"""What happens in a simulated run, and when: decided before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rankwise.errors import RankwiseError

MIN_STEPS_OF_TROUBLE = 20
"""A shorter run has no slow rank, no hot device and no restart."""
HANG_SECONDS = 45.0
"""How long the others wait for the rank that is lost, until the job is ended."""
PAUSE_SECONDS = 120.0
"""From the end of the first session to the start of the second."""

_MAX_RANKS = 1_000_000
_MAX_STEPS = 10_000_000
_MAX_SAVES = 10
_STARTED = 1767261600.0  # 2026-01-01 10:00 UTC


@dataclass(frozen=True)
class Window:
    """Steps in which one rank differs: from `first` to `last`, both included."""

    rank: int
    first: int
    last: int


@dataclass(frozen=True)
class Session:
    """One start of the program: the steps that it makes, and when it begins."""

    first: int
    last: int
    started: float
    """Seconds since 1970."""
    is_lost: bool
    """Whether it ends because a rank is lost; its newest steps are made again by the next one."""
    number: int


@dataclass(frozen=True)
class Plan:
    """A simulated run.

    Attributes:
        seconds_per_step: of a usual step, without checkpoints and validation.
        started: seconds since 1970.
        finished: False leaves the last session without its end, as while it runs.
    """

    num_ranks: int
    num_steps: int
    seed: int = 0
    ranks_per_node: int = 8
    seconds_per_step: float = 0.4
    started: float = _STARTED
    finished: bool = True
    with_trouble: bool = True

    def __post_init__(self) -> None:
        for name, most in (("num_ranks", _MAX_RANKS), ("num_steps", _MAX_STEPS), ("ranks_per_node", _MAX_RANKS)):
            if not 1 <= getattr(self, name) <= most:
                raise RankwiseError(f"{name} is {getattr(self, name)}; give a number from 1 to {most}.")
        if not 1e-3 <= self.seconds_per_step <= 3600:
            raise RankwiseError(f"seconds_per_step is {self.seconds_per_step}; give seconds from 0.001 to 3600.")

    @property
    def num_nodes(self) -> int:
        """Nodes that the ranks stand on; the last one may be less than full."""
        return -(-self.num_ranks // self.ranks_per_node)

    def host(self, rank: int) -> str:
        """The name of the rank's node."""
        return f"node-{rank // self.ranks_per_node:04d}"

    def device(self, rank: int) -> str:
        """The rank's device, as torch writes it."""
        return f"cuda:{rank % self.ranks_per_node}"

    def pid(self, rank: int, session: Session) -> int:
        """The process of the rank in a session."""
        return 4000 + 1000 * session.number + rank % self.ranks_per_node

    @property
    def has_trouble(self) -> bool:
        """Whether it is long and wide enough for something to go wrong."""
        return self.with_trouble and self.num_steps >= MIN_STEPS_OF_TROUBLE and self.num_ranks > 1

    @cached_property
    def _troubled(self) -> list[int]:
        """The slow, the hot and the lost rank: three where there are so many, and none of them the main process."""
        ranks = np.random.default_rng([self.seed, 1]).permutation(np.arange(1, self.num_ranks))[:3].tolist()
        return (ranks * 3)[:3] if self.has_trouble else []

    @property
    def slow(self) -> Window | None:
        """The rank whose data comes late for a while."""
        return self._window(0, 0.20, 0.40)

    @property
    def hot(self) -> Window | None:
        """The rank whose device gets hot, and slow."""
        return self._window(1, 0.70, 0.90)

    @property
    def lost(self) -> Window | None:
        """The rank that vanishes in the step `last`, by which the first session ends."""
        return self._window(2, 0.57, 0.57)

    @property
    def save_every(self) -> int:
        """Steps from one checkpoint to the next."""
        return max(1, self.num_steps // _MAX_SAVES)

    @property
    def validate_every(self) -> int:
        """Steps from one validation to the next."""
        return max(1, self.num_steps // (2 * _MAX_SAVES))

    @property
    def log_every(self) -> int:
        """Steps from one line of losses to the next."""
        return max(1, min(10, self.num_steps // 20))

    def _window(self, number: int, begin: float, end: float) -> Window | None:
        if not self.has_trouble:
            return None
        first, last = (max(1, round(share * self.num_steps)) for share in (begin, end))
        return Window(self._troubled[number], first, last)
