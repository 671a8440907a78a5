"""Any bytes give findings or "cannot parse", from the real engine with every rule on; nothing brings it down."""

import random
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankwise.check.config import Config
from rankwise.check.files import SourceFile, decode, split_lines
from rankwise.check.finding import Finding
from rankwise.check.fixes import mend
from rankwise.check.run import Checker
from rankwise.check.sarif import as_sarif
from rankwise.check.text import as_text

ROOT = Path(__file__).parents[3]
CHECKER = Checker(Config(select=("ALL",), unused_ignores=True))
PIECES = (
    *("rank", "local_rank", "dist", "torch", "os.environ['RANK']", "model", "self", "args", "x", "0", "None"),
    *("\n", "\n    ", "\n        ", ":\n    ", " = ", ", ", "(", ")", "[", "]", ".", " == ", " % ", " and ", " not "),
    *("if ", "else", "elif ", "for ", "while ", "with ", "def f", "class A", "return ", "lambda ", "yield ", "await "),
    *("try", "except", "finally", "match ", "case ", "import ", "from ", "del ", "global ", "@", "assert ", "raise "),
    *("dist.get_rank()", "dist.barrier()", "torch.cuda.set_device", "torch.save", "torch.load", "os.makedirs"),
    *("DistributedSampler", "mp.spawn", "exit()", "continue", "break", "pass", "# rankwise: ignore[RW101]\n", "\t"),
    *("f'{rank}'", "*", "\\\n"),
)
REAL = (
    *sorted((ROOT / "examples").rglob("*.py")),
    *sorted((ROOT / "src" / "rankwise").glob("*.py")),
    ROOT / "src" / "videovae" / "train.py",
)


def check(raw: bytes) -> list[Finding]:
    """What is found in a file; the promises that hold for every file are looked at here."""
    source = decode("a.py", raw)
    if not isinstance(source, SourceFile):
        assert source.line >= 1
        assert source.message
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = CHECKER.find({"a.py": source.text})
    lines = split_lines(source.text)
    for finding in found:
        assert "this rankwise fails" not in finding.message
        assert 1 <= finding.line <= finding.end_line <= max(1, len(lines))
        assert finding.column >= 1
        if finding.rule != "RW000":
            assert finding.column - 1 <= len(lines[finding.line - 1])
            assert finding.end_column - 1 <= len(lines[finding.end_line - 1])
    as_text(found, lambda path, line: lines[line - 1], is_colored=False).encode("utf-8", "backslashreplace")
    as_sarif(found, lambda path, line: lines[line - 1])
    if any(finding.edits for finding in found):
        mended = mend({"a.py": source.text}, CHECKER.find)
        assert mend(mended, CHECKER.find) == {}, "mending is done at once"
    return found


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200))
def test_any_bytes_are_checked(raw: bytes) -> None:
    check(raw)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_any_words_are_checked(pieces: list[str]) -> None:
    check("".join(pieces).encode())


def mutate(raw: bytes, chance: random.Random) -> bytes:
    """The bytes with some changed, cut out, doubled or brought in from elsewhere in them."""
    changed = bytearray(raw)
    for _ in range(chance.randint(1, 6)):
        start = chance.randrange(len(changed) + 1)
        end = min(len(changed), start + chance.choice((1, 2, 10, 200)))
        match chance.randrange(4):
            case 0:
                changed[start:end] = bytes(chance.randrange(256) for _ in range(end - start))
            case 1:
                del changed[start:end]
            case 2:
                other = chance.randrange(len(changed) + 1)
                changed[start:start] = changed[other : other + 40]
            case 3:
                changed[start:end] = chance.choice(PIECES).encode()
    return bytes(changed)


def swap_lines(raw: bytes, chance: random.Random) -> bytes:
    """The lines with some moved or taken out, their indents kept: more of these parse."""
    lines = raw.split(b"\n")
    for _ in range(chance.randint(1, 8)):
        if lines:
            line = lines.pop(chance.randrange(len(lines)))
            if chance.random() < 0.5:
                lines.insert(chance.randrange(len(lines) + 1), line)
    return b"\n".join(lines)


@pytest.mark.parametrize("path", REAL, ids=lambda path: str(path.relative_to(ROOT)))
def test_real_files_with_changes_are_checked(path: Path) -> None:
    chance = random.Random(path.name)
    raw = path.read_bytes()
    check(raw)
    for _ in range(4):
        check(mutate(raw, chance))
        check(swap_lines(raw, chance))


DEEP = {
    "brackets": "(" * 5000 + ")" * 5000,
    "nested calls": "f(" * 90 + "rank" + ")" * 90,
    "signs": "x = " + "-" * 100_000 + "1",
    "nots": "x = " + "not " * 5000 + "rank",
    "attributes": "x = a" + ".b" * 5000,
    "calls in a row": "x = a" + ".b()" * 3000,
    "sums": "x = " + "rank + " * 5000 + "1",
    "comparisons": "x = " + "rank == " * 5000 + "1",
    "names": "x = " * 5000 + "rank",
    "lambdas": "x = " + "lambda: " * 90 + "rank",
    "ternaries": "x = " + "1 if rank else " * 90 + "2",
    "long ternaries": "x = " + "1 if rank else " * 5000 + "2",
    "ands": "x = " + " and ".join(["rank == 0"] * 5000),
    "blocks": "".join(f"{' ' * depth}if rank == 0:\n" for depth in range(95)) + " " * 95 + "dist.barrier()\n",
    "more blocks": "".join(f"{' ' * depth}if rank == 0:\n" for depth in range(500)) + " " * 500 + "pass\n",
    "functions": "".join(f"{' ' * depth}def f(rank):\n" for depth in range(95)) + " " * 95 + "f(rank)\n",
    "elifs": "if a: pass\n" + "elif rank == 0: dist.barrier()\n" * 1500,
    "strings": "x = (" + "'a' " * 20_000 + ")",
    "a long list": "x = [" + "rank, " * 50_000 + "]",
    "a long line": "x = '" + "a" * 1_000_000 + "'; torch.cuda.set_device(dist.get_rank())",
    "many lines": "torch.cuda.set_device(rank)\n" * 5000,
    "many branches": "def f(rank):\n" + "    if rank == 0:\n        x = g(x)\n    else:\n        x = h(x)\n" * 300,
    "many early returns": "def f(rank):\n" + "    if x:\n        return rank\n" * 300 + "    dist.barrier()\n",
    "calls back and forth": "".join(f"def f{i}(rank):\n    f{i + 1}(rank); f{i // 2}(rank)\n" for i in range(300)),
    "itself": "def f(rank):\n    rank = f(rank)\n    return f(f(rank))\n",
    "a class of itself": "class A(A):\n    def f(self):\n        self.a = self.a.f().a\n        return self\n",
    "aliases in a circle": "a = b\nb = c\nc = a\ntorch.cuda.set_device(a)\n",
    "imports of itself": "from a import x\nfrom a import *\nimport a\na.a.x = a.x\n",
    "loops": "".join(f"{' ' * depth}for i{depth} in range(rank):\n" for depth in range(18))
    + " " * 18
    + "dist.barrier()\n",
    "format fields": "x = f'" + "{rank}" * 3000 + "'",
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.timeout(60)
def test_deep_and_long_sources_are_checked(name: str) -> None:
    check(f"import torch\nimport torch.distributed as dist\nrank = dist.get_rank()\n{DEEP[name]}".encode())
