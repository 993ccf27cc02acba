"""The contract on one page: what a method, a task, a scorer or a model must implement, and what it may use.

Shapes: B rows, P prompts, G images of a group, N transitions or states, K children of a state, (C, h, w) one latent, (H, W, 3) one image.
Time t runs from 1 (noise) to 0 (image); a step goes from t (its start) to s (its end), t > s.
nfe: evaluations of the network in forward-equivalents; a forward costs 1, a backward 2 more, guidance doubles both.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .flow import Kernel, Path, Prediction, Step, ode
from .trees import TreePlan

if TYPE_CHECKING:
    import pandas as pd

Split = Literal["train", "validation", "test"]
# The conditioning of B prompts, as the model's text encoders make it; every tensor leads with B.
Cond = Mapping[str, Tensor]
Images = np.ndarray[Any, np.dtype[np.uint8]]  # (B, H, W, 3), RGB
Values = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Prompt:
    """A text for the model, and the facts that a scorer needs to score its images."""

    text: str
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])
    # GenEval's tag, HPSv2's style: the mean over prompts is the unweighted mean of the strata's means.
    stratum: str = ""


_SYMBOLS = frozenset("#%&@‰")  # punctuation by category, and yet C is not C#, nor 5 % 5
_SEPARATORS = frozenset("`´¨|~")  # symbols by category, used as quotation marks and separators
_DROPPED = frozenset("\ufe0e\ufe0f")  # whether a sign is drawn as text or as emoji
_DASHES = str.maketrans("−–—‒", "----")
# The characters of an ASCII text that _tells_apart keeps: letters, digits and symbols; signs between numbers; signs of numbers.
_ASCII = re.compile(r"[a-z0-9#%&@$+<=>^]|(?<=[0-9])[!\"'()*,\-./:;?\[\\\]_{}](?=[0-9])|(?<![a-z0-9.\-])[\-.](?=[0-9])")


def fold_text(text: str) -> str:
    """The text without case, punctuation and spacing: two prompts are the same where their folded texts are equal.

    Marks of letters (vowel signs of Hindi, Thai, Arabic), symbols (emoji, +, #, %), signs of numbers and points within them stay:
    they change what is asked for.
    """
    folded = text.casefold()
    if folded.isascii():
        return "".join(_ASCII.findall(folded)) or "".join(folded.split())
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).translate(_DASHES)
    return "".join(c for i, c in enumerate(folded) if _tells_apart(folded, i)) or "".join(folded.split())


def _tells_apart(text: str, i: int) -> bool:
    """Whether a character says something that punctuation and spacing do not."""
    character = text[i]
    kind = unicodedata.category(character)[0]
    if kind in "LMNS" or character in _SYMBOLS:
        return character not in _SEPARATORS and character not in _DROPPED
    before, after = text[i - 1] if i else " ", text[i + 1] if i + 1 < len(text) else " "
    if kind != "P" or not after.isdecimal():
        return False
    # 1.5 is not 15, nor 1/2; -5 and .5 are not 5. A hyphen between a word and a number is punctuation.
    return before.isdecimal() or (character in "-." and not before.isalnum() and before not in "-.")


class PolicyModel(Protocol):
    """The part of a model that a method may use, as `rig.model`: the protocol's settings and the named weight copies."""

    @property
    def steps(self) -> int:
        """Steps of the protocol's sampler."""
        ...

    @property
    def guidance(self) -> float:
        """Guidance scale of the protocol; 1 is no guidance."""
        ...

    @property
    def guided_cost(self) -> int:
        """Evaluations of the network for one velocity under guidance: 2, or 1 where guidance is an input of the network."""
        ...

    def times(self, steps: int) -> Tensor:
        """(steps + 1,) float32: the time grid of the model's own schedule, falling from at most 1 to 0 or just above."""
        ...

    def update_copy(self, name: str, decay: float) -> None:
        """Set the weight copy `name` to decay * copy + (1 - decay) * policy; the first call makes it equal to the policy."""
        ...


class Model(PolicyModel, Protocol):
    """A text-to-image model as a velocity field over latents: everything that training and evaluation need of one.

    Weights are called by name: "policy" is what is trained, "ref" the base model, others are copies that `update_copy` made.
    """

    name: str
    prediction: Prediction  # what the network predicts: errors are measured in these units
    shape: tuple[int, ...]  # of one latent, (C, h, w)
    device: torch.device
    network: Any  # the torch module that is trained, and the autoencoder: their calls are counted from outside
    vae: Any

    @property
    def current_weights(self) -> str:
        """The name of the weights that the network computes with."""
        ...

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        ...

    @property
    def path(self) -> Path:
        """The path between data and noise, see `flow`."""
        ...

    def encode(self, prompts: Sequence[str]) -> Cond:
        """The conditioning of B prompts."""
        ...

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        cond: Cond,
        *,
        guidance: float = 1.0,
        weights: str = "policy",
        detach: bool = False,
        merged: bool = False,
        half: bool = False,
    ) -> Tensor:
        """The velocity (B, C, h, w) in float32 at latents x (B, C, h, w) and times t (B,).

        Args:
            x: latents (B, C, h, w).
            t: times (B,) in [0, 1].
            cond: the conditioning of B prompts, from `encode`.
            guidance: scale of the guidance; other than 1 it costs `guided_cost` evaluations.
            weights: the name of the weights to compute with.
            detach: hold the unconditional branch of guidance constant.
            merged: images are sampled: an adapter may be merged into the weights, whose last digits then differ from an update's.
            half: on merged weights, bf16 may be used: no density and no evaluation depends on this pass.
        Raises KeyError on weights that no call of `update_copy` made.
        """
        ...

    def decode(self, x0: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W), 0 black and 1 white. What lies outside is clamped where pixels are made.

        An image with a value that is not finite is not scored: do not hide one by clamping.
        """
        ...

    def latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> latents (B, C, h, w): the inverse of `decode`, up to what the autoencoder loses."""
        ...

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters in a fixed order; empty where the model was opened without an adapter."""
        ...

    @property
    def copies(self) -> Sequence[str]:
        """Names of the weight copies that exist beside "policy" and "ref"."""
        ...

    def weight_state(self) -> dict[str, Tensor]:
        """Trained weights and all copies, `copy/parameter` -> tensor on the CPU: what a checkpoint keeps."""
        ...

    def restore_weights(self, state: Mapping[str, Tensor]) -> None:
        """Set trained weights and copies to a `weight_state`; copies that are missing are made."""
        ...

    def save_adapter(self, folder: FilePath, weights: str = "policy") -> None:
        """Write the adapter with these weights in diffusers format, so that `pipe.load_lora_weights(folder)` takes it."""
        ...

    def load_adapter(self, folder: FilePath) -> Sequence[str]:
        """Load an adapter; "policy" then computes with it. Returns notes on how it was read. Raises UserError where it does not fit."""
        ...

    def flops_a_forward(self) -> float:
        """Floating-point operations of one forward of one latent."""
        ...


def counted_guidance(model: PolicyModel) -> float:
    """The protocol's guidance as `Method.cost` counts it: 1, no second evaluation, where it is an input of the network."""
    return model.guidance if model.guided_cost > 1 else 1.0


