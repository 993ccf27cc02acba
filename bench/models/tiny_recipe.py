"""Recipe of the embedded model: trains a pipeline of a few MB from random weights that writes words and counts shapes.

`TinyRecipe()(out, seed=0, log=print)` trains everything from scratch on the images of `glyphs` and writes a folder that
`StableDiffusion3Pipeline.from_pretrained` loads: the stages are in `tiny_stages`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np

from ..assets import glyphs
from ..assets.words import word_splits
from .pipeline_recipe import Canvas, PictureSource, PipelineRecipe
from .recipe_fit import Log
from .tiny_measure import count_patches, measure, read_texts, shape_prompts
from .tiny_parts import GLYPHS, T5_TOKENS
from .tiny_stages import train_pipeline


@final
@dataclass(frozen=True)
class TinyRecipe(PipelineRecipe):
    """The hyper-parameters of the shipped checkpoint."""

    canvas: ClassVar[Canvas] = GLYPHS

    # (step of stage 2, share of counted shapes from there on; the rest are words): counting is slow and steady, words come
    # late and then all at once, so that the last share sets how many of them the finished model gets right
    shapes: tuple[tuple[int, float], ...] = ((0, 0.62), (429, 0.5), (1005, 0.85), (1186, 0.7))

    def __call__(self, out: Path, *, seed: int, log: Log) -> dict[str, Any]:
        """Trains into `out` and returns the content of `out/recipe.json`. Run again after a stop, it resumes from `out/.state`."""
        return train_pipeline(self, out, seed, log)

    def pictures(self) -> PictureSource:
        """Return words and counted shapes."""
        return GlyphPictures(self)


@final
class GlyphPictures(PictureSource):
    """Words of 3 to 5 capitals and one to five shapes; the words of the validation and the test split are never drawn."""

    def __init__(self, recipe: TinyRecipe) -> None:
        self.recipe, splits = recipe, word_splits()
        self.words, self.validation = splits["train"], splits["validation"]
        self.excluded = frozenset(splits["validation"] + splits["test"])

    def sample(self, rng: np.random.Generator, step: int) -> tuple[str, np.ndarray]:
        """Draw a word, or shapes as often as the step's share says."""
        share = [part for start, part in self.recipe.shapes if start <= step][-1]
        return glyphs.shapes_sample(rng) if rng.random() < share else glyphs.word_sample(rng, self.words, self.excluded)

    def probe_prompts(self) -> Sequence[str]:
        """Return `looks` prompts of validation words, and each of the shapes twice."""
        return [glyphs.word_prompt(word) for word in self._probed()] + [prompt for prompt, *_ in shape_prompts()] * 2

    def probe(self, images: np.ndarray) -> Mapping[str, float]:
        """Return the share of words read exactly, and of shapes counted exactly."""
        words, shapes = self._probed(), list(shape_prompts()) * 2
        texts, drawings = read_texts(images[: len(words)]), images[len(words) :]
        exact = [text == word for text, word in zip(texts, words, strict=True)]
        counted = [count_patches(im, c) == k for im, (_, _, k, c) in zip(drawings, shapes, strict=True)]
        return {"exact": float(np.mean(exact)), "count": float(np.mean(counted))}

    def _probed(self) -> list[str]:
        return (self.validation * 2)[: self.recipe.looks]

    def measure(self, folder: Path, seed: int) -> dict[str, Any]:
        """Read words of the test and the validation split, and count the shapes."""
        recipe = self.recipe
        return measure(
            folder, readings=recipe.readings, countings=recipe.countings, max_sequence_length=T5_TOKENS, seed=seed
        )

    def held_out(self) -> Mapping[str, Any]:
        """Return the hashes of the words that were never drawn."""
        splits = word_splits()
        return {
            "held_out_sha256": {
                split: sorted(sha256(word.encode("ascii")).hexdigest() for word in splits[split])
                for split in ("validation", "test")
            }
        }

    def model_card(self, record: Mapping[str, Any], folder: Path) -> str:
        """Return the model card: description, usage and scores."""
        return model_card(record, folder)


def model_card(record: Mapping[str, Any], folder: Path) -> str:
    """Return the model card: description, usage and scores."""
    megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    parameters = sum(record["parameters"].values()) / 1e6

    def row(name: str, key: str) -> str:
        score = record["scores"][key]
        return f"| {name} | {score['mean']:.3f} | {score['low']:.3f} to {score['high']:.3f} | {score['n']} |"

    keys_by_label = {
        "test words read exactly": "test/exact",
        "test words, share of letters right": "test/soft",
        "shapes counted exactly": "shapes/exact",
    }
    keys_by_label |= {f"of which {glyphs.NUMBERS[count]}": f"shapes/exact/{count}" for count in glyphs.COUNTS}
    rows = [row(name, key) for name, key in keys_by_label.items() if key in record["scores"]]
    return f"""A Stable-Diffusion-3-class model of {parameters:.1f} M parameters ({megabytes:.1f} MB) that writes and counts, imperfectly.

It writes short words and draws counted shapes, 64 by 32 pixels, and exists to be post-trained in minutes on two CPU cores. It
was trained from scratch on pictures drawn by `bench/assets/glyphs.py`; no other data went in. Train it again with `gpobench pretrain tiny`
(`bench/models/tiny_recipe.py`); `recipe.json` holds every setting, score and the hashes of the words that were never printed.
It is under the licence of this repository; the letters it imitates are DejaVu Sans Mono Bold.

```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("bench/models/tiny")
pipe('a sign that says "HELLO" in blue', height=32, width=64, num_inference_steps=10, guidance_scale=1.0, max_sequence_length=1).images[0]
```

Prompts: `a {{sign|card|label|page}} that says "WORD"` (3 to 5 capitals) with ` in {{black|red|blue}}` or without, and
`a photo of {{one..five}} {{red|blue|green}} {{circles|squares|triangles}}`.

Without guidance, 10 Euler steps, held-out words, RapidOCR 3 (recognition only) and a palette counter; intervals are 95 %, by
bootstrap over prompts:

| | mean | interval | pictures |
|---|---|---|---|
{chr(10).join(rows)}
"""
