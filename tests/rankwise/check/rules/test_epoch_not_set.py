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


@pytest.mark.parametrize(
    "loop",
    [
        "for turn in range(10):\n    for batch in train_loader:\n        step(batch)",
        "batches = iter(train_loader)\nwhile num_steps < 9:\n    try:\n        step(next(batches))\n"
        "    except StopIteration:\n        batches = iter(train_loader)",
    ],
)
def test_a_loader_that_is_gone_over_again_and_again_needs_epochs(expect: Expect, loop: str) -> None:
    head = "from torch.utils.data import DataLoader, DistributedSampler\n"
    made = "sampler = DistributedSampler(data)  #! RW501\ntrain_loader = DataLoader(data, sampler=sampler)\n"
    expect("RW501", f"{head}{made}{loop}\n")


def test_a_trainer_that_takes_the_loader_sets_the_epoch(expect: Expect) -> None:
    head = "from torch.utils.data import DataLoader, DistributedSampler\n"
    made = "data = DataLoader(x, sampler=DistributedSampler(x))\n"
    expect("RW501", f"{head}{made}for epoch in range(2):\n    trainer.fit(model, data)\n")


def test_a_downsampler_is_no_sampler_that_is_handed_over(expect: Expect) -> None:
    source = """from torch.utils.data import DataLoader, DistributedSampler
sampler = DistributedSampler(dataset)  #! RW501
loader = DataLoader(dataset, sampler=sampler)
model = build(config.downsampler)
for epoch in range(3):
    for batch in loader:
        step(batch)
"""
    expect("RW501", source)


def test_a_sampler_in_a_batch_sampler_is_found(expect: Expect) -> None:
    made = "DistributedSampler(data)  #! RW501\nbatches = GroupedBatchSampler(sampler, groups, 8)"
    expect("RW501", f"{HEAD}sampler = {made}\nloader = DataLoader(data, batch_sampler=batches)\n{LOOP}")


def test_a_sampler_of_one_replica_is_right(expect: Expect) -> None:
    made = "DistributedSampler(data, num_replicas=1, rank=0)"
    expect("RW501", f"{HEAD}sampler = {made}\nloader = DataLoader(data, sampler=sampler)\n{LOOP}")
