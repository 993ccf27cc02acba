"""The report page works in a real browser without network or mouse and on a narrow screen (needs playwright and Chromium)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpobench.leaderboards.build_board import build_board
from gpobench.leaderboards.page import page
from gpobench.leaderboards.report_data import read_report_data
from gpobench.leaderboards.runs import load_runs

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
QUIET = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run"
).split()
LONG = "x" * 60
METHODS = {
    "gpo": 0.3,
    "awm": 0.25,
    "best-of-n": 0.15,
    "sft": 0.02,
    f"mine.py:{LONG}": 0.1,
    "e": 0.05,
    "f": 0.04,
    "g": 0.03,
    "h": 0.01,
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(
    make_full_at: Callable[..., Path], with_frontier: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder, seeds = tmp_path_factory.mktemp("runs"), {"gpo": (0, 1), "awm": (0, 1)}
    run_dirs = [
        make_full_at(folder / f"{k}-{s}", m, s, g)
        for k, (m, g) in enumerate(METHODS.items())
        for s in seeds.get(m, (0,))
    ]
    for run_dir in folder.glob(f"{list(METHODS).index('best-of-n')}-*"):
        with_frontier(run_dir, {1: 0.0, 2: 0.4, 4: 0.8, 8: 1.0})
    runs = load_runs(run_dirs)
    table = build_board(runs)
    path = folder / "report.html"
    path.write_text(page(table, read_report_data(table, runs)), "utf-8")
    return path


@pytest.fixture
def visit(browser: Any, file: Path) -> Iterator[Callable[..., Any]]:
    """visit(width, scheme) -> the page, open; anything it complains of fails the test."""
    complaints: list[str] = []
    contexts: list[Any] = []

    def opened(width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme, offline=True)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        tab.on("pageerror", lambda e: complaints.append(str(e)))
        tab.on("requestfailed", lambda r: complaints.append(r.url))
        tab.on("request", lambda r: complaints.append(r.url) if r.url[:5] not in ("file:", "data:") else None)
        tab.goto(file.as_uri())
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def column(tab: Any, number: int) -> list[str]:
    cells = tab.locator(f"#leaderboard tbody td:nth-child({number})")
    return [str(v) for v in cells.evaluate_all("cells => cells.map(c => c.dataset.v)")]


def focus(tab: Any) -> str:
    return str(tab.evaluate("document.activeElement.id || document.activeElement.getAttribute('href') || ''"))


def test_a_head_sorts_by_enter_and_by_space(visit: Callable[..., Any]) -> None:
    tab = visit()
    head = tab.locator("#leaderboard th").nth(2)
    assert tab.locator("#leaderboard th").first.get_attribute("aria-sort") == "ascending"
    head.locator("button").focus()
    tab.keyboard.press("Enter")
    values = [float(v) for v in column(tab, 3)]
    assert head.get_attribute("aria-sort") == "descending" and values == sorted(values, reverse=True)
    tab.keyboard.press("Space")
    values = [float(v) for v in column(tab, 3)]
    assert head.get_attribute("aria-sort") == "ascending" and values == sorted(values)
    assert tab.locator("#leaderboard [aria-sort=ascending]").count() == 1


def test_what_has_no_value_comes_last_either_way(visit: Callable[..., Any]) -> None:
    tab = visit()
    button = tab.locator("#leaderboard th").nth(4).locator("button")  # the base is not compared with itself
    for _ in range(2):
        button.click()
        assert column(tab, 5)[-1] == "" and "" not in column(tab, 5)[:-1]


def test_curves_change_their_currency_their_score_and_their_lines(visit: Callable[..., Any]) -> None:
    tab = visit()
    lines = tab.locator("#curve-chart polyline[stroke-width='2']")
    assert lines.count() == len(METHODS)
    before = tab.locator("#curve-chart svg").inner_html()
    assert "spent: nfe" in before
    tab.locator("#curve-currency").select_option(label="seconds")
    assert "spent: seconds" in tab.locator("#curve-chart svg").inner_html()
    tab.locator("#curve-key").select_option(label="engine/exact")
    assert "engine/exact" in tab.locator("#curve-chart svg").inner_html()
    tab.locator("#curve-legend button").first.focus()
    tab.keyboard.press("Space")
    assert tab.locator("#curve-legend button").first.get_attribute("aria-pressed") == "false"
    assert lines.count() == len(METHODS) - 1
    for choice in ("all", "one", "none"):
        tab.locator("#curve-bands").select_option(choice)
        shown = tab.locator("#curve-chart .band:not([opacity='0'])").count()
        assert shown == {"all": len(METHODS) - 1, "one": 1, "none": 0}[choice]
    tab.locator("#trade-x").select_option(label="spent: nfe")
    assert tab.locator("#trade-chart circle").count() == len(METHODS)


@pytest.mark.parametrize("width", [1280, 390])
def test_a_search_is_drawn_against_training_on_a_logarithmic_axis(visit: Callable[..., Any], width: int) -> None:
    tab = visit(width)
    chart = tab.locator("#frontier-chart-0")
    assert chart.locator("line.trained").count() == len(METHODS) - 1
    points = chart.locator("polyline.search").get_attribute("points").split()
    x = [float(point.partition(",")[0]) for point in points]
    steps = [b - a for a, b in zip(x, x[1:], strict=False)]
    assert len(x) == 4 and max(steps) - min(steps) < 0.5  # 10, 20, 40, 80 nfe lie evenly
    assert all(name in chart.inner_text() for name in ("gpo", "best-of-n", "nfe per served image"))
    chart.locator("circle").first.hover(force=True)
    assert "best-of-n, 1 candidates" in chart.locator(".tip").inner_text()


def test_a_picture_opens_and_closes_by_keyboard(visit: Callable[..., Any]) -> None:
    tab = visit()
    dialog, button = tab.locator("#album-dialog"), tab.locator("#album-cards button").nth(2)
    button.focus()
    tab.keyboard.press("Enter")
    assert dialog.evaluate("d => d.open") and focus(tab) == "album-close"
    title = tab.locator("#album-title").inner_text()
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#album-title").inner_text() != title
    loaded = "images => Promise.all(images.map(i => i.decode())).then(() => images.every(i => i.naturalWidth > 0))"
    assert tab.locator("#album-dialog img").evaluate_all(loaded)
    assert tab.locator("#album-shots figure").count() == len(METHODS)
    tab.keyboard.press("Escape")
    assert not dialog.evaluate("d => d.open")
    assert button.evaluate("b => b === document.activeElement")


def test_everything_can_be_reached_by_tab(visit: Callable[..., Any]) -> None:
    tab = visit()
    tab.keyboard.press("Tab")
    assert focus(tab) == "#board"  # the way past the navigation
    tab.keyboard.press("Tab")
    assert focus(tab) == "theme"
    unreachable = "nodes => nodes.filter(n => n.tabIndex < 0 && n.offsetParent !== null).length"
    assert tab.locator("button, select, summary, a, input, .scroll").evaluate_all(unreachable) == 0
    unnamed = "nodes => nodes.filter(n => !(n.getAttribute('aria-label') || n.textContent.trim())).length"
    assert tab.locator("button, [role=region], [role=img]").evaluate_all(unnamed) == 0


def test_light_and_dark_follow_the_system_until_told(visit: Callable[..., Any]) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light, dark = visit(), visit(scheme="dark")
    assert light.evaluate(paper) != dark.evaluate(paper)
    before = light.evaluate(paper)
    light.locator("#theme").focus()
    light.keyboard.press("Enter")
    assert light.evaluate(paper) == dark.evaluate(paper)
    assert light.locator("#theme").get_attribute("aria-pressed") == "true"
    light.keyboard.press("Enter")
    assert light.evaluate(paper) == before


@pytest.mark.parametrize("width", [390, 320, 1280])
def test_the_page_itself_never_scrolls_sideways(visit: Callable[..., Any], width: int) -> None:
    tab = visit(width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.locator("#album-cards button").first.click()
    box = tab.locator("#album-dialog").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    assert tab.locator("#album-dialog").evaluate("d => d.scrollWidth <= d.clientWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_they_stand_on(visit: Callable[..., Any], scheme: str) -> None:
    # WCAG 2.1: a contrast of at least 4.5 for text.
    tab = visit(scheme=scheme)
    contrast = """([ink, paper]) => {
      const light = (name) => {
        const probe = document.body.appendChild(document.createElement("i"));
        probe.style.color = `var(${name})`;
        const rgb = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255);
        probe.remove();
        const [r, g, b] = rgb.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const [a, b] = [light(ink), light(paper)].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05);
    }"""
    for ink in ("--ink", "--soft", "--link", "--good", "--bad"):
        for paper in ("--paper", "--panel"):
            assert tab.evaluate(contrast, [ink, paper]) >= 4.5, (ink, paper)
