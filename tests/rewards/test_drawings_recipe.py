"""Recipe of the held-out detector of drawings: its outlines, its colours, and that a stopped run repeats itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gpobench.bench.assets import drawings
from gpobench.bench.assets.drawings import COLOURS, SHAPES
from gpobench.bench.errors import Missing
from gpobench.rewards import drawings_recipe as recipe
from gpobench.rewards.detect_drawings import DrawingsColours, DrawingsDetector

SMALL = recipe.DrawingsRecipe(steps=3, batch=8, tell_every=1, calibrated=16, measured=8)


def test_a_batch_is_pure_in_its_seed():
    (a, x, c), (b, y, d), (e, _, _) = (recipe.draw_batch(12, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(a, b) and torch.equal(c, d) and all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
    assert not torch.equal(a, e) and a.shape == (12, 32, 64, 3) and 0 <= float(a.min()) <= float(a.max()) <= 255


@pytest.mark.parametrize("kind", SHAPES)
def test_an_outline_is_most_like_the_drawing_of_its_kind(kind: str):
    """Two programs draw the same shapes: none of the other seven overlaps more."""
    place = (torch.arange(16) + 0.5 - 8) / drawings.RADIUS
    edge = recipe.edge_of(kind, place[None, :], place[:, None], torch.tensor(0.5))
    mine = (0.5 - edge * drawings.RADIUS).clamp(0, 1).numpy()
    overlap = {
        other: np.minimum(mine, drawn).sum() / np.maximum(mine, drawn).sum()
        for other, drawn in ((other, drawings.shape_coverage(other)) for other in SHAPES)
    }
    assert max(overlap, key=overlap.__getitem__) == kind and overlap[kind] > 0.75, overlap


def test_a_named_colour_is_near_the_pixels_of_its_shape():
    named = np.array(list(COLOURS.values()), float)
    hits = []
    for step in range(4):
        pictures, truth, colours = recipe.draw_batch(64, (9, step), strength=0.0)
        solid = truth.real & (colours >= 0) & (truth.kind != SHAPES.index("ring"))
        for row, i in torch.nonzero(solid).tolist():
            x, y = int(truth.x[row, i].clamp(0, 63)), int(truth.y[row, i].clamp(0, 31))
            distance = np.linalg.norm(pictures[row, y, x].numpy() - named, axis=1)
            hits.append(int(distance.argmin()) == int(colours[row, i]))
    assert len(hits) > 150 and np.mean(hits) > 0.85


def test_the_colour_loss_is_the_mean_over_named_shapes_in_float64():
    g = torch.Generator().manual_seed(0)
    pictures, truth, colours = recipe.draw_batch(6, (4,))
    maps = torch.randn(len(pictures), recipe.OUTPUTS, 16, 32, generator=g).double()
    terms = []
    for row, i in torch.nonzero(truth.real & (colours >= 0)).tolist():
        y, x = min(max(int(truth.y[row, i] / 2), 0), 15), min(max(int(truth.x[row, i] / 2), 0), 31)
        logits = maps[row, len(SHAPES) + 4 :, y, x].numpy()
        terms.append(np.log(np.exp(logits).sum()) - logits[int(colours[row, i])])
    assert float(recipe.colour_loss(maps, truth, colours)) == pytest.approx(np.mean(terms), abs=1e-12)


def test_a_stopped_run_continues_as_if_it_had_not(tmp_path: Path):
    facts = SMALL(tmp_path / "straight", seed=3, log=lambda line: None)
    assert facts == json.loads((tmp_path / "straight" / "drawings.json").read_text())

    class Cut(Exception):
        pass

    def cut(line: dict[str, Any]) -> None:
        if line.get("step") == 2:
            raise Cut

    with pytest.raises(Cut):
        SMALL(tmp_path / "cut", seed=3, log=cut)
    lines: list[dict[str, Any]] = []
    SMALL(tmp_path / "cut", seed=3, log=lines.append)
    assert lines[0] == {"recipe": "drawings", "continues_at": 2}
    one, two = (load_file(tmp_path / run / "drawings.safetensors") for run in ("straight", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)

    detector = DrawingsDetector(tmp_path / "cut" / "drawings.safetensors")
    pictures, _ = recipe.known_drawings(5, 0)
    together = detector.maps(pictures)
    assert all(torch.equal(detector.maps(p[None])[0], row) for p, row in zip(pictures, together, strict=True))
    for picture, found in zip(pictures, detector(pictures), strict=True):
        assert set(DrawingsColours(detector)(picture, found)) <= set(COLOURS)


def test_without_weights_it_says_how_to_make_them(tmp_path: Path):
    with pytest.raises(Missing, match="gpobench pretrain drawings"):
        DrawingsDetector(tmp_path / "none.safetensors")
