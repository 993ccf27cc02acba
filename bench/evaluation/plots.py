"""Figures of a run: grids of sample images with prompts and notes, and the curve of scores over the budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..rendering import IMAGE_FAULT, LATENT_FAULT
from ..spec import Images, Scorer
from .estimates import Evaluation
from .ranking import binary_metric

PAD, LINE = 6, 13
PAPER, INK, FAINT, GOOD, BAD = (250, 250, 250), (30, 30, 30), (120, 120, 120), (20, 120, 50), (180, 40, 30)


def grid(
    images: Sequence[Images],
    captions: Sequence[Sequence[str]],
    correct: Sequence[Sequence[bool | None]],
    titles: Sequence[str],
    columns: int = 4,
    prompts: Sequence[str] = (),
    *,
    absent: Sequence[Sequence[bool]] = (),
) -> Image.Image:
    """Draw one cell for each sample with its versions side by side (same noise: before, after), each with a caption below.

    Args:
        images: versions x (K, H, W, 3).
        captions: versions x K.
        correct: versions x K; colours the caption green or red, None leaves it black.
        titles: of the versions.
        columns: cells in a row.
        prompts: K texts written above the cells, or none.
        absent: versions x K, or none: crossed out instead of drawn, as the model made no finite image.
    """
    count, height, width = images[0].shape[:3]
    scale = max(1, 128 // width)
    w, h = width * scale, height * scale
    cell = len(images) * (w + PAD) + 2 * PAD
    rows = -(-count // columns)
    prompt_height = LINE if prompts else 0
    row = prompt_height + h + LINE + PAD
    sheet = Image.new("RGB", (columns * cell, rows * row + LINE + 2 * PAD), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for k in range(columns):
        for v, title in enumerate(titles):
            draw.text((k * cell + v * (w + PAD) + PAD, PAD), title, fill=FAINT, font=font)
    for k in range(count):
        y = LINE + 2 * PAD + (k // columns) * row + prompt_height
        if prompts:
            text = prompts[k][: (cell - 2 * PAD) // 6]
            draw.text(((k % columns) * cell + PAD, y - LINE), text, fill=INK, font=font)
        for v, version in enumerate(images):
            x = (k % columns) * cell + v * (w + PAD) + PAD
            if absent and absent[v][k]:
                draw.rectangle((x, y, x + w - 1, y + h - 1), outline=BAD)
                draw.line((x, y, x + w - 1, y + h - 1), fill=BAD)
                draw.line((x, y + h - 1, x + w - 1, y), fill=BAD)
            else:
                sheet.paste(Image.fromarray(version[k]).resize((w, h), Image.Resampling.NEAREST), (x, y))
            fill = {None: INK, True: GOOD, False: BAD}[correct[v][k]]
            draw.text((x, y + h), captions[v][k][: w // 6], fill=fill, font=font)
    return sheet


def samples(versions: Sequence[Evaluation], titles: Sequence[str], scorer: Scorer) -> Image.Image:
    """Draw the images of evaluations side by side, with the scorer's notes, coloured where its metric is right or wrong."""
    count = min(len(version.images) for version in versions)
    binary = binary_metric(scorer.metrics)
    metric = binary or scorer.metrics[0]
    correct: list[list[bool | None]] = []
    for version in versions:
        rows: Any = version.table[(version.table.scorer == scorer.name) & (version.table.metric == metric)]
        correct.append([bool(value == 1) if binary else None for value in version.shown(rows).value])
    images = [version.images[:count] for version in versions]
    notes = [version.notes(scorer.name) for version in versions]
    absent = [_not_finite(version, scorer) for version in versions]
    notes = [["not finite" if a else n for a, n in zip(*pair, strict=True)] for pair in zip(absent, notes, strict=True)]
    return grid(images, notes, correct, titles, prompts=versions[0].texts(), absent=absent)


def _not_finite(version: Evaluation, scorer: Scorer) -> list[bool]:
    """For each shown image, whether the model made none: the pixels that stand for it are black."""
    rows: Any = version.table.loc[version.table.scorer == scorer.name]
    reasons = [str(reason) for reason in version.shown(rows).reason]
    return [any(fault in reason for fault in (LATENT_FAULT, IMAGE_FAULT)) for reason in reasons]


def curve(path: Path, points: Sequence[dict[str, Any]], keys: Sequence[str], currency: str = "nfe") -> None:
    """Draw validation scores over the spend, a band for the 95 % interval; PNG or SVG by the path's suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), dpi=120)
    for key in keys:
        x = [p["spent"][currency] for p in points]
        y = [p["scores"][key]["mean"] for p in points]
        # Null, where there are too few prompts for an interval, becomes NaN and draws nothing.
        low, high = (np.array([p["scores"][key]["ci"][end] for p in points], np.float64) for end in (0, 1))
        (line,) = axes.plot(x, y, marker="o", markersize=3, label=key)
        axes.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set_xlabel(f"spent: {currency}")
    axes.set_ylabel("validation score, 95 % interval")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)
    pyplot.close(figure)