def nfe_of_an_image(model: PolicyModel) -> int:
    """Evaluations of the network for one image under the protocol."""
    return model.steps * (1 if model.guidance == 1 else model.guided_cost)


@dataclass(frozen=True)
class Scores:
    """Scores of B images; NaN where an image could not be scored, with the reason in `reasons`."""

    value: Mapping[str, Values]  # metric name -> (B,)
    reasons: Mapping[int, str] = field(default_factory=dict[int, str])  # row -> why it is NaN
    notes: Sequence[str] | None = None  # what the scorer found in each image, such as the text it read, for the record


class Scorer(Protocol):
    """Images and their prompts -> scores, higher is better. Raises only where the caller passed wrong arguments."""

    id: str  # rule + engine + weights revision: two numbers compare only when their ids are equal
    name: str  # the short name in tables
    metrics: Sequence[str]  # the first is the one a method is trained on

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores: ...


@runtime_checkable
class SupportsWorkers(Protocol):
    """A scorer that computes on one core, so that further processes score further images at the same time.

    A worker makes it again by its name. The scores of a call must have the same bits as those of calls with the same images in
    chunks of `worker_images`, in whichever process.
    """

    worker_images: int  # images of a worker's call; 0: as it was made, it does not run in workers
    image_seconds: float  # of a core for one image, roughly; where it is small, workers are not started by themselves


