"""Patterns for paths."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankwise.check.globs import PathPatterns, compile_glob


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*.py", "a.py", True),
        ("*.py", "a/b.py", False),
        ("a/**/b.py", "a/b.py", True),
        ("a/**/b.py", "a/x/y/b.py", True),
        ("a/**", "a/x/y", True),
        ("**/b", "x/y/b", True),
        ("?.py", "ab.py", False),
        ("[ab].py", "b.py", True),
        ("[!ab].py", "b.py", False),
        ("[!ab].py", "c.py", True),
        ("a[!b]c", "a/c", False),
        ("[a-c]", "b", True),
        ("[z-a]", "b", False),
        ("[]a]", "]", True),
        ("[a", "[a", True),
        (r"\*.py", "*.py", True),
        (r"\*.py", "a.py", False),
        ("a.py", "aXpy", False),
    ],
)
def test_pattern_matches_as_in_a_gitignore(pattern: str, path: str, expected: bool) -> None:
    assert bool(compile_glob(pattern).fullmatch(path)) is expected


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(alphabet="ab*?[]!^\\/-&~|.", max_size=12), st.text(alphabet="ab/].", max_size=8))
def test_every_text_is_a_pattern(pattern: str, path: str) -> None:
    compile_glob(pattern).fullmatch(path)


def test_a_pattern_of_many_stars_does_not_take_forever() -> None:
    assert compile_glob("*" * 500 + "b").fullmatch("a" * 500) is None


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("build", "src/build/a.py", True),
        ("build/", "src/build/a.py", True),
        ("build", "src/builder/a.py", False),
        ("src/*", "src/a/b.py", True),
        ("/src", "src/a.py", True),
        ("/src", "lib/src/a.py", False),
        ("./src/a.py", "src/a.py", True),
        ("tests/**/test_*.py", "tests/x/test_a.py", True),
        ("test_*.py", "tests/x/test_a.py", True),
        ("b/c", "a/b/c", False),
    ],
)
def test_a_path_is_meant_by_its_own_pattern_or_that_of_a_folder_around_it(
    pattern: str, path: str, expected: bool
) -> None:
    assert PathPatterns((pattern,)).match(path) is expected
