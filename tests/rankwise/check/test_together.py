"""The command with the real rules: what a person sees of a real mistake, and what mending leaves."""

import json
import re
from pathlib import Path

import pytest

from rankwise.check.cli import main
from rankwise.check.rules import RULES

ROOT = Path(__file__).parents[3]

HELPER = """\
import torch.distributed as dist


def who_am_i():
    return dist.get_rank()
"""
SCRIPT = """\
import torch
from helper import who_am_i

index = who_am_i()
torch.cuda.set_device(index)
"""
MENDABLE = """\
import os
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

dist.init_process_group("nccl")
rank = dist.get_rank()
local_rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)  # \u6f22
if not os.path.exists("out"):
\tos.makedirs("out")
model = DistributedDataParallel(torch.nn.Linear(1, 1).cuda())
state = torch.load("weights.pt")
sampler = DistributedSampler(data)
loader = DataLoader(data, sampler=sampler)
for epoch in range(10):
    for batch in loader:
        model(batch)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def found(capfd: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    main([*arguments, "--format", "json", "--isolated"])
    findings = json.loads(capfd.readouterr().out)
    assert isinstance(findings, list)
    return findings


@pytest.mark.parametrize("num_jobs", ["1", "2"])
def test_a_rank_is_followed_from_the_file_that_asks_for_it(num_jobs: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("helper.py").write_text(HELPER)
    Path("train.py").write_text(SCRIPT)
    Path("other.py").write_text("x = 1\n")
    (finding,) = found(capfd, "--jobs", num_jobs)
    place = [finding[key] for key in ("rule", "path", "line", "column", "severity")]
    assert place == ["RW101", "train.py", 5, 23, "error"]
    assert {"text": "dist.get_rank()", "path": "helper.py", "line": 5} in finding["trail"]  # type: ignore[operator]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_mending_changes_the_mistakes_alone_and_once(newline: str, capfd: pytest.CaptureFixture[str]) -> None:
    raw = b"\xef\xbb\xbf" + MENDABLE.rstrip("\n").replace("\n", newline).encode()
    Path("train.py").write_bytes(raw)
    rules = {finding["rule"] for finding in found(capfd, "--fix", "--severity", "error")}
    assert rules == set()
    found(capfd, "--fix")
    mended = Path("train.py").read_bytes()
    expected = raw.replace(b"set_device(rank)", b"set_device(local_rank)")
    expected = expected.replace(b'makedirs("out")', b'makedirs("out", exist_ok=True)')
    expected = expected.replace(b'load("weights.pt")', b'load("weights.pt", map_location="cpu")')
    end = newline.encode()
    expected = expected.replace(b"range(10):" + end, b"range(10):" + end + b"    sampler.set_epoch(epoch)" + end)
    assert mended == expected
    assert found(capfd, "--fix") == []
    assert Path("train.py").read_bytes() == mended


def test_the_examples_have_the_mistakes_that_they_show(capfd: pytest.CaptureFixture[str]) -> None:
    article = ROOT / "examples" / "article"
    wrong = found(capfd, str(article / "checkpoint_wrong.py"))
    assert [finding["rule"] for finding in wrong] == ["RW201"]
    assert found(capfd, *map(str, article.glob("*_right.py"))) == []


@pytest.mark.parametrize("code", RULES)
def test_every_rule_is_explained_under_the_same_headings(code: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--explain", code]) == 0
    text = capfd.readouterr().out
    assert text.startswith(f"# {code} {RULES[code].name}\n")
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert headings == ["What it finds", "Why it hurts", "Example", "Instead", "Known limits"]


def test_the_page_lists_every_rule_with_its_severity() -> None:
    rows = re.findall(
        r"^\| \[(\w+)\]\((.*?)\) `(.*?)` \| (\w+) \| (.*?) \|$", (ROOT / "docs" / "check.md").read_text(), re.MULTILINE
    )
    assert [row[0] for row in rows] == list(RULES)
    for code, page, name, severity, text in rows:
        rule = RULES[code]
        assert (name, severity) == (rule.name, rule.severity)
        assert text.startswith(rule.summary)
        assert ("off by default" in text, "--fix" in text) == (not rule.default, rule.fixable)
        assert (ROOT / "docs" / page).is_file()
