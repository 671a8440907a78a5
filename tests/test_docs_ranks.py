"""docs/ranks.md, in both languages, names only what exists and says the same twice."""

import ast
import inspect
import io
import re
import tokenize
from pathlib import Path
from typing import Any

import pytest

import rankwise

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / "ranks.md", DOCS / "ranks.zh-CN.md"]
WRONG, RIGHT = "\u9519\u8bef", "\u6b63\u786e"
"""The two words in Chinese."""
OPERATIONS = (
    *("log", "progress bar", "tracker", "download", "cache", "preprocessing", "device", "data shard", "seed", "noise"),
    *("checkpoint, save", "checkpoint, load", "evaluation", "barrier", "metrics", "early stop", "early exit"),
    *("run directory", "temporary files", "profiling", "weights"),
)


def rows_of(page: Path) -> list[list[str]]:
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def snippets_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def without_comments(code: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return [token.string for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL)]


def named_in(page: Path, owner: str) -> set[str]:
    """Names after a dot behind `owner`, in prose and code."""
    return set(re.findall(rf"(?<![\w./]){owner}\.(\w+(?:\.\w+)*)", page.read_text()))


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_name_of_the_package_is_public(page: Path) -> None:
    named = named_in(page, "rankwise")
    assert len(named) > 20
    assert named <= set(rankwise.__all__)


def test_every_member_of_session_and_checkpoints_exists(page: Path, tmp_path: Path) -> None:
    names, checkpoint_names = named_in(page, "session"), named_in(page, "checkpoints")
    assert {"agree_to_stop", "device", "identity.is_main_process", "run_dir"} <= names
    assert {"save", "load"} <= checkpoint_names
    with rankwise.init(tmp_path, device_type="cpu") as session:
        for name in names:
            value: Any = session
            for part in name.split("."):
                value = getattr(value, part)
    assert all(hasattr(rankwise.CheckpointManager, name) for name in checkpoint_names)


def test_every_call_in_a_snippet_fits_its_function(page: Path) -> None:
    num_calls = 0
    for snippet in snippets_of(page):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("rankwise."):
                function = getattr(rankwise, ast.unparse(node.func).removeprefix("rankwise."))
                keywords = {keyword.arg: None for keyword in node.keywords}
                inspect.signature(function).bind(*node.args, **keywords)
                num_calls += 1
    assert num_calls > 15


def test_each_snippet_shows_the_wrong_form_before_the_right_one() -> None:
    for snippet in snippets_of(PAGES[0]):
        assert re.findall(r"^# (wrong|right)\b", snippet, flags=re.MULTILINE) == ["wrong", "right"], snippet
    for snippet in snippets_of(PAGES[1]):
        assert re.findall(rf"^# ({WRONG}|{RIGHT})", snippet, flags=re.MULTILINE) == [WRONG, RIGHT], snippet


def test_every_row_is_whole(page: Path) -> None:
    for row in rows_of(page):
        assert len(row) == 4
        assert all(row), row
        assert re.search(r"`[^`]+`", row[2]), row


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_classic_operations_have_a_row(operation: str) -> None:
    wanted = {"seed": "rankwise.seed_all"}.get(operation, operation)
    assert any(wanted in f"{row[0]} {row[2]}" for row in rows_of(PAGES[0]))


def test_both_pages_have_the_same_rows_sections_and_code() -> None:
    english, chinese = ([row[2] for row in rows_of(page)] for page in PAGES)
    assert english == chinese
    levels = [re.findall(r"^(#+) \S", page.read_text(), flags=re.MULTILINE) for page in PAGES]
    headings = [[level for level in found if len(level) > 1] for found in levels]
    assert headings[0] == headings[1]
    codes = [[without_comments(snippet) for snippet in snippets_of(page)] for page in PAGES]
    assert codes[0] == codes[1]


def test_paths_that_the_pages_name_exist(page: Path) -> None:
    for path in re.findall(r"`((?:examples|docs|tests)/[^`]*)`", page.read_text()):
        assert (DOCS.parent / path).exists(), path
