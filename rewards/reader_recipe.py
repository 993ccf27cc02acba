"""Recipe of the held-out reader: trains it in minutes on random letters in 18 typefaces, warped, broken, blurred and coloured.

Two rules keep it independent. It never sees DejaVu Sans Mono, the typeface of the embedded model's training images; and every string that
the split rule of `bench/assets/glyphs.py` puts into validation or test is discarded before it is drawn, so its score on test words is a
score on words it was not trained on. Step k draws its batch from (seed, k) alone, so an interrupted run continues as if it had not stopped.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save
from torch import Tensor, nn

from ..bench.assets import glyphs
from ..bench.assets.words import word_splits
from ..bench.errors import UserError
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
from ..bench.stats.intervals import proportion
from .reader import ALPHABET, COLUMNS, HEIGHT, WIDTH, network, spell, standardise

ZOOM = 2  # coverage is warped at twice the size and averaged down, so that warping does not blur
SIZES = tuple(range(14, 24))  # px of the em on the 64x32 canvas
FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10"),
    "",  # the face built into PIL
)
BOLD = tuple(face for face in FACES if "Bol" in face or face in ("cmb10", ""))  # drawn as often as all others together
LENGTHS = "1" + "22" + "3" * 8 + "4" * 9 + "5" * 9  # of the strings, as often as they are drawn


# Coverage: the share of ink in each pixel, 0..1


@lru_cache(maxsize=1)
def _folder() -> Path:
    return glyphs.default_font().parent


@lru_cache(maxsize=512)
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(str(_folder() / f"{face}.ttf"), size) if face else ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise UserError("the reader is printed in PIL's own face too, which needs a Pillow built with FreeType")
    return font


@lru_cache(maxsize=60_000)  # 4 kB each at most
def letter_coverage(face: str, size: int, zoom: int, letter: str, most: int) -> np.ndarray:
    """Draw one capital as (h, w) coverage, cropped to its advance, at most `most` px wide; h is that of the tallest capital."""
    font = _font(face, size * zoom)
    _, top, _, bottom = font.getbbox("HQ", anchor="ls")
    left, _, right, _ = font.getbbox(letter, anchor="ls")
    wide = max(int(math.ceil(max(right, font.getlength(letter)) - min(left, 0))), 1)
    sheet = Image.new("L", (wide, int(math.ceil(bottom - top)) + 2), 0)
    ImageDraw.Draw(sheet).text((-min(left, 0), 1 - top), letter, fill=255, font=font, anchor="ls")
    if wide > most:
        sheet = sheet.resize((most, sheet.height), Image.Resampling.BOX)
    return np.asarray(sheet, dtype=np.float32) / 255


def random_letters(rng: np.random.Generator) -> str:
    """Draw 1 to 5 independent capitals; never a string of the validation or the test split."""
    while True:
        length = int(LENGTHS[int(rng.integers(len(LENGTHS)))])
        text = "".join(ALPHABET[i] for i in rng.integers(26, size=length))
        if glyphs.split_of(text) == "train":
            return text


def print_letters(text: str, rng: np.random.Generator) -> np.ndarray:
    """Draw letters as (2 * 32, 2 * 64) coverage, on the 12 px grid or spaced by their widths, near the middle of the canvas."""
    if not text:
        return np.zeros((ZOOM * HEIGHT, ZOOM * WIDTH), np.float32)
    faces = BOLD if rng.random() < 0.5 else FACES
    face, size = faces[int(rng.integers(len(faces)))], SIZES[int(rng.integers(len(SIZES)))]
    native = rng.random() < 0.4  # drawn at the size of the canvas, with its hinting, and doubled
    zoom = 1 if native else ZOOM
    grid = rng.random() < 0.55
    # A monospaced face has a narrow M and W: two thirds of the words on the grid have them too, made by narrowing other faces.
    most = int(rng.integers(10, 14)) if grid and rng.random() < 0.67 else 99
    letters = [letter_coverage(face, size, zoom, letter, most * zoom) for letter in text]
    if grid:
        pitch = glyphs.CELL * zoom
        centres = [(i - (len(text) - 1) / 2) * pitch for i in range(len(text))]
    else:
        gap = float(rng.uniform(-0.5, 3.0)) * zoom
        widths = [letter.shape[1] + gap for letter in letters]
        ends = np.cumsum(widths)
        centres = [float(end - width / 2 - ends[-1] / 2) for end, width in zip(ends, widths, strict=True)]
        spread = max(centres[-1] - centres[0] + (widths[0] + widths[-1]) / 2, 1.0)
        squeeze = min(1.0, (WIDTH - 2) * zoom / spread)
        centres = [centre * squeeze for centre in centres]
    high, wide = HEIGHT * zoom, WIDTH * zoom
    sheet = np.zeros((high + 32 * zoom, wide + 64 * zoom), np.float32)
    wobble = 0.6 * zoom if rng.random() < 0.4 else 0.0
    for letter, centre in zip(letters, centres, strict=True):
        h, w = letter.shape
        x = int(round(wide / 2 + centre - w / 2 + rng.normal() * wobble)) + 32 * zoom
        y = int(round((high - h) / 2 + rng.normal() * wobble)) + 16 * zoom
        x, y = min(max(x, 0), sheet.shape[1] - w), max(y, 0)
        window = sheet[y : y + h, x : x + w]
        np.maximum(window, letter[: window.shape[0]], out=window)
    sheet = sheet[16 * zoom : 16 * zoom + high, 32 * zoom : 32 * zoom + wide]
    return np.repeat(np.repeat(sheet, 2, 0), 2, 1) if native else sheet


# Degradation of a whole batch


@lru_cache(maxsize=8)
def _ramp(few: int, many: int) -> Tensor:
    """Return the (many, few) matrix that interpolates `few` points smoothly at `many`."""
    return F.interpolate(torch.eye(few)[None], many, mode="linear", align_corners=True)[0].T.contiguous()


def _waves(shape: tuple[int, int, int, int], size: tuple[int, int], g: torch.Generator) -> Tensor:
    """Draw low-frequency normal noise (B, C, *size), interpolated between (h, w) knots."""
    return _ramp(shape[2], size[0]) @ torch.randn(shape, generator=g) @ _ramp(shape[3], size[1]).T


def _chance(rows: int, p: float, g: torch.Generator) -> Tensor:

    return (torch.rand(rows, 1, 1, 1, generator=g) < p).float()


def bend(coverage: Tensor, g: torch.Generator, strength: float = 1.0) -> Tensor:
    """Warp (B, 1, 64, 128) to (B, 1, 32, 64): strokes thickened or thinned, turned, scaled, sheared, moved by up to 3 px, warped."""
    rows = len(coverage)
    coverage = coverage.clone()
    kind = torch.rand(rows, generator=g)
    for chosen, most in ((kind < 0.12, torch.maximum), ((kind > 0.12) & (kind < 0.22), torch.minimum)):
        some = coverage[chosen]
        some[..., 1:] = most(some[..., 1:], some[..., :-1])
        some[..., 1:, :] = most(some[..., 1:, :], some[..., :-1, :])
        coverage[chosen] = some

    moved = _chance(rows, 0.75, g) * strength  # the others are only moved by whole pixels
    u = lambda scale: (torch.rand(rows, generator=g) * 2 - 1) * scale * moved[:, 0, 0, 0]  # noqa: E731
    turn, shear, zoom, aspect = u(0.10), u(0.15), 1 + u(0.13), 1 + u(0.07)
    shift = torch.randint(-3, 4, (rows, 2), generator=g).float() * (torch.rand(rows, 1, generator=g) < 0.8)
    y = ((torch.arange(ZOOM * HEIGHT) + 0.5) / ZOOM - HEIGHT / 2).view(1, -1, 1)  # px from the middle
    x = ((torch.arange(ZOOM * WIDTH) + 0.5) / ZOOM - WIDTH / 2).view(1, 1, -1)
    a, b, c, d = (
        v.view(-1, 1, 1) for v in (turn.cos() * zoom * aspect, shear - turn.sin(), turn.sin(), turn.cos() * zoom)
    )
    warp = _waves((rows, 2, 4, 7), (ZOOM * HEIGHT, ZOOM * WIDTH), g) * 0.55 * moved * _chance(rows, 0.6, g)  # px
    to_x = a * x + b * y + shift[:, 0].view(-1, 1, 1) + warp[:, 0]
    to_y = c * x + d * y + shift[:, 1].view(-1, 1, 1) + warp[:, 1]
    flow = torch.stack((to_x * (2 / WIDTH), to_y * (2 / HEIGHT)), -1)
    return F.avg_pool2d(F.grid_sample(coverage, flow, align_corners=False), ZOOM)


def _patches(rows: int, largest: float, g: torch.Generator) -> Tensor:
    """Draw one ellipse an image, (B, 1, 32, 64) in {0, 1}, its half-axes up to `largest` px."""
    y = torch.arange(HEIGHT).view(1, 1, -1, 1) - torch.rand(rows, 1, 1, 1, generator=g) * HEIGHT
    x = torch.arange(WIDTH).view(1, 1, 1, -1) - torch.rand(rows, 1, 1, 1, generator=g) * WIDTH
    a, b = (0.8 + torch.rand(rows, 1, 1, 1, generator=g) * (largest - 0.8) for _ in range(2))
    return ((y / a) ** 2 + (x / b) ** 2 < 1).float()


def _soften(x: Tensor) -> Tensor:
    """Blur (B, C, h, w) by about 0.7 px: each pixel 0.46 of itself and 0.27 of its neighbours along both axes."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = 0.27 * (x[..., :-2] + x[..., 2:]) + 0.46 * x[..., 1:-1]
    return 0.27 * (x[..., :-2, :] + x[..., 2:, :]) + 0.46 * x[..., 1:-1, :]


