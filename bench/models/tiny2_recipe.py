"""Recipe of the second embedded model, `tiny` 2: short texts, counted shapes and pairs of shapes on the canvas of the first.

`gpobench pretrain tiny-2 --out DIR --seed 0` runs it. Networks and stages are those of the first model (`tiny_stages`); what differs are
the pictures (`bench/assets/drawings.py`), prompts of 23 tokens, and two and a half times as many samples. docs/tiny-2.md says why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np

from ..assets import drawings
from ..assets.drawing_prompts import (
    ShapePrompt,
    TextPrompt,
    counting_prompts,
    geneval_prompts,
    two_word_prompts,
    word_prompts,
    words_of,
)
from .drawings_measure import read_text, shows
from .pipeline_recipe import Canvas, PictureSource, PipelineRecipe
from .recipe_fit import Log
from .tiny_measure import interval, painter
from .tiny_parts import T5_TOKENS
from .tiny_stages import train_pipeline

TOKENS = 23  # two words of six letters, a space, the quotes, six words around them, begin and end
CHANNELS = 20  # of the latent: through 16 only 87 % of clean drawings stay right, through 20 all
DRAWINGS = Canvas(drawings.WIDTH, drawings.HEIGHT, TOKENS, drawings.VOCABULARY, gap="_", channels=CHANNELS)

DrawnPrompt = TextPrompt | ShapePrompt


@final
@dataclass(frozen=True)
class Tiny2Recipe(PipelineRecipe):
    """The hyper-parameters of the second embedded model; an estimate, until it has been trained once."""

    canvas: ClassVar[Canvas] = DRAWINGS

    # (step of stage 2, share of one word, of two words, of counted shapes; the rest are pairs of shapes)
    shares: tuple[tuple[int, float, float, float], ...] = ((0, 0.25, 0.2, 0.3),)
    autoencoder_steps: int = 400
    steps: int = 3600
    average: float = 0.998
    decoder_steps: int = 500
    drawn: int = 4096
    tell_every: float = 30.0
    save_every: float = 60.0
    look_every: float = 240.0
    looks: int = 40  # validation prompts of each kind
    readings: int = 1  # pictures of each test text in the final measurement; 0 for none
    countings: int = 2  # pictures of each test prompt about shapes in the final measurement; 0 for none

    def __call__(self, out: Path, *, seed: int, log: Log) -> dict[str, Any]:
        """Trains into `out` and returns the content of `out/recipe.json`. Run again after a stop, it resumes from `out/.state`."""
        return train_pipeline(self, out, seed, log)

    def pictures(self) -> PictureSource:
        """Return texts, counted shapes and pairs of shapes."""
        return DrawingPictures(self)


def right(image: np.ndarray, prompt: DrawnPrompt) -> bool:
    """Return whether an image shows what a prompt asks for, exactly."""
    return read_text(image) == prompt.target if isinstance(prompt, TextPrompt) else shows(image, prompt)


def prompts_by_kind(split: str) -> dict[str, Sequence[DrawnPrompt]]:
    """Return the prompts of a split: the two strata of texts, the task counting, and GenEval's tags."""
    kinds: dict[str, list[DrawnPrompt]] = {
        "word": [*word_prompts(split)],
        "two_words": [*two_word_prompts(split)],
        "counts": [*counting_prompts(split)],
    }
    for prompt in geneval_prompts(split):
        kinds.setdefault(prompt.tag, []).append(prompt)
    return dict(kinds)


@final
class DrawingPictures(PictureSource):
    """PictureSource of train combinations alone; the words of the validation and the test split are never drawn."""

    def __init__(self, recipe: Tiny2Recipe) -> None:
        self.recipe = recipe
        self.words = words_of("train")
        self.excluded = frozenset(words_of("validation") + words_of("test"))
        self.probed = [
            (kind, prompt)
            for kind, prompts in prompts_by_kind("validation").items()
            if kind not in ("counting", "single_object")  # the same pictures as `counts` and `colors`
            for prompt in prompts[: recipe.looks]
        ]

    def sample(self, rng: np.random.Generator, step: int) -> tuple[str, np.ndarray]:
        """Draw a text, counted shapes or a pair, as often as the step's shares say."""
        _, *shares = [row for row in self.recipe.shares if row[0] <= step][-1]
        return drawings.sample(rng, self.words, self.excluded, drawings.Shares(*shares))

    def probe_prompts(self) -> Sequence[str]:
        """Return up to `looks` validation prompts of every kind."""
        return [prompt.text for _, prompt in self.probed]

    def probe(self, images: np.ndarray) -> Mapping[str, float]:
        """Return the share of right images of every kind."""
        verdicts: dict[str, list[bool]] = {}
        for image, (kind, prompt) in zip(images, self.probed, strict=True):
            verdicts.setdefault(kind, []).append(right(image, prompt))
        return {kind: float(np.mean(these)) for kind, these in verdicts.items()}

    def measure(self, folder: Path, seed: int) -> dict[str, Any]:
        """Measure the test prompts of every kind: `test/word`, `test/two_words`, `test/counts`, `test/position` ..."""
        recipe, scores = self.recipe, dict[str, Any]()
        if not recipe.readings and not recipe.countings:
            return scores
        paint = painter(folder, (recipe.canvas.height, recipe.canvas.width), T5_TOKENS, seed)
        for salt, (kind, prompts) in enumerate(prompts_by_kind("test").items()):
            each = recipe.readings if isinstance(prompts[0], TextPrompt) else recipe.countings
            if each:
                rows = [prompt for prompt in prompts for _ in range(each)]
                images = paint([prompt.text for prompt in rows], salt)
                verdicts = [right(image, prompt) for image, prompt in zip(images, rows, strict=True)]
                scores[f"test/{kind}"] = interval(np.array(verdicts, float).reshape(-1, each))
        return scores

    def held_out(self) -> Mapping[str, Any]:
        """Return the hashes of the words that were never drawn; of shapes the split rule says it."""
        splits = ("validation", "test")
        hashes = {
            split: sorted(sha256(word.encode("ascii")).hexdigest() for word in words_of(split)) for split in splits
        }
        return {"held_out_sha256": hashes}

    def model_card(self, record: Mapping[str, Any], folder: Path) -> str:
        """Return the model card: description, usage and scores."""
        megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        parameters = sum(record["parameters"].values()) / 1e6
        rows = [
            f"| {name.removeprefix('test/')} | {score['mean']:.3f} | {score['low']:.3f} to {score['high']:.3f} | {score['n']} |"
            for name, score in record["scores"].items()
        ]
        return CARD.format(parameters=parameters, megabytes=megabytes, rows="\n".join(rows))


CARD = """A Stable-Diffusion-3-class model of {parameters:.1f} M parameters ({megabytes:.1f} MB) that writes and draws, imperfectly.

It writes one or two short words and draws counted and placed shapes, 64 by 32 pixels, and exists to be post-trained in minutes on
two CPU cores. It was trained from scratch on pictures drawn by `bench/assets/drawings.py`; no other data went in. Train it again with
`gpobench pretrain tiny-2` (`bench/models/tiny2_recipe.py`); `recipe.json` holds every setting and score. It is under the licence of this
repository; the letters it imitates are DejaVu Sans Mono Bold.

Without guidance, 10 Euler steps, test prompts, exact pictures (RapidOCR 3 line by line; colours and outlines); intervals are 95 %, by
bootstrap over prompts:

| | right | interval | pictures |
|---|---|---|---|
{rows}
"""
