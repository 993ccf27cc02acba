"""A reader without a network, a mouse or a wide screen: the page in a real browser, where playwright and a Chromium are installed."""

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
METHODS = {"gpo": 0.3, "awm": 0.25, "sft": 0.02, f"mine.py:{LONG}": 0.1, "e": 0.05, "f": 0.04, "g": 0.03, "h": 0.01}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield found
        found.close()


@pytest.fixture(scope="module")
def file(make_full_at: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, seeds = tmp_path_factory.mktemp("runs"), {"gpo": (0, 1), "awm": (0, 1)}
    homes = [
        make_full_at(folder / f"{k}-{s}", m, s, g)
        for k, (m, g) in enumerate(METHODS.items())
        for s in seeds.get(m, (0,))
    ]
    runs = load_runs(homes)
    table = build_board(runs, resamples=200)
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
        one = context.new_page()
        one.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        one.on("pageerror", lambda e: complaints.append(str(e)))
        one.on("requestfailed", lambda r: complaints.append(r.url))
        one.on("request", lambda r: complaints.append(r.url) if r.url[:5] not in ("file:", "data:") else None)
        one.goto(file.as_uri())
        return one

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def column(one: Any, number: int) -> list[str]:
    cells = one.locator(f"#leaderboard tbody td:nth-child({number})")
    return [str(v) for v in cells.evaluate_all("cells => cells.map(c => c.dataset.v)")]


def focus(one: Any) -> str:
    return str(one.evaluate("document.activeElement.id || document.activeElement.getAttribute('href') || ''"))


def test_a_head_sorts_by_enter_and_by_space(visit: Callable[..., Any]) -> None:
    one = visit()
    head = one.locator("#leaderboard th").nth(2)
    assert one.locator("#leaderboard th").first.get_attribute("aria-sort") == "ascending"
    head.locator("button").focus()
    one.keyboard.press("Enter")
    values = [float(v) for v in column(one, 3)]
    assert head.get_attribute("aria-sort") == "descending" and values == sorted(values, reverse=True)
    one.keyboard.press("Space")
    values = [float(v) for v in column(one, 3)]
    assert head.get_attribute("aria-sort") == "ascending" and values == sorted(values)
    assert one.locator("#leaderboard [aria-sort=ascending]").count() == 1


def test_what_has_no_value_comes_last_either_way(visit: Callable[..., Any]) -> None:
    one = visit()
    button = one.locator("#leaderboard th").nth(4).locator("button")  # the base is not compared with itself
    for _ in range(2):
        button.click()
        assert column(one, 5)[-1] == "" and "" not in column(one, 5)[:-1]


def test_curves_change_their_currency_their_score_and_their_lines(visit: Callable[..., Any]) -> None:
    one = visit()
    lines = one.locator("#curve-chart polyline[stroke-width='2']")
    assert lines.count() == len(METHODS)
    before = one.locator("#curve-chart svg").inner_html()
    assert "spent: nfe" in before
    one.locator("#curve-currency").select_option(label="seconds")
    assert "spent: seconds" in one.locator("#curve-chart svg").inner_html()
    one.locator("#curve-key").select_option(label="engine/exact")
    assert "engine/exact" in one.locator("#curve-chart svg").inner_html()
    one.locator("#curve-legend button").first.focus()
    one.keyboard.press("Space")
    assert one.locator("#curve-legend button").first.get_attribute("aria-pressed") == "false"
    assert lines.count() == len(METHODS) - 1
    for choice in ("all", "one", "none"):
        one.locator("#curve-bands").select_option(choice)
        shown = one.locator("#curve-chart .band:not([opacity='0'])").count()
        assert shown == {"all": len(METHODS) - 1, "one": 1, "none": 0}[choice]
    one.locator("#trade-x").select_option(label="spent: nfe")
    assert one.locator("#trade-chart circle").count() == len(METHODS)


def test_a_picture_opens_and_closes_by_keyboard(visit: Callable[..., Any]) -> None:
    one = visit()
    dialog, button = one.locator("#album-dialog"), one.locator("#album-cards button").nth(2)
    button.focus()
    one.keyboard.press("Enter")
    assert dialog.evaluate("d => d.open") and focus(one) == "album-close"
    title = one.locator("#album-title").inner_text()
    one.keyboard.press("ArrowRight")
    assert one.locator("#album-title").inner_text() != title
    loaded = "images => Promise.all(images.map(i => i.decode())).then(() => images.every(i => i.naturalWidth > 0))"
    assert one.locator("#album-dialog img").evaluate_all(loaded)
    assert one.locator("#album-shots figure").count() == len(METHODS)
    one.keyboard.press("Escape")
    assert not dialog.evaluate("d => d.open")
    assert button.evaluate("b => b === document.activeElement")


def test_everything_can_be_reached_by_tab(visit: Callable[..., Any]) -> None:
    one = visit()
    one.keyboard.press("Tab")
    assert focus(one) == "#board"  # the way past the navigation
    one.keyboard.press("Tab")
    assert focus(one) == "theme"
    unreachable = "nodes => nodes.filter(n => n.tabIndex < 0 && n.offsetParent !== null).length"
    assert one.locator("button, select, summary, a, input, .scroll").evaluate_all(unreachable) == 0
    unnamed = "nodes => nodes.filter(n => !(n.getAttribute('aria-label') || n.textContent.trim())).length"
    assert one.locator("button, [role=region], [role=img]").evaluate_all(unnamed) == 0


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
    one = visit(width)
    assert one.evaluate("document.documentElement.scrollWidth") <= width
    one.locator("#album-cards button").first.click()
    box = one.locator("#album-dialog").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    assert one.locator("#album-dialog").evaluate("d => d.scrollWidth <= d.clientWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_they_stand_on(visit: Callable[..., Any], scheme: str) -> None:
    # WCAG 2.1: a contrast of at least 4.5 for text.
    one = visit(scheme=scheme)
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
            assert one.evaluate(contrast, [ink, paper]) >= 4.5, (ink, paper)