def damage(coverage: Tensor, g: torch.Generator, strength: float = 1.0) -> Tensor:
    """Degrade (B, 1, 32, 64) coverage: break and smear strokes, add faint marks, erase patches."""
    rows = len(coverage)
    for largest, p in ((1.8, 0.45), (1.8, 0.35), (1.8, 0.25), (2.8, 0.20)):
        coverage = coverage * (1 - _patches(rows, largest, g) * _chance(rows, p * strength, g))
    smeared = _soften(_soften(_soften(coverage)))
    for _ in range(2):
        where = _patches(rows, 7.0, g) * _chance(rows, 0.3 * strength, g)
        coverage = coverage * (1 - where) + smeared * where
    spots = _patches(rows, 1.8, g) * _chance(rows, 0.25 * strength, g) * torch.rand(rows, 1, 1, 1, generator=g)
    coverage = torch.maximum(coverage, spots)
    ghost = (
        coverage.roll(1, 0).roll(int(torch.randint(-8, 9, (1,), generator=g)), 3)
        * torch.rand(rows, 1, 1, 1, generator=g)
        * 0.3
    )
    coverage = torch.maximum(coverage, ghost * _chance(rows, 0.2 * strength, g))
    fade = _waves((rows, 1, 2, 5), (HEIGHT, WIDTH), g).abs().clamp(max=1)
    return coverage * (1 - 0.6 * fade * _chance(rows, 0.3 * strength, g))


