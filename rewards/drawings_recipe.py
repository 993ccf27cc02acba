"""Recipe of the held-out detector of drawings: eight shapes in any size and proportion, degraded, in colours near a name or near none.

No picture of `drawings` is trained on; they only measure the result. Shapes are drawn by their distance to the edge, which is other code
than the polygons of the embedded model's pictures. Step k draws its batch from (seed, k) alone, so that an interrupted run continues as if
it had not stopped.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from ..bench.assets import drawings
from ..bench.assets.drawings import COLOURS, SHAPES, Counted, Pair, Shares
from ..bench.models.recipe_fit import FitSettings, Interval, Learner, Log, cosine_rate, fit, in_half, in_single, threads
from ..bench.stats.intervals import proportion
from .detect_drawings import OUTPUTS, DrawingsColours, DrawingsDetector
from .detect_shapes import CALIBRATION, STRIDE, network
from .reader import HEIGHT, WIDTH, standardise
from .reader_recipe import damage, print_letters, random_letters
from .shapes_recipe import MOST, THRESHOLD, Truth, calibrate, loss_of, random_places
from .tiny_clip_recipe import roughened

INKS = 3  # in a picture at most
WEAR = 0.7  # of the reader's degradation: a shape has less detail than a letter


# Outlines: signed distance to the edge in half-widths, negative inside; x to the right, y down, both in half-widths


def edge_of(kind: str, x: Tensor, y: Tensor, shape: Tensor) -> Tensor:
    """Return the signed distance (...) to a shape's edge. shape: a number in 0..1 that varies its proportions."""
    if kind == "circle":
        return torch.hypot(x, y) - 1
    if kind == "ring":
        return torch.maximum(torch.hypot(x, y) - 1, 0.38 + 0.24 * shape - torch.hypot(x, y))
    if kind == "square":
        return torch.maximum(x.abs(), y.abs()) - (0.84 + 0.12 * shape)
    if kind == "triangle":
        return torch.maximum(y - 0.95, (2 * x.abs() - (y + 1)) / math.sqrt(5))
    if kind == "diamond":
        return (x.abs() + y.abs() / (1 + 0.2 * shape) - 1) / math.sqrt(2)
    if kind == "cross":
        arm = 0.28 + 0.16 * shape
        tall = torch.maximum(x.abs() - arm, y.abs() - 1)
        return torch.minimum(tall, torch.maximum(x.abs() - 1, y.abs() - arm))
    if kind == "star":
        return _star_edge(x, y, 0.4 + 0.16 * shape)
    if kind == "heart":
        lobe = torch.hypot(x.abs() - 0.48, y + 0.4) - 0.54
        tip = (1.25 * x.abs() + 0.98 * (y - 1.05)) / math.hypot(1.25, 0.98)
        return torch.minimum(lobe, torch.maximum(tip, -(y + 0.3)))
    raise ValueError(f"no shape called {kind!r}; there are {', '.join(SHAPES)}")


def _star_edge(x: Tensor, y: Tensor, inner: Tensor) -> Tensor:
    """Return the distance to the side between a point of a five-pointed star, at 1.15, and the corner beside it, at `inner`."""
    fifth = 2 * math.pi / 5
    angle = torch.atan2(x, -y)  # 0 is up, where a point is
    angle = (angle - fifth * torch.round(angle / fifth)).abs()
    px, py = torch.hypot(x, y) * angle.cos(), torch.hypot(x, y) * angle.sin()
    to_x, to_y = inner * math.cos(fifth / 2) - 1.15, inner * math.sin(fifth / 2)
    return ((px - 1.15) * to_y - py * to_x) / torch.sqrt(to_x**2 + to_y**2)


# Pictures


