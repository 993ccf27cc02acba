"""Recipe of the two tiny preference scorers: trains them on images and prompts of the glyph domain, with near misses and degraded copies.

The published preference scores are two-tower networks: an image tower, a text tower, a cosine. These two are the same thing at a
size that trains in minutes: `pick` has a vision transformer, `hps` CLIP's residual network, both open_clip's own
classes, and their training images differ. For every prompt there are six images: the right one clean, the same worn, the same
ruined, a near miss (one letter, one shape more or fewer, another ink, kind or colour), another near miss worn, and a mixture of right
and near miss. A prompt must find its image among those of all prompts (contrastive loss), and within the six the order of quality
must be kept (Bradley and Terry's loss, which PickScore was trained with). Every string that the split rule of `bench/assets/glyphs.py` puts
into validation or test is discarded before it is drawn. Step k draws its batch from (seed, tower, k) alone, so that an interrupted
run continues as if it had not stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from ..bench.assets import glyphs
from ..bench.assets.words import read_word_list
from ..bench.errors import Missing, UserError
from ..bench.models.muon import Muon
from ..bench.models.recipe_fit import FitSettings, Interval, Learner, Log, Weights, cosine_rate, fit, in_half, threads
from ..bench.models.tiny_parts import build_tokenizer
from ..bench.spec import Prompt
from ..bench.stats.intervals import proportion
from .reader_recipe import damage
from .two_towers import Stretch, standardise, tiny, tiny_tokenizer

CONTEXT = 16  # tokens of a prompt with its begin and end
STRIP = 4  # px, the width of one patch of the transformer
SPECIALS = ("<pad>", "<unk>", "<begin>", "<end>")
TEXT: dict[str, Any] = {
    "context_length": CONTEXT,
    "vocab_size": 64,
    "hf_tokenizer_name": "tokenizer.json",
    "width": 64,
    "heads": 4,
    "layers": 2,
    "no_causal_mask": True,
    "pool_type": "eos",
    "eos_id": SPECIALS.index("<end>"),
}
# open_clip's model configurations. The transformer's patches are 16 strips, three to a letter; it averages their
# outputs. The residual network only exists for squares, so its images are stretched to twice their height.
TOWERS: dict[str, dict[str, Any]] = {
    "pick": {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": [32, 64],
            "patch_size": [32, STRIP],
            "width": 96,
            "layers": 4,
            "head_width": 16,
            "mlp_ratio": 2.0,
            "pool_type": "avg",
        },
        "text_cfg": TEXT,
    },
    "hps": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "width": 10, "layers": [1, 1, 1, 1], "head_width": 32},
        "text_cfg": TEXT,
    },
}


# Contents of images and prompts


@dataclass(frozen=True)
class Thing:
    """Content of an image: a word in an ink, or a count of shapes of a colour."""

    word: str = ""
    kind: str = ""
    count: int = 0
    colour: str = ""  # the ink of a word, the colour of shapes

    def prompt(self, *, surface: str = "sign", named: bool = True) -> str:
        """Return the prompt for this content; the ink of a word may stay unnamed."""
        if self.word:
            return glyphs.word_prompt(self.word, surface=surface, ink=self.colour if named else None)
        return glyphs.shapes_prompt(self.kind, self.count, self.colour)


def _one(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


def _train_word(draw: Callable[[], str]) -> str:
    """Draw words until one belongs to the train split by the split rule."""
    while glyphs.split_of(word := draw()) != "train":
        pass
    return word


def draw_thing(rng: np.random.Generator, words: float) -> Thing:
    """Draw a word of random letters or of vowels and consonants in turn (share `words`), or one to five shapes."""
    if rng.random() < words:
        return Thing(word=_train_word(lambda: glyphs.random_word(rng, (), ())), colour=_one(rng, tuple(glyphs.INKS)))
    return Thing(
        kind=_one(rng, glyphs.SHAPES), count=_one(rng, glyphs.COUNTS), colour=_one(rng, tuple(glyphs.SHAPE_COLOURS))
    )


def _misspelt(word: str, rng: np.random.Generator) -> str:
    """Misspell a word: replace a letter (two times in three), or swap two, drop, double or add one; 1 to 5 letters remain."""
    kind, at = rng.random(), int(rng.integers(len(word)))
    letter = _one(rng, glyphs.ALPHABET)
    if kind < 0.67:
        return word[:at] + letter + word[at + 1 :]
    if kind < 0.78:
        other = int(rng.integers(len(word)))
        letters = list(word)
        letters[at], letters[other] = letters[other], letters[at]
        return "".join(letters)
    if kind < 0.86 and len(word) > glyphs.SHORTEST:
        return word[:at] + word[at + 1 :]
    if kind < 0.93 and len(word) < glyphs.LONGEST:
        return word[:at] + letter + word[at:]
    return word[:at] + word[(at + 1) % len(word)] + word[at + 1 :]


def near_miss(thing: Thing, rng: np.random.Generator, *, colour_counts: bool) -> Thing:
    """Change one property of the content; another ink is no miss where the prompt names none (`colour_counts` is false)."""
    palette = tuple(glyphs.INKS) if thing.word else tuple(glyphs.SHAPE_COLOURS)
    others = [c for c in palette if c != thing.colour]
    kind = rng.random()
    if colour_counts and kind < 0.15:
        return replace(thing, colour=_one(rng, others))
    if thing.word:

        def other() -> str:
            while (word := _misspelt(thing.word, rng)) == thing.word:
                pass
            return word

        return replace(thing, word=_train_word(other))
    if kind < 0.3:
        return replace(thing, kind=_one(rng, [k for k in glyphs.SHAPES if k != thing.kind]))
    step = 1 if rng.random() < 0.85 else 2
    counts = [c for c in (thing.count - step, thing.count + step) if 1 <= c <= 6]
    return replace(thing, count=_one(rng, counts or [thing.count + 1]))


def coverage(thing: Thing, seed: int) -> np.ndarray:
    """Draw the ink's coverage (32, 64) in 0..1. Shapes of one seed have the same positions, whatever their number."""
    rng = np.random.default_rng(seed)
    black, white = (0, 0, 0), (255, 255, 255)
    if thing.word:
        dx, dy = rng.integers(-1, 2, 2)
        picture = glyphs.draw_word(thing.word, paper=white, ink=black, shift=(int(dx), int(dy)))
    else:
        picture = glyphs.draw_shapes(thing.kind, thing.count, black, white, rng)
    return 1 - picture[..., 0].astype(np.float32) / 255


