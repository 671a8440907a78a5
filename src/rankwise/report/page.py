"""The page itself: template, style, scripts and content as one text that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.resources import files

from rankwise import __version__
from rankwise.report.content import Content

SCRIPTS = ("base", "heatmap", "heatcontrol", "timeline", "tables", "phases", "charts", "devices", "main")
"""In the order in which they are run; each uses what stands before it."""
MARK = '<meta name="generator" content="rankwise report'
"""What every report has in its first bytes: so that one may replace another, and nothing else."""

_SIGNS = {"bad": ("!", "trouble"), "note": ("i", "note"), "fact": ("=", "fact"), "good": ("&#10003;", "fine")}


def build_page(title: str, content: Content, now: datetime) -> str:
    """The whole page. Nothing of it is fetched: its policy forbids the browser any request, and any script but its own.

    Ranks: local.
    """
    script = _scripts()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    facts = dict(content.facts)
    parts = {
        "title": as_text(title),
        "generator": as_text(f"rankwise report {__version__}"),
        "script_hash": f"'sha256-{digest}'",
        "style": f"{_asset('uplot/uPlot.min.css')}\n{_asset('style.css')}",
        "script": script,
        "data": content.packed,
        "findings": "\n".join(_finding(finding.level, finding.title, finding.text) for finding in content.findings),
        "state": as_text(facts.get("state", "")),
        "facts": "\n".join(f"<dt>{as_text(name)}</dt><dd>{as_text(value)}</dd>" for name, value in content.facts),
        "facts_open": "" if content.has_steps else " open",
        "made": now.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "uplot_licence": as_text(_asset("uplot/LICENSE")),
    }
    return fill(_asset("template.html"), parts)


def fill(template: str, parts: Mapping[str, str]) -> str:
    """The template with each {{name}} replaced once; what a part has in it is not looked at again.

    Ranks: local.
    """
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def as_text(text: str) -> str:
    """The text as it is written in HTML, in an attribute too. Addresses in it are no longer ones that software finds.

    Ranks: local.
    """
    return html.escape(text, quote=True).replace("://", ":&#47;&#47;")


def _finding(level: str, title: str, text: str) -> str:
    sign, word = _SIGNS[level]
    return (
        f'<li class="{level}"><strong><span class="unseen">{word}: </span>'
        f'<span class="badge" aria-hidden="true">{sign}</span> {as_text(title)}</strong>'
        f"<span>{as_text(text)}</span></li>"
    )


def _scripts() -> str:
    """All scripts as one, whose names are its own."""
    own = "\n".join(_asset(f"{name}.js").replace("'use strict';\n", "") for name in SCRIPTS)
    return f"{_asset('uplot/uPlot.iife.min.js')}\n(() => {{\n'use strict';\n{own}\n}})();\n"


def _asset(name: str) -> str:
    return files("rankwise.report").joinpath("assets", name).read_text(encoding="utf-8")
