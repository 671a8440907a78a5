"""`rankwise check` from its arguments to its exit status."""

import io
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from rankwise.check.cli import main
from rankwise.check.rules import RULES

pytestmark = pytest.mark.usefixtures("toy_engine")

WRONG = "set_device(rank)\n"
MILD = "makedirs(path)\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def stdin(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


def test_findings_are_printed_and_counted(capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.py").write_text("rank = get()\n" + WRONG)
    Path("b.py").write_text("x = 1\n")
    status, out, err = run(capfd)
    assert status == 1
    assert out.startswith("a.py:2:12: RW101 error: what RW101 says [device-from-global-rank]\n")
    assert "  2 | set_device(rank)\n    |            ^^^^\n    = rank <- dist.get_rank()  line 1\n" in out
    assert err == "Found 1 error in 1 of 2 files. --fix mends 1 of them.\n"


def test_nothing_found_is_status_zero(capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.py").write_text("x = 1\n")
    assert run(capfd) == (0, "", "Nothing found in 1 file.\n")
    assert run(capfd, "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([], 1),
        (["--severity", "warning"], 1),
        (["--severity", "error"], 0),
        (["--ignore", "RW303"], 0),
        (["--select", "RW103"], 0),
        (["--select", "RW103", "--severity", "info"], 1),
    ],
)
def test_the_severity_decides_on_the_exit_status(
    arguments: list[str], status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("a.py").write_text(MILD + "init_process_group()\n")
    assert run(capfd, "a.py", *arguments)[0] == status


def test_json_goes_to_stdout_alone(capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.py").write_text(WRONG + MILD)
    status, out, err = run(capfd, "--format", "json")
    assert (status, err) == (1, "")
    keys = ("rule", "path", "line", "column", "severity", "message")
    assert [tuple(found[key] for key in keys) for found in json.loads(out)] == [
        ("RW101", "a.py", 1, 12, "error", "what RW101 says"),
        ("RW303", "a.py", 2, 1, "warning", "what RW303 says"),
    ]
    Path("a.py").write_text("")
    assert run(capfd, "--format", "json") == (0, "[]\n", "")


def test_github_and_sarif_are_printed(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.check.rules.Rule.explain", lambda rule: f"# {rule.code}")
    Path("a.py").write_text(WRONG)
    assert run(capfd, "--format", "github")[1].startswith("::error file=a.py,line=1,")
    assert json.loads(run(capfd, "--format", "sarif")[1])["runs"][0]["results"][0]["ruleId"] == "RW101"


@pytest.mark.parametrize("name", ["gone.py", "--nonsense"])
def test_what_cannot_run_is_status_two_with_one_line(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, name)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"x = (\n", "cannot parse: not Python"),
        (b"x = '\xff'\n", "cannot parse: byte 0xff is not utf-8"),
        (b"x\0 = 1\n", "cannot parse: not Python"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_a_finding(raw: bytes, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.py").write_bytes(raw)
    Path("b.py").write_text(WRONG)
    status, out, _ = run(capfd, "--severity", "error")
    assert status == 1
    assert f"RW000 error: {message}" in out
    assert "b.py:1:12: RW101" in out
    assert run(capfd, "a.py", "--ignore", "RW000")[0] == 0


def test_the_standard_input_is_checked(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, WRONG.encode())
    assert run(capfd, "-", "--stdin-filename", "src/a.py")[1].startswith("src/a.py:1:12: RW101")
    stdin(monkeypatch, b"\xff")
    assert run(capfd, "-")[1].startswith("-:1:1: RW000 error: cannot parse")


def test_fix_mends_and_leaves_every_other_byte(capfd: pytest.CaptureFixture[str]) -> None:
    raw = b"\xef\xbb\xbf# \xe6\xbc\xa2\r\n\tset_device(rank) \r\nmakedirs(path)\rx = '\x0c'"
    Path("a.py").write_bytes(raw.replace(b"\t", b""))
    Path("b.py").write_bytes(b"x = 1")
    Path("c.py").write_bytes(b"init_process_group()\n")
    status, out, err = run(capfd, "--fix", "--select", "ALL", "--severity", "info")
    assert status == 1  # one is left that cannot be mended
    assert "RW103" in out
    assert "RW101" not in out
    assert err.startswith("Mended 1 file.\nFound 1 note")
    fixed = raw.replace(b"\t", b"").replace(b"(rank)", b"(local_rank)").replace(b"(path)", b"(path, exist_ok=True)")
    assert Path("a.py").read_bytes() == fixed
    assert run(capfd, "--fix")[0] == 0
    assert Path("a.py").read_bytes() == fixed
    assert Path("b.py").read_bytes() == b"x = 1"


def test_fix_mends_only_what_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    text = WRONG + WRONG.replace("\n", "  # rankwise: ignore[RW101] known\n") + MILD
    Path("a.py").write_text(text)
    assert run(capfd, "--fix", "--severity", "error")[0] == 0
    assert Path("a.py").read_text() == text.replace("(rank)", "(local_rank)", 1)


def test_fix_of_what_the_baseline_knows_does_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.py").write_text(WRONG)
    run(capfd, "--write-baseline", "known.json")
    Path("a.py").write_text(MILD + WRONG)
    run(capfd, "--fix", "--baseline", "known.json")
    assert Path("a.py").read_text() == "makedirs(path, exist_ok=True)\n" + WRONG


def test_fix_of_the_standard_input_prints_the_text(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin(monkeypatch, b"set_device(rank)\r\ninit_process_group()\r\n")
    assert main(["-", "--fix", "--extend-select", "RW103", "--severity", "info"]) == 1
    captured = capfdbinary.readouterr()
    assert captured.out == b"set_device(local_rank)\r\ninit_process_group()\r\n"
    assert b"RW103" in captured.err


@pytest.mark.parametrize("raw", [b"", b"x = 1", b"x = \xff\n", b"x = (\r"])
def test_fix_of_the_standard_input_prints_it_also_where_there_is_nothing_to_mend(
    raw: bytes, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin(monkeypatch, raw)
    main(["-", "--fix"])
    assert capfdbinary.readouterr().out == raw


def test_a_file_that_cannot_be_written_is_told_of_and_its_findings_stay(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a.py").write_text(WRONG)

    def refuse(path: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rankwise.check.fixes.write_atomic", refuse)
    status, out, err = run(capfd, "--fix")
    assert status == 1
    assert "RW101" in out
    assert "error: a.py stays as it is: it cannot be written: No space left on device" in err


def test_diff_prints_a_patch_and_changes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.py").write_text("x = 1\n" + WRONG)
    status, out, err = run(capfd, "--diff")
    assert (status, err) == (1, "--fix would mend 1 file.\n")
    assert out == "--- a/a.py\n+++ b/a.py\n@@ -1,2 +1,2 @@\n x = 1\n-set_device(rank)\n+set_device(local_rank)\n"
    assert Path("a.py").read_text() == "x = 1\n" + WRONG
    Path("a.py").write_text("init_process_group()\n")
    assert run(capfd, "--diff", "--quiet") == (0, "", "")


def test_a_baseline_leaves_what_is_new(capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.py").write_text(WRONG)
    assert run(capfd, "--write-baseline", "known.json") == (0, "", "Wrote 1 finding to known.json.\n")
    Path("pyproject.toml").write_text('[tool.rankwise.check]\nbaseline = "known.json"\n')
    Path("a.py").write_text("# moved\n\n" + WRONG)
    assert run(capfd) == (0, "", "Nothing found in 1 file (1 known from the baseline).\n")
    Path("a.py").write_text(MILD)
    status, out, err = run(capfd)
    assert (status, "RW303" in out) == (1, True)
    assert err.startswith("1 finding of the baseline no longer there")
    Path("known.json").unlink()
    assert run(capfd)[0] == 2
    assert run(capfd, "--no-baseline")[0] == 1


def test_excludes_hold_for_named_files_where_that_was_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    Path("vendor").mkdir()
    Path("vendor/a.py").write_text(WRONG)
    Path("pyproject.toml").write_text('[tool.rankwise.check]\nextend-exclude = ["vendor"]\n')
    assert run(capfd)[0] == 0
    assert run(capfd, "vendor/a.py")[0] == 1
    assert run(capfd, "vendor/a.py", "--force-exclude")[0] == 0


def test_rules_are_listed_and_explained(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.check.rules.Rule.explain", lambda rule: f"# {rule.code} text\n")
    status, out, _ = run(capfd, "--list-rules")
    assert status == 0
    assert re.findall(r"^RW\d+", out, flags=re.MULTILINE) == list(RULES)
    assert "off by default" in next(line for line in out.splitlines() if line.startswith("RW103"))
    assert run(capfd, "--explain", "RW101")[:2] == (0, "# RW101 text\n")
    assert run(capfd, "--explain", "device-not-pinned")[:2] == (0, "# RW102 text\n")
    status, _, err = run(capfd, "--explain", "RW999")
    assert status == 2
    assert "'RW999' is no rule" in err


def test_help_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capfd, "--help")
    assert status == 0
    assert "Exit status" in out


CODE = "import sys; from rankwise.cli import main; status = main(sys.argv[1:]); sys.stdout.flush(); "


def test_a_check_needs_the_standard_library_alone(here: Path) -> None:
    Path("a.py").write_text("import torch\n")
    command = [sys.executable, "-c", CODE + "print(*sys.modules)", "check", "--quiet", "a.py"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in result.stdout.splitlines()[-1].split()}
    own = {name for name in packages if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert own <= {"rankwise", "sitecustomize", "usercustomize", "site"}


def test_the_checked_folder_is_never_imported(here: Path) -> None:
    for name in ("ast", "tokenize", "json", "torch", "conftest", "setup"):
        Path(f"{name}.py").write_text("raise SystemExit('it was run')\n")
    command = [sys.executable, "-P", "-m", "rankwise", "check", "."]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_a_full_disk_and_a_reader_that_has_gone_are_no_traceback(here: Path) -> None:
    Path("a.py").write_text("x = (\n" * 2)
    command = [sys.executable, "-P", "-m", "rankwise", "check", "a.py"]
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert result.returncode == 2
        assert result.stderr.startswith("error: the output cannot be written: No space left")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        result = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr


def test_the_hooks_of_pre_commit_run_the_check(here: Path) -> None:
    root = Path(__file__).parents[3]
    hooks = {hook["id"]: hook for hook in yaml.safe_load((root / ".pre-commit-hooks.yaml").read_text())}
    assert set(hooks) == {"rankwise-check", "rankwise-check-installed"}
    assert all(hook["types"] == ["python"] for hook in hooks.values())
    script = root / hooks["rankwise-check"]["entry"].split()[0]
    Path("ast.py").write_text("raise SystemExit('it was run')\n")
    Path("a.py").write_text("x = (\n")
    environ = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run([script, "a.py", "ast.py"], capture_output=True, text=True, check=False, env=environ)
    assert result.returncode == 1, result.stderr
    assert result.stdout.startswith("a.py:1:")
    installed = hooks["rankwise-check-installed"]["entry"].split()
    assert installed[:2] == ["rankwise", "check"]
    assert installed[0] in tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