def draw_coverage(
    rows: int, rng: np.random.Generator, g: torch.Generator, strength: float
) -> tuple[Tensor, Truth, Tensor]:
    """Draw shapes of up to three inks: (B, INKS, 32, 64) coverage, the truth, and each shape's ink (B, MOST)."""
    layout = np.full((rows, MOST, 3), 4, np.float32)  # absent shapes have a size too: no division by zero
    there = np.zeros((rows, MOST), bool)
    for row in range(rows):
        for i, place in enumerate(random_places(rng)[:MOST]):
            layout[row, i], there[row, i] = place, True
    one_kind = rng.random((rows, 1)) < 0.55
    kinds = np.where(one_kind, rng.integers(0, len(SHAPES), (rows, 1)), rng.integers(0, len(SHAPES), (rows, MOST)))
    inks = np.where(one_kind, 0, rng.integers(0, INKS, (rows, MOST)))
    kind, ink, present = torch.from_numpy(kinds), torch.from_numpy(inks), torch.from_numpy(there)
    x, y, r = torch.from_numpy(layout).unbind(-1)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, MOST, generator=g)

    def likely(p: float) -> Tensor:
        return torch.rand(rows, MOST, generator=g) < p

    aspect, turn = 1 + uniform(-0.1, 0.1) * likely(0.7), uniform(-0.14, 0.14) * likely(0.4 * strength)
    a, b = r * aspect, r / aspect  # half the width, half the height
    u = torch.arange(WIDTH) + 0.5 - x[..., None]
    v = torch.arange(HEIGHT) + 0.5 - y[..., None]
    c, s = (part[..., None, None] for part in (turn.cos(), turn.sin()))
    across = (c * u[:, :, None] + s * v[..., None]) / a[..., None, None]
    along = (c * v[..., None] - s * u[:, :, None]) / b[..., None, None]
    edge, proportions = torch.full_like(across, 9.0), uniform(0, 1)[..., None, None]
    for number, name in enumerate(SHAPES):
        these = (kind == number) & present
        edge[these] = edge_of(name, across[these], along[these], proportions[these])

    # A straight cut may remove a side: with most of it left it is still a shape, with less than half a piece.
    cut, piece = likely(0.10 * strength), likely(0.10)
    angle = uniform(0, 2 * math.pi)[..., None, None]
    offset = torch.where(piece, uniform(-0.9, -0.15), torch.where(cut, uniform(0.6, 1.0), torch.tensor(9.0)))
    edge = torch.maximum(edge, across * angle.cos() + along * angle.sin() - offset[..., None, None])
    ghost, faint = likely(0.06), likely(0.12 * strength)
    weight = torch.where(ghost, uniform(0.0, 0.25), torch.where(faint, uniform(0.5, 1.0), torch.tensor(1.0))) * present
    covered = (0.5 - edge * r[..., None, None]).clamp(0, 1) * weight[..., None, None]
    canvas = torch.stack([(covered * (ink == i)[..., None, None]).amax(1) for i in range(INKS)], 1)
    return canvas, Truth(present & ~piece & ~ghost, kind, x, y, 2 * a, 2 * b), ink


def draw_batch(rows: int, seed: tuple[int, ...], strength: float = 1.0) -> tuple[Tensor, Truth, Tensor]:
    """Draw (B, 32, 64, 3) in 0..255, the truth, and each shape's colour (B, MOST), -1 where it has no name. Pure in (seed, rows).

    One in ten pictures shows letters and no shape.
    """
    rng = np.random.default_rng(seed)
    g = torch.Generator().manual_seed(int(rng.integers(2**62)))
    canvas, truth, ink = draw_coverage(rows, rng, g, strength)
    letters = rng.random(rows) < 0.1
    for row in np.flatnonzero(letters):
        canvas[row] = 0
        canvas[row, :1] = F.avg_pool2d(torch.from_numpy(print_letters(random_letters(rng), rng))[None], 2)
    truth.real[torch.from_numpy(letters)] = False
    clean = torch.rand(rows, 1, 1, 1, generator=g) < 0.2
    worn = damage(canvas.flatten(0, 1)[:, None], g, WEAR * strength).view_as(canvas)
    canvas = torch.where(clean, canvas, worn)
    paper = 255 - torch.rand(rows, 3, generator=g) * 50 * torch.rand(rows, 1, generator=g)
    named = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    choice = torch.stack([torch.randperm(len(COLOURS), generator=g)[:INKS] for _ in range(rows)])
    near = named[choice] + 22 * torch.randn(rows, INKS, 3, generator=g)
    nameless = torch.rand(rows, INKS, generator=g) < 0.15
    inks = torch.where(nameless[..., None], torch.rand(rows, INKS, 3, generator=g) * 190, near).clamp(0, 255)
    picture = paper[:, :, None, None].expand(rows, 3, HEIGHT, WIDTH)
    for i in range(INKS):
        picture = picture + canvas[:, i : i + 1] * (inks[:, i, :, None, None] - picture)
    picture = roughened(picture, torch.rand(rows, generator=g) * (torch.rand(rows, generator=g) < 0.7 * strength), g)
    names = torch.where(nameless, torch.tensor(-1), choice)
    return picture.movedim(1, -1), truth, names.gather(1, ink)