def colour(coverage: Tensor, g: torch.Generator, strength: float = 1.0) -> Tensor:
    """Colour (B, 1, 32, 64) coverage as (B, 3, 32, 64) in 0..255: random ink on a paper that differs enough, tinted, blurred, noisy."""
    rows = len(coverage)
    paper = 255 - torch.rand(rows, 3, 1, 1, generator=g) * 70 * torch.rand(rows, 1, 1, 1, generator=g)
    ink = (
        torch.rand(rows, 3, 1, 1, generator=g)
        * torch.tensor([70.0, 210.0])[torch.randint(0, 2, (rows, 3, 1, 1), generator=g)]
    )
    weights = torch.tensor([0.3, 0.6, 0.1]).view(1, 3, 1, 1)
    short = (45 - ((paper - ink) * weights).sum(1, keepdim=True)).clamp(min=0)  # at least 45 grey levels apart
    ink = (ink - short).clamp(0, 255)
    faint = 1 - 0.65 * torch.rand(rows, 1, 1, 1, generator=g) * _chance(rows, 0.3 * strength, g)
    ink = paper + faint * (ink - paper)
    swap = _chance(rows, 0.12, g)
    paper, ink = paper * (1 - swap) + ink * swap, ink * (1 - swap) + paper * swap
    tint = _waves((rows, 3, 3, 5), (HEIGHT, WIDTH), g)
    picture = paper + coverage * (ink - paper) + tint * 9 * _chance(rows, 0.4 * strength, g)
    soft = torch.rand(rows, 1, 1, 1, generator=g) * _chance(rows, 0.5 * strength, g)
    once = _soften(picture)
    picture = picture + soft * (once + _chance(rows, 0.3, g) * (_soften(once) - once) - picture)
    coarse = F.interpolate(F.avg_pool2d(picture, 2), scale_factor=2, mode="bilinear", align_corners=False)
    picture = picture + 0.6 * torch.rand(rows, 1, 1, 1, generator=g) * _chance(rows, 0.2 * strength, g) * (
        coarse - picture
    )
    grain = torch.randn(picture.shape, generator=g)
    grain = torch.where(_chance(rows, 0.5, g) > 0, grain, _soften(grain) * 1.8)
    level = 22 * torch.rand(rows, 1, 1, 1, generator=g) * _chance(rows, 0.6 * strength, g)
    return (picture + grain * level).clamp(0, 255).round()


