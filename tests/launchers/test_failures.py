"""Ranks that fail, are missing or come twice, where no launcher ends the others: each was started by hand."""

import pytest


@pytest.fixture
def start_by_hand(launch):
    """Starts a program once for each of `ranks`, in one job of `world_size` processes."""

    def start(program: str, *arguments: str, ranks: list[int], world_size: int) -> list:
        job = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": launch.free_port()}
        command = (*launch.python, launch.program(program), *arguments)
        return [launch.start(*command, RANK=str(rank), LOCAL_RANK=str(rank), **job) for rank in ranks]

    return start


@pytest.mark.parametrize("ranks", [[0, 1, 1], [0, 0]], ids=["two of rank 1", "two of rank 0"])
def test_two_processes_with_one_rank_are_named_by_all(start_by_hand, ranks) -> None:
    running = start_by_hand("gather.py", "120", ranks=ranks, world_size=len(ranks))
    twice = [process.process.pid for rank, process in zip(ranks, running, strict=True) if ranks.count(rank) == 2]
    ended = [process.ended() for process in running]
    message = f"two processes claim rank {ranks[-1]}: pid"
    for one in ended:
        told = one.told
        assert told["seconds"] < 15
        assert message in told["error"]
        assert all(f"pid {pid} " in told["error"] for pid in twice)
    assert any(message in one.stderr for one in ended)


def test_missing_rank_is_named_when_the_time_is_up(start_by_hand) -> None:
    ended = [process.ended() for process in start_by_hand("gather.py", "5", ranks=[0, 2], world_size=3)]
    message = "2 of 3 ranks started within 5 s; missing: rank 1"
    for one in ended:
        told = one.told
        assert told["seconds"] < 20
        assert message in told["error"]
    assert any(message in one.stderr for one in ended)


def test_missing_main_process_is_named_when_the_time_is_up(start_by_hand) -> None:
    for one in [process.ended() for process in start_by_hand("gather.py", "5", ranks=[1, 2], world_size=3)]:
        told = one.told
        assert told["seconds"] < 30
        assert "found no rank 0 at 127.0.0.1:" in told["error"]
        assert "found no rank 0 at 127.0.0.1:" in one.stderr


@pytest.mark.parametrize("lost", [0, 2])
def test_killed_rank_is_named_by_all_that_wait_for_it(start_by_hand, lost) -> None:
    running = start_by_hand("lose_a_rank.py", str(lost), ranks=[0, 1, 2], world_size=3)
    ended = [process.ended() for process in running]
    assert ended[lost].status == -9, str(ended[lost])
    others = [(rank, one) for rank, one in enumerate(ended) if rank != lost]
    for rank, one in others:
        told = one.told
        assert told["rank"] == rank
        assert told["seconds"] < 30
        assert f"rank {lost} (" in told["error"]
    assert any(f"rank {lost} (" in one.stderr for _, one in others), "no rank has said it on its console"


def test_error_of_the_main_process_reaches_those_that_wait_for_it(start_by_hand) -> None:
    running = start_by_hand("main_raises.py", ranks=[0, 1, 2], world_size=3)
    told = [process.ended().told for process in running]
    assert told[0]["type"] == "ZeroDivisionError"
    for other in told[1:]:
        assert other["type"] == "RankFailedError"
        assert abs(other["at"] - told[0]["at"]) < 5
        assert "rank 0" in other["message"]
        assert "ZeroDivisionError: the data set has no clips" in other["message"]
        assert 'main_raises.py", line' in other["message"], "the traceback is missing"
        assert "in prepare" in other["message"]


@pytest.mark.parametrize(("act", "speaker"), [("raise-late", 1), ("raise-while-main-is-busy", 0)])
def test_error_is_printed_once_whatever_the_main_process_does(start_by_hand, act, speaker) -> None:
    running = start_by_hand("misbehave.py", act, ranks=[0, 1], world_size=2)
    failed = running[1].ended()
    assert failed.status == 1, str(failed)
    if act == "raise-while-main-is-busy":
        running[0].process.kill()  # as a launcher does when a rank has failed
    ended = [running[0].ended(), failed]
    assert ended[speaker].stderr.count("reason") == 2, str(ended[speaker])  # the line of the script, and the error
    assert "Traceback" in ended[speaker].stderr
    assert "reason" not in ended[1 - speaker].stderr


def test_main_process_that_hangs_is_named_though_it_holds_the_store(start_by_hand) -> None:
    running = start_by_hand("misbehave.py", "stop-main", ranks=[0, 1], world_size=2)
    told = running[1].ended()
    running[0].process.kill()
    assert told.status == 1
    assert "barrier 'after': the others did not come within 2 s" in told.stderr
    assert "Rank 0, whose process holds the store, does not answer" in told.stderr


def test_second_stop_signal_ends_a_script_that_never_asks(start_by_hand) -> None:
    for one in [
        process.ended() for process in start_by_hand("misbehave.py", "ignore-sigterm", ranks=[0, 1], world_size=2)
    ]:
        assert (one.status, one.stdout) == (-15, "still here\n"), str(one)


def test_group_of_spawned_processes_tells_them_their_places(launch, tmp_path) -> None:
    done = launch.start(*launch.python, launch.program("misbehave.py"), "spawn", str(tmp_path)).ended()
    assert (done.status, done.stdout) == (0, "group [(0, 0, 2), (1, 1, 2)]\n"), str(done)
