"""One object, two, so many, this colour, that side: the GenEval benchmark as a task, with a train and a validation split of its own.

`open` is the benchmark (arXiv 2310.11513): 553 prompts in six tags, four images each, for real models. Flow-GRPO (arXiv 2505.05470) trains
on prompts of the same grammar and picks checkpoints on the test set; here validation is a third split. It has five tags: the grammar can
say 80 single objects and the benchmark asks for all 80, so none is left to validate (or train) on.

`glyphs` is what the embedded 64x32 model has words for: single_object (one shape), counting (two to five) and colors (one shape, whose
colour is judged), split as in the task counting. The first two and the third tag of a single shape share their text, because the model's
prompts always name a colour. two_object, position and color_attr need words that the embedded model was not taught (`and`, `left of`):
a number of this domain compares with no number of the benchmark.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..bench import registry
from ..bench.errors import UserError
from ..bench.registry import known_domain
from ..bench.spec import Columns, EvaluationSettings, Prompt, Split
from . import geneval_open as published
from .counting import COLUMNS, HELD_OUT, REWARD, SPLITS, combinations, evaluation, parse_shapes, shapes

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class GenEval:
    """The task, version 1. A field that changes prompts changes their hashes, which every table checks."""

    name: str = "geneval"
    version: str = "1"
    train: int = 50_000  # prompts of the domain open, as many as Flow-GRPO's list has
    validation: int = 16  # prompts a tag of the domain open
    seed: int = 0  # of their choice

    def __post_init__(self) -> None:
        if self.train < 100 or self.validation < 1:
            raise UserError(
                f"geneval needs train of at least 100 and validation of at least 1, got {self.train} and {self.validation}"
            )

    def reward(self, domain: str) -> str:
        """The scorer methods train on."""
        return REWARD[known_domain(self.name, domain)]

    def held_out(self, domain: str) -> Sequence[str]:
        """The scorers that every run needs and no method trains on."""
        return HELD_OUT[known_domain(self.name, domain)]

    def scorers(self, domain: str) -> Sequence[str]:
        """All that judge."""
        return [self.reward(domain), *self.held_out(domain)]

    def evaluation(self, domain: str) -> EvaluationSettings:
        """Four images of a published prompt, as published; many of each of the few prompts of shapes."""
        return evaluation(known_domain(self.name, domain))

    def columns(self, domain: str) -> Columns:
        """Quality, diversity and drift beside the benchmark."""
        return COLUMNS[known_domain(self.name, domain)]

    def prompts(self, split: Split, domain: str) -> Sequence[Prompt]:
        """The prompts of a split; UserError where the published list cannot be had."""
        if split not in SPLITS:
            raise registry.unknown("split", split, SPLITS)
        if known_domain(self.name, domain) == "open":
            data = os.environ.get("GPOBENCH_DATA", "")
            if split == "test":
                return published.published(data)
            return published.splits(self.train, self.validation, self.seed, data)[split]
        tags = {1: ("single_object", "colors")}
        return [shapes(tag, *which) for which in combinations(split) for tag in tags.get(which[1], ("counting",))]

    def read(self, text: str, facts: Mapping[str, Any], domain: str) -> Prompt:
        """A person's own prompt of the grammar, or any text with the facts tag and include; UserError naming the word that is none."""
        if known_domain(self.name, domain) == "open":
            return published.read(text, facts, lambda: published.objects(os.environ.get("GPOBENCH_DATA", "")))
        which = parse_shapes(text)
        return shapes("colors" if which[1] == 1 else "counting", *which, text=text)

    def summary(self, table: "pd.DataFrame") -> Mapping[str, float]:
        """The benchmark's numbers, `SCORER/NUMBER`, for every scorer that says `correct`.

        Each tag's share of correct images, `overall` (their unweighted mean, the headline), `images` (the share over all images, which is
        another number where tags differ in size), and `any` (the share of prompts with at least one correct image, whatever their number).
        Images that could not be scored are left out, and so is a prompt or a tag that has no other.
        """
        named: dict[str, float] = {}
        verdicts = table[(table.metric == "correct") & table.value.notna()]
        for scorer, rows in verdicts.groupby("scorer", sort=False):
            tags = rows.groupby("stratum", sort=False).value.mean()
            named |= {f"{scorer}/{tag}": float(share) for tag, share in tags.items()}
            named[f"{scorer}/overall"] = float(tags.mean())
            named[f"{scorer}/images"] = float(rows.value.mean())
            named[f"{scorer}/any"] = float((rows.groupby("prompt").value.max() > 0).mean())
        return named