def ink_of(thing: Thing) -> tuple[int, int, int]:
    return (glyphs.INKS if thing.word else glyphs.SHAPE_COLOURS)[thing.colour]


# Degradation


def _uniform(rows: int, g: torch.Generator) -> Tensor:

    return torch.rand(rows, 1, 1, 1, generator=g)


def _warp(x: Tensor, strength: Tensor, g: torch.Generator) -> Tensor:
    """Warp (B, C, 32, 64), every row by a smooth field of `strength` px."""
    rows = len(x)
    field = F.interpolate(torch.randn(rows, 2, 4, 8, generator=g), size=(32, 64), mode="bicubic", align_corners=False)
    plain = F.affine_grid(torch.eye(2, 3).expand(rows, 2, 3), [rows, 1, 32, 64], align_corners=False)
    scale = torch.tensor([2 / 64, 2 / 32])
    return F.grid_sample(
        x,
        plain + (field * strength).movedim(1, -1) * scale,
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )


def _blurred(x: Tensor) -> Tensor:

    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)


def worn(ink: Tensor, g: torch.Generator) -> Tensor:
    """Degrade (B, 1, 32, 64) coverage lightly: strokes nicked, warped by up to a pixel, slightly blurred. It stays legible."""
    ink = damage(ink, g, 0.45)
    ink = _warp(ink, 0.7 * _uniform(len(ink), g), g)
    share = 0.6 * _uniform(len(ink), g)
    return ink + share * (_blurred(ink) - ink)


