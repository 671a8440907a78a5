"""Checks of what the ranks found out together, on findings made by hand."""

from rankwise.doctor.facts import RankFacts
from rankwise.doctor.probes import Bandwidth, ClockOffset, Sighting
from rankwise.doctor.together import (
    check_all_reduce,
    check_clocks,
    check_directory,
    check_rendezvous,
    failed_rendezvous,
)
from rankwise.doctor.verdict import ALONE

ROWS = [RankFacts(rank=rank, host=f"node-{rank // 2}", node_rank=rank // 2, num_nodes=2) for rank in range(4)]
SEEN = Sighting("/data", True, 0.1, True)


def test_the_rank_that_came_last_is_named() -> None:
    rows = [RankFacts(rank=rank, wait_seconds=wait) for rank, wait in enumerate([9.5, 10.0, 1.5])]
    assert check_rendezvous(rows).message == "3 ranks found each other; the last, rank 2, came 8.5 s after the first"


def test_a_failed_rendezvous_says_what_was_said() -> None:
    check = failed_rendezvous("rank 3 is missing", num_nodes=1, environ={"MASTER_ADDR": "localhost"})
    assert (check.status, check.message) == ("fail", "rank 3 is missing")


def test_a_loopback_address_for_several_nodes_is_pointed_out() -> None:
    for address, is_told in (("127.0.0.1", True), ("localhost", True), ("node-0", False)):
        check = failed_rendezvous("no", num_nodes=2, environ={"MASTER_ADDR": address})
        assert check.advice is not None
        assert ("loopback" in check.advice) is is_told


def test_a_clock_that_is_off_beyond_doubt_is_a_warning() -> None:
    check = check_clocks(ROWS, [ClockOffset(2, "node-1", -3.0, 0.01)])
    assert check.status == "warn"
    assert "-3.000 s (+- 0.010) on node-1" in check.message
    assert check.rows == [{"rank": 2, "host": "node-1", "offset_seconds": -3.0, "uncertainty_seconds": 0.01}]


def test_a_clock_that_may_be_right_passes() -> None:
    assert check_clocks(ROWS, [ClockOffset(2, "node-1", 1.5, 0.8)]).status == "pass"


def test_clocks_of_one_host_are_not_compared() -> None:
    one_host = [RankFacts(rank=rank) for rank in range(2)]
    assert check_clocks(one_host, []).status == "pass"
    assert check_clocks(one_host[:1], []).message == ALONE


def test_hosts_that_told_no_time_are_a_warning() -> None:
    assert check_clocks(ROWS, []).status == "warn"


def test_a_directory_that_all_see_passes() -> None:
    assert check_directory(ROWS, [SEEN] * 4).status == "pass"


def test_a_directory_that_one_node_does_not_see_fails_and_names_its_ranks() -> None:
    check = check_directory(ROWS, [SEEN, SEEN, Sighting("/data", writable=True), Sighting("/data", writable=True)])
    assert check.status == "fail"
    assert "ranks 2-3: /data on node-1" in check.message
    assert "/data on node-0" in check.message


def test_a_directory_that_a_rank_cannot_write_fails() -> None:
    check = check_directory(ROWS, [SEEN, SEEN, SEEN, Sighting("/data", True, 0.1, False)])
    assert check.status == "fail"
    assert "not writable for rank 3: /data on node-1" in check.message


def test_a_directory_that_the_main_process_cannot_write_is_told_once() -> None:
    check = check_directory(ROWS, [Sighting("/data", error="the main process cannot write there: denied")] * 4)
    assert check.message == "/data on node-0: the main process cannot write there: denied"


def test_what_one_rank_could_not_read_is_told_beside_what_others_do_not_see() -> None:
    sightings = [SEEN, Sighting("/data", error="denied"), Sighting("/data", writable=True), SEEN]
    message = check_directory(ROWS, sightings).message
    assert "rank 1: /data on node-0: denied" in message
    assert "rank 2: /data on node-1" in message


def test_a_right_sum_passes_with_its_speed() -> None:
    check = check_all_reduce("all-reduce", Bandwidth(2, 16 << 20, 0.016))
    assert check.status == "pass"
    assert "1.05 GB/s" in check.message
    assert "16 MiB" in check.message


def test_bandwidth_does_not_depend_on_the_number_of_ranks() -> None:
    # A ring: each of n ranks sends 2 (n - 1) / n of the data, so at one link speed the time grows towards double.
    assert Bandwidth(2, 1000, 1.0).bytes_per_second == 1000
    assert Bandwidth(4, 1000, 1.5).bytes_per_second == 1000


def test_a_wrong_sum_fails() -> None:
    check = check_all_reduce("all-reduce", Bandwidth(8, 16 << 20, 0.01, num_wrong=8))
    assert check.status == "fail"
    assert "wrong on 8 of 8 ranks" in check.message


def test_a_slow_link_between_nodes_is_a_warning_there_alone() -> None:
    slow = Bandwidth(2, 16 << 20, 1.0)
    assert check_all_reduce("all-reduce-nodes", slow, between_nodes=True).status == "warn"
    assert check_all_reduce("all-reduce", slow).status == "pass"


def test_a_backend_that_raises_fails_with_what_it_said() -> None:
    check = check_all_reduce("all-reduce-devices", Bandwidth(8, 1, backend="nccl", error="nccl: unhandled"))
    assert (check.status, check.message) == ("fail", "nccl: unhandled")
    assert check.advice is not None
    assert "NCCL_DEBUG" in check.advice
