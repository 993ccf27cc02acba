"""Recipe of the held-out reader of lines: random letters in 18 typefaces, in one line or two, warped, broken, blurred and coloured.

It keeps the two rules of `reader_recipe.py`: it never sees DejaVu Sans Mono, the typeface of the embedded model's pictures, and a string
that the split rule puts into validation or test is discarded before it is drawn. Step k draws its batch from (seed, k) alone.
"""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from ..bench.assets import drawings, glyphs
from ..bench.assets.drawing_prompts import two_word_prompts, word_prompts
from ..bench.models.recipe_fit import (
    FitSettings,
    Interval,
    Learner,
    Log,
    Weights,
    cosine_rate,
    fit,
    in_half,
    in_single,
    threads,
)
from .line_reader import COLUMNS, LINES, network, spell_lines
from .reader import ALPHABET, HEIGHT, WIDTH, standardise
from .reader_recipe import BOLD, FACES, ZOOM, bend, colour, damage, letter_coverage, rate

EM = 22  # px at which a letter is drawn before it is brought to its size
SHORTEST_DRAWN, LONGEST_DRAWN = 2, 7


def random_text(rng: np.random.Generator) -> tuple[str, ...]:
    """Draw one string of 2 to 7 capitals, or two of up to 6; never one of the validation or the test split."""
    many = 1 if rng.random() < 0.45 else 2
    longest = LONGEST_DRAWN if many == 1 else drawings.LONGEST_OF_TWO
    words: list[str] = []
    while len(words) < many:
        length = int(rng.integers(SHORTEST_DRAWN, longest + 1))
        word = "".join(ALPHABET[i] for i in rng.integers(26, size=length))
        if glyphs.split_of(word) == "train":
            words.append(word)
    return tuple(words)


@lru_cache(maxsize=40_000)
def _letter(face: str, letter: str, width: int, height: int) -> np.ndarray:
    """Draw one capital as coverage (height, at most width), narrowed where it is wider."""
    drawn = letter_coverage(face, EM, ZOOM, letter, 999)
    wide = min(max(round(drawn.shape[1] * height / drawn.shape[0]), 2), width)
    sheet = Image.fromarray(np.rint(drawn * 255).astype(np.uint8)).resize((wide, height), Image.Resampling.BOX)
    return np.asarray(sheet, np.float32) / 255


def print_lines(words: tuple[str, ...], rng: np.random.Generator) -> np.ndarray:
    """Draw one or two words as (2 * 32, 2 * 64) coverage, one above the other, each letter in the middle of its cell."""
    faces = BOLD if rng.random() < 0.5 else FACES
    face = faces[int(rng.integers(len(faces)))]
    high, wide = HEIGHT * ZOOM, WIDTH * ZOOM
    sheet = np.zeros((high, wide), np.float32)
    pitch = float(rng.uniform(7.2, min(10.0, (WIDTH - 2) / max(map(len, words))))) * ZOOM
    tall = int(rng.integers(8 * ZOOM, (13 if len(words) == 2 else 17) * ZOOM))
    width = int(pitch * rng.uniform(0.85, 1.05))
    wobble = 0.5 * ZOOM if rng.random() < 0.4 else 0.0
    gap = float(rng.uniform(14.5, 16.5)) * ZOOM
    for row, word in enumerate(words):
        middle = high / 2 + (row - (len(words) - 1) / 2) * gap
        free = max((wide - pitch * len(word)) / 2, 0.0)
        start = (wide - pitch * len(word)) / 2 + float(rng.uniform(-free, free)) * 0.6
        for i, character in enumerate(word):
            part = _letter(face, character, width, tall)
            x = round(start + (i + 0.5) * pitch - part.shape[1] / 2 + rng.normal() * wobble)
            y = round(middle - part.shape[0] / 2 + rng.normal() * wobble)
            x, y = min(max(x, 0), wide - part.shape[1]), min(max(y, 0), high - part.shape[0])
            window = sheet[y : y + part.shape[0], x : x + part.shape[1]]
            np.maximum(window, part, out=window)
    return sheet


def draw_batch(rows: int, seed: tuple[int, ...], strength: float = 1.0) -> tuple[Tensor, list[tuple[str, ...]]]:
    """Draw (B, 32, 64, 3) in 0..255 and B texts; 4 % are blank paper or shapes, with no word. Pure in (seed, rows)."""
    rng = np.random.default_rng(seed)
    g = torch.Generator().manual_seed(int(rng.integers(2**62)))
    texts = [() if rng.random() < 0.02 else random_text(rng) for _ in range(rows)]
    coverage = torch.from_numpy(np.stack([print_lines(text, rng) if text else _blank() for text in texts]))[:, None]
    clean = (torch.rand(rows, 1, 1, 1, generator=g) < 0.15).float()  # these stay as drawn
    bent = bend(coverage, g, 0.6 * strength)  # less than of one line: two reach to the edges
    worn = damage(bent, g, strength)
    pictures = colour(worn * (1 - clean) + bent * clean, g, strength).movedim(1, -1)
    for row in np.flatnonzero(rng.random(rows) < 0.02):
        content = drawings.sample_content(rng, [], (), drawings.Shares(0, 0, 0.5))
        pictures[row], texts[row] = torch.from_numpy(drawings.draw(content, rng)).float(), ()
    return pictures, texts


def _blank() -> np.ndarray:
    return np.zeros((ZOOM * HEIGHT, ZOOM * WIDTH), np.float32)


