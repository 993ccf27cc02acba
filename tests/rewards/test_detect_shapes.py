"""Held-out shape detector: what it counts, in any colour, that it is independent of the palette counter, and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gpobench.bench.assets import glyphs
from gpobench.bench.errors import Missing, UserError
from gpobench.rewards import detect_shapes, shapes_recipe
from gpobench.rewards.detectors import open_detector


@pytest.fixture(scope="module")
def detector() -> detect_shapes.ShapesDetector:
    return detect_shapes.detector()


def test_id_follows_the_weights(detector: detect_shapes.ShapesDetector, tmp_path: Path) -> None:
    assert detector.id.startswith("shapes-1/") and open_detector("shapes").id == detector.id
    other = {
        key: value + 1 if value.is_floating_point() else value
        for key, value in load_file(detect_shapes.WEIGHTS).items()
    }
    save_file(other, tmp_path / "other.safetensors")
    assert detect_shapes.ShapesDetector(tmp_path / "other.safetensors").id != detector.id
    assert detect_shapes.WEIGHTS.stat().st_size < 600_000


def test_counts_as_well_as_its_recipe_says(detector: detect_shapes.ShapesDetector) -> None:
    facts: Any = detect_shapes.recipe_facts()
    for key, draw in (("clean_drawings", shapes_recipe.clean_drawings), ("worn_drawings", shapes_recipe.worn_drawings)):
        found = shapes_recipe.exact(detector, *draw())
        assert (
            found["n"] == facts[key]["n"] and abs(found["exact"] - facts[key]["exact"]) <= 0.01
        )  # other machines round otherwise
    assert facts["clean_drawings"]["exact"] > 0.99
    assert shapes_recipe.counts(detector(shapes_recipe.words())).any(1).mean() < 0.02


@given(st.integers(0, 2**32 - 1))
def test_counts_any_colour_on_any_paper(detector: detect_shapes.ShapesDetector, seed: int) -> None:
    """Clear colours that the palette does not know; what is counted must not depend on them, nor on which is the lighter."""
    rng = np.random.default_rng(seed)
    dark, light = (rng.integers(low, low + 90, 3) for low in (0, 165))
    ink, paper = [tuple(map(int, c)) for c in ((dark, light), (light, dark))[int(rng.integers(2))]]
    kind, n = glyphs.SHAPES[int(rng.integers(3))], int(rng.integers(1, 6))
    picture = glyphs.draw_shapes(kind, n, ink, paper, rng)  # type: ignore[arg-type]
    (found,) = shapes_recipe.counts(detector(picture[None]))
    assert abs(found[glyphs.SHAPES.index(kind)] - n) <= 1 and found.sum() <= n + 1


def test_boxes_lie_around_the_shapes(detector: detect_shapes.ShapesDetector) -> None:
    from scipy import ndimage

    rng = np.random.default_rng(1)
    off = []
    for kind in glyphs.SHAPES:
        picture = glyphs.draw_shapes(kind, 4, (20, 20, 120), (255, 255, 255), rng)
        labelled: Any = ndimage.label((picture < 140).any(-1))
        true = [(c.start, r.start, c.stop, r.stop) for r, c in ndimage.find_objects(labelled[0])]
        (found,) = detector(picture[None])
        sure = [one for one in found if one.score > 0.9]
        assert len(sure) == len(true) == 4
        off += [min(np.abs(np.subtract(one.box, box)).max() for box in true) for one in sure]
    assert np.max(off) < 2.5 and np.mean(off) < 1.5


def test_a_batch_is_its_pictures_one_by_one_in_any_order(detector: detect_shapes.ShapesDetector) -> None:
    images, _ = shapes_recipe.worn_drawings(2)
    whole = detector.maps(images)
    for i in (0, 31, 32, 89):
        assert torch.equal(detector.maps(images[i : i + 1])[0], whole[i])
    order = np.random.default_rng(0).permutation(len(images))
    assert torch.equal(detector.maps(images[order]), whole[torch.from_numpy(order)])
    found = detector(images)
    assert detector(images[order]) == [found[i] for i in order]


def test_answers_have_the_form_of_the_contract(detector: detect_shapes.ShapesDetector) -> None:
    images, _ = shapes_recipe.worn_drawings(1)
    for row in detector(images):
        assert [one.score for one in row] == sorted((one.score for one in row), reverse=True)
        assert all(
            one.label in detector.classes and detect_shapes.FLOOR < one.score < 1 and one.mask is None for one in row
        )
    assert detector(images[:0]) == [] and detector.maps(images[:0]).shape == (0, 7, 16, 32)
    blank = np.stack([np.full((32, 64, 3), level, np.uint8) for level in (0, 127, 222, 255)])
    assert not shapes_recipe.counts(detector(blank)).any()


def test_a_peak_is_a_centre() -> None:
    maps = torch.full((1, 7, 16, 32), -20.0)
    maps[0, 1, 5, 7] = 3.0  # a square in the cell (7, 5), its centre right of the cell's, 9 x 8 px
    maps[0, 1, 5, 8] = 2.0  # beside the peak: no peak
    maps[0, 3:, 5, 7] = torch.tensor([0.25, 0.0, np.log(9), np.log(8)])
    ((found,),) = detect_shapes.peaks(maps, torch.tensor([2.0, -1.0]))
    assert found.label == "square" and found.score == pytest.approx(1 / (1 + np.exp(-5)))
    assert found.box == pytest.approx((15.5 - 4.5, 11 - 4, 15.5 + 4.5, 11 + 4), abs=1e-4)


def test_bad_input(detector: detect_shapes.ShapesDetector, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="looks at pictures of"):
        detector(np.zeros((1, 64, 64, 3), np.uint8))
    with pytest.raises(Missing, match="gpobench pretrain shapes"):
        detect_shapes.ShapesDetector(tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(detect_shapes.WEIGHTS.read_bytes()[:5000])
    with pytest.raises(UserError, match="does not hold"):
        detect_shapes.ShapesDetector(tmp_path / "broken.safetensors")
    broken = detect_shapes.detector()
    broken.network[0] = torch.nn.Conv2d(4, 24, 5, 2, 2)  # four channels where a picture has three
    with pytest.raises(RuntimeError):
        broken(np.zeros((1, 32, 64, 3), np.uint8))
