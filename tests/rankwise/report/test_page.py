"""The page is one file that asks nobody for anything."""

import base64
import hashlib
import re
from datetime import UTC, datetime
from pathlib import Path

from rankwise.report.content import Content
from rankwise.report.page import MARK, SCRIPTS, as_text, build_page, fill
from rankwise.report.summary import Finding

ASSETS = Path(__file__).parents[3] / "src" / "rankwise" / "report" / "assets"


def page_of(title: str = "run", facts: tuple[tuple[str, str], ...] = (), text: str = "") -> str:
    content = Content("eJwDAAAAAAE=", [Finding("note", "A title", text)], facts, True)
    return build_page(title, content, datetime(2026, 5, 1, tzinfo=UTC))


def test_no_address_stands_in_the_page_even_where_the_run_names_one() -> None:
    page = page_of("https://run", (("command", "train --store http://store/x s3://bucket"),), "see https://example")
    assert "http://" not in page
    assert "https://" not in page
    assert "store" in page


def test_words_of_the_run_are_no_markup() -> None:
    evil = "</script><img src=x onerror=alert(1)>\"'"
    page = page_of(evil, (("command", evil),), evil)
    assert "<img" not in page
    assert page.count("</script>") == 2


def test_the_policy_allows_the_pages_own_script_alone() -> None:
    page = page_of()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy[1]
    assert "default-src 'none'" in policy[1]


def test_the_mark_by_which_a_report_is_known_comes_early() -> None:
    assert MARK in page_of()[:1000]


def test_what_is_filled_in_is_not_filled_again() -> None:
    assert fill("{{a}} {{b}}", {"a": "{{b}}", "b": "2"}) == "{{b}} 2"


def test_text_is_escaped_for_attributes_too() -> None:
    assert as_text('<a href="x">&\'') == "&lt;a href=&quot;x&quot;&gt;&amp;&#x27;"


def test_every_script_is_in_the_page_and_files_are_short() -> None:
    assert sorted(f"{name}.js" for name in SCRIPTS) == sorted(path.name for path in ASSETS.glob("*.js"))
    for path in ASSETS.iterdir():
        if path.is_file():
            assert len(path.read_text(encoding="ascii").splitlines()) < 350, path


def test_the_licence_of_the_chart_library_is_in_the_page() -> None:
    page = page_of()
    assert "Copyright (c) 2022 Leon Sorokin" in page
    assert "Permission is hereby granted, free of charge" in page
