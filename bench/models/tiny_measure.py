"""Measures the embedded model: reads the words and counts the shapes in its images.

No scorer is imported here, so these are plain forms of the two that the tasks use: RapidOCR's recogniser on the whole image, and
patches of one palette colour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..assets import glyphs
from ..assets.words import word_splits
from .recipe_fit import generator

Paint = Callable[[Sequence[str], int], np.ndarray]  # (prompts, salt of the noise) -> (N, H, W, 3) uint8


def shape_prompts() -> Iterator[tuple[str, str, int, str]]:
    """List (prompt, kind, count, colour) of all 45 shapes prompts."""
    for kind in glyphs.SHAPES:
        for colour in glyphs.SHAPE_COLOURS:
            for count in glyphs.COUNTS:
                yield glyphs.shapes_prompt(kind, count, colour), kind, count, colour


@lru_cache(maxsize=2)
def recogniser(width: int) -> Any:
    """Load RapidOCR's recogniser for lines resized to `width` x 48 px, on one thread."""
    from rapidocr import RapidOCR

    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    # at the default width of 320 px most would be padding
    engine = RapidOCR(params={"Global.log_level": "error", "Rec.rec_img_shape": [3, 48, width], **threads})
    blank = np.zeros((glyphs.HEIGHT, glyphs.WIDTH, 3), np.uint8)
    engine(blank, use_det=False, use_cls=False, use_rec=True)  # it loads at its first use
    return engine.text_rec


def read_texts(images: np.ndarray) -> list[str]:
    """Read the text of each image (N, 32, 64, 3) uint8, by RapidOCR's recogniser on the whole image at 96x48."""
    from rapidocr.ch_ppocr_rec import TextRecInput

    texts = recogniser(96)(TextRecInput(img=[np.ascontiguousarray(image[..., ::-1]) for image in images])).txts
    return ["".join(text.split()).upper() for text in texts or [""] * len(images)]


def count_patches(image: np.ndarray, colour: str) -> int:
    """Count the patches of one shape colour in an image (32, 64, 3) uint8."""
    from scipy import ndimage

    other_colours = [value for name, value in glyphs.SHAPE_COLOURS.items() if name != colour]
    palette = np.array([glyphs.SHAPE_COLOURS[colour], *glyphs.PAPERS.values(), *other_colours], np.float32)
    mask = ((image[:, :, None].astype(np.float32) - palette) ** 2).sum(-1).argmin(-1) == 0
    # without an output array it is always the pair
    labels, count = cast(tuple[np.ndarray, int], ndimage.label(ndimage.binary_opening(mask, np.ones((2, 2)))))
    return int((np.bincount(labels.ravel(), minlength=count + 1)[1:] >= 12).sum())


def interval(values: np.ndarray) -> dict[str, Any]:
    """Compute the mean with a 95 % bootstrap interval over prompts; values (prompts, images of each)."""
    rng = np.random.default_rng(0)
    per_prompt = values.mean(1)
    means = per_prompt[rng.integers(len(per_prompt), size=(4000, len(per_prompt)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "mean": round(float(per_prompt.mean()), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "n": int(values.size),
    }


def measure(folder: Path, *, readings: int, countings: int, max_sequence_length: int, seed: int) -> dict[str, Any]:
    """Read words and count shapes in images of the exported pipeline: plain diffusers, 10 steps, no guidance.

    Args:
        folder: a folder that StableDiffusion3Pipeline.from_pretrained loads.
        readings: images of each word of the test and the validation split; 0 for none.
        countings: images of each shapes prompt; 0 for none.
        max_sequence_length: of the third text encoder, in tokens.
        seed: of the noise.

    Returns:
        `test/exact`, `test/soft`, `test/exact/3 letters`, `shapes/exact/2` ... -> mean, low and high (95 %), n.
    """
    paint = painter(folder, (glyphs.HEIGHT, glyphs.WIDTH), max_sequence_length, seed)
    scores: dict[str, Any] = {}
    for salt, split in enumerate(("test", "validation") if readings else ()):
        scores |= _reading_scores(paint, split, salt, readings)
    return scores | (_counting_scores(paint, countings) if countings else {})


def painter(folder: Path, size: tuple[int, int], max_sequence_length: int, seed: int) -> Paint:
    """Load a written pipeline; it samples 10 steps without guidance, at `size` (height, width)."""
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)

    def paint(prompts: Sequence[str], salt: int) -> np.ndarray:
        noise, painted = generator(seed, 10, salt), []
        for i in range(0, len(prompts), 64):
            output: Any = pipe(  # an output object, and a tuple only with return_dict=False
                prompt=list(prompts[i : i + 64]),
                num_inference_steps=10,
                guidance_scale=1.0,
                height=size[0],
                width=size[1],
                max_sequence_length=max_sequence_length,
                generator=noise,
                output_type="np",
            )
            painted.append(np.rint(output.images * 255).astype(np.uint8))
        return np.concatenate(painted)

    return paint


def _reading_scores(paint: Paint, split: str, salt: int, readings: int) -> dict[str, Any]:
    from rapidfuzz.distance import Levenshtein

    words = [word for word in word_splits()[split] for _ in range(readings)]
    texts = read_texts(paint([glyphs.word_prompt(word) for word in words], salt))
    pairs = list(zip(texts, words, strict=True))
    exact = np.array([text == word for text, word in pairs], float)
    soft = np.array([max(0.0, 1 - Levenshtein.distance(text, word) / len(word)) for text, word in pairs])
    scores = {
        f"{split}/exact": interval(exact.reshape(-1, readings)),
        f"{split}/soft": interval(soft.reshape(-1, readings)),
    }
    for length in range(glyphs.SHORTEST, glyphs.LONGEST + 1):
        chosen = np.array([len(word) == length for word in words])
        if chosen.any():
            scores[f"{split}/exact/{length} letters"] = interval(exact[chosen].reshape(-1, readings))
    return scores


def _counting_scores(paint: Paint, countings: int) -> dict[str, Any]:
    rows = [row for row in shape_prompts() for _ in range(countings)]
    images = paint([prompt for prompt, *_ in rows], 5)
    correct = [count_patches(image, colour) == count for image, (_, _, count, colour) in zip(images, rows, strict=True)]
    exact = np.array(correct, float)
    scores = {"shapes/exact": interval(exact.reshape(-1, countings))}
    for count in glyphs.COUNTS:
        chosen = np.array([row[2] == count for row in rows])
        scores[f"shapes/exact/{count}"] = interval(exact[chosen].reshape(-1, countings))
    return scores
