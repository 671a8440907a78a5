from textwrap import dedent

import pytest

from rankwise.check import analyze
from rankwise.check.explore import entry_guard, explore
from rankwise.check.program import Program
from rankwise.check.values import Value


def value_of(text: str, name: str = "found") -> Value:
    program = explore({"a.py": "import os, torch\nimport torch.distributed as dist\n" + dedent(text)})
    return program.modules[0].globals[name]


@pytest.mark.parametrize(
    ("expression", "kind"),
    [
        ("int(os.environ['RANK'])", "rank"),
        ("os.environ.get('LOCAL_RANK', os.environ.get('DP_RANK', '0'))", "local_rank"),
        ("{k: os.environ[k] for k in ('RANK', 'LOCAL_RANK')}['RANK']", "rank"),
        ("dict(os.environ)['SLURM_LOCALID']", "local_rank"),
        ("max(0, dist.get_rank())", "rank"),
        ("(dist.get_rank(), dist.get_world_size())[1]", "world_size"),
        ("{'r': dist.get_rank()}['r']", "rank"),
        ("getattr(trainer, 'local_rank')", "local_rank"),
        ("dist.get_rank() if dist.is_available() else 0", "rank"),
        ("int(os.environ['GROUP_RANK']) * 8 + int(os.environ['LOCAL_RANK'])", "rank"),
        ("dist.get_rank(group)", ""),
        ("dist.get_rank() // 8", ""),
        ("whatever()", ""),
    ],
)
def test_the_kind_of_a_number_is_its_origin(expression: str, kind: str) -> None:
    assert value_of(f"found = {expression}\n").kind == kind


def test_fields_of_dataclasses_are_followed() -> None:
    text = """
    from dataclasses import dataclass, field
    @dataclass
    class Config:
        where: int = field(default_factory=lambda: int(os.environ["LOCAL_RANK"]))
    config = Config()
    found = config.where
    """
    assert value_of(text).kind == "local_rank"


def test_properties_are_followed() -> None:
    text = """
    class Place:
        @property
        def number(self):
            return dist.get_rank()
    found = Place().number
    """
    assert value_of(text).kind == "rank"


def test_a_fallback_of_a_lone_process_gives_way() -> None:
    text = """
    if dist.is_initialized():
        found = dist.get_rank()
    else:
        found = 0
    """
    assert value_of(text).kind == "rank"


def test_two_different_ranks_are_neither() -> None:
    text = """
    if flag:
        found = dist.get_rank()
    else:
        found = int(os.environ["LOCAL_RANK"])
    """
    assert value_of(text).kind == "some_rank"


def function_guard(program: Program, name: str) -> list[tuple[str, str]]:
    function = next(one for one in program.modules[0].functions if one.name == name)
    return [(atom.scope, atom.which) for atom in entry_guard(program, function)]


def test_a_function_has_the_guard_that_all_its_callers_share() -> None:
    program = explore(
        {
            "a.py": dedent(
                """
                import torch.distributed as dist
                def both(): pass
                def one(): pass
                def main():
                    if dist.get_rank() == 0:
                        both()
                        one()
                    one()
                    if not dist.get_rank():
                        both()
                """
            )
        }
    )
    assert function_guard(program, "both") == [("rank", "main")]
    assert function_guard(program, "one") == []


def test_values_that_grow_in_each_round_stay_small() -> None:
    method = """
    def m{n}(self, x=dist.get_rank()):
        self.a = [self.a, x, self.a]
        self.m{m}([x, self.a])
"""
    text = "import torch.distributed as dist\nclass A:" + "".join(method.format(n=n, m=n - 1) for n in range(1, 40))
    assert analyze({"a.py": text}).cannot_parse == ()


def test_functions_that_call_each_other_end() -> None:
    text = """
    import torch.distributed as dist
    def a(x):
        return b(dist.get_rank())
    def b(x):
        return a(x)
    a(1)
    """
    assert analyze({"a.py": dedent(text)}).findings == ()


def test_a_trail_says_nothing_twice() -> None:
    found = value_of("rank = dist.get_rank()\nfound = rank")
    assert [step.text for step in found.trail] == ["found <- rank", "rank <- dist.get_rank()"]


def test_a_helper_is_told_which_rank_to_give() -> None:
    assert value_of("import sync\nfound = sync.get_rank('local')").kind == "local_rank"
    assert value_of("import sync\nfound = sync.get_rank('global')").kind == "rank"


def test_a_test_that_calls_a_guarded_function_takes_no_guard_away() -> None:
    source = """
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
def make(folder):
    return SummaryWriter(folder)
def main():
    dist.init_process_group()
    if dist.get_rank() == 0:
        make("runs")
main()
"""
    test = "from train import make\ndef test_make(tmp_path):\n    assert make(tmp_path)\n"
    assert not analyze({"train.py": source, "test_train.py": test}, {"RW302"}).findings
    unguarded = source.replace("if dist.get_rank() == 0:", "if True:")
    assert analyze({"train.py": unguarded, "test_train.py": test}, {"RW302"}).findings