def ruined(ink: Tensor, other: Tensor, g: torch.Generator) -> Tensor:
    """Degrade (B, 1, 32, 64) coverage in one or two of five ways: a part erased, smeared, warped, faded, overprinted by `other`."""
    rows = len(ink)
    ink = damage(ink, g, 1.0)
    ways = torch.rand(rows, 5, generator=g)
    ways = (ways >= ways.topk(2, 1).values[:, 1:]) & (torch.rand(rows, 5, generator=g) < 0.75)
    ways[~ways.any(1), 0] = True
    pick = ways.float().view(rows, 5, 1, 1, 1)
    x = torch.arange(64).view(1, 1, 1, -1).float()
    left, wide = _uniform(rows, g) * 50, 8 + 18 * _uniform(rows, g)
    ink = ink * (1 - pick[:, 0] * ((x >= left) & (x < left + wide)).float())
    smeared = F.interpolate(F.avg_pool2d(_blurred(_blurred(ink)), 4), scale_factor=4.0, mode="bilinear")
    ink = ink + pick[:, 1] * (0.7 + 0.3 * _uniform(rows, g)) * (smeared - ink)
    ink = _warp(ink, pick[:, 2] * (1.8 + 1.5 * _uniform(rows, g)), g)
    ink = ink * (1 - pick[:, 3] * (0.6 + 0.3 * _uniform(rows, g)))
    return torch.maximum(ink, pick[:, 4] * other * (0.5 + 0.5 * _uniform(rows, g)))


def pressed(ink: Tensor, paper: Tensor, pigment: Tensor) -> Tensor:
    """Colour (B, 1, 32, 64) coverage with (B, 3) colours, giving (B, 3, 32, 64) in 0..255."""
    page, pigment = paper.view(-1, 3, 1, 1), pigment.view(-1, 3, 1, 1)
    return page + ink * (pigment - page)


def roughened(picture: Tensor, rough: Tensor, g: torch.Generator) -> Tensor:
    """Add tint, noise and blur to (B, 3, 32, 64) in 0..255; `rough` (B,) in 0..1 sets their strength."""
    rows = len(picture)
    rough = rough.view(rows, 1, 1, 1)
    tint = F.interpolate(torch.randn(rows, 3, 3, 5, generator=g), size=(32, 64), mode="bicubic", align_corners=False)
    grain = _blurred(torch.randn(picture.shape, generator=g)) * 2
    picture = picture + rough * (10 * _uniform(rows, g) * tint + 14 * _uniform(rows, g) * grain)
    picture = picture + 0.5 * rough * _uniform(rows, g) * (_blurred(picture) - picture)
    return picture.clamp(0, 255).round()


# A batch

RIGHT, WORN, RUINED, MISS, MISS_WORN, MIXED = range(6)  # the six images of a prompt
READ = (RIGHT, WORN, MISS)  # those whose content the reading heads predict
# Better before worse. A near miss is worse than the right content worn: content counts before appearance.
ORDER = (
    (RIGHT, WORN),
    (WORN, RUINED),
    (RIGHT, MISS),
    (WORN, MISS),
    (WORN, MISS_WORN),
    (RIGHT, MIXED),
    (MIXED, MISS),
    (RIGHT, RUINED),
)


@dataclass(frozen=True)
class Batch:
    """P prompts, as many prompts that ask for their near misses, and six images each."""

    pictures: Tensor  # (6, P, 3, 32, 64) in 0..255
    prompts: list[str]  # 2 P
    askable: Tensor  # (2 P,) bool: six shapes cannot be asked for
    fits: Tensor  # (2 P, 6 P) bool: the picture shows what the prompt asks for
    slots: Tensor  # (5 P, S) int: what 2 P prompts and the pictures READ show, slot by slot; -1 is not said


# Targets of the reading heads, predicted from a vector.
SLOTS = [27] * glyphs.LONGEST + [4, 4, 7]  # letters, colour (black red blue green), kind, count; the last class is none
COLOURS = ("black", "red", "blue", "green")


def _slots(thing: Thing, named: bool) -> list[int]:
    letters = [glyphs.ALPHABET.index(c) for c in thing.word] + [26] * (glyphs.LONGEST - len(thing.word))
    colour = COLOURS.index(thing.colour) if named else -1
    return [*letters, colour, glyphs.SHAPES.index(thing.kind) if thing.kind else 3, thing.count]