def draw_batch(rows: int, seed: tuple[int, ...], strength: float = 1.0) -> tuple[Tensor, list[str]]:
    """Draw (B, 32, 64, 3) in 0..255 and B strings; 4 % are blank paper or shapes, with the empty string. Pure in (seed, rows)."""
    rng = np.random.default_rng(seed)
    g = torch.Generator().manual_seed(int(rng.integers(2**62)))
    texts = ["" if rng.random() < 0.02 else random_letters(rng) for _ in range(rows)]
    coverage = torch.from_numpy(np.stack([print_letters(text, rng) for text in texts]))[:, None]
    clean = _chance(rows, 0.15, g)  # these stay as drawn
    bent = bend(coverage, g, strength)
    worn = damage(bent, g, strength)
    pictures = colour(worn * (1 - clean) + bent * clean, g, strength).movedim(1, -1)
    for row in np.flatnonzero(rng.random(rows) < 0.02):
        kind, count = str(rng.choice(glyphs.SHAPES)), int(rng.integers(1, 6))
        shade = list(glyphs.SHAPE_COLOURS.values())[int(rng.integers(3))]
        paper = list(glyphs.PAPERS.values())[int(rng.integers(3))]
        pictures[row], texts[row] = torch.from_numpy(glyphs.draw_shapes(kind, count, shade, paper, rng)).float(), ""
    return pictures, texts


# Measuring