def colour_loss(maps: Tensor, truth: Truth, colours: Tensor) -> Tensor:
    """Compute the cross-entropy of the colours at the cells of the centres, over the shapes whose colour has a name."""
    high, wide = HEIGHT // STRIDE, WIDTH // STRIDE
    column, line = (truth.x / STRIDE).long().clamp(0, wide - 1), (truth.y / STRIDE).long().clamp(0, high - 1)
    logits = maps[:, len(SHAPES) + 4 :].flatten(2)
    at = (line * wide + column)[:, None].expand(-1, logits.shape[1], -1)
    labels = torch.where(truth.real, colours, torch.tensor(-1))
    total = F.cross_entropy(logits.gather(2, at), labels, ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


# Measuring


def known_drawings(many: int, seed: int) -> tuple[np.ndarray, list[Counted | Pair]]:
    """Draw (N, 32, 64, 3) uint8 as for the embedded model, half of them counts of a shape and half pairs, and their contents."""
    rng = np.random.default_rng(seed)
    contents = [drawings.sample_content(rng, [], (), Shares(0, 0, 0.5)) for _ in range(many)]
    pictures = np.stack([drawings.draw(content, rng) for content in contents])
    return pictures, [content for content in contents if isinstance(content, Counted | Pair)]


def worn(pictures: np.ndarray, seed: int) -> np.ndarray:
    """Roughen drawings (N, 32, 64, 3) uint8: tint, noise and blur."""
    g = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(pictures).movedim(-1, 1).float()
    return roughened(images, torch.ones(len(images)), g).movedim(1, -1).numpy().astype(np.uint8)


def exact(detector: DrawingsDetector, pictures: np.ndarray, contents: list[Counted | Pair]) -> dict[str, Any]:
    """Return how often every shape is found with its kind and colour, and nothing else."""
    colours, right = DrawingsColours(detector), 0
    for image, found, content in zip(pictures, detector(pictures), contents, strict=True):
        sure = [detection for detection in found if detection.score > THRESHOLD]
        seen = sorted(zip((detection.label for detection in sure), colours(image, sure), strict=True))
        if isinstance(content, Counted):
            wanted = [(content.kind, content.colour)] * content.count
        else:
            wanted = sorted((thing.kind, thing.colour) for thing in (content.first, content.second))
        right += seen == wanted
    share = proportion(right, len(contents))
    return {"exact": round(share.mean, 4), "n": len(contents), "ci95": [round(share.low, 4), round(share.high, 4)]}


# The recipe


@dataclass(frozen=True)
class DrawingsRecipe:
    """Trains the detector from random weights: AdamW, a cosine learning rate, weights averaged, scores calibrated at the end."""

    steps: int = 3000
    batch: int = 96
    lr: float = 3e-3
    weight_decay: float = 0.02
    warmup: int = 100  # steps
    average: float = 0.997  # decay of the averaged weights that are shipped
    tell_every: int = 100  # steps
    threads: int = 1
    calibrated: int = 3000  # pictures of the training kind, never trained on
    measured: int = 600  # drawings

    def __call__(self, out: Path, *, seed: int, log: Log) -> dict[str, Any]:
        """Write drawings.safetensors and drawings.json into `out`, resuming a run that was stopped there.

        Returns what drawings.json holds.
        """
        out.mkdir(parents=True, exist_ok=True)
        with threads(self.threads):
            began = time.process_time()
            settings = self._settings(out, seed)
            averaged, seconds = fit(DrawingsLearner(self, seed), settings, log=log)
            seconds -= time.process_time() - began  # of earlier starts alone
            weights, module = in_half(averaged), network(OUTPUTS).eval()
            module.load_state_dict(in_single(weights))
            slope, shift, accuracy = calibrate(*self._held_out(module, seed), kinds=len(SHAPES))
            weights[CALIBRATION] = torch.tensor([slope, shift])
            (out / "drawings.safetensors").write_bytes(save(weights))
            detector = DrawingsDetector(out / "drawings.safetensors")
            pictures, contents = known_drawings(self.measured, seed)
            facts = {
                "recipe": asdict(self) | {"seed": seed},
                "cpu_seconds": round(seconds + time.process_time() - began),
                "pictures": self.steps * self.batch,
                "parameters": sum(p.numel() for p in module.parameters()),
                "torch": torch.__version__,
                "calibration": {"slope": slope, "shift": shift, "all_kinds_exact_on_training_kind": round(accuracy, 4)},
                "clean_drawings": exact(detector, pictures, contents),
                "worn_drawings": exact(detector, worn(pictures, seed), contents),
            }
            (out / "drawings.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
            settings.checkpoint.unlink(missing_ok=True)
            return facts

    def _settings(self, out: Path, seed: int) -> FitSettings:
        every = Interval(steps=self.tell_every)
        return FitSettings(
            label={"recipe": "drawings"},
            made_by=asdict(self) | {"seed": seed},
            checkpoint=out / "drawings.state.pt",
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
            maps = torch.cat([module(standardise(pictures.to(torch.uint8))) for pictures, _, _ in batches])
        return maps, Truth(*(torch.cat(parts) for parts in zip(*(truth for _, truth, _ in batches), strict=True)))


class DrawingsLearner(Learner):
    """The network, trained by CenterNet's loss and the cross-entropy of the colours on the images of each batch."""

    def __init__(self, recipe: DrawingsRecipe, seed: int) -> None:
        self.recipe, self.seed = recipe, seed
        torch.manual_seed(seed)
        self.module = network(OUTPUTS).train()
        with torch.no_grad():
            last: Any = self.module[-1]
            last.bias[: len(SHAPES)] = -3.0  # initial scores near zero everywhere
        self.optimisers = [
            torch.optim.AdamW(
                self.module.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
            )
        ]

    def loss(self, step: int, shard: int) -> Tensor:
        strength = min(1.0, 0.2 + 1.6 * (step / self.recipe.steps))
        pictures, truth, colours = draw_batch(self.recipe.batch, (self.seed, step), strength=strength)
        with torch.autocast("cpu", torch.bfloat16):
            maps = self.module(standardise(pictures).contiguous(memory_format=torch.channels_last)).float()
        return loss_of(maps, truth, len(SHAPES)) + 0.3 * colour_loss(maps, truth, colours)