def strips(slots: Tensor) -> Tensor:
    """Map (B, S) slots of images to (B, 16): the letter that each strip belongs to, 26 for none; a pixel of jitter is ignored."""
    letters = slots[:, : glyphs.LONGEST]
    length = (letters < 26).sum(1, keepdim=True)
    middle = torch.arange(glyphs.WIDTH // STRIP) * STRIP + STRIP // 2
    place = torch.div(middle - (glyphs.WIDTH - glyphs.CELL * length) // 2, glyphs.CELL, rounding_mode="floor")
    inside = (place >= 0) & (place < length)
    return letters.gather(1, place.clamp(0, glyphs.LONGEST - 1)).where(inside, 26)


def draw_texts(rows: int, seed: tuple[int, ...], words: float) -> tuple[list[str], Tensor]:
    """Draw prompts without images and their (B, S) slots: learning to spell needs many."""
    rng = np.random.default_rng(seed)
    things = [draw_thing(rng, words) for _ in range(rows)]
    named = [not thing.word or bool(rng.random() < 0.65) for thing in things]
    texts = [t.prompt(surface=_one(rng, glyphs.SURFACES), named=n) for t, n in zip(things, named, strict=True)]
    return texts, torch.tensor([_slots(t, n) for t, n in zip(things, named, strict=True)])


def draw_batch(rows: int, seed: tuple[int, ...], words: float = 0.6) -> Batch:
    """Draw a batch of `rows` prompts; pure in its arguments."""
    rng = np.random.default_rng(seed)
    g = torch.Generator().manual_seed(int(rng.integers(2**62)))
    things = [draw_thing(rng, words) for _ in range(rows)]
    named = [not thing.word or bool(rng.random() < 0.65) for thing in things]
    misses = [near_miss(t, rng, colour_counts=n) for t, n in zip(things, named, strict=True)]
    others = [near_miss(t, rng, colour_counts=n) for t, n in zip(things, named, strict=True)]
    places = rng.integers(2**31, size=rows)  # of the right image
    moved = np.where(rng.random(rows) < 0.5, places, rng.integers(2**31, size=rows))
    right, miss, other, again = (
        torch.from_numpy(np.stack([coverage(t, int(s)) for t, s in zip(what, where, strict=True)]))[:, None]
        for what, where in ((things, places), (misses, moved), (others, moved), (things, moved))
    )
    papers = list(glyphs.PAPERS.values())

    def papered() -> Tensor:
        chosen = torch.tensor([papers[i] for i in rng.integers(len(papers), size=rows)], dtype=torch.float32)
        return (chosen + 4 * torch.randn(rows, 3, generator=g)).clamp(0, 255)

    def inked(what: list[Thing]) -> Tensor:
        chosen = torch.tensor([ink_of(thing) for thing in what], dtype=torch.float32)
        return (chosen + 10 * torch.randn(rows, 3, generator=g)).clamp(0, 255)

    rough = torch.rand(3 * rows, generator=g) * (torch.rand(3 * rows, generator=g) < 0.7)
    paper = papered()
    clean = pressed(right, paper, inked(things))
    missed = pressed(miss, papered(), inked(misses))
    mixed = clean + (0.3 + 0.4 * _uniform(rows, g)) * (pressed(miss, paper, inked(misses)) - clean)
    tired = pressed(worn(again, g), papered(), inked(things))
    broken = pressed(ruined(right, other, g), papered(), inked(things))
    beaten = pressed(worn(other, g), papered(), inked(others))
    rougher = roughened(torch.cat([tired, broken, beaten]), rough, g).unflatten(0, (3, rows))
    six = torch.stack([clean, rougher[0], rougher[1], missed, rougher[2], mixed])

    surfaces = [glyphs.SURFACES[i] for i in rng.integers(len(glyphs.SURFACES), size=rows)]
    requests = [(t, n, s) for t, n, s in zip(things, named, surfaces, strict=True)]
    requests += [(t, n, s) for t, n, s in zip(misses, named, surfaces, strict=True)]
    askable = torch.tensor([thing.count <= max(glyphs.COUNTS) for thing, _, _ in requests])
    prompts = [t.prompt(surface=s, named=n) if t.count <= max(glyphs.COUNTS) else "" for t, n, s in requests]

    def codes(what: Sequence[Thing]) -> np.ndarray:
        return np.array([hash((t.word, t.kind, t.count)) for t in what], np.int64)

    shown = [*things, *things, *things, *misses, *others, *things]
    wants, shows = [t for t, _, _ in requests], codes(shown)
    fits = codes(wants)[:, None] == shows[None]
    same = np.array([COLOURS.index(t.colour) for t in wants])[:, None] == np.array(
        [COLOURS.index(t.colour) for t in shown]
    )
    fits &= same | ~np.array([n for _, n, _ in requests])[:, None]
    slots = [_slots(t, n) for t, n, _ in requests] + [_slots(t, True) for t in (*things, *things, *misses)]
    return Batch(six, prompts, askable, torch.from_numpy(fits), torch.tensor(slots))


# Losses


def contrast(logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Average -log softmax of the positive among itself and the negatives over rows: (B, N) logits, (B,) columns, (B, N) bool."""
    positive_logit = logits.gather(1, positive[:, None])
    rest = logits.masked_fill(~negative, float("-inf"))
    return (torch.logsumexp(torch.cat([positive_logit, rest], 1), 1) - positive_logit[:, 0]).mean()


def losses(texts: Tensor, images: Tensor, scale: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Compute the contrastive and the preference loss of unit vectors of (2 P) prompts and (6, P) images."""
    p = images.shape[1]
    rows = torch.arange(p)
    logits = scale * texts @ images.flatten(0, 1).T  # (2 P, 6 P)
    apart = ~batch.fits
    apart[rows, MIXED * p + rows] = False  # half right
    apart[p + rows, MIXED * p + rows] = False
    miss = rows[batch.askable[p:]]
    terms = [
        contrast(logits[:p], RIGHT * p + rows, apart[:p]),
        contrast(logits[:p], WORN * p + rows, apart[:p]),
        contrast(logits[p + miss], MISS * p + miss, apart[p + miss]),
    ]
    apart = apart & batch.askable[:, None]
    for picture, prompt_rows in ((RIGHT, rows), (WORN, rows), (MISS, p + miss)):
        column = picture * p + (prompt_rows % p)
        terms.append(contrast(logits.T[column], prompt_rows, apart.T[column]))
    scores = scale * (images * texts[:p]).sum(-1)  # (6, P)
    order = torch.stack([F.softplus(scores[worse] - scores[better]).mean() for better, worse in ORDER]).mean()
    return {"contrast": torch.stack(terms).mean(), "order": order}


# Measuring


def measure(score: Callable[[np.ndarray, list[str]], np.ndarray], seed: int, words: Sequence[str]) -> dict[str, Any]:
    """Measure the shares of correct comparisons, on held-out `words` and as many shapes prompts.

    score: (B, 32, 64, 3) uint8, B prompts -> (B,).
    """

    rng = np.random.default_rng((seed, 77))
    g = torch.Generator().manual_seed(seed + 77)

    def show(things: list[Thing], how: str) -> np.ndarray:
        ink = torch.from_numpy(np.stack([coverage(t, int(rng.integers(2**31))) for t in things]))[:, None]
        rough = torch.zeros(len(things))
        if how == "worn":
            ink, rough = worn(ink, g), torch.rand(len(things), generator=g)
        if how == "ruined":
            ink = ruined(ink, ink.roll(1, 0), g)
        papers = torch.tensor([_one(rng, list(glyphs.PAPERS.values())) for _ in things], dtype=torch.float32)
        pigment = torch.tensor([ink_of(t) for t in things], dtype=torch.float32)
        return roughened(pressed(ink, papers, pigment), rough, g).movedim(1, -1).numpy().astype(np.uint8)

    def other_letter(word: str) -> str:
        at = int(rng.integers(len(word)))
        return word[:at] + _one(rng, [c for c in glyphs.ALPHABET if c != word[at]]) + word[at + 1 :]

    held_out = [Thing(word=word, colour=_one(rng, tuple(glyphs.INKS))) for word in words]
    inks = [replace(t, colour=_one(rng, [c for c in glyphs.INKS if c != t.colour])) for t in held_out]
    letters = [replace(t, word=other_letter(t.word)) for t in held_out]
    shapes = [
        Thing(kind=k, count=n, colour=c) for k in glyphs.SHAPES for n in glyphs.COUNTS for c in glyphs.SHAPE_COLOURS
    ]
    shapes = [shapes[i % len(shapes)] for i in range(len(words))]
    more = [replace(t, count=t.count + (1 if t.count == 1 or rng.random() < 0.5 else -1)) for t in shapes]
    kinds = [replace(t, kind=_one(rng, [k for k in glyphs.SHAPES if k != t.kind])) for t in shapes]
    colours = [replace(t, colour=_one(rng, [c for c in glyphs.SHAPE_COLOURS if c != t.colour])) for t in shapes]

    def wins(things: list[Thing], better: np.ndarray, worse: np.ndarray, named: bool = True) -> dict[str, Any]:
        prompts = [t.prompt(named=named) for t in things]
        correct = score(better, prompts) > score(worse, prompts)
        share = proportion(int(correct.sum()), len(correct))
        return {"share": round(share.mean, 4), "n": len(correct), "ci95": [round(share.low, 4), round(share.high, 4)]}

    return {
        "word over one letter changed": wins(held_out, show(held_out, ""), show(letters, ""), named=False),
        "word over one letter changed, both worn": wins(
            held_out, show(held_out, "worn"), show(letters, "worn"), named=False
        ),
        "ink asked for over another": wins(held_out, show(held_out, ""), show(inks, "")),
        "clean word over worn": wins(held_out, show(held_out, ""), show(held_out, "worn"), named=False),
        "worn word over ruined": wins(held_out, show(held_out, "worn"), show(held_out, "ruined"), named=False),
        "clean word over ruined": wins(held_out, show(held_out, ""), show(held_out, "ruined"), named=False),
        "count over one more or fewer": wins(shapes, show(shapes, ""), show(more, "")),
        "count over one more or fewer, both worn": wins(shapes, show(shapes, "worn"), show(more, "worn")),
        "kind over another": wins(shapes, show(shapes, ""), show(kinds, "")),
        "colour over another": wins(shapes, show(shapes, ""), show(colours, "")),
        "clean shapes over worn": wins(shapes, show(shapes, ""), show(shapes, "worn")),
        "worn shapes over ruined": wins(shapes, show(shapes, "worn"), show(shapes, "ruined")),
        "clean shapes over ruined": wins(shapes, show(shapes, ""), show(shapes, "ruined")),
    }


# The recipe


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: known prompt words, the capitals one by one, the quote."""
    build_tokenizer().save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"  # transformers 5 writes a class name of its own
    path.write_text(path.read_text("utf-8").replace("TokenizersBackend", "PreTrainedTokenizerFast"), "utf-8")


@dataclass(frozen=True)
class TinyClipRecipe:
    """Trains both scorers from random weights in turn: Muon on matrices, AdamW on the rest, weights averaged at the end."""

    towers: tuple[str, ...] = tuple(TOWERS)
    steps: int = 600
    prompts: int = 32  # of a batch; six pictures each
    texts: int = 96  # more prompts, only to be read
    words: float = 0.7  # share of prompts that ask for a word
    muon: float = 6e-3  # rate
    adam: float = 3e-3  # rate
    weight_decay: float = 0.02
    warmup: int = 60  # steps
    average: float = 0.995  # decay of the averaged weights that are shipped
    # weight, falling to 0, of the reading heads that teach both towers to spell; they are thrown away
    reading: float = 1.0
    # shares of the run: up to the first the other losses have weight 0, from the second on weight 1
    alone: tuple[float, float] = (0.12, 0.3)
    order: float = 1.0  # weight of the preference loss
    save_every: int = 20  # steps
    threads: int = 1
    measured: int = 400  # held-out words compared at the end, and as many shapes prompts

    def __call__(self, out: Path, *, seed: int, log: Log) -> dict[str, Any]:
        """Write TOWER.json, TOWER.safetensors, the tokenizer and facts.json into `out`; resumes a run that was stopped there."""

        out.mkdir(parents=True, exist_ok=True)
        write_tokenizer(out)
        book = out / "facts.json"
        with threads(self.threads):
            for tower in self.towers:
                if tower not in TOWERS:
                    raise UserError(f"tiny-clip has no tower {tower!r}; valid: {', '.join(TOWERS)}")
                facts = json.loads(book.read_text("utf-8")) if book.exists() else {}
                if tower not in facts or facts[tower]["recipe"] != self._made_by(seed):
                    facts[tower] = self._train(tower, out, seed, log)
                    book.write_text(json.dumps(dict(sorted(facts.items())), indent=1) + "\n", "utf-8")
            return json.loads(book.read_text("utf-8"))

    def _made_by(self, seed: int) -> dict[str, Any]:
        return json.loads(json.dumps({k: v for k, v in asdict(self).items() if k != "towers"} | {"seed": seed}))

    def _train(self, tower: str, out: Path, seed: int, log: Log) -> dict[str, Any]:

        settings = self._settings(tower, out, seed)
        averaged, seconds = fit(TowersLearner(self, tower, out, seed), settings, log=log)
        (out / f"{tower}.safetensors").write_bytes(save(in_half(averaged)))
        (out / f"{tower}.json").write_text(json.dumps(TOWERS[tower], indent=1) + "\n", "utf-8")
        facts = self._facts(tower, out, seed, seconds)
        settings.checkpoint.unlink(missing_ok=True)
        return facts

    def _settings(self, tower: str, out: Path, seed: int) -> FitSettings:

        every, share = Interval(steps=self.save_every), cosine_rate(self.warmup, self.steps, 1e-3)
        return FitSettings(
            label={"recipe": "tiny-clip", "tower": tower},
            made_by=self._made_by(seed),
            checkpoint=out / f"{tower}.state.pt",
            steps=self.steps,
            samples=self.prompts * 6,
            rate=lambda base, step: base * share(1.0, step),
            save=every,
            report=every,
            evaluate=every,
            average=self.average,
            clip_norm=5.0,
        )

    def _facts(self, tower: str, out: Path, seed: int, spent: float) -> dict[str, Any]:
        import open_clip

        scorer = tiny(tower, out)

        def score(images: np.ndarray, prompts: list[str]) -> np.ndarray:
            return scorer(images, [Prompt(text) for text in prompts]).value[scorer.metrics[0]]

        held_out = [word for word in read_word_list() if glyphs.split_of(word) != "train"]
        return {
            "recipe": self._made_by(seed),
            "cpu_seconds": round(spent),
            "pictures": self.steps * self.prompts * 6,
            "parameters": sum(p.numel() for p in network(tower).parameters()),
            "versions": {"torch": torch.__version__, "open_clip": open_clip.__version__},
            "never_seen": "every string whose split is validation or test",
            "held_out": measure(score, seed, held_out[: self.measured]),
        }


class TowersLearner(Learner):
    """A pair of towers, and the reading heads that train it to encode spelling."""

    def __init__(self, recipe: TinyClipRecipe, tower: str, out: Path, seed: int) -> None:
        self.recipe, self.seed, self.salt = recipe, seed, list(TOWERS).index(tower)
        # Letters are also predicted from the strips of `pick`: without that a transformer takes far longer to learn them.
        self.dense = dense = tower == "pick"
        torch.manual_seed(1000 * seed + self.salt)
        self.clip = network(tower).train()
        self.module: nn.Module = self.clip
        network(tower)  # takes its random draws before the heads do
        self.clip.visual.output_tokens = dense
        self.reading = nn.ModuleList([nn.Linear(TOWERS[tower]["embed_dim"], sum(SLOTS))])
        if dense:
            self.reading.append(nn.Linear(TOWERS[tower]["vision_cfg"]["width"], SLOTS[0]))
        self.heads = self.reading
        self.optimisers = self._optimisers()
        self.tokens = tiny_tokenizer(out, TOWERS[tower])
        side = self.clip.visual.image_size
        self.stretch = Stretch(*side) if isinstance(side, tuple | list) else Stretch(side, side)
        self.smoothed: dict[str, float] = {}  # the terms of the loss, averaged over about ten steps

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        """Make Muon for matrices and AdamW for all else."""
        named = dict(self.module.named_parameters())
        matrices = {
            n: p
            for n, p in named.items()
            if p.ndim == 2 and min(p.shape) >= 16 and "embedding" not in n and n != "proj"
        }
        others = [*(p for n, p in named.items() if n not in matrices), *self.reading.parameters()]
        return [
            Muon(list(matrices.values()), self.recipe.muon, (0, 1), lambda flat: None),
            torch.optim.AdamW(others, lr=self.recipe.adam, betas=(0.9, 0.98), weight_decay=self.recipe.weight_decay),
        ]

    def loss(self, step: int, shard: int) -> Tensor:
        share = step / self.recipe.steps
        terms = self._terms(step)
        awake = min(max((share - self.recipe.alone[0]) / (self.recipe.alone[1] - self.recipe.alone[0]), 0.0), 1.0)
        loss = awake * (terms["contrast"] + self.recipe.order * terms["order"])
        for name in ("reading", "strips"):
            if name in terms:
                loss = loss + self.recipe.reading * (1 - share) * terms[name] / 4
        for name, term in terms.items():
            now = float(term.detach())
            self.smoothed[name] = 0.9 * self.smoothed.get(name, now) + 0.1 * now
        return loss

    def _terms(self, step: int) -> dict[str, Tensor]:
        """Compute the terms of a step's loss: contrast, order, reading, and strips where they are predicted."""
        batch = draw_batch(self.recipe.prompts, (self.seed, self.salt, step), self.recipe.words)
        more, slots = draw_texts(self.recipe.texts, (self.seed, self.salt, step, 1), self.recipe.words)
        x = standardise(self.stretch.batch(batch.pictures.flatten(0, 1) / 255))
        # a quarter less time for convolutions on a CPU with bfloat16; the small transformer gains nothing
        with torch.autocast("cpu", torch.bfloat16, enabled=not self.dense):
            features, patches = self.clip.visual(x) if self.dense else (self.clip.visual(x), None)
        images = F.normalize(features.float(), dim=-1).unflatten(0, (6, -1))
        texts = F.normalize(self.clip.encode_text(self.tokens([*batch.prompts, *more])), dim=-1)
        texts, others = texts[: len(batch.prompts)], texts[len(batch.prompts) :]
        terms = losses(texts, images, self.clip.logit_scale.exp(), batch)
        shown = torch.cat([texts, images[list(READ)].flatten(0, 1), others])
        readings = self.reading[0](shown * shown.shape[-1] ** 0.5).split(SLOTS, 1)
        wanted = torch.cat([batch.slots, slots])
        terms["reading"] = torch.stack(
            [F.cross_entropy(r, s, ignore_index=-1) for r, s in zip(readings, wanted.T, strict=True)]
        ).sum()
        if patches is not None:
            letters = self.reading[1](patches.unflatten(0, (6, -1))[list(READ)].flatten(0, 1))
            want = strips(batch.slots[len(batch.prompts) :])
            terms["strips"] = 8 * F.cross_entropy(letters.flatten(0, 1), want.flatten())
        return terms

    def constrain(self) -> None:
        self.clip.logit_scale.clamp_(max=math.log(100))

    def evaluate(self, weights: Weights, step: int) -> dict[str, float]:
        """Return the smoothed terms of the loss, and the temperature."""
        return {**self.smoothed, "scale": float(self.clip.logit_scale.detach().exp())}


def network(tower: str) -> Any:
    """Build open_clip's CLIP with random weights."""
    try:
        from open_clip import CLIP
    except ImportError as error:
        raise Missing("the recipe 'tiny-clip' needs open_clip; install with: pip install 'gpobench[clip]'") from error
    return CLIP(**TOWERS[tower])
