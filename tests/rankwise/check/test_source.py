import pytest

from rankwise.check import analyze
from rankwise.check.finding import CannotParse
from rankwise.check.source import Module, is_marked, parse


@pytest.mark.parametrize(
    "content",
    [
        b"def f(:\n",
        b"x = 1\x00",
        b"\xff\xfe\x00",
        b"# coding: none-such\n",
        b"x = (" * 300,
        b"-" * 30_000 + b"1",
        "x = '\ud800'",
    ],
)
def test_what_is_no_python_cannot_be_parsed_and_raises_nothing(content: str | bytes) -> None:
    analysis = analyze({"a.py": content})
    assert analysis.findings == ()
    assert [one.path for one in analysis.cannot_parse] == ["a.py"]


def test_the_line_to_blame_is_told() -> None:
    parsed = parse("a.py", b"x = 1\ny = (\n")
    assert isinstance(parsed, CannotParse)
    assert parsed.line == 2


def test_deep_nesting_ends_in_a_word_not_in_a_traceback() -> None:
    body = "".join(f"{'  ' * depth}if rank == {depth}:\n" for depth in range(90)) + "  " * 90 + "dist.barrier()\n"
    analysis = analyze({"a.py": f"import torch.distributed as dist\nrank = dist.get_rank()\n{body}"})
    assert [one.path for one in analysis.cannot_parse] == ["a.py"]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_lines_are_counted_whatever_ends_them(newline: str) -> None:
    text = newline.join(["import torch, os", "rank = int(os.environ['RANK'])", "torch.cuda.set_device(rank)", ""])
    [finding] = analyze({"a.py": text.encode()}, {"RW101"}).findings
    assert (finding.line, finding.column) == (3, 23)


def test_a_declared_encoding_is_read() -> None:
    text = "# coding: latin-1\nimport torch, os\ns = '\u00e9'; torch.cuda.set_device(int(os.environ['RANK']))\n"
    [finding] = analyze({"a.py": text.encode("latin-1")}, {"RW101"}).findings
    assert finding.column == 32


def test_relative_imports_are_made_whole() -> None:
    module = parse("package/inner/a.py", "from . import b\nfrom ..util import c as d\n")
    assert isinstance(module, Module)
    assert module.imports == {"b": "package.inner.b", "d": "package.util.c"}


def test_a_licence_alone_does_not_mark_a_file() -> None:
    assert not is_marked("# distributed under the License is distributed on an AS IS BASIS\nx = frank\n")
    assert is_marked("import torch.distributed as dist")


def test_imports_are_found_in_blocks_too() -> None:
    text = (
        "rank = 0\ntry:\n    import a\nexcept ImportError:\n    import b as c\n"
        "else:\n    from d import e\nfinally:\n    import f\n"
        "def g():\n    if x:\n        import h\n    else:\n        import i\n    with y:\n        import j\n"
        "class K:\n    import k\nmatch z:\n    case 1:\n        import m\n"
    )
    module = parse("a.py", text)
    assert isinstance(module, Module)
    assert module.imports == {name: name for name in "afhijkm"} | {"c": "b", "e": "d.e"}