@runtime_checkable
class DifferentiableScorer(Protocol):
    """A scorer whose first metric has a gradient in the pixels, beside what every `Scorer` has."""

    def differentiable(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B,): the first metric of images (B, 3, H, W) in [0, 1], with a gradient; of the same pixels the same as `__call__`.

        NaN where an image could not be scored. May raise any exception: no image of the call then has a score.
        """
        ...


def check_images(images: Images, prompts: Sequence[Prompt]) -> None:
    """Raise ValueError where images are not (B, H, W, 3) uint8 or their number is not the prompts'."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"a scorer takes images of shape (B, H, W, 3) and type uint8, got {images.shape} {images.dtype}"
        )
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")


class Embedder(Protocol):
    """Images -> vectors whose distances measure diversity within a prompt and drift from the base model."""

    id: str  # engine + weights revision
    name: str
    distance: Literal["cosine", "squared"]  # 1 - <a, b> of unit vectors | |a - b|^2

    def __call__(self, images: Images) -> np.ndarray[Any, np.dtype[np.float32]]:
        """(B, H, W, 3) -> (B, D). May raise any exception."""
        ...


@dataclass(frozen=True)
class Columns:
    """Names of what a table shows beside the task's scorers; one whose parts are not installed is left out with a message."""

    quality: Sequence[str] = ()  # scorers of something else than the task: a fall marks a hack
    diversity: Sequence[str] = ()  # embedders: mean distance between the images of a prompt
    drift: Sequence[str] = ()  # embedders: distance between a model's image and the base's on the same noise


@dataclass(frozen=True)
class EvaluationSettings:
    """How a task is evaluated: on which prompts, with how many images a prompt, and the seed of the evaluation noise."""

    test_images: int = 2
    validation_images: int = 1  # where the result is evaluated on validation prompts
    curve_images: int = 1  # at every eval point, on validation prompts
    eval_points: int = 10  # evaluations on validation prompts in the course of a budget, beside the one before it
    seed: int = 20_260_101
    split: Literal["test", "validation"] = "test"  # of the result; settings are chosen on validation

    def __post_init__(self) -> None:
        if min(self.test_images, self.validation_images, self.curve_images) < 1:
            raise UserError(
                f"evaluation: at least one image a prompt, got {self.test_images}, {self.validation_images} "
                f"and {self.curve_images}"
            )
        if self.eval_points < 1:
            raise UserError(f"evaluation: the curve needs at least one eval point, got {self.eval_points}")


class Task(Protocol):
    """Prompts in three disjoint splits, the scorer to train on, and the scorers to evaluate with, all by name."""

    name: str
    version: str

    def prompts(self, split: Split, domain: str) -> Sequence[Prompt]: ...
    def reward(self, domain: str) -> str: ...
    def scorers(self, domain: str) -> Sequence[str]: ...
    def held_out(self, domain: str) -> Sequence[str]: ...
    def evaluation(self, domain: str) -> EvaluationSettings: ...


@runtime_checkable
class SupportsColumns(Protocol):
    """A task with columns beside its own scorers."""

    def columns(self, domain: str) -> Columns: ...


@runtime_checkable
class SupportsKey(Protocol):
    """A task that states by which score its tables rank; without it that is the first graded metric of the held-out scorers."""

    def key(self, domain: str) -> str:
        """`SCORER/METRIC`, the scorer one of `held_out` and named as there, e.g. `geneval:shapes/partial`. "" for none."""
        ...


