"""Which ranks a filter keeps."""

import pytest

from rankwise.top.filters import parse_filter
from rankwise.top.rows import Row

ROWS = [
    Row(0, "node-1", "cuda:0", 10, 2.0, {"data": 0.1, "mine": 0.9}, "data", lag_steps=2, age_seconds=1.5),
    Row(1, "node-1", "cuda:1", 12, 2.0, {"data": 0.5}, "backward", lag_steps=0, age_seconds=20, marks=("stale",)),
    Row(12, "Node-2", "cuda:0", 12, 2.5, {"data": 0.02}, None, lag_steps=0, utilisation_percent=40.0),
    Row(13, "node-2", "cuda:1"),
]


def kept(text: str) -> list[int]:
    keep = parse_filter(text, {"mine"})
    return [row.rank for row in ROWS if keep is None or keep(row)]


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("", [0, 1, 12, 13]),
        ("   ", [0, 1, 12, 13]),
        ("lag>0", [0]),
        ("lag>=0", [0, 1, 12]),
        ("lag=0", [1, 12]),
        ("step!=12", [0]),
        ("age<5", [0]),
        ("util<50", [12]),
        ("it/s>2.2", [12]),
        ("data>20", [1]),
        ("data<=10 lag>0", [0]),
        ("mine>50", [0]),
        ("forward=0", [0, 1, 12]),
        ("rank=0-1,13", [0, 1, 13]),
        ("rank!=0-1", [12, 13]),
        ("rank>=12", [12, 13]),
        ("host=node-2", [12, 13]),
        ("host!=node-2", [0, 1]),
        ("phase=back", [1]),
        ("device=cuda:1 host=node-1", [1]),
        ("note=stale", [1]),
        ("note!=stale", [0, 12, 13]),
        ("stale", [1]),
        ("NODE-2", [12, 13]),
        ("1", [1]),
        ("cuda:0 node-1", [0]),
        ("nothing-like-it", []),
    ],
)
def test_filter_keeps(text: str, ranks: list[int]) -> None:
    assert kept(text) == ranks


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lag>", "lacks a value"),
        ("lag>much", "lacks a number"),
        ("host>5", "compares a name; write host="),
        ("lags>5", "is about nothing that is there; there are rank, host"),
        ("rank=5-2", "ends before it begins"),
        ("note=slow", "is no note; there are hang, stale"),
    ],
)
def test_what_cannot_be_understood_is_said(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_filter(text)
