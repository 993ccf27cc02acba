"""Order-preserving GFlowNet (OP-GFN): the model's own likelihoods must put the best image of a group first.

Chen and Mauch, arXiv 2310.00386; code yhangchen/OP-GFN, which learns to build molecules and networks, not images.

A GFlowNet samples in proportion to a reward that it may choose itself, as long as it keeps the order of the given one. With P_i
its predicted log reward of a terminal object i, the two order losses of the code are
  listwise  cross-entropy of softmax(P) and y / sum y, y = 1 on the group's best
  pairs     each object with a random other one: 2-way cross-entropy with target (1, 0), (0, 1), or (1/2, 1/2) on a tie
Adaptation to images (this file's own): P_i = -(beta / 2) (e_i - e_ref,i), the log-likelihood ratio to the reference at one
(t, eps) of the group; log Z, which depends on the prompt alone, cancels. So "listwise" is the first term of a Plackett-Luce
ranking, and "pairs" is online Diffusion-DPO with random pairs and smoothed labels on ties. The loss is divided by beta, which
keeps the gradient at the reference independent of it.
Only the order counts, gaps and scale of the rewards do not. Of several rewards the paper takes the images that none dominates
for the best; the rig's reward is one number, so here these are the images at the maximum. There is no replay buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import training_times
from ..bench.losses import first_place, implicit_accuracy, informative, listwise, random_pairs
from ..bench.spec import Choice, Groups, LogUniform, Optim, Range, Rig, Uniform, select_rows


@dataclass(frozen=True)
class OPGFN:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 1e-3),
        "beta": LogUniform(10, 1000),
        "t_min": Uniform(0, 0.8),
        "loss_type": Choice(("listwise", "pairs")),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-5, minibatches=1))  # epochs: timesteps per group
    prompts: int = 8  # prompts per iteration, one group each
    group: int = 24  # images per prompt
    beta: float = 100.0  # how soon the softmax saturates: the strength of the trust region
    loss_type: Literal["listwise", "pairs"] = "listwise"  # the whole group's best, or random pairs
    timestep_shift: float = 0.0  # shift of the times of training; 0: the model's own, 1: none (flow.training_times)
    t_min: float = 0.0  # t is drawn from [t_min, 1]: few-step images are a little blurred, low noise would teach that
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 0.0  # guidance of the rollout; 0: the protocol's

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("group", self.group >= 2, "at least 2: one image has no order"),
            ("beta", self.beta > 0, "above 0"),
            ("timestep_shift", self.timestep_shift >= 0, "at least 0"),
            ("t_min", 0 <= self.t_min < 1, "a time in [0, 1)"),
            ("steps", self.steps >= 0, "at least 0"),
            ("guidance", self.guidance >= 0, "at least 0"),
        ):
            if not valid:
                raise UserError(f"op-gfn: {name} must be {rule}, got {getattr(self, name)}")

    @property
    def latents(self) -> int:
        return self.group

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        passes, times = 1 if (self.guidance or guidance) == 1 else 2, self.optim.epochs
        return {"rollout": (self.steps or steps) * passes, "policy": 3 * times, "ref": times}

    def collect(self, rig: Rig) -> Groups:
        """Sample and score P groups; keep those whose images differ in reward."""
        groups = rig.groups(self.prompts, self.group, steps=self.steps, guidance=self.guidance or None)
        return select_rows(groups, informative(groups.reward))

    def loss(self, rig: Rig, batch: Groups) -> Tensor:
        """cross-entropy(softmax(-(beta / 2) s), the best) / beta, a mean over groups; one (t, eps) per group."""
        n, g = batch.reward.shape
        t = training_times(rig.normal(n).sigmoid(), rig.path, self.t_min, self.timestep_shift).repeat_interleave(g)
        eps = rig.noise(n).repeat_interleave(g, 0)
        errors = rig.errors(batch.x0.flatten(0, 1), batch.prompt_ids.repeat_interleave(g), t, eps, "policy", "ref")
        error, error_ref = (e.view(n, g) for e in errors)
        rig.note("policy/accuracy", implicit_accuracy(batch.reward, error, error_ref))
        score = -self.beta / 2 * (error - error_ref)
        listed = self.loss_type == "listwise"
        lists = first_place(batch.reward) if listed else random_pairs(batch.reward, rig.uniform(n * g).view(n, g))
        return listwise(score, lists).mean() / self.beta