@runtime_checkable
class SupportsOwnPrompts(Protocol):
    """A task that reads prompts from a user's file (`--prompts FILE`)."""

    def read(self, text: str, facts: Mapping[str, Any], domain: str) -> Prompt:
        """The prompt with the facts its scorers need, from the row's other columns. Raises UserError naming what is missing."""
        ...


@runtime_checkable
class SupportsPublishedLists(Protocol):
    """A task whose published prompts keep their publication's rule where a person brings the list as a file of theirs."""

    @property
    def published_lists(self) -> Collection[str]:
        """The lists by content: what `git hash-object FILE` prints."""
        ...

    def read_published(self, text: str, domain: str) -> Prompt:
        """The prompt of a line of such a list."""
        ...


@runtime_checkable
class SupportsFreshPrompts(Protocol):
    """A task that draws prompts which nobody has seen, for an audit (`gpobench verify --level audit`)."""

    def fresh(self, count: int, seed: int, domain: str) -> Sequence[Prompt]:
        """Up to `count` prompts of the kind of the test prompts, none of which is in a split; the seed is secret."""
        ...


@runtime_checkable
class SupportsSummary(Protocol):
    """A task with the aggregation of its publication."""

    def summary(self, table: pd.DataFrame) -> Mapping[str, float]:
        """Named numbers from an evaluation's table (prompt, ordinal, text, stratum, scorer, metric, value, ...)."""
        ...


