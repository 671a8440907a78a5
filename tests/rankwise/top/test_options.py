"""The command line of `rankwise top`."""

import pytest

from rankwise.top.options import parse_options


def test_defaults() -> None:
    options = parse_options(["runs/mine"])
    assert (options.run, options.once, options.as_json, options.sort, options.descending) == (
        "runs/mine",
        False,
        False,
        "rank",
        False,
    )
    assert (options.interval_seconds, options.stale_seconds, options.filter) == (1.0, 15.0, "")


@pytest.mark.parametrize("given", [["--sort", "-lag"], ["--sort=-lag"]])
def test_dash_before_a_column_turns_the_order(given: list[str]) -> None:
    options = parse_options(["run", *given])
    assert (options.sort, options.descending) == ("lag", True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "required: RUN"),
        (["run", "--sort", "size"], "'size' is no column; there are rank, host"),
        (["run", "--interval", "0"], r"'0' is no number of seconds from 0\.1"),
        (["run", "--stale", "soon"], "'soon' is no number"),
        (["run", "--filter", "lag>"], "lacks a value"),
        (["run", "--onc"], "unrecognized arguments: --onc"),
    ],
)
def test_options_that_cannot_be_understood_are_said(given: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_options(given)
