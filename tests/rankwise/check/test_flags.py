import ast

import pytest

from rankwise.check.explore import explore
from rankwise.check.flags import decided, flags_of
from rankwise.check.source import Function

FLAGS = frozenset({("evaluate", True), ("group", None)})


@pytest.mark.parametrize(
    ("test", "is_true"),
    [
        ("evaluate", True),
        ("not evaluate", False),
        ("group", False),
        ("group is None", True),
        ("group is not None", False),
        ("rank == 0 and not evaluate", False),
        ("rank == 0 or evaluate", True),
        ("evaluate and not group", True),
        ("rank == 0 and evaluate", None),
        ("args.evaluate", None),
        ("other", None),
    ],
)
def test_a_test_is_decided_where_its_flags_are_enough(test: str, is_true: bool | None) -> None:
    assert decided(ast.parse(test, mode="eval").body, FLAGS) is is_true


@pytest.mark.parametrize(
    ("call", "flags"),
    [
        ("load(1)", {("evaluate", False), ("group", None)}),
        ("load(1, True)", {("evaluate", True), ("group", None)}),
        ("load(1, evaluate=True, group=g)", {("evaluate", True)}),
        ("load(1, wanted)", {("group", None)}),
        ("load(*values)", set()),
        ("load(1, **options)", set()),
    ],
)
def test_flags_are_what_the_call_or_the_default_says(call: str, flags: set[tuple[str, bool | None]]) -> None:
    source = f"rank = 0\ndef load(path, evaluate=False, *, group=None, limit=3):\n    pass\n{call}\n"
    made = next(one for trace in explore({"a.py": source}).traces for one in trace.calls if one.last == "load")
    assert isinstance(made.callee, Function)
    assert flags_of(made, made.callee) == flags


def test_flags_of_a_method_leave_self_out() -> None:
    source = "rank = 0\nclass A:\n    def f(self, x, quiet=False):\n        pass\n    def g(self):\n"
    source += "        self.f(True, True)\n"
    made = next(one for trace in explore({"a.py": source}).traces for one in trace.calls if one.last == "f")
    assert isinstance(made.callee, Function)
    assert flags_of(made, made.callee) == {("x", True), ("quiet", True)}
