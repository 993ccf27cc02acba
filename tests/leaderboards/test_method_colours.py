"""A method has one colour, whichever other methods are shown, and no two registered methods share one."""

from __future__ import annotations

from gpobench.bench import registry
from gpobench.leaderboards.method_colours import COLOURS, method_colour, row_styles


def test_every_registered_method_has_a_colour_of_its_own() -> None:
    methods = {registry.canonical("method", name) for name in registry.entries("method")}
    assert methods <= set(COLOURS)
    for background in (0, 1):
        assert len({colours[background] for colours in COLOURS.values()}) == len(COLOURS)


def test_the_colour_does_not_depend_on_the_other_rows() -> None:
    alone, together = row_styles({"gpo": "gpo"}), row_styles({"base": "base", "awm": "awm", "gpo": "gpo"})
    assert (alone["gpo"].light, alone["gpo"].dark) == (together["gpo"].light, together["gpo"].dark)
    assert method_colour("flow-grpo:fast") == method_colour("flow-grpo")


def test_rows_of_one_method_differ_in_dash_and_marker() -> None:
    styles = row_styles({"gpo (lr=1)": "gpo", "gpo (lr=2)": "gpo", "base": "base"})
    first, second = styles["gpo (lr=1)"], styles["gpo (lr=2)"]
    assert first.light == second.light and first.dash != second.dash and first.marker != second.marker
    assert styles["base"].marker == "s"


def test_a_method_of_a_third_party_has_a_stable_colour() -> None:
    light, dark = method_colour("my-method")
    assert (light, dark) == method_colour("my-method") and light != dark
    assert light.startswith("#") and len(light) == len(dark) == 7
