"""Write this word: prompts that quote a text, judged by engines that read what was drawn.

The task of Flow-GRPO (arXiv 2505.05470, section "visual text rendering"), in two prompt domains. `glyphs`: short words from `ocr_words.txt`
for the embedded 64x32 model; the spelling alone decides the split, so a test word can be in no other. `open`: scene descriptions for real
models; the test set is the published one, read from the folder GPOBENCH_DATA names, the other two splits are composed here.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from ..bench import registry
from ..bench.errors import Missing, UserError
from ..bench.glyphs import ALPHABET, INKS, LONGEST, SHORTEST, SURFACES, split_of, word_prompt
from ..bench.spec import Judging, Prompt, Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
WORDS = Path(__file__).with_name("ocr_words.txt")
PUBLISHED = Path("flow_grpo", "dataset", "ocr", "test.txt")  # below GPOBENCH_DATA; yifan123/flow_grpo at ac4c86e, MIT
PUBLISHED_SHA256 = "4dd8caf3ab6ade73bd376c7d14c6ca49b6eacfb1bd321e22c40714ae4a98d4dc"


# Sameness of prompts


def fold(text: str) -> str:
    """Lower-cased letters and digits only: what two texts share when they differ in case, spaces and punctuation."""
    return "".join(character for character in text.lower() if character.isalnum())


def fingerprint(prompt: Prompt) -> str:
    """sha256 of the folded target: asking for the same text in another sentence is asking for the same thing."""
    return sha256(fold(str(prompt.meta["target"])).encode("utf-8")).hexdigest()


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """sha256 of the prompt texts in their order, one a line: two numbers compare only when these are equal."""
    return sha256("\n".join(prompt.text for prompt in prompts).encode("utf-8")).hexdigest()


def overlap(a: Sequence[Prompt], b: Sequence[Prompt]) -> list[str]:
    """The targets of `a` that `b` asks for too, in the order of `a`."""
    known = {fingerprint(prompt) for prompt in b}
    return list(dict.fromkeys(str(prompt.meta["target"]) for prompt in a if fingerprint(prompt) in known))


def refuse_overlap(splits: dict[Split, list[Prompt]]) -> None:
    """UserError that names the targets where two splits share any."""
    for i, one in enumerate(SPLITS):
        for other in SPLITS[i + 1 :]:
            shared = overlap(splits[one], splits[other])
            if shared:
                some = ", ".join(shared[:5]) + (f" and {len(shared) - 5} more" if len(shared) > 5 else "")
                raise UserError(f"the splits {one} and {other} of the task ocr share {len(shared)} targets: {some}")


# Words


def _digest(word: str) -> int:
    return int(sha256(word.encode("ascii")).hexdigest(), 16)


def word_to_prompt(word: str) -> Prompt:
    """The one prompt of a word: its spelling picks the surface and the ink, or no ink."""
    place = _digest(word) // 100  # the remainder decides the split
    place, surface = divmod(place, len(SURFACES))
    ink = (None, *INKS)[place % (1 + len(INKS))]
    return Prompt(word_prompt(word, surface=SURFACES[surface], ink=ink), {"target": word})


def read_words(path: Path) -> list[str]:
    """The words of a file, one a line, by digest: any first part of the list is a fair sample. UserError on a line that is no word."""
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


@dataclass(frozen=True)
class OCR:
    """The task, version 1. A field that changes prompts changes their hashes, which every table checks."""

    name: str = "ocr"
    version: str = "1"
    train_words: str = ""  # a file of your own, one word a line, instead of the train words of the list
    validation_words: int = 130  # of 137; the curve is judged on them at every mark
    test_images: int = 2  # a prompt, at the end

    def reward(self, domain: str) -> str:
        """The scorer methods train on."""
        return {"glyphs": "rapidocr", "open": "rapidocr:page"}[_known(domain)]

    def held_out(self, domain: str) -> Sequence[str]:
        """The scorers no method trains on; Tesseract is one of them where it is installed."""
        always, further = {"glyphs": (["reader"], ["tesseract"]), "open": ([], ["tesseract:page"])}[_known(domain)]
        return [*always, *(reference for reference in further if _present(reference))]

    def scorers(self, domain: str) -> Sequence[str]:
        """All that judge, the one methods train on first."""
        return [self.reward(domain), *self.held_out(domain)]

    def judging(self, domain: str) -> Judging:
        """Two images of every test word; one of each validation word. One image a prompt for real models, as published."""
        return Judging(test_images=self.test_images if _known(domain) == "glyphs" else 1, validation_images=1)

    def prompts(self, split: Split, domain: str) -> Sequence[Prompt]:
        """The prompts of a split; UserError where two splits share a target, or where the published file is not there."""
        if split not in SPLITS:
            raise registry.unknown("split", split, SPLITS)
        return _splits(self, _known(domain), os.environ.get("GPOBENCH_DATA", ""))[split]


def _known(domain: str) -> str:
    if domain not in ("glyphs", "open"):
        raise registry.unknown("prompt domain of the task ocr", domain, ("glyphs", "open"))
    return domain


@cache
def _present(reference: str) -> bool:
    try:
        registry.scorer(reference)
    except Missing:
        return False
    return True


@cache
def _splits(task: OCR, domain: str, data: str) -> dict[Split, list[Prompt]]:
    """All three splits, found to be disjoint; `data` is GPOBENCH_DATA, the folder of published prompt lists."""
    if domain == "open":
        from .ocr_open import compose, published

        test = published(Path(data) / PUBLISHED if data else None, PUBLISHED_SHA256)
        splits: dict[Split, list[Prompt]] = {**compose({fingerprint(prompt) for prompt in test}), "test": test}
    else:
        words = read_words(WORDS)
        splits = {split: [word_to_prompt(word) for word in words if split_of(word) == split] for split in SPLITS}
        splits["validation"] = splits["validation"][: task.validation_words]
        if task.train_words:
            splits["train"] = [word_to_prompt(word) for word in read_words(Path(task.train_words))]
    refuse_overlap(splits)
    return splits
