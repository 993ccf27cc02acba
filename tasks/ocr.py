"""The task ocr: draw a quoted text, scored by text recognition engines.

The task of Flow-GRPO (arXiv 2505.05470, section "visual text rendering"), in two prompt domains. `glyphs`: short words from
`bench/assets/ocr_words.txt` for the embedded 64x32 model; the spelling alone decides the split, so a test word can be in no other.
`open`: scene descriptions for real models; the test split is the published one, from the folder in GPOBENCH_DATA or downloaded
once, the other two splits are composed here.
"""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, final

import numpy as np

from ..bench import registry
from ..bench.assets.downloads import PinnedFile
from ..bench.assets.glyphs import (
    ALPHABET,
    INKS,
    LONGEST,
    SHORTEST,
    SURFACES,
    VOCABULARY,
    random_word,
    split_of,
    word_prompt,
)
from ..bench.assets.record_files import fact
from ..bench.assets.words import WORD_LIST
from ..bench.errors import UserError
from ..bench.registry import known_domain
from ..bench.spec import Columns, EvaluationSettings, Prompt, Split
from .base import SPLITS, DomainSettings, DomainTask

PUBLISHED = PinnedFile(  # MIT
    "flow_grpo/dataset/ocr/test.txt",
    "https://raw.githubusercontent.com/yifan123/flow_grpo/ac4c86e8cae021841f1fde853d340e0db67690dd/dataset/ocr/test.txt",
    sha256="4dd8caf3ab6ade73bd376c7d14c6ca49b6eacfb1bd321e22c40714ae4a98d4dc",
    records=1018,
)


# Published lists of scenes by content, as `git hash-object FILE` names it: test.txt, and train.txt, whose content was not at hand.
PUBLISHED_LISTS = ("8deb4f8d8f2e863f45353354243669b3c991a6a2", "3ce0521b77b0a9031191d66ecc36ebaaf27a3922")


# Words


def _digest(word: str) -> int:
    return int(sha256(word.encode("ascii")).hexdigest(), 16)


def word_to_prompt(word: str) -> Prompt:
    """The prompt of a word: its spelling decides the surface and the ink, or no ink."""
    place = _digest(word) // 100  # the remainder decides the split
    place, surface = divmod(place, len(SURFACES))
    ink = (None, *INKS)[place % (1 + len(INKS))]
    return Prompt(word_prompt(word, surface=SURFACES[surface], ink=ink), {"target": word})


