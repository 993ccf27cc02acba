"""D3PO: denoising as a decision process, and DPO at every step of two whole trajectories ranked by their images.

Yang et al., arXiv 2311.13231, Eq. 14; code yk7333/d3po, scripts/rm/train_d3po.py (rewards in place of a person's choice).

Every step of the stochastic sampler is a Gaussian action with a density p. For step i of the pair w over l:
  u    = log clip(p / p_ref (x_w,i), 1 - c, 1 + c) - log clip(p / p_ref (x_l,i), 1 - c, 1 + c)
  loss = -log sigmoid(beta u) / beta
log p is a mean over the elements of a latent, the reference is the base, and both trajectories begin at one noise. Outside of
its clip a ratio has no gradient, on either side. With the code's beta and clip of 0.1 the sigmoid's argument is at most 0.02, so
the loss hardly leaves log 2 / beta: policy/accuracy says whether it learns. The division by beta is this file's own: it keeps
the gradient at the reference independent of it.
Differs from the code: the last step, whose noise is next to nothing (none on SD3 and FLUX), is not trained; the rows of an update
are steps of the whole batch; a pair of equal rewards is left out (there its label is 0, without a gradient); on SD3 and FLUX the
presets have Flow-GRPO's stochastic step. The paper's other loop is left out: a person's choices, and the model of each round the
next reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import Kernel, ddim, sde
from ..bench.losses import step_dpo
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, select_rows
from ..bench.training.pairs import compare


@dataclass(frozen=True)
class StepPairs:
    """N pairs of transitions at one step of two trajectories, the better image's first."""

    x: Tensor  # (N, 2, C, h, w) at t
    t: Tensor  # (N,)
    s: Tensor  # (N,)
    to: Tensor  # (N, 2, C, h, w) at s
    prompt_ids: Tensor  # (N,)


@dataclass(frozen=True)
class D3PO:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(3e-5, 1e-3),
        "beta": LogUniform(0.1, 100),
        "clip_range": LogUniform(1e-3, 0.3),
        "group": Choice((2, 4, 8)),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=3e-5, minibatches=1))
    prompts: int = 10  # prompts per iteration
    group: int = 2  # images per prompt, all from one initial noise
    choose: Literal["extremes", "random", "all"] = "all"  # pairs of a group: best and worst, one at random, or all
    margin: float = 0.0  # only pairs whose rewards differ by more than this
    beta: float = 0.1  # inverse temperature of the sigmoid
    clip_range: float = 0.1  # clip of each ratio to the reference
    sde_type: Literal["ddim", "sde"] = "ddim"  # the stochastic step: DDIM's, or Flow-GRPO's
    noise_level: float = 1.0  # of the stochastic step; ddim: its eta
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 0.0  # guidance of rollout and training; 0: the protocol's

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("group", self.group >= 2, "at least 2: one image makes no pair"),
            ("margin", self.margin >= 0, "at least 0"),
            ("beta", self.beta > 0, "above 0"),
            ("clip_range", 0 < self.clip_range < 1, "between 0 and 1"),
            ("noise_level", self.noise_level > 0 and (self.sde_type == "sde" or self.noise_level <= 1), "above 0, for ddim at most 1"),
            ("steps", self.steps == 0 or self.steps >= 2, "at least 2, or 0 for the protocol's number"),
            ("guidance", self.guidance >= 0, "at least 0"),
        ):  # fmt: skip
            if not valid:
                raise UserError(f"d3po: {name} must be {rule}, got {getattr(self, name)}")

    @property
    def kernel(self) -> Kernel:
        return sde(self.noise_level) if self.sde_type == "sde" else ddim(self.noise_level)

    @property
    def latents(self) -> int:
        return 2

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        """An image is in 2 / G pairs on average, in G - 1 of "all"; each trains all steps but the last."""
        steps, passes = self.steps or steps, 1 if (self.guidance or guidance) == 1 else 2
        pairs = self.group - 1 if self.choose == "all" else 2 / self.group
        trained = (steps - 1) * pairs * self.optim.epochs * passes
        return {"rollout": steps * passes, "policy": 3 * trained, "ref": trained}

    def collect(self, rig: Rig) -> StepPairs:
        """Sample P groups stochastically, each from one noise; pair the images, and then their transitions step by step."""
        steps = self.steps or rig.model.steps
        transitions, reward = rig.transitions(
            self.prompts, self.group, [self.kernel] * steps,
            keep=range(steps - 1), shared=True, guidance=self.guidance or None,
        )  # fmt: skip
        which, win, lose = compare(reward, self.choose, self.margin, rig.uniform(self.prompts))
        rig.note("pairs/kept", len(which))
        # (image, step), whatever parts the rollout was made in
        order = transitions.t.to(transitions.image.device).argsort(dim=0, descending=True, stable=True)
        rows = order[transitions.image[order].argsort(dim=0, stable=True)].view(-1, steps - 1)
        w, l = (select_rows(transitions, rows[which * self.group + member].flatten()) for member in (win, lose))
        return StepPairs(torch.stack([w.x, l.x], 1), w.t, w.s, torch.stack([w.to, l.to], 1), w.prompt_ids)

    def loss(self, rig: Rig, batch: StepPairs) -> Tensor:
        """-log sigmoid(beta (log clip(rho_w) - log clip(rho_l))) / beta, a mean over pairs and steps."""
        guidance = self.guidance or rig.model.guidance
        t, s, prompt_ids = (column.repeat_interleave(2) for column in (batch.t, batch.s, batch.prompt_ids))
        logp, ref = (
            rig.step(self.kernel, batch.x.flatten(0, 1), t, s, prompt_ids, weights=weights, guidance=guidance)
            .logp(batch.to.flatten(0, 1)).view(-1, 2)
            for weights in ("policy", "ref")
        )  # fmt: skip
        log_ratio = (logp - ref).detach()
        rig.note("policy/accuracy", ((log_ratio[:, 0] - log_ratio[:, 1]).sign() + 1).mean() / 2)
        rig.note("policy/clipped", ((log_ratio.exp() - 1).abs() > self.clip_range).float().mean())
        return step_dpo(logp[:, 0], ref[:, 0], logp[:, 1], ref[:, 1], self.beta, self.clip_range).mean() / self.beta
