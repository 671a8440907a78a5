"""A process that has torch imported and forks the ranks of jobs, so that hundreds of them die in minutes.

It reads one JSON object per line, a job, and answers with the process ids of its ranks, and later with how each ended.
Mounts that it makes vanish with it, where it runs in a mount namespace of its own.
"""

import atexit
import contextlib
import encodings.idna  # noqa: F401  a user that may not read our Python cannot import it later
import json
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import crash_damage
import crash_disks
import crash_ranks
import torch

from rankwise.parent import follow_parent

MODULES = (crash_ranks, crash_disks, crash_damage)


def serve() -> None:
    follow_parent()
    torch.set_num_threads(1)
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    signal.set_wakeup_fd(sender)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    unread = b""
    while True:
        readable, _, _ = select.select([0, receiver], [], [])
        if receiver in readable:
            os.read(receiver, 4096)
            reap()
        if 0 in readable:
            got = os.read(0, 1 << 16)
            if not got:
                return
            *lines, unread = (unread + got).split(b"\n")
            for line in lines:
                answer(json.loads(line))


def answer(job: dict[str, Any]) -> None:
    say({"job": job["job"], "pids": [hatch(job, rank) for rank in range(job["num_ranks"])]})


def say(words: dict[str, Any]) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            say({"pid": pid, "status": os.waitstatus_to_exitcode(status), "at": time.monotonic()})


def hatch(job: dict[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        become_rank(job, rank)
        status = 0
    except BaseException:
        traceback.print_exc()
    # What the interpreter would do at its end, but for its own clean-up.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def become_rank(job: dict[str, Any], rank: int) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    atexit._clear()
    follow_parent()
    folder = Path(job["folder"])
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    journal = crash_ranks.Journal(folder / f"journal-{rank}")
    os.environ.update(job["environ"])
    if job["num_ranks"] > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["num_ranks"], "LOCAL_WORLD_SIZE": job["num_ranks"]}
        os.environ.update({name: str(value) for name, value in place.items()})
    if job["user"] and os.getuid() == 0:
        os.setgroups([])
        os.setgid(job["user"])
        os.setuid(job["user"])
    body = next(getattr(module, job["body"]) for module in MODULES if hasattr(module, job["body"]))
    body(rank, journal, **job["arguments"])


if __name__ == "__main__":
    serve()
