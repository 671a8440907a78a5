from collections.abc import Callable

import pytest

from rankwise.check import analyze

Expect = Callable[..., None]
HEAD = "from torch.utils.data import DataLoader\nfrom torch.utils.data.distributed import DistributedSampler\n"
LOOP = "for epoch in range(9):\n    for batch in loader:\n        step(batch)\n"


def test_a_sampler_whose_epoch_is_never_set_is_found(expect: Expect) -> None:
    expect(
        "RW501",
        f"{HEAD}sampler = DistributedSampler(data)  #! RW501\nloader = DataLoader(data, sampler=sampler)\n{LOOP}",
    )


@pytest.mark.parametrize(
    "made", ["DistributedSampler(data, shuffle=False)", "DistributedSampler(val_data)", "RandomSampler(data)"]
)
def test_a_sampler_that_needs_no_epoch_is_right(expect: Expect, made: str) -> None:
    expect("RW501", f"{HEAD}sampler = {made}\nloader = DataLoader(data, sampler=sampler)\n{LOOP}")


@pytest.mark.parametrize("line", ["sampler.set_epoch(epoch)", "loader.sampler.set_epoch(epoch)"])
def test_an_epoch_that_is_set_is_right(expect: Expect, line: str) -> None:
    loop = LOOP.replace("    for batch", f"    {line}\n    for batch")
    expect("RW501", f"{HEAD}sampler = DistributedSampler(data)\nloader = DataLoader(data, sampler=sampler)\n{loop}")


def test_a_loader_that_leaves_the_given_files_is_right(expect: Expect) -> None:
    source = f"{HEAD}from engine import fit\nloader = DataLoader(data, sampler=DistributedSampler(data))\n"
    expect("RW501", f"{source}for epoch in range(9):\n    fit(loader, epoch)\n")


def test_one_pass_over_the_data_is_right(expect: Expect) -> None:
    expect(
        "RW501",
        f"{HEAD}loader = DataLoader(data, sampler=DistributedSampler(data))\nfor batch in loader:\n    step(batch)\n",
    )


def test_the_endless_generator_is_followed(expect: Expect) -> None:
    expect(
        "RW501",
        f"{HEAD}loader = DataLoader(data, sampler=DistributedSampler(data))  #! RW501\n"
        "def forever(loader):\n    while True:\n        for batch in loader:\n            yield batch\n",
    )


def test_the_fix_sets_the_epoch_first_in_the_loop() -> None:
    text = f"{HEAD}sampler = DistributedSampler(data)\nloader = DataLoader(data, sampler=sampler)\n{LOOP}"
    [finding] = analyze({"train.py": text}, {"RW501"}).findings
    [edit] = finding.edits
    assert (edit.line, edit.column, edit.replacement) == (6, 4, "sampler.set_epoch(epoch)\n    ")
