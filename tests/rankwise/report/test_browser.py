"""The report in a real browser: it draws, asks nobody for anything, and can be used by keys and on small screens."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankwise.report import make_report
from rankwise.runreader import read_run
from rankwise.telemetry import Event, Start, Steps, Tick, events_path, monitor_path, to_json

READY = "document.documentElement.dataset.ready"
Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens a page of a given width; at the end nothing may have been printed, raised or asked for."""
    contexts, wrong = [], []

    def open_page(path: Path, width: int = 1280, **settings: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        page.bring_to_front()
        # Not wait_for_function: what it asks a second time is a string, which the page's policy does not run.
        page.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)
        assert page.evaluate(READY) == "yes"
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def test_all_parts_are_drawn_within_seconds(opened: Open, report: Path) -> None:
    page = opened(report)
    assert page.locator("section:visible").count() == 9
    assert page.locator("figure.chart canvas").count() > 15
    # Two seconds are asked for, with a machine to itself.
    assert page.evaluate("performance.getEntriesByName('data-ready')[0].startTime") < 20_000


def test_cells_of_the_picture_are_the_numbers_of_the_run(opened: Open, run_dir: Path, report: Path) -> None:
    page = opened(report)
    cells = page.evaluate(
        """() => { const { picture } = rankwiseReport.steps, rows = [];
        for (let row = 0; row < picture.heat.rows; row++)
          for (let column = 0; column < picture.heat.columns; column++) rows.push(picture.cell(row, column));
        return rows; }"""
    )
    run = read_run(run_dir)
    assert len(cells) == 16 * 400
    for history in run.histories():
        own = cells[history.rank * 400 : (history.rank + 1) * 400]
        assert [cell["step"] for cell in own] == history.steps.tolist()
        np.testing.assert_allclose([cell["seconds"] for cell in own], history.seconds, rtol=5e-4)
        for phase in ("data", "backward", "communication"):
            np.testing.assert_allclose(
                [cell["phases"][phase] for cell in own], history.phases[phase], rtol=5e-4, atol=2e-6
            )


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280, 1920])
def test_the_page_fits_its_screen(opened: Open, report: Path, width: int, theme: str) -> None:
    page = opened(report, width, color_scheme=theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    page.get_by_role("button", name="dark colours").click()
    assert page.evaluate("document.documentElement.dataset.theme") != theme


def test_arrow_keys_go_from_cell_to_cell_and_say_what_is_there(opened: Open, report: Path) -> None:
    page = opened(report)
    page.locator("#heat").focus()
    page.keyboard.press("ArrowRight")
    assert "rank 0, step 1:" in page.locator("#announcer").inner_text()
    for key in ("ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert "rank 1, step 2:" in page.locator("#announcer").inner_text()
    assert page.locator("#tooltip").is_visible()
    page.keyboard.press("+")
    view = page.evaluate("rankwiseReport.shared.view.value")
    assert view["to"] - view["from"] < 399
    page.keyboard.press("End")
    assert "rank 1, step 400:" in page.locator("#announcer").inner_text()
    page.keyboard.press("0")
    assert page.evaluate("rankwiseReport.shared.view.value") == {"from": 1, "to": 400}
    page.keyboard.press("Enter")
    assert page.locator("#filter").input_value() == "1"


def test_the_first_tab_leads_past_the_head(opened: Open, report: Path) -> None:
    page = opened(report)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "heat":
            break
    assert page.evaluate("document.activeElement.id") == "heat"


def test_a_drag_zooms_every_chart_of_steps_and_a_double_click_shows_all(opened: Open, report: Path) -> None:
    page = opened(report)
    page.locator("#heat").scroll_into_view_if_needed()
    box = page.locator("#heat").bounding_box()
    page.mouse.move(box["x"] + 400, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 600, box["y"] + 60)
    page.mouse.up()
    view = page.evaluate("rankwiseReport.shared.view.value")
    assert 50 < view["to"] - view["from"] < 100
    scale = page.evaluate("(({ min, max }) => ({ min, max }))(rankwiseReport.charts[0].u.scales.x)")
    assert (scale["min"], scale["max"]) == (view["from"], view["to"])
    page.mouse.dblclick(box["x"] + 400, box["y"] + 40)
    assert page.evaluate("rankwiseReport.shared.view.value") == {"from": 1, "to": 400}


def test_ranks_are_chosen_by_words(opened: Open, report: Path) -> None:
    page = opened(report)
    wanted = {"0-3, 9": 5, "node:1": 8, "local:0": 2, "node-0001": 8, "8-": 8, "nobody": 0, "": 16}
    for text, num in wanted.items():
        page.locator("#filter").fill(text)
        assert page.evaluate("rankwiseReport.shared.chosen.value.reduce((a, b) => a + b, 0)") == num, text
        assert page.evaluate("rankwiseReport.steps.map.rows.length") == num, text
        assert page.locator("#ranks tbody tr").count() == max(num, 1), text


def test_a_table_sorts_by_a_click_and_says_so(opened: Open, report: Path) -> None:
    page = opened(report)
    head = page.locator("#phases th").filter(has_text="rank")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert page.locator("#phases tbody td").first.inner_text() == "15"
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert page.locator("#phases tbody td").first.inner_text() == "0"


def test_charts_are_read_with_keys(opened: Open, report: Path) -> None:
    page = opened(report)
    figure = page.locator("#metrics figure").filter(has_text="nll").first
    figure.locator(".plot").focus()
    page.keyboard.press("Home")
    first = figure.locator(".said").inner_text()
    page.keyboard.press("ArrowRight")
    second = figure.locator(".said").inner_text()
    assert first
    assert second not in ("", first)


def test_an_event_leads_to_its_steps(opened: Open, report: Path) -> None:
    page = opened(report)
    page.locator("#events tbody button.link").first.click()
    step = page.evaluate("rankwiseReport.data.events[0].step")
    view = page.evaluate("rankwiseReport.shared.view.value")
    assert view["from"] <= step <= view["to"]
    assert view["to"] - view["from"] < 399


def evil_run(folder: Path) -> Path:
    """A run whose every word is markup."""
    evil = "</script><img src=x onerror=alert(1)><svg onload=alert(2)>"
    for name in ("logs", "metrics", "monitor", "events"):
        (folder / name).mkdir(parents=True)
    row = {"rank": 0, "host": evil, "device": evil, "device_uuid": evil, "local_rank": 0, "node_rank": 0}
    (folder / "run.json").write_text(json.dumps({"command": [evil], "git_revision": evil, "ranks": [row]}))
    record = {"time": "2026-05-01T12:00:00.000000+00:00", "monotonic_ns": 1, "level": "WARNING", "logger": evil}
    record |= {"message": f"{evil} https://evil.example", "rank": 0, "step": 1}
    (folder / "logs" / "rank-00000.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "metrics" / "rank-00000.jsonl").write_text(json.dumps({"step": 1, evil: 1.0}) + "\n")
    lines = [
        Start(1.0, 0, 0, 0, 1, evil, 1, evil, evil),
        Tick(2.0, 2, evil, 0.0, Steps(1, [1.0, 2.0], {evil: [0.5, 0.5]})),
    ]
    monitor_path(folder, 0).write_text("".join(to_json(line) + "\n" for line in lines))
    events_path(folder, 0).write_text(to_json(Event("hang", 2.0, 1, evil, [0], evil)) + "\n")
    return folder


def test_words_of_a_run_never_become_markup(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "evil.html"
    path.write_text(make_report(evil_run(tmp_path / "run")))
    assert "http://" not in path.read_text()
    assert "https://" not in path.read_text()
    page = opened(path)
    page.locator("#heat").focus()
    for key in ("ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    page.locator("#timeline").hover()
    assert page.locator("img, svg").count() == 0
    assert "onerror" in page.locator("#logs").inner_text()


def test_a_run_with_nothing_but_its_identity_has_a_page(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"ranks": [{"rank": 0, "host": "alone"}]}))
    path = tmp_path / "report.html"
    path.write_text(make_report(tmp_path))
    page = opened(path)
    assert page.locator("section:visible").count() == 2
    assert "alone" in page.locator("#ranks").inner_text()


@pytest.mark.parametrize("values", [["NaN", "NaN", "NaN"], ["1.0"], ["NaN", "0", "-1", "1e300"]])
def test_losses_that_are_no_numbers_are_gaps(opened: Open, tmp_path: Path, values: list[str]) -> None:
    lines = [f'{{"step": {step}, "nll": {value}}}\n' for step, value in enumerate(values, 1)]
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "rank-00000.jsonl").write_text("".join(lines))
    path = tmp_path / "report.html"
    path.write_text(make_report(tmp_path))
    page = opened(path)
    assert page.locator("#metrics figure").count() == 1
    page.locator("#log-scale").check()


def test_one_step_of_one_rank_is_a_picture(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "monitor").mkdir()
    line = to_json(Tick(2.0, 1, None, 0.0, Steps(1, [0.25], {"other": [0.25]})))
    monitor_path(tmp_path, 0).write_text(line + "\n")
    path = tmp_path / "report.html"
    path.write_text(make_report(tmp_path))
    page = opened(path)
    page.locator("#heat").focus()
    page.keyboard.press("ArrowRight")
    assert "rank 0, step 1: 250 ms" in page.locator("#announcer").inner_text()
    for key in ("+", "-", "ArrowLeft", "PageDown", "End"):
        page.keyboard.press(key)


def test_paper_is_white_and_the_screen_is_as_before_after_it(opened: Open, report: Path) -> None:
    page = opened(report, color_scheme="dark")
    assert page.pdf()[:4] == b"%PDF"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_what_was_logged_before_the_first_step_is_in_the_charts(opened: Open, run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    with (folder / "metrics" / "rank-00000.jsonl").open("a") as file:
        file.write('{"step": 0, "time": 1.0, "before": 2.5}\n{"step": 7, "time": 2.0, "before": 3.5}\n')
    path = tmp_path / "report.html"
    path.write_text(make_report(folder))
    page = opened(path)
    scale = "(({ min, max }) => ({ min, max }))(rankwiseReport.charts[0].u.scales.x)"
    assert page.evaluate(scale) == {"min": 0, "max": 400}
    page.evaluate("rankwiseReport.showSteps(rankwiseReport.data.heat, 5, 50)")
    assert page.evaluate(scale) == {"min": 5, "max": 50}


def test_a_level_with_the_name_of_our_own_mark_is_a_level(opened: Open, run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    path = folder / "logs" / "rank-00000.jsonl"
    record = json.loads(path.read_text().splitlines()[0]) | {"level": "$"}
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    report = tmp_path / "report.html"
    report.write_text(make_report(folder))
    assert "1 $" in opened(report).locator("#logs").inner_text()
