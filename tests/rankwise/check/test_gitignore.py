"""What git ignores is what git says that it ignores."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from rankwise.check.files import find_files
from rankwise.check.gitignore import outer_ignore_files, read_ignore_file

FILES = (
    *("a.py", "b.py", "keep.py", "logs/a.py", "logs/keep.py", "src/a.py", "src/gen/a.py", "src/gen/b.py", "src/x/a.py"),
    *("src/x/y/a.py", "out/a.py", "deep/out/a.py", "sp ace.py", "trail.py", "#hash.py", "!bang.py", "[x].py", "x.py"),
    *("data/one/a.py", "data/two/a.py", "data/two/b.py", "doc/a.py", "doc/b/a.py"),
)
IGNORE_FILES = {
    ".gitignore": [
        *("# a comment", "", "/b.py", "logs/*", "!logs/keep.py", "out/", "src/gen/**", "sp\\ ace.py", "trail.py   "),
        *("\\#hash.py", "\\!bang.py", "[[]x].py", "**/two", "doc/**/a.py"),
    ],
    "src/.gitignore": ["x/y", "!gen/b.py", "/a.py\r"],
    "data/one/.gitignore": ["*", "!.gitignore"],
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name, lines in IGNORE_FILES.items():
        (tmp_path / name).write_bytes("\n".join(lines).encode())
    return tmp_path


def found(folder: Path, **options: bool) -> set[str]:
    paths, unreadable = find_files(
        [str(folder)], lambda path: False, respects_gitignore=options.get("gitignore", True), excludes_given=False
    )
    assert not unreadable
    return {os.path.relpath(path, folder) for path in paths}


def test_the_files_left_are_those_that_git_lists(tree: Path) -> None:
    if shutil.which("git") is None and os.environ.get("CI") != "true":
        pytest.skip("no git")
    environ = {"PATH": os.environ["PATH"], "HOME": str(tree), "GIT_CONFIG_NOSYSTEM": "1"}
    git = ["git", "-c", "core.quotepath=off", "-C", str(tree)]
    subprocess.run([*git, "init", "--quiet"], check=True, env=environ)
    (tree / ".git" / "info").mkdir(exist_ok=True)
    (tree / ".git" / "info" / "exclude").write_text("x.py\n")
    command = [*git, "ls-files", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, check=True, env=environ, capture_output=True, text=True).stdout.split("\0")
    expected = {name for name in listed if name.endswith(".py")}
    assert found(tree) == expected
    assert {"a.py", "logs/keep.py", "src/x/a.py"} <= expected
    assert not {"b.py", "x.py", "out/a.py", "data/two/b.py", "doc/b/a.py"} & expected


def test_ignore_files_around_the_folder_count_inside_of_a_repository_alone(tree: Path) -> None:
    assert found(tree / "src") >= {"gen/a.py"}
    (tree / ".git").mkdir()
    assert "gen/a.py" not in found(tree / "src")
    assert "gen/b.py" in found(tree / "src")
    assert [file.folder for file in outer_ignore_files(str(tree / "src"))] == [str(tree)]


def test_everything_is_found_where_it_is_asked_for(tree: Path) -> None:
    assert found(tree, gitignore=False) == set(FILES)


def test_an_ignore_file_that_is_none_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").mkdir()
    assert read_ignore_file(str(tmp_path)) is None
    os.rmdir(tmp_path / ".gitignore")
    os.mkfifo(tmp_path / ".gitignore")
    assert read_ignore_file(str(tmp_path)) is None
    os.unlink(tmp_path / ".gitignore")
    (tmp_path / ".gitignore").write_bytes(b"\xff\xfe\n[\n\\\n!\n/\n")
    (tmp_path / "a.py").touch()
    assert found(tmp_path) == {"a.py"}
