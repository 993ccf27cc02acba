"""Pictures for people: grids of samples with what was asked and what was read, and the curve of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..spec import Images

PAD, LINE = 6, 13
PAPER, INK, FAINT, GOOD, BAD = (250, 250, 250), (30, 30, 30), (120, 120, 120), (20, 120, 50), (180, 40, 30)


def grid(
    images: Sequence[Images],
    captions: Sequence[Sequence[str]],
    marks: Sequence[Sequence[bool | None]],
    titles: Sequence[str],
    columns: int = 4,
    prompts: Sequence[str] = (),
) -> Image.Image:
    """One cell a sample, holding its versions side by side (same noise: before, after), each with a caption below.

    images: versions x (K, H, W, 3); captions and marks: versions x K; a mark colours its caption green or red.
    prompts: what was asked for, written above each cell.
    """
    count, height, width = images[0].shape[:3]
    scale = max(1, 128 // width)
    w, h = width * scale, height * scale
    cell = len(images) * (w + PAD) + 2 * PAD
    rows = -(-count // columns)
    asked = LINE if prompts else 0
    row = asked + h + LINE + PAD
    sheet = Image.new("RGB", (columns * cell, rows * row + LINE + 2 * PAD), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for k in range(columns):
        for v, title in enumerate(titles):
            draw.text((k * cell + v * (w + PAD) + PAD, PAD), title, fill=FAINT, font=font)
    for k in range(count):
        y = LINE + 2 * PAD + (k // columns) * row + asked
        if prompts:
            words = prompts[k][: (cell - 2 * PAD) // 6]
            draw.text(((k % columns) * cell + PAD, y - LINE), words, fill=INK, font=font)
        for v, version in enumerate(images):
            x = (k % columns) * cell + v * (w + PAD) + PAD
            sheet.paste(Image.fromarray(version[k]).resize((w, h), Image.Resampling.NEAREST), (x, y))
            mark = marks[v][k]
            draw.text(
                (x, y + h), captions[v][k][: w // 6], fill=INK if mark is None else GOOD if mark else BAD, font=font
            )
    return sheet


def curve(path: Path, points: Sequence[dict[str, Any]], keys: Sequence[str], currency: str = "nfe") -> None:
    """Validation scores against what was spent, a band for the 95 % interval; PNG or SVG by the path's suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), dpi=120)
    for key in keys:
        x = [p["spent"][currency] for p in points]
        y = [p["scores"][key]["mean"] for p in points]
        low, high = ([p["scores"][key]["ci"][end] for p in points] for end in (0, 1))
        (line,) = axes.plot(x, y, marker="o", markersize=3, label=key)
        axes.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set_xlabel(f"spent: {currency}")
    axes.set_ylabel("validation score, 95 % interval")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)
    pyplot.close(figure)
