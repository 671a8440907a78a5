"""Run directories as numbers: who ran, what each rank's steps took, what happened, losses, checkpoints.

    run = read_run("runs/mine")
    for history in run.histories():
        print(history.rank, history.seconds.max(), history.steps[history.seconds.argmax()])

It only reads, needs no torch, and takes what is there: half lines, ranks without a file and runs that were never
monitored are no errors. docs/design/run-directory.md gives the layout.
"""

from __future__ import annotations

from rankwise.runreader.history import RankHistory, Span, read_history
from rankwise.runreader.run import Checkpoint, Run, Series, read_run
from rankwise.runreader.tail import Look, RankState, Tail

__all__ = [
    "Checkpoint",
    "Look",
    "RankHistory",
    "RankState",
    "Run",
    "Series",
    "Span",
    "Tail",
    "read_history",
    "read_run",
]