def read_words(path: Path) -> list[str]:
    """The words of a file, one per line, sorted by digest, so that a first part of them is a random sample.

    Raises UserError on a line that is not a word."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the words in {path}: {error}") from error
    words = [line.strip() for line in lines if line.strip()]
    for word in words:
        if not SHORTEST <= len(word) <= LONGEST or set(word) - set(ALPHABET):
            raise UserError(f"{path}: {word!r} is not a word of {SHORTEST} to {LONGEST} capitals A-Z")
    if not words:
        raise UserError(f"{path} holds no words")
    return sorted(set(words), key=_digest)


# Targets of a person's own prompts


def _unescaped(text: str) -> str:
    """The text with plain quotation marks where every one of them is escaped, as a program leaves them that escapes twice."""
    return text.replace('\\"', '"') if text.count('"') == text.count('\\"') else text


def _stated_target(text: str, facts: Mapping[str, Any]) -> str | None:
    """The fact `target` as text; None where there is none, or an empty one. UserError where it is neither text nor a number."""
    target = fact(facts, "target")
    if target is None or (isinstance(target, str) and not target.strip()):
        return None
    if isinstance(target, str):
        return target
    if isinstance(target, bool) or not isinstance(target, int | float) or not math.isfinite(target):
        raise UserError(f"the fact `target` of {text!r} is {target!r}, which is neither text nor a number")
    return str(int(target) if target == int(target) else target)  # tables turn whole numbers into 5.0


def _quoted_target(text: str) -> str:
    """The first text between straight double quotes. UserError where there is none, or where it is unclear what is quoted."""
    marks = text.count('"')
    if marks < 2:
        raise UserError(
            f"an OCR prompt needs the text to write, between straight double quotes or as a fact `target`: {text!r}"
        )
    if marks % 2:
        raise UserError(f"{marks} quotation marks do not pair; name the text to write as a fact `target`: {text!r}")
    before, target, _ = text.split('"', 2)
    if before[-1:].isdecimal() or target != target.strip() or not target:
        raise UserError(
            f"the first quotation marks seem not to quote ({target!r}); name the text to write as a fact `target`: {text!r}"
        )
    return target


@final
@dataclass(frozen=True)
class OCR(DomainTask):
    """The task, version 1. A field that changes prompts changes their hashes, which every table checks."""

    name: str = "ocr"
    version: str = "1"
    train_words: str = ""  # path of a file with one word per line, instead of the train words of the list
    validation_words: int = 130  # of 132; each eval point of the curve uses them
    test_images: int = 2  # per prompt of the domain glyphs, in the final evaluation

    def domains(self) -> Mapping[str, DomainSettings]:
        """Two images of every test word, one of each validation word; one image per prompt for real models, as published."""
        return {
            "glyphs": DomainSettings(
                reward="rapidocr",
                held_out=["reader"],
                key="reader/soft",
                optional=["tesseract"],
                columns=Columns(quality=["pickscore:tiny"], diversity=["clip:tiny"], drift=["clip:tiny"]),
                evaluation=EvaluationSettings(test_images=self.test_images, validation_images=1),
            ),
            "open": DomainSettings(
                reward="rapidocr:page",
                held_out=["tesseract:page"],
                key="tesseract:page/soft",
                columns=Columns(
                    quality=["pickscore", "aesthetic", "imagereward", "hpsv2"], diversity=["clip"], drift=["clip"]
                ),
                evaluation=EvaluationSettings(test_images=1, validation_images=1),
            ),
        }

    @property
    def published_lists(self) -> Collection[str]:
        """The published lists, whose lines keep their publication's rule."""
        return PUBLISHED_LISTS

    def read_published(self, text: str, domain: str) -> Prompt:
        """A line of a published list: the target is what stands behind its first straight double quote, up to the next."""
        known_domain("ocr", domain)
        return Prompt(text, {"target": text.split('"')[1] if '"' in text else text})

    def read(self, text: str, facts: Mapping[str, Any], domain: str) -> Prompt:
        """A user's own prompt: its target is the fact `target`, else the first text between straight double quotes."""
        tiny = known_domain("ocr", domain) == "glyphs"
        text = _unescaped(text)
        target = _stated_target(text, facts)
        target = _quoted_target(text) if target is None else target
        if tiny and (set(target) - set(ALPHABET) or not SHORTEST <= len(target) <= LONGEST):
            raise UserError(f"tiny writes {SHORTEST} to {LONGEST} capitals A-Z, not {target!r}")
        words = [word for part in text.split('"')[::2] for word in part.split()]
        if tiny and (strange := [word for word in words if word not in VOCABULARY]):
            raise registry.unknown(f"word for tiny in {text!r}:", strange[0], VOCABULARY)
        return Prompt(text, {**facts, "target": target})

    def fresh(self, count: int, seed: int, domain: str) -> Sequence[Prompt]:
        """Random words of letters, or of vowels and consonants, that are not in the list; scenes with texts that are in no split."""
        known = [prompt for split in SPLITS for prompt in self.split_prompts(split, domain)]
        if known_domain("ocr", domain) == "open":
            from .ocr_open import fresh_scenes

            return fresh_scenes(count, seed, known)
        listed = {*read_words(WORD_LIST), *(str(prompt.meta["target"]) for prompt in known)}
        words, rng = dict[str, None](), np.random.default_rng(seed)
        while len(words) < count:
            words[random_word(rng, [], {*listed, *words}, listed=0.0)] = None
        return [word_to_prompt(word) for word in words]

    def split_prompts(self, split: Split, domain: str) -> Sequence[Prompt]:
        """Words of the list, or scenes. Every run checks that no target is in two splits (the evaluator does)."""
        return _splits(self, domain, os.environ.get("GPOBENCH_DATA", ""))[split]


@cache
def _splits(task: OCR, domain: str, data: str) -> dict[Split, list[Prompt]]:
    """All three splits; `data` is GPOBENCH_DATA, the folder of published prompt lists."""
    if domain == "open":
        from .ocr_open import compose, published

        test = published(PUBLISHED)
        return {**compose(test), "test": test}
    words = read_words(WORD_LIST)
    splits: dict[Split, list[Prompt]] = {
        split: [word_to_prompt(word) for word in words if split_of(word) == split] for split in SPLITS
    }
    splits["validation"] = splits["validation"][: task.validation_words]
    if task.train_words:
        splits["train"] = [word_to_prompt(word) for word in read_words(Path(task.train_words))]
    return splits
