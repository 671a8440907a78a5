"""The examination itself: every rank gathers, the main process judges and prints."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import rankwise
from rankwise import collectives
from rankwise.doctor import table, together
from rankwise.doctor.environment import ENVIRONMENT_CHECKS, check_threads, check_variables, missing_for_gloo
from rankwise.doctor.facts import (
    RankFacts,
    collect_facts,
    find_interfaces,
    find_variables,
    first_line,
    is_any_probe_left,
    within,
)
from rankwise.doctor.machine import LOCAL_CHECKS, MACHINE_CHECKS
from rankwise.doctor.probes import (
    ClockOffset,
    can_compute_together,
    measure_clocks,
    probe_all_reduce,
    probe_between_nodes,
    probe_devices_together,
    probe_directory,
)
from rankwise.doctor.verdict import Check
from rankwise.errors import LaunchError, MissingRanksError, RankFailedError, RankwiseError
from rankwise.identity import Identity
from rankwise.rendezvous import find_meeting_point

MAX_PROBE_SECONDS = 15.0
"""How long one step of all ranks may take."""

MAX_SIGHT_SECONDS = 5.0
"""How long a file that one rank wrote may take to be seen by another."""

_OWN_TERMINALS = ("openmpi",)
"""Launchers that give every process a terminal which is not the user's: what it shows may end up in a file."""

_INTERRUPTED = 128 + signal.SIGINT


def examine(identity: Identity, directory: Path, *, timeout_seconds: float, as_json: bool) -> int:
    """Run every check and print them on the main process.

    Args:
        directory: the one that the ranks are to share, as this rank names it.
        timeout_seconds: of the start and of every step.
    Returns:
        The exit status.
    Ranks: every rank must call.
    """
    examination = _Examination(identity, directory, timeout_seconds, as_json)
    is_handled = _heed_sigterm_in_the_session_alone(identity.world_size)
    wanted = os.environ.get("GLOO_SOCKET_IFNAME")
    if wanted is not None and missing_for_gloo(wanted, find_interfaces()):
        # This rank could not talk, and the others would only see it go; without it the table names this rank.
        del os.environ["GLOO_SOCKET_IFNAME"]
    try:
        # On the CPU, so that a rank whose device is broken can still say so.
        with rankwise.init(device_type="cpu", timeout_seconds=timeout_seconds, log_level="CRITICAL") as session:
            examination.run(session.identity)
            status = examination.report()
    except (RankwiseError, RuntimeError) as error:
        status = examination.report_failure(error)
    except KeyboardInterrupt:
        return _INTERRUPTED
    if is_handled:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the interpreter's end takes away every other handler
    if is_any_probe_left():
        # A thread of ours is held in a driver, and the interpreter's end would wait for what that holds.
        sys.stdout.flush()
        os._exit(status)
    return status


