"""Checks of what the ranks found out together; see `probes`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rankwise.doctor.facts import RankFacts
from rankwise.doctor.fold import fold_names, fold_values, show_bytes
from rankwise.doctor.probes import Bandwidth, ClockOffset, Sighting
from rankwise.doctor.verdict import ALONE, Check, Finding, judge

MAX_CLOCK_SECONDS = 1.0
MIN_NODE_BYTES_PER_SECOND = 100_000_000
"""Between nodes; what a link of 1 Gbit/s carries, about."""

_NO_LOOPBACK = (
    "The address of rank 0 is its own loopback, where no other node finds it: set MASTER_ADDR to a name or address of "
    "its node that all nodes reach."
)
_COME = (
    "Start all ranks within --timeout of each other, let every node reach the address and port of rank 0, and see the "
    "output of the ranks that are missing."
)

_STAY = "See the output of the rank named, and on its node who stopped it (dmesg, the log of the scheduler)."


def check_rendezvous(rows: Sequence[RankFacts]) -> Check:
    """All ranks found each other.

    Ranks: local.
    """
    if len(rows) == 1:
        return Check("rendezvous", "pass", "one process: nobody to find")
    # Durations alone, which need no common clock: who waited longest came first.
    waits = {row.rank: row.wait_seconds for row in rows}
    last, longest = min(waits, key=lambda rank: waits[rank]), max(waits.values())
    skew = longest - waits[last]
    return Check(
        "rendezvous",
        "pass",
        f"{len(rows)} ranks found each other; the last, rank {last}, came {skew:.1f} s after the first",
    )


def lost_connection(message: str) -> Check:
    """Some rank came, and left or stopped answering before the end.

    Args:
        message: what the session said, which names it.
    Ranks: local.
    """
    return Check("connection", "fail", message, _STAY)


def failed_rendezvous(
    message: str, *, num_nodes: int, environ: Mapping[str, str], is_place_known: bool = True
) -> Check:
    """Some rank did not come, or this one knew not where to.

    Args:
        message: what the session said, which names the rank, or says what to set.
        is_place_known: False where MASTER_ADDR or MASTER_PORT is missing: who is late does not matter then.
    Ranks: local.
    """
    if not is_place_known:
        return Check("rendezvous", "fail", message)
    address = environ.get("MASTER_ADDR", "")
    is_loopback = num_nodes > 1 and (address == "localhost" or address.startswith("127."))
    return Check("rendezvous", "fail", message, _NO_LOOPBACK if is_loopback else _COME)


def check_clocks(rows: Sequence[RankFacts], offsets: Sequence[ClockOffset]) -> Check:
    """The clocks of the hosts agree, so that their logs and file times can be laid side by side.

    Ranks: local.
    """
    if len(rows) == 1:
        return Check("clocks", "pass", ALONE)
    if not offsets and len({row.host for row in rows}) > 1:
        return Check("clocks", "warn", "no host told its time before the time was up", "See the checks that failed.")
    if not offsets:
        return Check("clocks", "pass", "all ranks are on one host, which has one clock")
    shown = {offset.rank: _offset(offset) for offset in offsets}
    table = [
        {
            "rank": offset.rank,
            "host": offset.host,
            "offset_seconds": round(offset.offset_seconds, 6),
            "uncertainty_seconds": round(offset.uncertainty_seconds, 6),
        }
        for offset in offsets
    ]
    # Beyond doubt: a slow network must not make a clock look wrong.
    off = [offset for offset in offsets if _at_least(offset) > MAX_CLOCK_SECONDS]
    worst = max(offsets, key=lambda offset: abs(offset.offset_seconds))
    if off:
        message = f"clocks against {rows[0].host}'s: " + fold_names(shown[offset.rank] for offset in off)
        advice = "Let NTP or chrony set the clocks: what one host says came first may have come later."
        return Check("clocks", "warn", message, advice, table)
    return Check("clocks", "pass", f"against {rows[0].host}'s at most {shown[worst.rank]}", None, table)


def _at_least(offset: ClockOffset) -> float:
    return abs(offset.offset_seconds) - offset.uncertainty_seconds


def _offset(offset: ClockOffset) -> str:
    return f"{offset.offset_seconds:+.3f} s (+- {offset.uncertainty_seconds:.3f}) on {offset.host}"


def check_directory(rows: Sequence[RankFacts], sightings: Sequence[Sighting]) -> Check:
    """A file that the main process writes is seen by every rank, and every rank may write beside it.

    Ranks: local.
    """
    slowest = max(sighting.seconds for sighting in sightings)
    seen = f"what the main process writes into {sightings[0].directory} is seen by all within {slowest:.1f} s"
    if len(rows) == 1:
        seen = f"{sightings[0].directory} can be written ({ALONE})"
    return judge("directory", _directory_findings(rows, sightings), seen)


def _directory_findings(rows: Sequence[RankFacts], sightings: Sequence[Sighting]) -> Iterator[Finding]:
    advice = "Choose a directory on a file system that all nodes mount at the same path, and name it in full (--dir)."
    failed = {row.rank: f"{s.directory} on {row.host}: {s.error}" for row, s in _pairs(rows, sightings) if s.error}
    if len(failed) == len(rows) and len({sighting.error for sighting in sightings}) == 1:
        where = f"{sightings[0].directory} on {rows[0].host}"
        yield Finding("fail", f"{where}: {sightings[0].error}", "Make it, or name another that can be written (--dir).")
        return
    if failed:
        yield Finding("fail", fold_values(failed), advice)
    blind = {
        row.rank: f"{sighting.directory} on {row.host}"
        for row, sighting in _pairs(rows, sightings)
        if not sighting.seen and sighting.error is None
    }
    if blind:
        where = f"{sightings[0].directory} on {rows[0].host}"
        yield Finding("fail", f"what rank 0 wrote into {where} is not there for {fold_values(blind)}", advice)
    locked = {
        row.rank: f"{sighting.directory} on {row.host}"
        for row, sighting in _pairs(rows, sightings)
        if sighting.seen and not sighting.writable
    }
    if locked:
        told = "Every rank writes its part of a checkpoint: give its user the right to, on every node."
        yield Finding("fail", f"not writable for {fold_values(locked)}", told)


def _pairs(rows: Sequence[RankFacts], sightings: Sequence[Sighting]) -> Iterable[tuple[RankFacts, Sighting]]:
    return zip(rows, sightings, strict=True)


def check_all_reduce(name: str, found: Bandwidth | None, *, between_nodes: bool = False) -> Check:
    """A sum over the ranks is right; with how fast it was.

    Ranks: local.
    """
    if found is None:
        return Check(name, "pass", ALONE)
    if found.error is not None:
        advice = "See the checks of devices and variables, and whether a firewall stands between the nodes."
        if found.backend == "nccl":
            advice = "Set NCCL_DEBUG=INFO and look for the first warning. " + advice
        return Check(name, "fail", found.error, advice)
    if found.num_wrong:
        advice = "Do not train on these nodes: memory, a link or a driver is broken."
        message = f"the sum is wrong on {found.num_wrong} of {found.num_ranks} ranks ({found.backend})"
        return Check(name, "fail", message, advice)
    speed = f"{found.bytes_per_second / 1e9:.2f} GB/s for each rank"
    size = f"{show_bytes(found.num_bytes)} of float32 over {found.num_ranks} ranks in {1000 * found.seconds:.1f} ms"
    message = f"{speed}: {size} ({found.backend})"
    if between_nodes and found.bytes_per_second < MIN_NODE_BYTES_PER_SECOND:
        advice = "Less than a link of 1 Gbit/s: name the fast network with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."
        return Check(name, "warn", message, advice)
    return Check(name, "pass", message)


def devices_apart() -> Check:
    """The devices' own all-reduce was not tried, since they cannot work together.

    Ranks: local.
    """
    return Check("all-reduce-devices", "warn", "not tried", "See the checks devices and shared-devices first.")
