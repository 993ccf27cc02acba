"""RankDPO: DPO over all pairs of a ranked group, each pair weighted by what its order is worth in the ranking.

Karthik et al., arXiv 2410.18013, Eqs. 5 to 7; no code was found. The images of a prompt share t, and each has its own noise:
  s_i  = e_i - e_ref,i
  loss = -sum over i ranked above j of Delta_ij log sigmoid(-(beta / 2) (s_i - s_j)) / beta
  Delta_ij = |G_i - G_j| |1 / log(1 + rank_i) - 1 / log(1 + rank_j)|,   G_i = 2^phi_i - 1,
phi_i the share of the group's other images that image i beats. With two images this is Diffusion-DPO times a constant
(App. A.2). The paper's beta, learning rate and optimiser were not found: beta is in the mean-and-half convention of
Diffusion-DPO's code, and the division by beta, which keeps the gradient at the reference independent of it, is this file's own.
Differs from the paper: its images are 58,000 prompts' from four generators, made and ranked once by five scorers, whose wins
phi pools; here they are the model's own, ranked by the one training scorer; of equal rewards each has the best rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import training_times
from ..bench.losses import implicit_accuracy, informative, listwise, ranked_pairs
from ..bench.spec import Groups, LogUniform, Optim, Range, Rig, Uniform, select_rows


@dataclass(frozen=True)
class RankDPO:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 1e-3),
        "beta": LogUniform(10, 5000),
        "t_min": Uniform(0, 0.8),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-5, minibatches=1))  # epochs: timesteps per group
    prompts: int = 8  # prompts per iteration, one group each
    group: int = 4  # images per prompt
    beta: float = 2000.0  # how soon the sigmoids saturate: the strength of the trust region
    shared_noise: bool = False  # one noise for all images of a group instead of one each
    timestep_shift: float = 0.0  # shift of the times of training; 0: the model's own, 1: none (flow.training_times)
    t_min: float = 0.0  # t is drawn from [t_min, 1]: few-step images are a little blurred, low noise would teach that
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 0.0  # guidance of the rollout; 0: the protocol's

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("group", self.group >= 2, "at least 2: one image has no rank"),
            ("beta", self.beta > 0, "above 0"),
            ("timestep_shift", self.timestep_shift >= 0, "at least 0"),
            ("t_min", 0 <= self.t_min < 1, "a time in [0, 1)"),
            ("steps", self.steps >= 0, "at least 0"),
            ("guidance", self.guidance >= 0, "at least 0"),
        ):
            if not valid:
                raise UserError(f"rankdpo: {name} must be {rule}, got {getattr(self, name)}")

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
        """sum Delta_ij (-log sigmoid(-(beta / 2) (s_i - s_j))) / beta, a mean over groups; one t per group, one eps per image."""
        n, g = batch.reward.shape
        t = training_times(rig.normal(n).sigmoid(), rig.path, self.t_min, self.timestep_shift).repeat_interleave(g)
        eps = rig.noise(n).repeat_interleave(g, 0) if self.shared_noise else rig.noise(n * g)
        errors = rig.errors(batch.x0.flatten(0, 1), batch.prompt_ids.repeat_interleave(g), t, eps, "policy", "ref")
        error, error_ref = (e.view(n, g) for e in errors)
        rig.note("policy/accuracy", implicit_accuracy(batch.reward, error, error_ref))
        score = -self.beta / 2 * (error - error_ref)
        return listwise(score, ranked_pairs(batch.reward)).mean() / self.beta
