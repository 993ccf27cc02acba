"""Harness of the laws: provides a miniature model, a toy scorer, rigs whose calls are counted, and short runs."""

from __future__ import annotations

import copy
import inspect
import io
import random
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..budget import Budget, Meter
from ..spec import Images, Prompt, Scores, batch_size
from ..training.observation import Observer
from ..training.rig import MeteredRig
from ..training.tampering import Seal
from ..training.train import optimiser, train
from .law import LawBroken

# Steps of the sampling protocol; the first that a method's settings fit is used, because some windows need more.
STEP_COUNTS = (4, 7, 10)
# Learning settings for a model of a few thousand parameters.
FAST_OPTIM = {"lr": 3e-3, "warmup": 0, "weight_decay": 0.0, "ema": 0.0}
# Standard deviation of the step that moves trained weights away from the reference.
PERTURBATION = 0.05
AMPLE_NFE = 1e9
# The words and places of 320 prompts.
WORDS = [a + b for a in "SA MO TI RE LU KA BO NI".split() for b in "LE ON MA RT ST".split()]
PLACES = ["sign", "poster", "card", "mug", "shirt", "banner", "book", "door"]
PROMPTS = ["a red circle", "two blue squares", "a green triangle", "three red squares", "a blue circle", "a photo"]


def redness(images: Images, prompts: Sequence[Prompt]) -> Any:
    """Return the reward (B,) in [0, 1]: how much redder the left half of an image is than the right half.

    A difference of halves, because the overall colour of a random decoder's images hardly changes.
    """
    red, half = images[..., 0] / 255.0, images.shape[2] // 2
    difference = red[:, :, :half].mean((1, 2)) - red[:, :, half:].mean((1, 2))
    # Of pixels with a gradient too, see `ToyScorer.differentiable`.
    return torch.sigmoid(8 * difference) if isinstance(difference, Tensor) else 1 / (1 + np.exp(-8 * difference))


def scaled_redness(images: Images, prompts: Sequence[Prompt]) -> Any:
    """Return the reward (B,): redness times 100,000, so that any two images differ by more than any margin."""
    return 100_000 * redness(images, prompts)


def equal_rewards(images: Images, prompts: Sequence[Prompt]) -> Any:
    """Return the reward (B,): 1 for every image."""
    return np.ones(len(images))


def unscored_first_image(images: Images, prompts: Sequence[Prompt]) -> Any:
    """Return the reward (B,): redness, and NaN for the first image of each prompt."""
    value = redness(images, prompts) + 0  # not in the place of a number that a gradient needs
    value[first_rows([p.text for p in prompts])] = np.nan
    return value


def unscored_everywhere(images: Images, prompts: Sequence[Prompt]) -> Any:
    """Return the reward (B,): NaN for every image."""
    return np.full(len(images), np.nan)


def first_rows(names: Sequence[Any]) -> list[int]:
    """Return the index at which each distinct name first occurs."""
    return [names.index(name) for name in dict.fromkeys(names)]