def clean_words(seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Draw every test word of the task `ocr` in the style of the embedded model's training images: (N, 32, 64, 3) uint8 and N words."""
    rng = np.random.default_rng(seed)
    words = word_splits()["test"]
    papers, inks = list(glyphs.PAPERS.values()), list(glyphs.INKS.values())
    return np.stack(
        [
            glyphs.draw_word(
                word, paper=papers[int(rng.integers(3))], ink=inks[int(rng.integers(3))], shift=(int(dx), int(dy))
            )
            for word, (dx, dy) in zip(words, rng.integers(-1, 2, (len(words), 2)), strict=True)
        ]
    ), words


def degraded_words(seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Draw the same words and typeface with the degradation, colours, blur and noise of the training images, but no warp."""
    g = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    _, words = clean_words()
    shifts = rng.integers(-2, 3, (len(words), 2))
    prints = np.stack(
        [glyphs.draw_word(w, shift=(int(dx), int(dy))) for w, (dx, dy) in zip(words, shifts, strict=True)]
    )
    grey = torch.from_numpy(prints).float().mean(-1)[:, None]
    coverage = (255 - grey) / (255 - grey.amin((2, 3), keepdim=True))
    pictures = colour(damage(coverage, g), g).movedim(1, -1)
    return pictures.numpy().astype(np.uint8), words


def rate(read: Callable[[np.ndarray], list[str]], pictures: np.ndarray, words: list[str]) -> dict[str, Any]:
    """Count the strings that are read exactly."""
    share = proportion(sum(a == b for a, b in zip(read(pictures), words, strict=True)), len(words))
    return {"exact": round(share.mean, 4), "n": len(words), "ci95": [round(share.low, 4), round(share.high, 4)]}


# The recipe


@dataclass(frozen=True)
class ReaderRecipe:
    """Trains the reader from random weights: AdamW on random strings, a cosine learning rate, weights averaged."""

    steps: int = 1800
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
        """Write reader.safetensors and reader.json into `out`, resuming a run that was stopped there.

        Returns what reader.json holds.
        """

        out.mkdir(parents=True, exist_ok=True)
        with threads(self.threads):
            learner = ReaderLearner(self, seed)
            averaged, seconds = fit(learner, self._settings(out, seed), log=log)
            weights = in_half(averaged)
            (out / "reader.safetensors").write_bytes(save(weights))  # save_file makes it private to its owner
            learner.averaged.load_state_dict(in_single(weights))
            facts = self._facts(learner.averaged, seed, seconds)
            (out / "reader.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
            return facts

    def _settings(self, out: Path, seed: int) -> FitSettings:
        every = Interval(steps=self.save_every)
        return FitSettings(
            label={"recipe": "reader"},
            made_by=asdict(self) | {"seed": seed},
            checkpoint=out / "reader.state.pt",
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

        hard, strings = draw_batch(self.measured, (seed + 2, 0))
        read = lambda pictures: _read(module, pictures)
        return {
            "recipe": asdict(self) | {"seed": seed},
            "cpu_seconds": round(seconds),
            "pictures": self.steps * self.batch,
            "parameters": sum(p.numel() for p in module.parameters()),
            "torch": torch.__version__,
            "faces": [face or "PIL built-in" for face in FACES],
            "never_seen": ["DejaVu Sans Mono (all styles)", "every string whose split is validation or test"],
            "clean_test_words_in_dejavu_sans_mono_bold": rate(read, *clean_words()),
            "degraded_test_words_in_dejavu_sans_mono_bold": rate(read, *degraded_words()),
            "degraded_and_bent_random_strings_in_training_faces": rate(read, hard.numpy(), strings),
        }


class ReaderLearner(Learner):
    """The network, trained by CTC on the strings of each batch."""

    def __init__(self, recipe: ReaderRecipe, seed: int) -> None:
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
        logp = logits.float().log_softmax(1).permute(2, 0, 1)  # (16, B, 27), as CTC wants it
        letters = torch.tensor([ALPHABET.index(letter) + 1 for text in texts for letter in text])
        lengths = torch.tensor([len(text) for text in texts])
        columns = torch.full((self.recipe.batch,), COLUMNS)
        return F.ctc_loss(logp, letters, columns, lengths, zero_infinity=True)

    def evaluate(self, weights: Weights, step: int) -> dict[str, float]:
        """Return the share of hard strings, never trained on, that the averaged weights read exactly."""
        self.averaged.load_state_dict(weights)
        pictures, texts = draw_batch(self.recipe.probe, (self.seed + 1, step - 1))
        share = rate(lambda batch: _read(self.averaged, batch), pictures.numpy(), texts)
        return {"hard_unseen_strings": share["exact"]}


def _read(module: nn.Module, pictures: np.ndarray) -> list[str]:

    with torch.inference_mode():
        return spell(module(standardise(torch.from_numpy(pictures))).argmax(1).numpy())
