"""Direct Discriminative Optimization (DDO): the likelihood ratio of policy and reference as a GAN's discriminator.

Zheng et al., arXiv 2503.01103, Eqs. 13 and 16; NVlabs/DDO has no training code.

The policy is trained so that real images have a high likelihood ratio to the reference and the reference's own samples a low one:
  Delta = -(e - e_ref),   loss = -(log sigmoid(b Delta(real)) + alpha log sigmoid(-b Delta(fake))) / beta,   b = beta / 2
With beta below 1 in the paper's units its optimum goes past the data: p = p_ref^(1 - 1 / beta) p_data^(1 / beta). In rounds: at
each the policy becomes the reference, which draws the fakes. The paper sums over the elements of a latent under a weight
w(t); here e is a mean, in the mean-and-half convention of Diffusion-DPO, so beta here is 2 D times the paper's. The division by
beta is this file's own: it keeps the gradient at the reference independent of it.
Adaptation (the paper trains unconditional and class-conditional models on data sets, never on a reward): both kinds come from
groups that the reference drew and a scorer ranked. Real is the best image of a group, fake a random other one, each with its
own time and noise. One real and one fake of a prompt without a common sigmoid: this is Diffusion-KTO's kind of loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import training_times
from ..bench.losses import ddo, informative
from ..bench.spec import LogUniform, Optim, Pairs, Range, Rig, Uniform


@dataclass(frozen=True)
class DDO:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 1e-3),
        "beta": LogUniform(10, 5000),
        "alpha": LogUniform(0.5, 6),
        "t_min": Uniform(0, 0.8),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-5, minibatches=1))  # epochs: timesteps per image
    prompts: int = 8  # prompts per iteration, one group each
    group: int = 24  # images per prompt, drawn by the reference
    beta: float = 100.0  # how soon the sigmoids saturate
    alpha: float = 1.0  # weight of the fakes
    ref_update_step: int = 40  # iterations of a round, after which the policy becomes the reference
    timestep_shift: float = 0.0  # shift of the times of training; 0: the model's own, 1: none (flow.training_times)
    t_min: float = 0.0  # t is drawn from [t_min, 1]: few-step images are a little blurred, low noise would teach that
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 0.0  # guidance of the rollout; 0: the protocol's

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("group", self.group >= 2, "at least 2: one real and one fake"),
            ("beta", self.beta > 0, "above 0"),
            ("alpha", self.alpha > 0, "above 0"),
            ("ref_update_step", self.ref_update_step >= 1, "at least 1"),
            ("timestep_shift", self.timestep_shift >= 0, "at least 0"),
            ("t_min", 0 <= self.t_min < 1, "a time in [0, 1)"),
            ("steps", self.steps >= 0, "at least 0"),
            ("guidance", self.guidance >= 0, "at least 0"),
        ):
            if not valid:
                raise UserError(f"ddo: {name} must be {rule}, got {getattr(self, name)}")

    @property
    def latents(self) -> int:
        return 2

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        """Two images of a group are trained."""
        passes, times = 1 if (self.guidance or guidance) == 1 else 2, 2 * self.optim.epochs / self.group
        return {"rollout": (self.steps or steps) * passes, "policy": 3 * times, "old": times}

    def collect(self, rig: Rig) -> Pairs:
        """Let the round's reference draw P groups; of each the best image is real and a random other one is fake."""
        if rig.iteration % self.ref_update_step == 0:
            rig.model.update_copy("old", 0.0)
        groups = rig.groups(self.prompts, self.group, steps=self.steps, weights="old", guidance=self.guidance or None)
        reward, u = groups.reward, rig.uniform(self.prompts * self.group).view(self.prompts, self.group)
        real = reward.nan_to_num(-torch.inf).argmax(1)
        others = reward.isfinite().scatter(1, real[:, None], False)
        fake = torch.where(others, u, -1.0).argmax(1)
        rows = informative(reward).nonzero().flatten()
        images = groups.x0[rows]
        n = torch.arange(len(rows), device=rows.device)
        return Pairs(images[n, real[rows]], images[n, fake[rows]], groups.prompt_ids[rows.to(groups.prompt_ids.device)])

    def loss(self, rig: Rig, batch: Pairs) -> Tensor:
        """-(log sigmoid(b Delta(real)) + alpha log sigmoid(-b Delta(fake))) / beta, a mean over prompts."""
        n = len(batch.prompt_ids)
        t = training_times(rig.normal(2 * n).sigmoid(), rig.path, self.t_min, self.timestep_shift)
        x0, prompt_ids = torch.stack([batch.win, batch.lose], 1).flatten(0, 1), batch.prompt_ids.repeat_interleave(2)
        errors = rig.errors(x0, prompt_ids, t, rig.noise(2 * n), "policy", "old")
        s = (errors[0] - errors[1]).view(n, 2)
        rig.note("policy/accuracy", ((-s * s.new_tensor([1.0, -1.0])).detach().sign() + 1).mean() / 2)
        return ddo(s[:, 0], s[:, 1], self.beta, self.alpha).mean() / self.beta
