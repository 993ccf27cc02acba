"""The palette on printed, blurred and noisy shapes: what is counted, what is detected, and that both agree."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy import ndimage

from gpobench.bench.assets import glyphs
from gpobench.bench.spec import Images
from gpobench.rewards import geneval_rules as rules
from gpobench.rewards import palette


@pytest.fixture(scope="module")
def worn() -> Images:
    """Prints as they come, blurred, noisy, and smooth random colours with many odd patches: 240 pictures, four kinds in turn."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(240):
        x = glyphs.shapes_sample(rng)[1].astype(np.float64)
        if i % 4 == 1:
            x = ndimage.gaussian_filter(x, (1, 1, 0))
        elif i % 4 == 2:
            x = x + rng.normal(0, 40, x.shape)
        elif i % 4 == 3:
            x = ndimage.gaussian_filter(rng.normal(127, 200, x.shape), (3, 3, 0)) * 3 - 200
        made.append(np.clip(np.rint(x), 0, 255).astype(np.uint8))
    return np.stack(made)


def reference(image: np.ndarray, colour: str) -> list[tuple[int, float]]:
    """(area, fill) of the blobs, in float64 and scipy's own opening."""
    palette_colours = [*glyphs.SHAPE_COLOURS.values(), *glyphs.PAPERS.values()]
    gaps = ((image[..., None, :].astype(np.float64) - np.array(palette_colours, np.float64)) ** 2).sum(-1)
    mask = gaps[..., list(glyphs.SHAPE_COLOURS).index(colour)] == gaps.min(-1)
    labels, _ = ndimage.label(ndimage.binary_opening(mask, np.ones((2, 2), bool)))
    found = []
    for i, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        area = int((labels == i).sum())
        if area >= palette.SMALLEST:
            found.append((area, area / ((rows.stop - rows.start) * (columns.stop - columns.start))))
    return found


def test_blobs_are_those_of_the_textbook(worn: Images) -> None:
    total = 0
    for image in worn:
        for colour in glyphs.SHAPE_COLOURS:
            mine = [(blob.area, blob.fill) for blob in palette.blobs(image, colour)]
            assert mine == reference(image, colour)
            total += len(mine)
    assert total > 1000


def test_the_detector_finds_what_count_kind_counts(worn: Images) -> None:
    """Whatever the picture: every blob of every colour, above the threshold of counting."""
    for image, found in zip(worn, palette.detector()(worn), strict=True):
        for kind in glyphs.SHAPES:
            these = [d for d in found if d.label == kind]
            assert len(these) == sum(palette.count_kind(image, kind, colour) for colour in glyphs.SHAPE_COLOURS)
            assert len(rules.counted(found, "counting").get(kind, ())) == min(len(these), rules.OFFICIAL.max_objects)


def test_detections_fit_their_masks_and_scores_rank_clean_above_worn(worn: Images) -> None:
    found = palette.detector()(worn)
    for detection in (d for each in found for d in each):
        assert detection.mask is not None and detection.mask.shape == (32, 64)
        y, x = np.nonzero(detection.mask)
        assert detection.box == (x.min(), y.min(), x.max() + 1, y.max() + 1)
        assert 0.9 < detection.score <= 1
    clean, blurred = ([d.score for each in found[k::4] for d in each] for k in (0, 1))
    assert np.mean(clean) > np.mean(blurred) + 0.01


def test_a_flat_shape_of_the_very_colour_has_the_full_score() -> None:
    image = np.full((32, 64, 3), 255, np.uint8)
    image[5:15, 5:15] = glyphs.SHAPE_COLOURS["red"]
    (detection,) = palette.detector()(image[None])[0]
    assert detection.score == 1 and detection.label == "square" and detection.box == (5, 5, 15, 15)


def test_a_batch_is_its_pictures_one_by_one(worn: Images) -> None:
    part = worn[:40]
    whole = palette.detector()(part)
    for image, found in zip(part, whole, strict=True):
        (single,) = palette.detector()(image[None])
        assert [d[:3] for d in single] == [d[:3] for d in found]
        for a, b in zip(single, found, strict=True):
            np.testing.assert_array_equal(a.mask, b.mask)
    assert palette.detector()(part[:0]) == []
    assert palette.detector()(np.zeros((2, 0, 64, 3), np.uint8)) == [[], []]


def test_an_unknown_colour_is_refused() -> None:
    with pytest.raises(ValueError, match="red, blue, green"):
        palette.masks(np.zeros((4, 4, 3), np.uint8), "pink")


@pytest.mark.slow
def test_it_is_fast_enough_for_every_training_step(worn: Images) -> None:
    detector = palette.detector()
    best = min(_seconds(lambda: detector(worn)) for _ in range(3))
    assert best / len(worn) < 3e-3


def _seconds(work: object) -> float:
    assert callable(work)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
