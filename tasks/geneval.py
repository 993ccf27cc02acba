"""The task geneval: the GenEval benchmark (objects, counts, colours, positions), with a train and a validation split of its own.

`open` is the benchmark (arXiv 2310.11513): 553 prompts in six tags, four images each, for real models. Flow-GRPO (arXiv 2505.05470)
trains on prompts of the same grammar and picks checkpoints on the test set; here validation is a third split. It has five tags: the
grammar can say 80 single objects and the benchmark asks for all 80, so none is left to validate (or train) on.

`glyphs` is what the embedded 64x32 model has words for: single_object (one shape), counting (two to five) and colors (one shape, whose
colour counts), split as in the task counting. single_object and colors share their texts, because the model's prompts always name a
colour. two_object, position and color_attr need words that the embedded model was not taught (`and`, `left of`): no number of this
domain compares with a number of the benchmark.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from ..bench.errors import UserError
from ..bench.registry import known_domain
from ..bench.spec import Prompt, Split
from . import geneval_open, shapes
from .base import DomainSettings, DomainTask

if TYPE_CHECKING:
    import pandas as pd


@final
@dataclass(frozen=True)
class GenEval(DomainTask):
    """The task, version 1. A field that changes prompts changes their hashes, which every table checks."""

    name: str = "geneval"
    version: str = "1"
    train: int = 50_000  # prompts of the domain open, as many as Flow-GRPO's list has
    validation: int = 16  # prompts per tag of the domain open
    seed: int = 0  # of their choice

    def __post_init__(self) -> None:
        if self.train < 100 or self.validation < 1:
            raise UserError(
                f"geneval needs train of at least 100 and validation of at least 1, got {self.train} and {self.validation}"
            )

    def domains(self) -> Mapping[str, DomainSettings]:
        """Those of GenEval's detectors."""
        return shapes.DETECTION

    def split_prompts(self, split: Split, domain: str) -> Sequence[Prompt]:
        """Shapes under three tags, or the published prompts and those composed beside them."""
        if domain == "open":
            data = os.environ.get("GPOBENCH_DATA", "")
            if split == "test":
                return geneval_open.published(data)
            return geneval_open.splits(self.train, self.validation, self.seed, data)[split]
        tags = {1: ("single_object", "colors")}
        return [
            shapes.compose(tag, *which)
            for which in shapes.combinations(split)
            for tag in tags.get(which[1], ("counting",))
        ]

    def read(self, text: str, facts: Mapping[str, Any], domain: str) -> Prompt:
        """A user's own prompt of the grammar, or any text with the facts tag and include; UserError naming the unknown word."""
        if known_domain(self.name, domain) == "open":
            return geneval_open.read(text, facts, lambda: geneval_open.objects(os.environ.get("GPOBENCH_DATA", "")))
        which = shapes.parse(text)
        return shapes.compose("colors" if which[1] == 1 else "counting", *which, text=text)

    def summary(self, table: "pd.DataFrame") -> Mapping[str, float]:
        """The benchmark's numbers, `SCORER/NUMBER`, for every scorer with the metric `correct`.

        Each tag's share of correct images, `overall` (their unweighted mean, the headline), `images` (the share over all images, which is
        another number where tags differ in size), and `any` (the share of prompts with at least one correct image, whatever their number).
        Images that could not be scored are left out, and so is a prompt or a tag that has no other.
        """
        numbers: dict[str, float] = {}
        verdicts = table[(table.metric == "correct") & table.value.notna()]
        for scorer, rows in verdicts.groupby("scorer", sort=False):
            tags = rows.groupby("stratum", sort=False).value.mean()
            numbers |= {f"{scorer}/{tag}": float(share) for tag, share in tags.items()}
            numbers[f"{scorer}/overall"] = float(tags.mean())
            numbers[f"{scorer}/images"] = float(rows.value.mean())
            numbers[f"{scorer}/any"] = float((rows.groupby("prompt").value.max() > 0).mean())
        return numbers
