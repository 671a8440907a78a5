"""Many ranks in few words."""

from rankwise.doctor.fold import fold_names, fold_ranks, fold_same, fold_values, show_bytes


def test_ranks_are_told_as_ranges() -> None:
    assert fold_ranks([3]) == "rank 3"
    assert fold_ranks([7, 0, 1, 2, 9, 8]) == "ranks 0-2, 7-9"
    assert fold_ranks([0, 0, 1]) == "ranks 0-1"


def test_one_odd_rank_among_many_is_seen() -> None:
    values = dict.fromkeys(range(512), "2.13.0") | {512: "2.12.1"}
    assert fold_values(values) == "ranks 0-511: 2.13.0; rank 512: 2.12.1"


def test_what_is_equal_everywhere_is_told_without_ranks() -> None:
    assert fold_same({0: "a", 1: "a"}) == "a"
    assert fold_same({0: "a", 1: "b"}) == "rank 0: a; rank 1: b"


def test_text_stays_short_however_many_ranks_differ() -> None:
    assert len(fold_values({rank: f"host {rank}" for rank in range(1024)})) < 200
    assert len(fold_ranks(range(0, 1024, 2))) < 60
    assert fold_names("abcdefgh").endswith("and 2 more")


def test_sizes_are_told_in_mib_or_gib() -> None:
    assert show_bytes(64 << 20) == "64 MiB"
    assert show_bytes(3 << 29) == "1.5 GiB"
