"""OCR scoring rule of the published benchmark: compares the quoted target of a prompt with the text that was read.

Source: Flow-GRPO (arXiv 2505.05470), `flow_grpo/ocr.py` of yifan123/flow_grpo at ac4c86e. Both texts lose their ASCII spaces and
their case; nothing else is cleaned, so tabs, accents and punctuation count. Its loopholes are kept, because a corrected reward
is another reward: text beside the target costs nothing, and a repeated target counts as one. The metric `exact` detects both; which of
the two it was, `ned`, `extra_text_ratio` and `repeat_count` show for a text that was read. They are for closer analysis and no
columns of a table.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

from ..bench.errors import UserError
from ..bench.spec import Images, Prompt, Scorer, Scores

RULE = "flow-grpo-ocr-v1"  # goes into the id of every scorer that uses these functions


def normalised(text: str) -> str:
    """Return the text without ASCII spaces (only those), in lower case."""
    return text.replace(" ", "").lower()


def target_of(prompt: str) -> str:
    """Return the first segment between straight double quotes, unchanged; UserError where there is none or it is blank."""
    parts = prompt.split('"')
    if len(parts) < 3:
        raise UserError(f"an OCR prompt holds its target in straight double quotes, this one does not: {prompt!r}")
    if not normalised(parts[1]):
        raise UserError(f"the quoted target is empty: {prompt!r}")
    return parts[1]


def _target(text: str) -> str:
    cleaned = normalised(text)
    if not cleaned:
        raise UserError(f"an OCR target needs at least one character that is not a space, got {text!r}")
    return cleaned


def ocr_reward(target: str, recognised: str) -> float:
    """Score in [0, 1]: 1 where the text read contains the target, else 1 - min(d, n) / n, d the Levenshtein distance, n = |target|."""
    wanted, text = _target(target), normalised(recognised)
    if wanted in text:
        return 1.0
    n = len(wanted)
    return 1.0 - min(Levenshtein.distance(text, wanted), n) / n


def exact(target: str, recognised: str) -> float:
    """Return 1 where the whole text that was read is the target, else 0."""
    return float(_target(target) == normalised(recognised))


def ned(target: str, recognised: str) -> float:
    """Return 1 - d / (max(|target|, |read|) + 1e-5), which also penalises additions (AnyText, tyxsspa/AnyText at 3d4a260)."""
    wanted, text = _target(target), normalised(recognised)
    return 1.0 - Levenshtein.distance(text, wanted) / (max(len(wanted), len(text)) + 1e-5)


def extra_text_ratio(target: str, recognised: str) -> float:
    """Return max(0, |read| - n) / n: the surplus length of the text, in lengths of the target."""
    n = len(_target(target))
    return max(0, len(normalised(recognised)) - n) / n


def repeat_count(target: str, recognised: str) -> int:
    """Count the occurrences of the target in the text read, without overlap."""
    return normalised(recognised).count(_target(target))


# The same for a batch, shared by every engine.

METRICS = ("soft", "exact")  # soft is what methods are trained on


def score_texts(prompts: Sequence[Prompt], texts: Sequence[str | None], reasons: Mapping[int, str]) -> Scores:
    """Score B texts read for B prompts: soft (`ocr_reward`) and exact; None becomes NaN, and `reasons` must say why.

    The target is the prompt's fact `target` where it has one, else its quoted segment.
    """
    soft, full = np.full(len(texts), np.nan), np.full(len(texts), np.nan)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        target = str(prompt.meta["target"]) if "target" in prompt.meta else target_of(prompt.text)
        if text is None:
            if row not in reasons:
                raise ValueError(f"row {row} was not read and nobody says why")
        else:
            soft[row], full[row] = ocr_reward(target, text), exact(target, text)
    return Scores(value={"soft": soft, "exact": full}, reasons=dict(reasons), notes=[text or "" for text in texts])


# Words that every supported engine reads: they test that an installed engine works, not how well it reads.
KNOWN = ("ACT", "BOX", "JUDGE", "SILK", "FROWN", "VEST", "TWO", "CHALK")
KNOWN_PAGE = ("Grand", "Opening", "2024")


def check_known_answers(scorer: Scorer, *, paged: bool = False) -> None:
    """Test a scorer on built-in renders, clean words or a page of three lines; RuntimeError with the text read where one is wrong."""
    from ..bench.assets.glyphs import draw_word

    words = ("".join(KNOWN_PAGE),) if paged else KNOWN
    images = _page(KNOWN_PAGE)[None] if paged else np.stack([draw_word(word) for word in KNOWN])
    scores = scorer(images, [Prompt(f'a sign that says "{word}"', {"target": word}) for word in words])
    texts = [scores.reasons.get(row) or note for row, note in enumerate(scores.notes or ())]
    wrong = [
        f"{word} as {saw!r}" for word, saw, hit in zip(words, texts, scores.value["exact"], strict=True) if hit != 1
    ]
    if wrong:
        raise RuntimeError(f"{scorer.id} misread {', '.join(wrong)}")


def _page(lines: Sequence[str]) -> Images:
    """Draw lines of text one below the other, (256, 384, 3)."""
    from PIL import Image, ImageDraw, ImageFont

    from ..bench.assets.glyphs import default_font

    page = Image.new("RGB", (384, 256), (244, 240, 228))
    font = ImageFont.truetype(str(default_font()), 44)
    for i, line in enumerate(lines):
        ImageDraw.Draw(page).text((40, 24 + 72 * i), line, fill=(30, 30, 60), font=font)
    return np.asarray(page)
