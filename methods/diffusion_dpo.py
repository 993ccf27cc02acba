"""Diffusion-DPO: of two images of one prompt the better becomes likelier, relative to a reference, and the worse less likely.

Diffusion Model Alignment Using Direct Preference Optimization, Wallace et al., arXiv 2311.12908, Eq. 14; for flow models arXiv
2501.13918, Eq. 6 with a constant beta (its time-dependent one hacks the reward, Tables 3 and 4):
  s = e - e_ref,      loss = -log sigmoid(-(beta / 2) (s_win - s_lose)) / beta,
e the MEAN squared error over a latent's elements at one timestep and one noise that the two images share. beta is thus that of
SalesforceAIResearch/DiffusionDPO train.py and of yifan123/flow_grpo scripts/train_sd3_dpo.py. The division by beta is this
file's own: it keeps the gradient at the reference, and so the learning rate, independent of beta. Published learning rates were
found without it: with AdamW they carry over, since it divides a constant factor out again; a clip of the gradient's norm does not.

Online, the pairs come from the model's own groups, as in Flow-GRPO's comparison (arXiv 2505.05470, App. C.1). In its code one
adapter, `ref`, both draws the images and is the reference of the loss, and becomes the policy every `ref_update_step` updates:
here collector = "reference" with ref_update_step = 40 (its online DPO) or 0 (its offline DPO, on the pretrained model's images).
Offline, as in the first paper, `pairs` names a data set.
Differs from the codes: Flow-GRPO's makes a pair of two equal rewards, here such a group is left out; of Diffusion-DPO's, no
caption is dropped (a fifth there, which trains the unconditional branch of guidance), no image is flipped, and a latent is the
autoencoder's mode, not a draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import mix, training_times
from ..bench.losses import dpo, implicit_accuracy
from ..bench.spec import LogUniform, Optim, Pairs, Range, Rig, Uniform
from ..bench.training.pairs import compare


@dataclass(frozen=True)
class DiffusionDPO:
    """The fields are the hyper-parameters; `collect` makes the pairs, `loss` is the equation above."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 1e-3),
        "beta": LogUniform(10, 5000),
        "t_min": Uniform(0, 0.8),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-5, minibatches=1))  # epochs: timesteps per pair
    prompts: int = 8  # prompts per iteration, one group each; with `pairs`, pairs per iteration
    group: int = 24  # images per prompt
    beta: float = 100.0  # how soon the sigmoid saturates: the strength of the trust region
    choose: Literal["extremes", "random", "all"] = "extremes"  # pairs of a group: best and worst, one at random, or all
    margin: float = 0.0  # only pairs whose rewards differ by more than this
    collector: Literal["policy", "reference"] = "policy"  # the weights that draw the images
    ref_update_step: int = 0  # iterations after which the policy becomes the reference; 0 keeps the base
    pairs: str = ""  # a data set of pairs (bench/training/pairs.py) to learn from; none are sampled then
    # Distribution of t before its shift: Flow-GRPO's is logit-normal, DiffusionDPO's for epsilon models uniform.
    timestep_sampling: Literal["logit-normal", "uniform"] = "logit-normal"
    timestep_shift: float = 0.0  # shift of the times of training; 0: the model's own, 1: none (flow.training_times)
    t_min: float = 0.0  # t is drawn from [t_min, 1]: few-step images are a little blurred, low noise would teach that
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 0.0  # guidance of the rollout; 0: the protocol's

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"diffusion-dpo: a pair needs at least two images, got group={self.group}")
        if self.prompts < 1 or self.beta <= 0:
            got = f"{self.prompts} and {self.beta}"
            raise UserError(f"diffusion-dpo: prompts must be at least 1 and beta above 0, got {got}")
        if self.margin < 0 or self.ref_update_step < 0 or self.steps < 0 or self.guidance < 0:
            raise UserError("diffusion-dpo: margin, ref_update_step, steps and guidance must not be negative")
        if not self.timestep_shift >= 0:
            raise UserError(f"diffusion-dpo: timestep_shift must not be negative, got {self.timestep_shift}")
        if not 0 <= self.t_min < 1:
            raise UserError(f"diffusion-dpo: t_min is a time in [0, 1), got {self.t_min}")

    @property
    def reference(self) -> str:
        """Name of the reference weights: the base, or the copy that `ref_update_step` makes."""
        return "old" if self.ref_update_step else "ref"

    @property
    def latents(self) -> int:
        return 2

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        """An image is in 2 / G pairs on average, in G - 1 of "all"; with a data set: for each IMAGE OF A PAIR, none sampled."""
        if self.pairs:
            return {"policy": 3 * self.optim.epochs, self.reference: self.optim.epochs}
        times = self.optim.epochs * (self.group - 1 if self.choose == "all" else 2 / self.group)
        passes = 1 if (self.guidance or guidance) == 1 else 2
        return {"rollout": (self.steps or steps) * passes, "policy": 3 * times, self.reference: times}

    def collect(self, rig: Rig) -> Pairs:
        """Draw pairs from the data set; or sample and score P groups and pair their images."""
        # The first update of the reference, at iteration 0, copies the untrained policy.
        if self.ref_update_step and rig.iteration % self.ref_update_step == 0:
            rig.model.update_copy("old", 0.0)
        if self.pairs:
            return rig.pairs(self.pairs, self.prompts)
        weights = "policy" if self.collector == "policy" else self.reference
        groups = rig.groups(self.prompts, self.group, steps=self.steps, weights=weights, guidance=self.guidance or None)
        which, win, lose = compare(groups.reward, self.choose, self.margin, rig.uniform(self.prompts))
        rig.note("pairs/kept", len(which))
        return Pairs(groups.x0[which, win], groups.x0[which, lose], groups.prompt_ids[which])

    def loss(self, rig: Rig, batch: Pairs) -> Tensor:
        """-log sigmoid(-(beta / 2) (s_win - s_lose)) / beta, a mean over pairs; one (t, eps) per pair."""
        n = len(batch.prompt_ids)
        u = rig.normal(n).sigmoid() if self.timestep_sampling == "logit-normal" else rig.uniform(n)
        t = training_times(u, rig.path, self.t_min, self.timestep_shift).repeat(2)
        eps, prompt_ids = rig.noise(n).repeat(2, 1, 1, 1), batch.prompt_ids.repeat(2)
        x, target = mix(rig.path, torch.cat([batch.win, batch.lose]), eps, t)
        v, v_ref = (rig.velocity(x, t, prompt_ids, weights=weights) for weights in ("policy", self.reference))
        error, error_ref = (rig.error(u, target, t).view(2, n) for u in (v, v_ref))
        order = torch.tensor([1.0, 0.0]).to(error).expand(n, 2)  # the winner before the loser
        rig.note("policy/accuracy", implicit_accuracy(order, error.T, error_ref.T))
        rig.note("policy/kl", rig.error(v, v_ref, t).mean())
        rig.note("policy/error_win", error[0].mean())  # both errors are known to grow (DiffusionDPO issue 17)
        rig.note("policy/error_lose", error[1].mean())
        return dpo(error[0], error_ref[0], error[1], error_ref[1], self.beta).mean() / self.beta