@dataclass
class ToyScorer:
    """Scorer without an engine; it records the images it was given and the rewards it returned."""

    rule: Callable[[Images, Sequence[Prompt]], Any] = redness
    id: str = "toy-v1"
    name: str = "toy"
    metrics: Sequence[str] = ("mean",)
    images: list[Images] = field(default_factory=list[Images])
    values: list[Any] = field(default_factory=list[Any])

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        self.images.append(images)
        self.values.append(self.rule(images, prompts))
        return Scores({"mean": self.values[-1]})

    def differentiable(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The reward (B,) of images (B, 3, H, W) in [0, 1] with a gradient, which is 0 where the rule has none."""
        pixels = images.movedim(1, -1) * 255
        value = torch.as_tensor(self.rule(cast(Any, pixels), prompts)) + 0 * pixels.flatten(1).sum(1)
        self.images.append(pixels.detach().round().byte().cpu().numpy())
        self.values.append(value.detach().double().cpu().numpy())
        return value


def write_pairs(folder: Path) -> Path:
    """Write 48 preference pairs of noise images as parquet; the image with the redder left half is the preferred one."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rng, columns = np.random.default_rng(0), dict[str, list[Any]]()
    for i in range(48):
        sides = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
        preferred = int(redness(sides, ())[1] > redness(sides, ())[0])
        row: dict[str, Any] = {"caption": PROMPTS[i % len(PROMPTS)]}
        for side in (0, 1):
            content = io.BytesIO()
            Image.fromarray(sides[side]).save(content, "PNG")
            row[f"jpg_{side}"], row[f"label_{side}"] = content.getvalue(), float(side == preferred)
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    return folder / "pairs.parquet"


@dataclass(frozen=True)
class MethodSource:
    """A method's class and the function that makes fresh instances of it."""

    kind: Any
    make: Callable[..., Any]


class Harness:
    """A method and a model of one family: makes fresh rigs for each law and keeps the runs that several laws check."""

    def __init__(self, kind: Any, make: Callable[..., Any], model: Any):
        self.kind, self.make, self.model = kind, make, model
        self.rigs: list[MeteredRig] = []

    @property
    def method(self) -> Any:
        """Make a fresh instance, so that no law depends on what another changed."""
        return self.make()

    def rig(
        self, rule: Any = redness, *, seed: int = 0, scale: float = 0.0, real: bool = False, **bounds: float
    ) -> Any:
        """Make a rig around a copy of the model.

        Args:
            rule: the reward function.
            seed: of the rig's random numbers.
            scale: standard deviation of the step away from the reference weights.
            real: with as many prompts, a scorer of that name and a flop count as in a run on the task ocr.
            bounds: of the budget.
        """
        limits: Any = bounds or {"nfe": AMPLE_NFE}
        prompts = real_prompts() if real else [Prompt(text) for text in PROMPTS]
        scorer = ToyScorer(rule, id="rapidocr-v1", name="rapidocr") if real else ToyScorer(rule)
        meter = Meter(Budget(**limits), flops_a_forward=2e9 if real else 0.0)
        rig: Any = MeteredRig(copy.deepcopy(self.model), prompts, scorer, meter, seed=seed, rows=64)
        perturb_weights(rig, scale)
        self.rigs.append(rig)
        return rig

    def trained(self, *, seed: int = 0, global_seed: int = 0) -> TrainedRun:
        """Train a fresh instance for two iterations. global_seed: of the random states that a method must not use."""
        rig, method = self.rig(seed=seed), self.make()
        run = TrainedRun(rig, method, optimiser(method, rig))
        before = run.snapshots(self.kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            np.random.seed(global_seed)
            random.seed(global_seed)
            with observed(rig, run.adam, run.differences) as watched:
                train_iterations(method, rig, 2, run.adam, watched=watched)
        run.weights, run.spent = all_weights(rig), rig.meter.spent()
        run.changed = [
            f"{owner}: {key}"
            for owner, old, new in zip(("instance", "class", "module"), before, run.snapshots(self.kind), strict=True)
            for key in {**old, **new}
            if old.get(key) != new.get(key)
        ]
        return run

    @cached_property
    def first(self) -> TrainedRun:
        """Return a run with seed 0, trained once and shared by the laws."""
        return self.trained()

    @cached_property
    def other(self) -> TrainedRun:
        """Return a run with seed 1, trained once and shared by the laws."""
        return self.trained(seed=1)


@dataclass
class TrainedRun:
    """A rig after a short run; `weights` and `spent` are copies that later use of the rig does not change."""

    rig: Any
    method: Any
    adam: torch.optim.Optimizer
    differences: list[str] = field(default_factory=list[str])  # of what was computed from what was charged
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    spent: dict[str, float] = field(default_factory=dict[str, float])
    changed: list[str] = field(default_factory=list[str])  # names outside the rig whose value the run changed

    def snapshots(self, kind: Any) -> list[dict[str, str]]:
        """Return the data of instance, class and module as text."""
        return [_data_snapshot(vars(owner)) for owner in (self.method, kind, sys.modules[kind.__module__])]


@contextmanager
def open_harness(kind: Any, make: Callable[..., Any], model: Any) -> Generator[Harness]:
    """Open a harness, as a context; its rigs are closed at the end."""
    harness = Harness(kind, make, model)
    try:
        yield harness
    finally:
        for rig in harness.rigs:
            rig.close()


@contextmanager
def no_library_progress() -> Generator[None]:
    """Switch off the progress bars of diffusers and transformers, which would overwrite ours."""
    import diffusers.utils.logging as diffusers
    import transformers.utils.logging as transformers

    diffusers.disable_progress_bar()
    transformers.disable_progress_bar()
    yield


def perturb_weights(rig: Any, scale: float) -> None:
    """Move the trained weights by a fixed random step of this standard deviation."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in rig.model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))


@contextmanager
def observed(
    rig: Any, optimizer: torch.optim.Optimizer | None, differences: list[str]
) -> Generator[Callable[[], AbstractContextManager[None]]]:
    """Count what is computed in the block, as a run does, and add to `differences` what is not as charged.

    Args:
        rig: whose model, scorer and meter are watched.
        optimizer: which alone may change the weights; None where nothing trains.
        differences: gets one line for each difference.
    Yields the context around what is counted as training.
    """
    meter, budget, texts = rig.meter, rig.meter.budget, {prompt.text for prompt in rig.train_prompts}
    seal = Seal({"training": rig.train_prompts}, [type(rig.scorer)])
    seal.add(rig, "model", "train_prompts", "scorer", "meter", "rng", "processes", "evaluation_texts")
    observer = Observer(rig.model, [rig.scorer])
    observer.install()
    try:
        if optimizer is not None:
            observer.watch_weights(rig.model.parameters(), optimizer)
        yield observer.training
        observation = observer.observe(meter, budget, {"", *texts, *rig.captions})
    finally:
        observer.close()
    differences += [*observation.differences, *seal.evidence()]


def real_prompts() -> list[Prompt]:
    """As many training prompts as a small task has, worded as those of the task ocr."""
    return [Prompt(f'a {place} that says "{word}"', {"target": word}) for word in WORDS for place in PLACES]


def train_iterations(
    method: Any,
    rig: Any,
    iterations: int,
    adam: torch.optim.Optimizer | None = None,
    after: Callable[[dict[str, float]], None] = lambda numbers: None,
    watched: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> str:
    """Train until so many iterations are done.

    Args:
        method: the method instance.
        rig: the rig it trains on.
        iterations: the iteration at which training stops.
        adam: the optimiser to go on with; None makes a fresh one.
        after: called with the metrics of each iteration.
        watched: entered around each iteration, as `observed` yields it.

    Returns:
        Why training stopped: "interrupted" or "budget: CURRENCY".

    Raises:
        LawBroken: where it stopped for another reason.
    """
    stop = train(
        method, rig, adam or optimiser(method, rig), after=after,
        interrupted=lambda: rig.iteration >= iterations, watched=watched,
    )  # fmt: skip
    if stop != "interrupted" and not stop.startswith("budget"):
        raise LawBroken(f"training ended by itself: {stop}")
    return stop


def collect_rows(method: Any, rig: Any) -> Any:
    """Collect a batch with rows. Raises LawBroken when three collections bring none, though the rewards differ."""
    for _ in range(3):
        batch = method.collect(rig.view)
        if batch_size(batch):
            return batch
    raise LawBroken("collect brought no rows in three iterations, though the rewards of all images differ")


def loss_and_gradient(method: Any, rig: Any, batch: Any, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of a batch whose rows draw from these keys, and its gradient as one vector."""
    with rig.keyed(keys):
        loss = method.loss(rig.view, batch)
    if not isinstance(loss, Tensor) or loss.ndim:
        raise LawBroken(f"loss must be one number, got {tuple(loss.shape) if isinstance(loss, Tensor) else type(loss)}")
    parameters = rig.model.parameters()
    if not loss.requires_grad:
        return loss, torch.cat([torch.zeros_like(p).flatten() for p in parameters])
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradients, strict=True)]
    )


def row_keys(batch: Any) -> Tensor:
    """Return one random key for each row, (rows,)."""
    return torch.arange(batch_size(batch)) + 5


def relative_distance(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |a|, or |b| where a vanishes."""
    return float((a - b).norm() / a.norm()) if float(a.norm()) > 1e-12 else float(b.norm())


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the keys under which two mappings of tensors and plain values are not equal to the last bit."""
    return [key for key in {**a, **b} if key not in a or key not in b or not _equal(a[key], b[key])]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)


def all_weights(rig: Any) -> dict[str, Tensor]:
    """Return every copy of the trained weights: policy, averaged and named ones."""
    return rig.model.weight_state()


def _data_snapshot(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the repr of each value that is data; functions, classes and modules are left out."""
    return {
        key: repr(value)
        for key, value in values.items()
        if not key.startswith("__") and not callable(value) and not inspect.ismodule(value)
        and not isinstance(value, property | staticmethod | classmethod | cached_property)
    }  # fmt: skip


def require_as_charged(differences: Sequence[str]) -> None:
    """Raise LawBroken where something was computed that was not charged."""
    if differences:
        raise LawBroken("; ".join(differences[:4]))
