"""A report page shows the data of its runs, needs no network, stays small, and interprets no prompt as markup."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from gpobench.leaderboards.build_board import build_board
from gpobench.leaderboards.commands.report import report
from gpobench.leaderboards.figures import write_figures
from gpobench.leaderboards.formatting import number
from gpobench.leaderboards.method_colours import method_colour
from gpobench.leaderboards.page import page
from gpobench.leaderboards.report_data import read_report_data
from gpobench.leaderboards.runs import load_runs

Make = Callable[..., Path]
EVIL = '</script><script>alert("1")</script><img src=x onerror=alert(2)>\u2028{{ 7*7 }}'


class Seen(HTMLParser):
    """Tags with their attributes, and the text between them by tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self._in == "script" else self.words).append(data)


def made(*run_dirs: Path, **more: Any) -> str:
    runs = load_runs(run_dirs)
    table = build_board(runs, **more)
    return page(table, read_report_data(table, runs))


def data(text: str) -> dict[str, Any]:
    return json.loads(Seen(text).scripts[0])


def test_it_says_what_the_table_says(make_full: Make) -> None:
    run_dirs = [make_full(f"{m}{s}", m, s, g) for m, g in (("gpo", 0.3), ("awm", 0.1)) for s in (0, 1)]
    text = made(*run_dirs)
    table = build_board(load_runs(run_dirs))
    seen = Seen(text)
    for row in table.rows:
        assert row.label in seen.words
        assert any(number(row.cells[table.key].after.mean) in word for word in seen.words)
    facts = data(text)
    assert facts["labels"] == [row.label for row in table.rows]
    assert {c["label"] for c in facts["curves"]} == {"gpo", "awm"}
    assert set(facts["album"]["frames"]) == {"gpo", "awm"}
    assert "hack" not in "".join(seen.words) or any(r.hack for r in table.rows)


def test_it_asks_the_network_for_nothing(make_full: Make) -> None:
    seen = Seen(made(make_full("a")))
    assert not [1 for tag, a in seen.tags if tag == "link" and not (a.get("href") or "").startswith("data:")]
    outside = [a for _, a in seen.tags for name in ("src", "href") if not re.match("data:|#|$", a.get(name) or "")]
    assert outside == []
    assert "@import" not in made(make_full("b")) and "url(http" not in made(make_full("c"))


def test_what_looks_like_markup_is_shown_not_obeyed(make_full: Make, sealed: Callable[[Path], Path]) -> None:
    plain = Seen(made(make_full("a")))
    run_dir = make_full("b", failures=[EVIL], stop=EVIL, provenance={"machine": EVIL})
    table = pd.read_parquet(run_dir / "scores.parquet")
    table["text"], table["note"] = EVIL, EVIL
    table.to_parquet(run_dir / "scores.parquet", index=False)
    text = made(sealed(run_dir))
    evil = Seen(text)
    assert evil.scripts[1] == plain.scripts[1] and len(evil.scripts) == len(plain.scripts) == 2
    assert [tag for tag, _ in evil.tags].count("img") == [tag for tag, _ in plain.tags].count("img") == 0
    assert not [a for _, a in evil.tags if any(name.startswith("on") for name in a)]
    assert "alert(" in data(text)["album"]["noises"][0][2] and "{{ 7*7 }}" in "".join(evil.words)
    assert "\u2028" not in text


def test_it_says_what_is_missing(make: Make, make_full: Make) -> None:
    text = made(make("a", "gpo"), make_full("b", "awm", 0, 0.2))
    assert "No curve stored by: gpo." in text and "No pictures stored by: gpo." in text
    bare = made(make("c"))
    assert 'id="curves"' not in bare and 'id="pictures"' not in bare and data(bare)["album"] is None


