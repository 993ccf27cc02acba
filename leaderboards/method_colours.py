"""Assigns colours to methods: every figure and page draws a method in one colour, whichever other methods are shown."""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from .board import BASE

# On a light and on a dark background.
COLOURS: Mapping[str, tuple[str, str]] = {
    BASE: ("#5b6470", "#9aa4ae"),
    "gpo": ("#1f6fb4", "#6aaeea"),
    "diffusion-dpo": ("#c8501b", "#f0915f"),
    "dgpo": ("#27854a", "#6cc98b"),
    "diffusion-nft": ("#8a4fb0", "#c39be0"),
    "awm": ("#b3862a", "#e0bd6b"),
    "flow-grpo": ("#b8336a", "#ef86ad"),
    "grpo-guard": ("#16858c", "#5fc6cd"),
    "mix-grpo": ("#7a4a2b", "#c79a7b"),
    "rwr": ("#5a8a00", "#a8d155"),
    "sft": ("#33415c", "#93a5c9"),
    "best-of-n": ("#d11f1f", "#ff8a80"),
    "tempflow-grpo": ("#0f6b5c", "#58c2ae"),
    "g2rpo": ("#6b4fd1", "#ab9bf2"),
    "branch-grpo": ("#8f5a00", "#d9a441"),
    "draft": ("#3d6b1f", "#9ccc74"),
    "ddpo": ("#9c2f6e", "#d883b8"),
    "rankdpo": ("#9c5a12", "#dba15c"),
    "op-gfn": ("#4b3fa8", "#9d93ea"),
    "d3po": ("#0f7a5a", "#5ccaa5"),
    "ddo": ("#5a2f8c", "#a987d9"),
    "diffusion-dro": ("#6b6b00", "#c2c25a"),
    "spo": ("#a63d40", "#e5898b"),
}
DASHES = ("-", "--", "-.")  # of matplotlib, for the rows of one method; ":" is a curve of two points
MARKERS = ("o", "^", "v", "D")


@dataclass(frozen=True)
class RowStyle:
    """Colour of a row's method on a light and on a dark background, and the row's place among those of its method."""

    light: str
    dark: str
    variant: int
    base: bool = False

    @property
    def dash(self) -> str:
        """Return the line style of matplotlib."""
        return DASHES[self.variant % len(DASHES)]

    @property
    def marker(self) -> str:
        """Return the marker of matplotlib."""
        return "s" if self.base else MARKERS[self.variant % len(MARKERS)]


def method_colour(method: str) -> tuple[str, str]:
    """Return the hex colours of a method on a light and on a dark background; a variant has the colour of its method.

    A method without an entry in COLOURS gets a hue from a hash of its name.
    """
    name = method.partition(":")[0]
    if name in COLOURS:
        return COLOURS[name]
    hue = int.from_bytes(hashlib.sha256(method.encode()).digest()[:4], "big") / 2**32
    light, dark = (colorsys.hls_to_rgb(hue, lightness, 0.55) for lightness in (0.4, 0.7))
    return _hex(light), _hex(dark)


def row_styles(methods: Mapping[str, str]) -> dict[str, RowStyle]:
    """Map label to style; rows of one method share a colour and differ in dash and marker.

    methods: label -> method, in the order of the rows.
    """
    styles: dict[str, RowStyle] = {}
    count: dict[str, int] = {}
    for label, method in methods.items():
        name = method.partition(":")[0]
        variant = count.get(name, 0)
        count[name] = variant + 1
        styles[label] = RowStyle(*method_colour(method), variant, base=label == BASE)
    return styles


def _hex(rgb: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * x):02x}" for x in rgb)
