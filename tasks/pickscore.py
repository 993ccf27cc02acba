"""The task pickscore: prompts that users typed, scored by a network trained on their choices.

The PickScore task of Flow-GRPO (arXiv 2505.05470), in two prompt domains. `open`: the published lists, of which the default is the one
without sexual content. `glyphs`: the words and counted shapes of the embedded 64x32 model, scored by the embedded miniature of the
same network. The prompts are captions of Pick-a-Pic v1, on which PickScore itself was trained: a fine target to optimise, weak evidence
of what people prefer. The published train lists hold 31 to 37 prompts that differ from a test prompt in nothing but case and
punctuation; they are left out here.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any, final

from ..bench.assets.downloads import PinnedFile
from ..bench.errors import UserError
from ..bench.registry import known_domain
from ..bench.spec import Columns, EvaluationSettings, Prompt, Split, fold_text
from .base import DomainSettings, DomainTask
from .scenes import glyph_prompts

PINNED = "https://raw.githubusercontent.com/yifan123/flow_grpo/ac4c86e8cae021841f1fde853d340e0db67690dd/dataset"
# Not pinned: the list without sexual content was added upstream after ac4c86e, at an unknown commit.
NOT_PINNED = "https://raw.githubusercontent.com/yifan123/flow_grpo/main/dataset"


def _list(folder: str, file: str, records: int, root: str) -> PinnedFile:
    """No hash of these files was available when this was written: only the number of lines identifies them."""
    return PinnedFile(f"flow_grpo/dataset/{folder}/{file}", f"{root}/{folder}/{file}", records=records)


SAFE = {
    "test": _list("pickscore_sfw", "test.txt", 1_024, NOT_PINNED),
    "train": _list("pickscore_sfw", "train.txt", 15_486, NOT_PINNED),
}
WHOLE = {
    "test": _list("pickscore", "test.txt", 2_048, PINNED),
    "train": _list("pickscore", "train.txt", 25_432, PINNED),
}


@final
@dataclass(frozen=True)
class PickScore(DomainTask):
    """The task, version 1. A field that changes prompts changes their hashes, which every table checks."""

    name: str = "pickscore"
    version: str = "1"
    safe: bool = True  # the lists without sexual content; false takes the first published ones, which have some
    validation_prompts: int = 128  # taken from the published train list (domain open)
    test_images: int = 4  # per prompt of the domain glyphs, in the final evaluation; 1 of the domain open, as published

    def domains(self) -> Mapping[str, DomainSettings]:
        """Four images of each of the 60 test prompts of glyphs; one image per prompt for real models, as published.

        No text recognition: it could score the words of the domain glyphs, and not the shapes.
        """
        return {
            "glyphs": DomainSettings(
                reward="pickscore:tiny",
                held_out=["hpsv2:tiny"],
                key="hpsv2:tiny/score",
                columns=Columns(diversity=["clip:tiny"], drift=["clip:tiny"]),
                evaluation=EvaluationSettings(test_images=self.test_images, validation_images=1),
            ),
            "open": DomainSettings(
                reward="pickscore",
                held_out=["hpsv2"],
                key="hpsv2/score",
                columns=Columns(quality=["aesthetic", "imagereward"], diversity=["clip"], drift=["clip"]),
                evaluation=EvaluationSettings(test_images=1, validation_images=1),
            ),
        }

    def read(self, text: str, facts: Mapping[str, Any], domain: str) -> Prompt:
        """A user's own prompt; its scorers need the text and nothing else."""
        known_domain("pickscore", domain)
        return Prompt(text, dict(facts))

    def split_prompts(self, split: Split, domain: str) -> Sequence[Prompt]:
        """Words and shapes without strata, so that one mean is over all; or the published lists."""
        if domain == "glyphs":
            return [Prompt(prompt.text, prompt.meta) for prompt in glyph_prompts(split)]
        return _published(self, os.environ.get("GPOBENCH_DATA", ""))[split]


def full() -> PickScore:
    """The task pickscore on the whole published list, which holds prompts with sexual content."""
    return PickScore(name="pickscore-full", safe=False)


@cache
def _published(task: PickScore, data: str) -> dict[Split, list[Prompt]]:
    """All three splits of the domain open; `data` is GPOBENCH_DATA, the folder of published prompt lists."""
    lists = SAFE if task.safe else WHOLE
    return split(_lines(lists["test"]), _lines(lists["train"]), task.validation_prompts)


def split(test: Sequence[str], train: Sequence[str], validation: int) -> dict[Split, list[Prompt]]:
    """Test as published; of train, each prompt once and none that folds to a test prompt, its first by digest for validation."""
    test_texts = {fold_text(text) for text in test}
    free = {fold_text(text): text for text in reversed(train)}  # of several that fold alike, the first
    available = [text for text in train if free.get(fold_text(text)) is text and fold_text(text) not in test_texts]
    validation_texts = set(sorted(available, key=lambda text: sha256(text.encode()).digest())[:validation])
    return {
        "train": [Prompt(text) for text in available if text not in validation_texts],
        "validation": [Prompt(text) for text in available if text in validation_texts],
        "test": [Prompt(text) for text in test],
    }


def _lines(published: PinnedFile) -> list[str]:
    """One prompt a line, as published; UserError where there are more or fewer than there must be."""
    try:
        raw = published.read()
        lines = [line.strip() for line in raw.decode("utf-8").removesuffix("\n").split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{published.path} is not the published list: it is not UTF-8 ({error})") from None
    except UserError as error:
        raise UserError(f"the task pickscore, domain 'open': {error}") from None
    if len(lines) != published.records:
        raise UserError(
            f"{published.path} is not the published list: it has {len(lines):,} lines, expected {published.records:,}"
        )
    return lines