def test_flags_and_seeds_are_said(make: Make, before_and_after: Callable[..., Any]) -> None:
    hack = {"engine/exact": before_and_after(0.1, 3), "other/exact": before_and_after(0.0, 4)}
    words = "".join(Seen(made(make("a", "gpo", scores_by_key=hack), make("b", "awm", 0, 0.2))).words)
    assert (
        "gpo has the hack flag: transfer below 0.4 of the gain in engine/exact" in words
        and "one seed" in words
        and "by a fault" not in words
    )
    words = "".join(Seen(made(make("c", "gpo", fault="the loss is nan"), make("d", "awm", 0, 0.2))).words)
    assert "fault" in words and "gpo ended by a fault, so it is not ranked: the loss is nan." in words


def test_settings_that_differ_from_the_first_row_are_marked(make: Make) -> None:
    text = made(make("a", "gpo", 0, 0.3), make("b", "awm", 0, 0.1, config={"settings": {"lr": 2e-3, "new": 1}}))
    cells = [a.get("class") or "" for tag, a in Seen(text).tags if tag == "td"]
    assert sum("other" in c.split() for c in cells) == 1  # lr; what only one row has is no difference of values
    assert re.search(r'class="code other">0.002<', text)


def test_reported_numbers_stand_beside_and_are_never_ranked(make: Make) -> None:
    text = made(make("a", "flow-grpo", model="sd35m"))
    first = data(text)
    assert "reported" in Seen(text).words and "never ranked" in text
    assert first["labels"] == ["flow-grpo", "base"]  # no row is added
    assert "Reported elsewhere" not in made(make("b", "flow-grpo"))


def test_twelve_methods_of_three_seeds_stay_small(make_full: Make) -> None:
    # Pictures of noise do not compress: no real ones are larger.
    run_dirs = [make_full(f"m{m}-{s}", f"m{m}", s, 0.01 * m, size=64) for m in range(12) for s in range(3)]
    text = made(*run_dirs)
    assert len(text.encode()) < 5_000_000


def test_plots_are_the_same_bytes_again(make_full: Make, tmp_path: Path) -> None:
    runs = load_runs([make_full("a", "gpo", 0, 0.3), make_full("b", "$x^", 0, 0.1)])  # a name is no formula
    table = build_board(runs)
    report_data = read_report_data(table, runs)
    once, again = write_figures(table, report_data, tmp_path / "p"), write_figures(table, report_data, tmp_path / "q")
    assert [p.name for p in once] == ["curves.svg", "curves.png", "pareto.svg", "pareto.png"]
    assert [p.read_bytes() for p in once] == [p.read_bytes() for p in again]
    assert "$x^" in (tmp_path / "p" / "curves.svg").read_text("utf-8")


def test_the_command_writes_page_and_plots(make: Make, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(report)
    make("a")
    out = tmp_path / "page.html"
    result = CliRunner().invoke(app, [str(tmp_path / "a"), "-o", str(out), "--plots", str(tmp_path / "p")])
    assert result.exit_code == 0, result.output
    assert out.read_text("utf-8").startswith("<!doctype html>")
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["pareto.png", "pareto.svg"]  # no curve was stored


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_scores_that_are_not_there_are_no_error(make_full: Make, sealed: Callable[[Path], Path], value: float) -> None:
    run_dir = make_full("a")
    table = pd.read_parquet(run_dir / "scores.parquet")
    table.loc[(table.scorer == "engine") & (table.phase == "after"), "value"] = value
    table.to_parquet(run_dir / "scores.parquet", index=False)
    json.dumps(data(made(sealed(run_dir))), allow_nan=False)


def test_a_method_has_one_colour_in_table_and_curves(make_full: Make) -> None:
    text = made(make_full("a", "gpo", 0, 0.3), make_full("b", "sft", 0, 0.1))
    strips = [dict(attributes)["style"] for tag, attributes in Seen(text).tags if attributes.get("class") == "strip"]
    styles = data(text)["styles"]
    assert strips == [f"--method: {styles[label]['colour']}" for label in data(text)["labels"]]
    for label, style in styles.items():
        light, dark = method_colour(label)
        assert style["colour"] == f"light-dark({light}, {dark})", label
