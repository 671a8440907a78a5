"""`python -m rankwise.simulation`."""

from __future__ import annotations

import argparse
import sys
import time

from rankwise.errors import RankwiseError
from rankwise.simulation import Plan, make_run, play_run


def main() -> int:
    """Write a simulated run directory; the exit status is 2 where that cannot be done.

    Ranks: local, in no job.
    """
    parser = argparse.ArgumentParser(
        prog="python -m rankwise.simulation", description="Write the run directory of a training run that never ran."
    )
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument("--ranks", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same run")
    parser.add_argument("--ranks-per-node", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--seconds-per-step", type=float, default=0.4, metavar="S", help="default: 0.4")
    parser.add_argument("--no-trouble", action="store_true", help="nothing goes wrong")
    parser.add_argument("--live", action="store_true", help="write as if it ran now, until it has ended or Ctrl-C")
    given = parser.parse_args()
    begin = time.monotonic()
    settings = {"seconds_per_step": given.seconds_per_step, "with_trouble": not given.no_trouble}
    try:
        if given.live:
            plan = Plan(given.ranks, given.steps, given.seed, given.ranks_per_node, **settings)
            play_run(given.out, plan, is_over=lambda: False)
            return 0
        plan = make_run(
            given.out, given.ranks, given.steps, seed=given.seed, ranks_per_node=given.ranks_per_node, **settings
        )
    except KeyboardInterrupt:
        return 0 if given.live else 130
    except (RankwiseError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    told = [f"{plan.num_ranks} ranks x {plan.num_steps} steps in {time.monotonic() - begin:.1f} s: {given.out}"]
    for name in ("slow", "hot", "lost"):
        if (window := getattr(plan, name)) is not None:
            told.append(f"{name}: rank {window.rank}, steps {window.first} to {window.last}")
    print("\n".join(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
