"""Recipe of the held-out shape detector: trains it in minutes on shapes of any colour, degraded, cut, faint and crowded.

Two rules keep it independent of the scorer that methods are trained on. Its colours are drawn anew for every image, so no palette
can help it; and its shapes are drawn by other code and of other sizes and proportions than those of the embedded model, which are used
only to measure it. Step k draws its batch from (seed, k) alone, so
that an interrupted run continues as if it had not stopped.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from ..bench.assets import glyphs
from ..bench.models.recipe_fit import FitSettings, Interval, Learner, Log, cosine_rate, fit, in_half, in_single, threads
from ..bench.stats.intervals import proportion
from .detect_shapes import CALIBRATION, STRIDE, network
from .detect_shapes import ShapesDetector as Detector
from .detectors import Detection
from .reader import HEIGHT, WIDTH, standardise
from .reader_recipe import colour, damage, print_letters, random_letters

WINDOW = 18  # px; contains a shape of the largest radius, warped
MOST = 9  # shapes and pieces in an image
WEAR = 0.7  # of the reader's degradation: a shape has less detail than a letter
THRESHOLD = 0.9  # GenEval's for counting: more than this is an object
SPREAD = 0.8  # cells; standard deviation of the Gaussian around a centre


class Truth(NamedTuple):
    """Ground truth of the shapes: all (B, MOST), centres and sizes in pixels."""

    real: Tensor  # bool: a shape; a faint ghost, a piece of one or an empty place is none
    kind: Tensor  # int64, index into glyphs.SHAPES
    x: Tensor
    y: Tensor
    w: Tensor
    h: Tensor


# Drawing


def random_places(rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Draw up to MOST of (x, y, radius), in cells of a grid or anywhere; neighbours may touch but hardly overlap."""
    most = int(rng.integers(0, 9))
    radius = float(rng.uniform(3.5, 6.0))
    if rng.random() < 0.55:
        radius = min(radius, 5.4)
        pitch_x, pitch_y, columns = float(rng.uniform(11.5, 13)), float(rng.uniform(13, 16.5)), 5
        cells = rng.permutation(2 * columns)[:most]
        left, top = WIDTH / 2 - pitch_x * (columns - 1) / 2, HEIGHT / 2 - pitch_y / 2
        jitter = rng.normal(0, 0.8, (most, 2))
        return [
            (left + pitch_x * (c % columns) + dx, top + pitch_y * (c // columns) + dy, radius)
            for c, (dx, dy) in zip(cells.tolist(), jitter.tolist(), strict=False)
        ]
    closest = float(rng.choice([0.85, 1.0, 1.2]))
    placed: list[tuple[float, float, float]] = []
    for _ in range(4 * most):
        r = radius * float(rng.uniform(0.9, 1.1))
        near = placed and rng.random() < 0.3  # beside the last one, touching it
        if near:
            angle = float(rng.uniform(0, 2 * math.pi))
            x0, y0, r0 = placed[-1]
            x, y = x0 + closest * (r0 + r) * math.cos(angle), y0 + closest * (r0 + r) * math.sin(angle)
        else:
            x, y = float(rng.uniform(2, WIDTH - 2)), float(rng.uniform(2, HEIGHT - 2))
        inside = r * 0.6 < x < WIDTH - r * 0.6 and r * 0.6 < y < HEIGHT - r * 0.6
        if inside and all(math.hypot(x - a, y - b) >= 0.98 * closest * (r + q) for a, b, q in placed):
            placed.append((x, y, r))
        if len(placed) == most:
            break
    return placed


def draw_shapes(rows: int, rng: np.random.Generator, g: torch.Generator, strength: float) -> tuple[Tensor, Truth]:
    """Draw shapes by their distance to the edge: (B, 1, 32, 64) coverage, and their ground truth."""
    layout = np.full((rows, MOST, 3), 4, np.float32)  # absent shapes have a size too: no division by zero
    there = np.zeros((rows, MOST), bool)
    kinds = np.repeat(rng.integers(0, 3, (rows, 1)), MOST, 1)
    mixed = rng.random(rows) < 0.25
    kinds[mixed] = rng.integers(0, 3, (int(mixed.sum()), MOST))
    for row in range(rows):
        for i, place in enumerate(random_places(rng)[:MOST]):
            layout[row, i], there[row, i] = place, True
    kind, present = torch.from_numpy(kinds), torch.from_numpy(there)
    x, y, r = torch.from_numpy(layout).unbind(-1)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, MOST, generator=g)

    def likely(p: float) -> Tensor:
        return torch.rand(rows, MOST, generator=g) < p

    aspect = 1 + uniform(-0.1, 0.1) * likely(0.7)
    shrink = torch.where(kind == 1, uniform(0.82, 0.98), uniform(0.94, 1.04))
    a, b = r * shrink * aspect, r * shrink / aspect  # half the width, half the height
    turn = uniform(-0.14, 0.14) * likely(0.4 * strength)
    wave = torch.randn(rows, 2, 4, 7, generator=g) * 0.45 * strength * (torch.rand(rows, 1, 1, 1, generator=g) < 0.5)
    wave = F.interpolate(wave, (HEIGHT, WIDTH), mode="bilinear", align_corners=True)  # px
    # Each shape is drawn on a window of its own; the canvas, which has a margin, takes the maximum coverage.
    wide, high = WIDTH + 2 * WINDOW, HEIGHT + 2 * WINDOW
    left, top = (x - WINDOW / 2).round().long() + WINDOW, (y - WINDOW / 2).round().long() + WINDOW
    columns = (left[..., None] + torch.arange(WINDOW)).view(rows, MOST, 1, WINDOW)
    lines = (top[..., None] + torch.arange(WINDOW)).view(rows, MOST, WINDOW, 1)
    cells = (lines * wide + columns).view(rows, -1)
    wave = F.pad(wave, (WINDOW,) * 4, "replicate").flatten(2).gather(2, cells[:, None].expand(-1, 2, -1))
    wave_x, wave_y = wave.view(rows, 2, MOST, WINDOW, WINDOW).unbind(1)
    u = columns - WINDOW + 0.5 + wave_x - x[..., None, None]
    v = lines - WINDOW + 0.5 + wave_y - y[..., None, None]
    c, s = turn.cos()[..., None, None], turn.sin()[..., None, None]
    u, v = c * u + s * v, c * v - s * u
    a_, b_ = a[..., None, None], b[..., None, None]
    circle = ((u / a_) ** 2 + (v / b_) ** 2).sqrt().sub(1) * (a_ + b_) / 2
    square = torch.maximum(u.abs() - a_, v.abs() - b_)
    steep = (4 * b_**2 + a_**2).sqrt()
    triangle = torch.maximum(v - b_, (2 * b_ * u.abs() - a_ * (v + b_)) / steep)
    which = kind[..., None, None]
    edge = torch.where(which == 0, circle, torch.where(which == 1, square, triangle))

    # A straight cut may remove a side: with most of it left it is still a shape, with less than half a piece.
    cut, piece = likely(0.10 * strength), likely(0.12)
    angle = uniform(0, 2 * math.pi)[..., None, None]
    cut_offset = torch.where(piece, uniform(-0.9, -0.15), torch.where(cut, uniform(0.5, 1.0), torch.tensor(9.0)))
    edge = torch.maximum(edge, u * angle.cos() + v * angle.sin() - (cut_offset * r)[..., None, None])
    ghost, faint = likely(0.06), likely(0.12 * strength)
    ink = torch.where(ghost, uniform(0.0, 0.25), torch.where(faint, uniform(0.5, 1.0), torch.tensor(1.0))) * present
    canvas = torch.zeros(rows, high * wide).scatter_reduce(
        1, cells, ((0.5 - edge).clamp(0, 1) * ink[..., None, None]).flatten(1), "amax"
    )
    coverage = canvas.view(rows, 1, high, wide)[..., WINDOW:-WINDOW, WINDOW:-WINDOW]
    return coverage.clone(), Truth(present & ~piece & ~ghost, kind, x, y, 2 * a, 2 * b)


def _strokes(rows: int, g: torch.Generator) -> Tensor:
    """Draw distractors: (B, 1, 32, 64) coverage of three bars and a ring an image."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, 3, 1, 1, generator=g)

    columns, lines = (
        (torch.arange(WIDTH) + 0.5).view(1, 1, 1, WIDTH),
        (torch.arange(HEIGHT) + 0.5).view(1, 1, HEIGHT, 1),
    )
    u, v = columns - uniform(0, WIDTH), lines - uniform(0, HEIGHT)
    angle, long = uniform(0, math.pi), uniform(4, 20)
    along, across = u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin()
    bar = torch.maximum(along.abs() - long, across.abs() - uniform(0.4, 1.5))
    ring = ((u**2 + v**2).sqrt() - uniform(4, 8)).abs() - uniform(0.4, 1.2)
    edge = torch.where(torch.rand(rows, 3, 1, 1, generator=g) < 0.7, bar, ring)
    edge = torch.where(torch.rand(rows, 3, 1, 1, generator=g) < 0.5, edge, torch.tensor(9.0))
    return (0.5 - edge).clamp(0, 1).amax(1, keepdim=True)


def draw_batch(rows: int, seed: tuple[int, ...], strength: float = 1.0) -> tuple[Tensor, Truth]:
    """Draw (B, 32, 64, 3) in 0..255 and the truth; one in seven shows letters, bars or rings and no shape. Pure in (seed, rows)."""
    rng = np.random.default_rng(seed)
    g = torch.Generator().manual_seed(int(rng.integers(2**62)))
    coverage, truth = draw_shapes(rows, rng, g, strength)
    other = rng.random(rows)
    for row in np.flatnonzero(other < 0.10):
        letters = torch.from_numpy(print_letters(random_letters(rng), rng))
        coverage[row] = F.avg_pool2d(letters[None], 2)
    strokes = torch.from_numpy((other >= 0.10) & (other < 0.14))
    coverage[strokes] = _strokes(rows, g)[strokes]
    truth.real[torch.from_numpy(other < 0.14)] = False
    clean = torch.rand(rows, 1, 1, 1, generator=g) < 0.2
    worn = torch.where(clean, coverage, damage(coverage, g, WEAR * strength))
    return colour(worn, g, strength).movedim(1, -1), truth


# Learning


def targets(truth: Truth, kinds: int = len(glyphs.SHAPES)) -> tuple[Tensor, Tensor, Tensor]:
    """Return Gaussian maps (B, kinds, 16, 32), 1 at centres, boxes (B, MOST, 4) as the network codes them, and centres' cells (B, MOST)."""
    high, wide = HEIGHT // STRIDE, WIDTH // STRIDE
    u, v = truth.x / STRIDE, truth.y / STRIDE  # in cells
    column, line = u.floor().clamp(0, wide - 1), v.floor().clamp(0, high - 1)
    squared = (torch.arange(wide) - column[..., None])[:, :, None] ** 2 + (torch.arange(high) - line[..., None])[
        ..., None
    ] ** 2
    hill = torch.exp(-squared / (2 * SPREAD**2)) * truth.real[..., None, None]
    hills = torch.stack([(hill * (truth.kind == k)[..., None, None]).amax(1) for k in range(kinds)], 1)
    boxes = torch.stack((u - column - 0.5, v - line - 0.5, truth.w.clamp(min=1).log(), truth.h.clamp(min=1).log()), -1)
    return hills, boxes, (line * wide + column).long()


def loss_of(maps: Tensor, truth: Truth, kinds: int = len(glyphs.SHAPES)) -> Tensor:
    """Compute CenterNet's loss: the penalty-reduced focal loss of the maps (alpha 2, beta 4) + a tenth of the boxes' absolute error."""
    hills, boxes, cells = targets(truth, kinds)
    logits = maps[:, :kinds]
    p, summit = logits.sigmoid(), hills == 1
    many = truth.real.sum().clamp(min=1)
    focal = torch.where(summit, (1 - p) ** 2 * F.softplus(-logits), (1 - hills) ** 4 * p**2 * F.softplus(logits)).sum()
    predicted = maps[:, kinds : kinds + 4].flatten(2).gather(2, cells[:, None].expand(-1, 4, -1)).transpose(1, 2)
    off = ((predicted - boxes).abs().sum(-1) * truth.real).sum()
    return (focal + 0.1 * off) / many


# Measuring


def clean_drawings(each: int = 10, seed: int = 0) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """Draw (N, 32, 64, 3) uint8 and N (kind, count) as for the embedded model: every kind, colour and count `each` times."""
    rng = np.random.default_rng(seed)
    drawings = [
        (k, n, c)
        for k in glyphs.SHAPES
        for c in glyphs.SHAPE_COLOURS.values()
        for n in glyphs.COUNTS
        for _ in range(each)
    ]
    papers = list(glyphs.PAPERS.values())
    pictures = [glyphs.draw_shapes(k, n, c, papers[int(rng.integers(len(papers)))], rng) for k, n, c in drawings]
    return np.stack(pictures), [(k, n) for k, n, _ in drawings]


def worn_drawings(each: int = 10, seed: int = 0) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """Draw the same in the colours of the training images, with their degradation, blur and noise."""
    rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    drawings = [(k, n) for k in glyphs.SHAPES for _ in glyphs.SHAPE_COLOURS for n in glyphs.COUNTS for _ in range(each)]
    black = np.stack([glyphs.draw_shapes(k, n, (0, 0, 0), (255, 255, 255), rng) for k, n in drawings])
    coverage = 1 - torch.from_numpy(black).float().mean(-1)[:, None] / 255
    return colour(damage(coverage, g, WEAR), g).movedim(1, -1).numpy().astype(np.uint8), drawings


def words(many: int = 450, seed: int = 0) -> np.ndarray:
    """Draw (N, 32, 64, 3) uint8 without any shape: the words of the embedded model's domain."""
    rng = np.random.default_rng(seed)
    return np.stack([glyphs.word_sample(rng, [], ())[1] for _ in range(many)])


def counts(detections: list[list[Detection]], threshold: float = THRESHOLD) -> np.ndarray:
    """Count the shapes of each kind that score above the threshold, (B, 3)."""
    return np.array(
        [[sum(d.label == k and d.score > threshold for d in row) for k in glyphs.SHAPES] for row in detections]
    )


def exact(detector: Detector, pictures: np.ndarray, drawn: list[tuple[str, int]]) -> dict[str, Any]:
    """Return how often the drawn kind is counted right, and `other`: how often another kind is detected as well."""
    counted = counts(detector(pictures))
    kinds = np.array([glyphs.SHAPES.index(k) for k, _ in drawn])
    rows = np.arange(len(drawn))
    right = proportion(int((counted[rows, kinds] == [n for _, n in drawn]).sum()), len(drawn))
    other = float((counted.sum(1) > counted[rows, kinds]).mean())
    ci = [round(right.low, 4), round(right.high, 4)]
    return {"exact": round(right.mean, 4), "n": len(drawn), "ci95": ci, "other": round(other, 4)}


def calibrate(maps: Tensor, truth: Truth, kinds: int = len(glyphs.SHAPES)) -> tuple[float, float, float]:
    """Fit (a, b, accuracy): score = sigmoid(a * logit + b) is 0.9 where most images are counted right, all kinds at once.

    The slope is the one, under that condition, that makes the scores of peaks the best probabilities of being a shape (Platt).
    """
    logits = maps[:, :kinds]
    peak = F.max_pool2d(logits, 3, 1, 1) == logits
    wanted = torch.stack([((truth.kind == k) & truth.real).sum(1) for k in range(kinds)], 1)
    levels = torch.linspace(-4, 3, 141)
    right = torch.stack([((peak & (logits > t)).sum((2, 3)) == wanted).all(1).float().mean() for t in levels])
    smooth = F.avg_pool1d(right[None], 9, 1, 4, count_include_pad=False)[
        0
    ]  # the middle of the plateau, not a chance maximum
    best = int(smooth.argmax())
    level = float(levels[best])

    row, kind, y, x = torch.nonzero(peak & (logits > -5), as_tuple=True)
    gap = ((x[:, None] + 0.5) * STRIDE - truth.x[row]) ** 2 + ((y[:, None] + 0.5) * STRIDE - truth.y[row]) ** 2
    hit = ((gap < 3.0**2) & truth.real[row] & (truth.kind[row] == kind[:, None])).any(1).float()
    anchor = math.log(THRESHOLD / (1 - THRESHOLD))
    slopes = torch.linspace(0.2, 4, 77).tolist()
    peak_logits = logits[row, kind, y, x]
    prices = [float(F.binary_cross_entropy_with_logits(a * (peak_logits - level) + anchor, hit)) for a in slopes]
    slope = slopes[int(np.argmin(prices))]
    return slope, anchor - slope * level, float(right[best])


# The recipe


@dataclass(frozen=True)
class ShapesRecipe:
    """Trains the detector from random weights: AdamW, a cosine learning rate, weights averaged, scores calibrated at the end."""

    steps: int = 1500
    batch: int = 96
    lr: float = 3e-3
    weight_decay: float = 0.02
    warmup: int = 100  # steps
    average: float = 0.997  # decay of the averaged weights that are shipped
    tell_every: int = 100  # steps
    threads: int = 1
    calibrated: int = 3000  # pictures of the training kind, never trained on
    each: int = 10  # drawings of every kind, colour and count that are measured

    def __call__(self, out: Path, *, seed: int, log: Log) -> dict[str, Any]:
        """Write shapes.safetensors and shapes.json into `out`, resuming a run that was stopped there.

        Returns what shapes.json holds.
        """

        out.mkdir(parents=True, exist_ok=True)
        with threads(self.threads):
            began = time.process_time()
            settings = self._settings(out, seed)
            averaged, seconds = fit(ShapesLearner(self, seed), settings, log=log)
            seconds -= time.process_time() - began  # of earlier starts alone
            weights, module = in_half(averaged), network().eval()
            module.load_state_dict(in_single(weights))
            slope, shift, accuracy = calibrate(*self._held_out(module, seed))
            weights[CALIBRATION] = torch.tensor([slope, shift])
            (out / "shapes.safetensors").write_bytes(save(weights))
            facts = {
                "recipe": asdict(self) | {"seed": seed},
                "cpu_seconds": round(seconds + time.process_time() - began),
                "pictures": self.steps * self.batch,
                "parameters": sum(p.numel() for p in module.parameters()),
                "torch": torch.__version__,
                "calibration": {"slope": slope, "shift": shift, "all_kinds_exact_on_training_kind": round(accuracy, 4)},
            } | self._measured(Detector(out / "shapes.safetensors"))
            (out / "shapes.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
            settings.checkpoint.unlink(missing_ok=True)
            return facts

    def _settings(self, out: Path, seed: int) -> FitSettings:
        every = Interval(steps=self.tell_every)
        return FitSettings(
            label={"recipe": "shapes"},
            made_by=asdict(self) | {"seed": seed},
            checkpoint=out / "shapes.state.pt",
            steps=self.steps,
            samples=self.batch,
            rate=cosine_rate(self.warmup, self.steps, 1e-6),
            save=every,
            report=every,
            average=self.average,
            clip_norm=2.0,
        )

    def _held_out(self, module: nn.Module, seed: int) -> tuple[Tensor, Truth]:

        batches = [draw_batch(self.batch, (seed + 1, k)) for k in range(-(-self.calibrated // self.batch))]
        with torch.inference_mode():
            maps = torch.cat([module(standardise(pictures.to(torch.uint8))) for pictures, _ in batches])
        return maps, Truth(*(torch.cat(parts) for parts in zip(*(truth for _, truth in batches), strict=True)))

    def _measured(self, detector: Detector) -> dict[str, Any]:
        pictures = words()
        wrong = counts(detector(pictures)).any(1)
        return {
            "clean_drawings": exact(detector, *clean_drawings(self.each)),
            "worn_drawings": exact(detector, *worn_drawings(self.each)),
            "words_with_a_shape_seen": {"share": round(float(wrong.mean()), 4), "n": len(pictures)},
        }


class ShapesLearner(Learner):
    """The network, trained by CenterNet's loss on the images of each batch."""

    def __init__(self, recipe: ShapesRecipe, seed: int) -> None:
        self.recipe, self.seed = recipe, seed
        torch.manual_seed(seed)
        self.module = network().train()
        with torch.no_grad():
            last: Any = self.module[-1]
            last.bias[: len(glyphs.SHAPES)] = -3.0  # initial scores near zero everywhere
        self.optimisers = [
            torch.optim.AdamW(
                self.module.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
            )
        ]

    def loss(self, step: int, shard: int) -> Tensor:
        strength = min(1.0, 0.2 + 1.6 * (step / self.recipe.steps))
        pictures, truth = draw_batch(self.recipe.batch, (self.seed, step), strength=strength)
        with torch.autocast("cpu", torch.bfloat16):
            maps = self.module(standardise(pictures).contiguous(memory_format=torch.channels_last))
        return loss_of(maps.float(), truth)
