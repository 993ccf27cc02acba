"""Figures: every sample in its cell, every caption in its colour, every point on its curve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpobench.bench.evaluation import plots


def solid(*colours: tuple[int, int, int]) -> np.ndarray:
    """(K, 32, 64, 3): one colour an image."""
    return np.stack([np.full((32, 64, 3), colour, np.uint8) for colour in colours])


RED, GREEN, BLUE, PINK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255)


def colours(sheet: Image.Image) -> dict[tuple[int, ...], int]:
    found, counts = np.unique(np.asarray(sheet).reshape(-1, 3), axis=0, return_counts=True)
    return {tuple(int(v) for v in c): int(n) for c, n in zip(found, counts, strict=True)}


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_every_sample_is_shown_whole(columns: int) -> None:
    sheet = plots.grid(
        [solid(RED, GREEN, BLUE), solid(PINK, PINK, PINK)], [[""] * 3] * 2, [[None] * 3] * 2, ["", ""], columns
    )
    seen = colours(sheet)
    scale = (128 // 64) ** 2
    assert [seen[c] for c in (RED, GREEN, BLUE, PINK)] == [32 * 64 * scale] * 3 + [3 * 32 * 64 * scale]


def test_before_is_left_of_after() -> None:
    sheet = np.asarray(plots.grid([solid(RED), solid(BLUE)], [[""], [""]], [[None], [None]], ["b", "a"], 1))
    left, right = (np.argwhere((sheet == colour).all(-1))[:, 1] for colour in (RED, BLUE))
    assert left.max() < right.min()


def test_an_image_that_is_not_finite_is_crossed_out_and_not_shown_black() -> None:
    black = solid((0, 0, 0), (0, 0, 0))
    sheet = plots.grid([black], [["", ""]], [[None, None]], [""], absent=[[True, False]])
    seen = colours(sheet)
    assert seen[(0, 0, 0)] == 32 * 64 * (128 // 64) ** 2 and seen[plots.BAD] > 3 * 64


@pytest.mark.parametrize(("mark", "ink"), [(True, plots.GOOD), (False, plots.BAD), (None, plots.INK)])
def test_correct_and_wrong_colour_the_caption(mark: bool | None, ink: tuple[int, int, int]) -> None:
    white = solid((255, 255, 255))
    seen = np.array(list(colours(plots.grid([white], [["HELLO"]], [[mark]], [""], 1))))

    def gap(colour: tuple[int, int, int]) -> int:  # letters have soft edges
        return int(np.abs(seen - colour).sum(1).min())

    assert gap(ink) < 40 < min(gap(other) for other in {plots.GOOD, plots.BAD, plots.INK} - {ink})


def point(spent: float, low: float | None, high: float | None) -> dict[str, object]:
    mean = None if low is None or high is None else (low + high) / 2
    return {"spent": {"nfe": spent}, "scores": {"s/m": {"mean": mean, "ci": [low, high]}}}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_curve_is_drawn_also_of_one_point_and_of_none_scored(tmp_path: Path, suffix: str) -> None:
    nan = float("nan")
    for points in ([point(0, 0.1, 0.2), point(10, 0.3, 0.4)], [point(0, 0.1, 0.2)], [point(0, nan, nan)]):
        file = tmp_path / f"curve{suffix}"
        plots.curve(file, points, ["s/m"])
        assert file.stat().st_size > 1000


def test_a_curve_is_the_same_twice(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plots.curve(tmp_path / name, [point(0, 0.1, 0.2), point(10, 0.3, 0.4)], ["s/m"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
