"""The task hpsv2: the benchmark of Human Preference Score v2, 800 prompts in each of four styles.

Wu et al., arXiv 2306.09341; tgxs002/HPSv2 at 866735e. `open`: the published benchmark prompts as the test set, one image a prompt, and the
mean of each style over its 800 prompts. HPSv2's own list of prompts to train on (103,700) is not available at a fixed address and hash,
so train and validation prompts are scenes composed here in the same four styles; use your own with `--prompts FILE`. `glyphs`: words
and counted shapes of the embedded 64x32 model as two styles. HPSv2 was trained on prompts of the same source as its benchmark's.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np

from ..bench import registry
from ..bench.assets.downloads import PinnedFile
from ..bench.assets.record_files import fact
from ..bench.errors import UserError
from ..bench.registry import known_domain
from ..bench.spec import Columns, EvaluationSettings, Prompt, Split, fold_text
from .base import DomainSettings, DomainTask
from .scenes import STYLES, glyph_prompts, styled_scenes

if TYPE_CHECKING:
    import pandas as pd

WEIGHTS = ("v2.1", "v2")
GROUPS = 10  # groups of consecutive prompts; the publication reports the deviation of their means
# No hash of these files was available when this was written: only the number of prompts identifies them.
PUBLISHED = {
    style: PinnedFile(
        f"HPDv2/benchmark/{style}.json",
        f"https://huggingface.co/datasets/zhwang/HPDv2/resolve/main/benchmark/{style}.json",
        records=800,
    )
    for style in STYLES
}


@final
@dataclass(frozen=True)
class HPSv2(DomainTask):
    """The task, version 1. A field that changes prompts changes their hashes, which every table checks."""

    name: str = "hpsv2"
    version: str = "1"
    weights: Literal["v2.1", "v2"] = "v2.1"  # of the scorer; their scales differ, v2 23 to 28 and v2.1 14 to 34
    test_images: int = 4  # per prompt of the domain glyphs, in the final evaluation; 1 of the domain open, as published

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise registry.unknown("version of the HPSv2 weights", self.weights, WEIGHTS)

    def domains(self) -> Mapping[str, DomainSettings]:
        """Four images of each of the 60 test prompts of glyphs; one image per prompt for real models, as published."""
        return {
            "glyphs": DomainSettings(
                reward="hpsv2:tiny",
                held_out=["pickscore:tiny"],
                key="pickscore:tiny/score",
                columns=Columns(diversity=["clip:tiny"], drift=["clip:tiny"]),
                evaluation=EvaluationSettings(test_images=self.test_images, validation_images=1),
            ),
            "open": DomainSettings(
                reward=f"hpsv2:{self.weights}",
                held_out=["pickscore"],
                key="pickscore/score",
                columns=Columns(quality=["aesthetic", "imagereward"], diversity=["clip"], drift=["clip"]),
                evaluation=EvaluationSettings(test_images=1, validation_images=1),
            ),
        }

    def read(self, text: str, facts: Mapping[str, Any], domain: str) -> Prompt:
        """A user's own prompt; a fact `style` (or `stratum`), where there is one, is its style."""
        known_domain("hpsv2", domain)
        return Prompt(text, dict(facts), stratum=str(fact(facts, "style") or fact(facts, "stratum") or ""))

    def split_prompts(self, split: Split, domain: str) -> Sequence[Prompt]:
        """Words and shapes, or styles; the stratum is the style."""
        if domain == "glyphs":
            return _evenly(glyph_prompts(split)) if split == "train" else glyph_prompts(split)
        return _splits(os.environ.get("GPOBENCH_DATA", ""))[split]

    def summary(self, table: "pd.DataFrame") -> Mapping[str, float]:
        """The publication's numbers for each HPSv2 scorer in an evaluation's table, on its first metric.

        `anime/mean` is the mean over a style's prompts, `anime/std10` the population deviation of the means of ten groups of consecutive
        prompts (of 80 in the benchmark; left out where a style has fewer than ten prompts), `mean` that over all prompts. The deviation is
        no standard error: it does not cover seeds. Several images of a prompt count as their mean; images that could not be scored
        are left out. With two scorers of this name in a table, the numbers are `scorer/anime/mean`.
        """
        scorers = [name for name in dict.fromkeys(table.scorer) if str(name).startswith("hpsv2")]
        numbers: dict[str, float] = {}
        for scorer in scorers:
            rows: pd.DataFrame = table.loc[table.scorer == scorer]
            rows = rows.loc[rows.metric == rows.metric.iloc[0]]
            prefix = f"{scorer}/" if len(scorers) > 1 else ""
            by_prompt = rows.groupby(["stratum", "prompt"], sort=True).value.mean()
            for style in dict.fromkeys(rows.sort_values("prompt").stratum):
                numbers |= {
                    f"{prefix}{style}/{key}": value for key, value in _style(by_prompt[style].to_numpy(float)).items()
                }
            numbers[f"{prefix}mean"] = _mean(by_prompt.to_numpy(float))
        return numbers


def v2() -> HPSv2:
    """The task hpsv2 with the scorer's first weights, HPS v2, instead of v2.1."""
    return HPSv2(name="hpsv2-v2", weights="v2")


def _style(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    """(prompts,) in the benchmark's order -> mean, and std10 where there are ten prompts or more; NaN is left out."""
    numbers = {"mean": _mean(values)}
    if len(values) >= GROUPS:
        numbers["std10"] = float(np.std([_mean(group) for group in np.array_split(values, GROUPS)]))
    return numbers


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _evenly(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The styles in equal parts, as they count in the benchmark's mean: the prompts of a shorter style are repeated."""
    styles = {style: [p for p in prompts if p.stratum == style] for style in dict.fromkeys(p.stratum for p in prompts)}
    most = max(map(len, styles.values()))
    return [some[i % len(some)] for some in styles.values() for i in range(most)]


@cache
def _splits(data: str) -> dict[Split, list[Prompt]]:
    """All three splits of the domain open; `data` is GPOBENCH_DATA, the folder of published prompt lists."""
    test = [Prompt(text, stratum=style) for style, published in PUBLISHED.items() for text in _texts(published)]
    return {**styled_scenes({fold_text(prompt.text) for prompt in test}), "test": test}


def _texts(published: PinnedFile) -> list[str]:
    """A JSON list of prompts, as published; UserError where it is not such a list, or has another length."""
    try:
        raw = published.read()
    except UserError as error:
        raise UserError(f"the task hpsv2, domain 'open': {error}") from None
    try:
        texts = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{published.path} is not the published list: {error}") from None
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{published.path} is not the published list: it is not a JSON list of prompts")
    if len(texts) != published.records:
        raise UserError(
            f"{published.path} is not the published list: it has {len(texts):,} prompts, expected {published.records:,}"
        )
    return [str(text) for text in texts]