def split_pictures(split: str, seed: int) -> tuple[np.ndarray, list[str]]:
    """Draw the words and the texts of two words of a split as the embedded model's pictures show them."""
    rng = np.random.default_rng(seed)
    targets = [prompt.target for prompt in word_prompts(split) + two_word_prompts(split)]
    inks, papers = drawings.INKS, tuple(drawings.PAPERS)
    contents = [
        drawings.Text(tuple(t.split()), inks[int(rng.integers(len(inks)))], papers[int(rng.integers(len(papers)))])
        for t in targets
    ]
    return np.stack([drawings.draw(content, rng) for content in contents]), targets


# The recipe


@dataclass(frozen=True)
class LineReaderRecipe:
    """Trains the reader of lines from random weights: AdamW on random strings, a cosine learning rate, weights averaged."""

    steps: int = 4000
    batch: int = 96
    lr: float = 2.5e-3
    weight_decay: float = 0.02
    warmup: int = 150  # steps
    average: float = 0.998  # decay of the averaged weights that are shipped
    save_every: int = 200  # steps
    threads: int = 1
    probe: int = 192  # strings read at every checkpoint
    measured: int = 2000  # strings read at the end

    def __call__(self, out: Path, *, seed: int, log: Log) -> dict[str, Any]:
        """Write line_reader.safetensors and line_reader.json into `out`, resuming a run that was stopped there.

        Returns what line_reader.json holds.
        """
        out.mkdir(parents=True, exist_ok=True)
        with threads(self.threads):
            learner = LineReaderLearner(self, seed)
            averaged, seconds = fit(learner, self._settings(out, seed), log=log)
            weights = in_half(averaged)
            (out / "line_reader.safetensors").write_bytes(save(weights))
            learner.averaged.load_state_dict(in_single(weights))
            facts = self._facts(learner.averaged, seed, seconds)
            (out / "line_reader.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
            return facts

    def _settings(self, out: Path, seed: int) -> FitSettings:
        every = Interval(steps=self.save_every)
        return FitSettings(
            label={"recipe": "line-reader"},
            made_by=asdict(self) | {"seed": seed},
            checkpoint=out / "line_reader.state.pt",
            steps=self.steps,
            samples=self.batch,
            rate=cosine_rate(self.warmup, self.steps, 1e-6),
            save=every,
            report=every,
            evaluate=every,
            average=self.average,
            clip_norm=2.0,
        )

    def _facts(self, module: nn.Module, seed: int, seconds: float) -> dict[str, Any]:
        hard, texts = draw_batch(self.measured, (seed + 2, 0))
        pictures, targets = split_pictures("test", seed)
        two = [" " in target for target in targets]
        read = lambda images: _read(module, images)
        return {
            "recipe": asdict(self) | {"seed": seed},
            "cpu_seconds": round(seconds),
            "pictures": self.steps * self.batch,
            "parameters": sum(p.numel() for p in module.parameters()),
            "torch": torch.__version__,
            "faces": [face or "PIL built-in" for face in FACES],
            "never_seen": ["DejaVu Sans Mono (all styles)", "every string whose split is validation or test"],
            "clean_test_words": rate(read, pictures[~np.array(two)], [t for t in targets if " " not in t]),
            "clean_test_texts_of_two_words": rate(read, pictures[np.array(two)], [t for t in targets if " " in t]),
            "degraded_and_bent_random_strings_in_training_faces": rate(
                read, hard.numpy(), [" ".join(t) for t in texts]
            ),
        }


class LineReaderLearner(Learner):
    """The network, trained by CTC on both lines of each batch."""

    def __init__(self, recipe: LineReaderRecipe, seed: int) -> None:
        self.recipe, self.seed = recipe, seed
        torch.manual_seed(seed)
        self.module, self.averaged = network().train(), network().eval()
        self.optimisers = [
            torch.optim.AdamW(
                self.module.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
            )
        ]

    def loss(self, step: int, shard: int) -> Tensor:
        strength = min(1.0, 0.2 + 1.6 * (step / self.recipe.steps))
        pictures, texts = draw_batch(self.recipe.batch, (self.seed, step), strength=strength)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.module(standardise(pictures).contiguous(memory_format=torch.channels_last))
        return lines_loss(logits.float(), texts)

    def evaluate(self, weights: Weights, step: int) -> dict[str, float]:
        """Return the share of hard texts, never trained on, that the averaged weights read exactly."""
        self.averaged.load_state_dict(weights)
        pictures, texts = draw_batch(self.recipe.probe, (self.seed + 1, step - 1))
        share = rate(lambda images: _read(self.averaged, images), pictures.numpy(), [" ".join(t) for t in texts])
        return {"hard_unseen_texts": share["exact"]}


def lines_loss(logits: Tensor, texts: list[tuple[str, ...]]) -> Tensor:
    """Compute CTC's loss of the upper and the lower line, (B, 2, 27, 32); the lower one of one word is empty, as both of no word are."""
    logp = logits.log_softmax(2).flatten(0, 1).permute(2, 0, 1)  # (32, 2 B, 27), as CTC wants it
    lines = [(*text, "", "")[i] for text in texts for i in range(LINES)]
    letters = torch.tensor([ALPHABET.index(letter) + 1 for line in lines for letter in line])
    lengths = torch.tensor([len(line) for line in lines])
    each = F.ctc_loss(logp, letters, torch.full((len(lines),), COLUMNS), lengths, reduction="none", zero_infinity=True)
    return (each / lengths.clamp(min=1)).mean()


def _read(module: nn.Module, pictures: np.ndarray) -> list[str]:
    with torch.inference_mode():
        return spell_lines(module(standardise(torch.from_numpy(pictures))).argmax(2).numpy())