@dataclass(frozen=True)
class Optim:
    """Settings of the optimiser and of the updates on one collected batch."""

    lr: float = 3e-4  # of AdamW
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    weight_decay: float = 1e-4  # of AdamW
    epochs: int = 1  # passes over one collected batch
    minibatches: int = 2  # optimiser steps per pass
    micro: int = 0  # rows per backward pass; 0 takes a whole minibatch at once
    clip: float = 1.0  # of the gradient's norm
    warmup: int = 0  # updates over which the learning rate rises linearly from 0
    ema: float = 0.0  # decay of the averaged weights, which are evaluated in place of the last ones; 0: the last
    ema_warmup: int = 10  # the decay after update k is at most (1 + k) / (ema_warmup + k); 1: the decay from the start
    ema_interval: int = 1  # updates from one averaging to the next

    def __post_init__(self) -> None:
        lowest = {
            "epochs": 1,
            "minibatches": 1,
            "micro": 0,
            "warmup": 0,
            "weight_decay": 0,
            "ema_warmup": 1,
            "ema_interval": 1,
        }
        for name, low in lowest.items():
            if not getattr(self, name) >= low:
                raise UserError(f"optim.{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise UserError(f"optim.{name} must be above 0, got {getattr(self, name)}")
        if not (0 <= self.ema < 1 and all(0 <= beta < 1 for beta in self.betas)):
            raise UserError(f"optim.ema and optim.betas must lie in [0, 1), got {self.ema} and {self.betas}")

    def ema_decay(self, updates: int) -> float:
        """Decay of the averaged weights after so many updates: min((1 + k) / (ema_warmup + k), ema).

        That, with ema_warmup = 10, is flow_grpo/ema.py of Flow-GRPO, which DiffusionNFT, AWM and DGPO share. Without it a
        short run is evaluated on weights that are mostly those before training.
        """
        return min((1 + updates) / (self.ema_warmup + updates), self.ema)


@dataclass(frozen=True)
class LogUniform:
    """A number whose logarithm is uniform in [low, high]: learning rates, betas, clips."""

    low: float
    high: float


@dataclass(frozen=True)
class Uniform:
    """A number that is uniform in [low, high]."""

    low: float
    high: float


@dataclass(frozen=True)
class Choice:
    """One of these, equally likely."""

    options: tuple[Any, ...]


Range = LogUniform | Uniform | Choice


# The kinds of batches that methods share


@dataclass(frozen=True)
class Groups:
    """P prompts with G images each, and their rewards."""

    x0: Tensor  # (P, G, C, h, w)
    prompt_ids: Tensor  # (P,) which prompt
    reward: Tensor  # (P, G); NaN where the image could not be scored


@dataclass(frozen=True)
class Pairs:
    """P prompts with a better and a worse image each."""

    win: Tensor  # (P, C, h, w)
    lose: Tensor  # (P, C, h, w)
    prompt_ids: Tensor  # (P,)


@dataclass(frozen=True)
class Transitions:
    """N transitions x at t -> to at s of the images of a rollout, each with its image's advantage."""

    x: Tensor  # (N, C, h, w)
    t: Tensor  # (N,)
    s: Tensor  # (N,)
    to: Tensor  # (N, C, h, w)
    mean: Tensor  # (N, C, h, w) under the policy that sampled
    logp: Tensor  # (N,)
    advantage: Tensor  # (N,)
    prompt_ids: Tensor  # (N,)
    image: Tensor  # (N,) which image of the rollout, p G + g


def assign_advantages(transitions: Transitions, advantage: Tensor) -> Transitions:
    """The transitions with their image's advantage (P, G); those of images with advantage 0 are dropped.

    Such an image lies in a group without spread, was not scored, or earned exactly the mean: a policy gradient would
    multiply its transitions by 0 (Flow-GRPO's code drops them too).
    """
    by_image = advantage.flatten().cpu()
    images = (by_image != 0).nonzero().flatten()
    rows = torch.isin(transitions.image.cpu(), images).nonzero().flatten()
    informative = select_rows(transitions, rows)
    return replace(informative, advantage=by_image[informative.image.cpu()].to(transitions.advantage))


@dataclass(frozen=True)
class Branchings:
    """N states of trees, each with the up to K children that a stochastic step drew of it: one velocity of a state serves all.

    A row with fewer children than K repeats its first one, with `first` -1 and without weight.
    """

    x: Tensor  # (N, C, h, w)
    t: Tensor  # (N,)
    s: Tensor  # (N,)
    to: Tensor  # (N, K, C, h, w)
    logp: Tensor  # (N, K) under the policy that sampled
    advantage: Tensor  # (N, K)
    weight: (
        Tensor  # (N, K): a mean over rows of the weighted sums over children is the mean over the children that teach
    )
    prompt_ids: Tensor  # (N,)
    tree: Tensor  # (N,) which tree of the rollout
    step: Tensor  # (N,) which step of the grid
    first: Tensor  # (N, K) the first leaf below the child, tree * L + leaf; -1 where there is no child
    leaves: Tensor  # (N,) leaves below each child


def assign_branch_advantages(branchings: Branchings, advantage: Tensor) -> Branchings:
    """The branchings with their children's advantages (N, K) and weights; states none of whose children has one are dropped.

    A child has advantage 0 in a group without spread, without a score, or with exactly the mean: it gets no weight, as
    `assign_advantages` drops such an image.
    """
    teaches = (advantage != 0) & (branchings.first >= 0).to(advantage.device)
    rows = teaches.any(1)
    weight = teaches * (rows.sum() / teaches.sum().clamp(min=1))
    given = replace(
        branchings,
        advantage=torch.where(teaches, advantage, 0).to(branchings.advantage),
        weight=weight.to(branchings.weight),
    )
    return select_rows(given, rows)


def branch_ratios(rig: Rig, step: Step, batch: Branchings, clip_range: float) -> Tensor:
    """(N, K): exp(log p - log p_old) of each state's children, `step` the policy's (N,); notes mean and clipped share of those taught."""
    k = batch.to.shape[1]
    ratio = (step.repeat(k).logp(batch.to.flatten(0, 1)).view(-1, k) - batch.logp).exp()
    taught = batch.weight > 0  # a mask: an index of booleans would make the host wait for a GPU
    rig.note("policy/ratio", torch.where(taught, ratio.detach(), 0.0).sum() / taught.sum())
    rig.note("policy/clipped", (taught & ((ratio.detach() - 1).abs() > clip_range)).sum() / taught.sum())
    return ratio


@dataclass(frozen=True)
class InitialNoise:
    """N initial noises with their prompts, for methods that differentiate the sampler."""

    noise: Tensor  # (N, C, h, w)
    prompt_ids: Tensor  # (N,)


class Rig(Protocol):
    """What a method may use: the model, prompts, randomness and rewards, each charged to the budget before it is spent.

    Every call that costs raises `budget.Spent`, before anything is computed, where the budget does not afford it.
    prompt_ids (B,) are integers that stand for prompts; a method never sees a prompt's text.
    """

    @property
    def model(self) -> PolicyModel:
        """The protocol's settings, the time grid and the weight copies of the model."""
        ...

    @property
    def path(self) -> Path:
        """The model's path between data and noise, with the shift of the model's schedule (`flow.training_times`)."""
        ...

    @property
    def iteration(self) -> int:
        """Iterations of the training loop that are complete; 0 in the first."""
        ...

    @property
    def state(self) -> MutableMapping[str, Any]:
        """The method's memory between iterations: tensors and JSON values, saved with every checkpoint."""
        ...

    # Randomness. In `loss` every row of the batch has a key of its own, so that splitting a batch changes no draw: there the number
    # of draws must be a multiple of the rows.

    def prompts(self, n: int) -> Tensor:
        """Draw prompt_ids (n,) of training prompts, without repeats while there are enough."""
        ...

    def noise(self, n: int) -> Tensor:
        """(n, C, h, w) standard normal, on the model's device."""
        ...

    def normal(self, n: int) -> Tensor:
        """(n,) standard normal, on the model's device."""
        ...

    def uniform(self, n: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(n,) uniform in [low, high), on the model's device."""
        ...

    # The model

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        prompt_ids: Tensor,
        *,
        weights: str = "policy",
        guidance: float | None = None,
        detach: bool = False,
        role: str = "",
    ) -> Tensor:
        """The velocity (B, C, h, w) at latents x and times t. Gradients flow for weights "policy" only.

        Costs 1 nfe a row, 3 where a gradient is needed, times `model.guided_cost` under guidance.

        Args:
            x: latents (B, C, h, w).
            t: times (B,).
            prompt_ids: prompts (B,).
            weights: "policy", "ref", or a copy that `model.update_copy` made.
            guidance: None is what one evaluation gives: no guidance, or the protocol's where it is an input of the network.
            detach: hold the unconditional branch of guidance constant.
            role: the name under which the budget counts the cost; by default "policy" or the name of the weights.
        """
        ...

    def step(
        self,
        kernel: Kernel,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        prompt_ids: Tensor,
        *,
        weights: str = "policy",
        guidance: float | None = None,
        detach: bool = False,
        role: str = "",
    ) -> Step:
        """The Gaussian transition of a kernel from x at t (B,) to s (B,). Costs one `velocity`; other arguments as there.

        Args:
            kernel: the rule of the step.
            x: latents (B, C, h, w) at t.
            t: the step's start (B,).
            s: the step's end (B,).
            prompt_ids: (B,).
            weights: the name of the weights to compute with.
            guidance: as in `velocity`.
            detach: hold the unconditional branch of guidance constant.
            role: what the evaluation is charged as.
        """
        ...

    def walk(
        self,
        x: Tensor,
        prompt_ids: Tensor,
        kernels: Sequence[Kernel],
        *,
        start: int = 0,
        of: int = 0,
        times: Tensor | None = None,
        weights: str = "policy",
        guidance: float | None = None,
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Step, Tensor]]:
        """Sample along the kernels, without gradients; yields (i, x, t, s, step, x_next) for each. Costs one `velocity` a step.

        Args:
            x: latents (B, C, h, w) at the walk's first time.
            prompt_ids: prompts (B,).
            kernels: one for each step.
            start: index of the first step in the grid.
            of: number of steps of the whole grid; 0 lets the walk end at the grid's last time.
            times: a grid (start + len(kernels) + 1,) in place of the model's own.
            weights: the name of the weights to sample with.
            guidance: None is the protocol's.
        """
        ...

    def sample(
        self,
        x: Tensor,
        prompt_ids: Tensor,
        *,
        steps: int = 0,
        start: int = 0,
        weights: str = "policy",
        guidance: float | None = None,
        kernel: Kernel = ode,
    ) -> Tensor:
        """The clean latents (B, C, h, w) that the kernel reaches from x, without gradients. Costs one `velocity` a step.

        Args:
            x: latents (B, C, h, w) at the grid's time `start`.
            prompt_ids: prompts (B,).
            steps: steps of the whole grid; 0 is the protocol's number.
            start: index of the first step in the grid.
            weights: the name of the weights to sample with.
            guidance: None is the protocol's.
            kernel: the sampler's step, the ODE by default.
        """
        ...

    def error(self, v: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """(B,): mean squared difference of two velocities (B, C, h, w) at t (B,), in the units of what the model predicts."""
        ...

    def errors(self, x0: Tensor, prompt_ids: Tensor, t: Tensor, eps: Tensor, *weights: str) -> list[Tensor]:
        """Denoising errors (B,) of x0 (B, C, h, w) noised to t (B,) by eps, one for each of the named weights.

        Costs one `velocity` for each.
        """
        ...

    # Rewards

    def score(self, x0: Tensor, prompt_ids: Tensor) -> Tensor:
        """Rewards (B,) of the images that latents x0 decode to; NaN where an image could not be scored. Costs B images and calls."""
        ...

    def score_with_gradient(self, x0: Tensor, prompt_ids: Tensor) -> Tensor:
        """`score` with a gradient through scorer and decoder; for methods that `SupportsRewardGradient`. Used inside a loss.

        Costs B images and calls, and B backward passes of the reward. The gradient of a NaN is 0 behind `where`.
        """
        ...

    def sample_with_gradient(
        self,
        x: Tensor,
        prompt_ids: Tensor,
        *,
        steps: int = 0,
        start: int = 0,
        guidance: float | None = None,
        adjoint: bool = False,
    ) -> Tensor:
        """The clean latents (B, C, h, w) that the policy's ODE reaches from x, with a gradient through all these steps.

        Costs one `velocity` with a gradient a step. With `adjoint` the backward pass solves the adjoint ODE from image to
        noise and computes each step again: one step's activations are held in place of all, for one evaluation a step more.

        Args:
            x: latents (B, C, h, w) at the grid's time `start`.
            prompt_ids: prompts (B,).
            steps: steps of the whole grid; 0 is the protocol's number.
            start: index of the first step in the grid.
            guidance: None is the protocol's.
            adjoint: how the gradient is computed.
        """
        ...

    def groups(
        self,
        prompts: int,
        group: int,
        *,
        steps: int = 0,
        weights: str = "policy",
        guidance: float | None = None,
        kernel: Kernel = ode,
    ) -> Groups:
        """Draw prompts, sample a group of images for each and score them: P = prompts, G = group. Other arguments as in `sample`.

        Args:
            prompts: the number P of prompts.
            group: the number G of images per prompt.
            steps: of the sampler; 0 is the protocol's number.
            weights: the name of the weights that sample.
            guidance: scale; None is the protocol's.
            kernel: the sampler's step.
        """
        ...

    def transitions(
        self,
        prompts: int,
        group: int,
        kernels: Sequence[Kernel],
        *,
        keep: Sequence[int] | None = None,
        times: Tensor | None = None,
        drop: bool = False,
        shared: bool = False,
        weights: str = "policy",
        guidance: float | None = None,
    ) -> tuple[Transitions, Tensor]:
        """Draw prompts, sample a group along the kernels for each and score the ends; (transitions, rewards (P, G)).

        The transitions' advantages are 0 until `assign_advantages` sets them.

        Args:
            prompts: number of prompts, P.
            group: images a prompt, G.
            kernels: one for each step.
            keep: indices of the steps whose transitions are kept; by default all with noise.
            times: a grid (len(kernels) + 1,) in place of the model's own.
            drop: log-probabilities in Flow-CPS's form, see `flow.Step.logp`.
            shared: one initial noise for all images of a group.
            weights: the name of the weights to sample with.
            guidance: None is the protocol's.
        Raises ValueError where a step without noise is to be kept: it has no log-probability.
        """
        ...

    def trees(
        self,
        prompts: int,
        plan: TreePlan,
        *,
        seeds: int = 1,
        weights: str = "policy",
        guidance: float | None = None,
    ) -> tuple[Branchings, Tensor]:
        """Draw prompts, grow trees of images for each and score them; (branchings, rewards (R, L, S)).

        R = prompts * seeds trees, those of a prompt in a row; L leaves a tree, S strides. `losses.leaf_means` gives the rewards of the
        branchings' children. Their advantages are 0 until `assign_branch_advantages` sets them. Costs plan.evaluations
        velocities, plan.images images and reward calls a tree.

        Args:
            prompts: number of prompts.
            plan: branches, grid and strides of a tree.
            seeds: trees a prompt, each from an initial noise of its own.
            weights: the name of the weights to sample with.
            guidance: None is the protocol's.
        """
        ...

    def pairs(self, reference: str, n: int) -> Pairs:
        """Draw n pairs of a preference data set. Its own cost, if it states one, is charged before the first draw.

        Raises UserError on a data set that cannot be used, or that changed since the run began.
        """
        ...

    def affords(self, **each: int) -> int:
        """How many times this cost (nfe=, images=, reward_calls= ...) still fits into the budget."""
        ...

    # Metrics

    def note(self, name: str, value: Tensor | float) -> None:
        """Record a metric under a path such as `policy/ratio`; values of one iteration are averaged."""
        ...


class Method(Protocol):
    """A frozen dataclass: its fields are its hyper-parameters, `collect` samples a batch, `loss` is its equation."""

    space: ClassVar[Mapping[str, Range]]  # what `gpobench tune` may draw: the key of a --set -> its range

    @property
    def optim(self) -> Optim: ...

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        """nfe an image by role, where every group is informative; the meter must show the same. steps, guidance: the protocol's."""
        ...

    def collect(self, rig: Rig) -> Any:
        """Sample a batch: a dataclass of tensors that share their first dimension, the rows."""
        ...

    def loss(self, rig: Rig, batch: Any) -> Tensor:
        """The loss, a mean over rows, so that rows may be split for gradient accumulation and data parallelism."""
        ...


@runtime_checkable
class SupportsLatentCount(Protocol):
    """A method whose rows need several latents in the network at once, for the memory estimate."""

    @property
    def latents(self) -> int:
        """Latents of one row of the batch: the group's size, the times of an image, two of a pair."""
        ...


@runtime_checkable
class SupportsRewardGradient(Protocol):
    """A method that differentiates the reward: it trains on a `DifferentiableScorer` only."""

    @property
    def reward_backwards(self) -> float:
        """Backward passes of scorer and decoder per image; the meter must show the same."""
        ...


@runtime_checkable
class Search(Protocol):
    """A method without training, which spends the budget on better images at inference."""

    def answer(self, rig: Rig, noise: Tensor, prompt_ids: Tensor, images: int) -> Tensor:
        """Latents (B, C, h, w) for prompts prompt_ids (B,), from this noise (B, C, h, w) and any more that is drawn.

        images: the number of images of the whole evaluation, over which the budget is divided.
        """
        ...


@runtime_checkable
class SupportsIntermediateAnswers(Protocol):
    """A search that states its answer after every candidate, so that one run shows what every smaller budget would gain."""

    def answers(self, rig: Rig, noise: Tensor, prompt_ids: Tensor, images: int) -> Iterator[Tensor]:
        """The latents (B, C, h, w) that it would return after the first, second ... candidate; the last are those of `answer`.

        Arguments as in `Search.answer`, in whose place this is called.
        """
        ...


B = TypeVar("B")


def select_rows(batch: B, rows: Tensor) -> B:
    """The rows of a batch of any kind, by index or by mask; batch and rows may be on different devices."""
    return replace(batch, **{f.name: _rows(getattr(batch, f.name), rows) for f in fields(batch)})  # type: ignore[type-var]


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor[rows.to(tensor.device)]


def batch_size(batch: Any) -> int:
    """The number of rows of a batch."""
    return len(getattr(batch, fields(batch)[0].name))