class _Examination:
    """The checks made so far: what was found stays, even where a rank is lost on the way."""

    def __init__(self, identity: Identity, directory: Path, timeout_seconds: float, as_json: bool) -> None:
        self.identity = identity
        self.directory = directory
        self.facts_seconds = 0.7 * timeout_seconds  # the others wait for this rank's facts, and give up later
        self.probe_seconds = min(MAX_PROBE_SECONDS, timeout_seconds / 3)
        self.as_json = as_json
        self.checks: list[Check] = []
        self.is_told = False
        self.num_threads = torch.get_num_threads()
        self.variables = find_variables(os.environ)
        self.start = time.monotonic()

    def facts(self, wait_seconds: float) -> RankFacts:
        return collect_facts(
            self.identity,
            self.directory,
            self.variables,
            wait_seconds=wait_seconds,
            num_threads=self.num_threads,
            timeout_seconds=self.facts_seconds,
        )

    def run(self, identity: Identity) -> None:
        """Every step on every rank, in one order; the checks are those of the main process, the others' go unread."""
        self.identity = identity  # the session has verified what the environment could only assume
        rank, num_ranks, seconds = identity.rank, identity.world_size, self.probe_seconds
        rows = collectives.gather_objects(self.facts(time.monotonic() - self.start))
        self.checks.append(together.check_rendezvous(rows))
        self.checks += [check(rows) for check in (*ENVIRONMENT_CHECKS, *MACHINE_CHECKS)]
        self.checks.append(together.check_clocks(rows, self._clocks(rows)))
        sight_seconds = min(MAX_SIGHT_SECONDS, seconds)
        sightings = probe_directory(
            self.directory, is_main_process=identity.is_main_process, timeout_seconds=sight_seconds
        )
        self.checks.append(together.check_directory(rows, sightings))
        self.checks.append(together.check_all_reduce("all-reduce", probe_all_reduce(rank, num_ranks, seconds)))
        if (found := probe_between_nodes(rows, rank, seconds)) is not None:
            self.checks.append(together.check_all_reduce("all-reduce-nodes", found, between_nodes=True))
        if can_compute_together(rows):
            found = probe_devices_together(rows, rank, seconds)
            self.checks.append(together.check_all_reduce("all-reduce-devices", found))
        elif num_ranks > 1 and any(row.device.device != "cpu" for row in rows):
            self.checks.append(together.devices_apart())

    def _clocks(self, rows: Sequence[RankFacts]) -> list[ClockOffset]:
        try:
            return within(self.probe_seconds, lambda: measure_clocks(rows, self.identity.rank))
        except TimeoutError:
            return []  # a rank that no longer answers is named by the next step

    def report(self) -> int:
        """Print on the main process; the exit status of every rank.

        Ranks: every rank must call.
        """
        status = 0
        if self.identity.is_main_process:
            status = 0 if self._print() and table.is_ok(self.checks) else 1
        # After the output: a launcher kills the other ranks as soon as the first one ends with 1.
        return collectives.broadcast_object(status)

    def report_failure(self, error: Exception) -> int:
        """Tell that the ranks did not find each other, or lost each other; what this rank alone can check is added."""
        message = _told(error)
        if self.is_told or not self.identity.is_main_process:
            if not _is_told_by_main_process(error):
                where = f"rank {self.identity.rank} on {self.identity.hostname}"
                print(f"rankwise doctor: {where}: {message}", file=sys.stderr)
            return 1
        if self.checks:
            self.checks.append(together.lost_connection(message))
        else:
            self.checks.append(
                together.failed_rendezvous(
                    message,
                    num_nodes=self.identity.num_nodes,
                    environ=os.environ,
                    is_place_known=_knows_where(self.identity),
                )
            )
            rows = [self.facts(0.0)]
            self.checks += [check(rows) for check in (check_variables, check_threads, *LOCAL_CHECKS)]
        self._print()
        return 1

    def _print(self) -> bool:
        self.is_told = True
        if self.as_json:
            return _write(table.as_json(self.checks, self.identity.world_size))
        is_terminal = sys.stdout.isatty() and self.identity.launcher not in _OWN_TERMINALS
        return _write(table.as_table(self.checks) if is_terminal else table.as_lines(self.checks))


def _is_told_by_main_process(error: Exception) -> bool:
    """Whether the main process is there and has this error too; otherwise each rank tells its own."""
    if isinstance(error, MissingRanksError):
        return bool(error.ranks) and 0 not in error.ranks
    if isinstance(error, RankFailedError):
        return all(failure.rank != 0 for failure in error.failures)
    if isinstance(error, LaunchError):
        return False  # a second process of one rank may come when the others are past it
    return isinstance(error, RankwiseError) and error.on_every_rank


def _told(error: Exception) -> str:
    """What an error says, without the stack that it may carry."""
    if isinstance(error, RankFailedError):
        first = error.failures[0]
        return f"rank {first.rank} ({first.host}) {error.verb}: {first.error_type}: {first.message}"
    told = str(error) if isinstance(error, RankwiseError) else first_line(error)
    return told.replace("(timeout_seconds)", "(--timeout)")  # the session's argument is this command's option


def _knows_where(identity: Identity) -> bool:
    try:
        find_meeting_point(identity, os.environ)
    except LaunchError:
        return False
    return True


def _heed_sigterm_in_the_session_alone(world_size: int) -> bool:
    """Do not end by SIGTERM before or after the session, whose own handler ends the wait for the others.

    A launcher sends it to the other ranks once one has ended with 1; their status is to be 1 too, not the signal's.

    Returns:
        Whether that was done.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    if world_size == 1 or not is_main_thread or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        return False
    # No SIG_IGN yet: a session leaves that as it is, as behind nohup.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    return True


def _write(text: str) -> bool:
    """Whether all of `text` and a line end went out."""
    data = (text + "\n").encode(sys.stdout.encoding or "utf-8", "backslashreplace")
    try:
        while data:
            data = data[os.write(1, data) :]
    except BrokenPipeError:
        return False  # the reader has gone, and wants no more
    except OSError as error:
        print(f"error: the output cannot be written: {error.strerror}. Give it a place with room.", file=sys.stderr)
        return False
    return True
