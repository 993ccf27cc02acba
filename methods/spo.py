"""SPO: at each step the best and the worst of a few next latents that were drawn from one latent; no credit over trajectories.

Step-aware Preference Optimization, Liang et al., arXiv 2406.04314, Eqs. 4 and 5; code RockeyCoss/SPO, train_spo.py.

From x_t the policy draws k candidates for the next latent. A preference model judges each, and a pair is kept where the softmax
of its best and worst scores differs by more than `gap`. A random candidate goes on.
  u    = log clip(p / p_ref (x_w | x_t), 1 - c, 1 + c) - log clip(p / p_ref (x_l | x_t), 1 - c, 1 + c)
  loss = -log sigmoid(beta u) / beta
log p is a mean over the elements of a latent. The two share x_t, so one evaluation of each model serves both. Outside of its clip
a ratio has no gradient, on either side.
In place of the paper's preference model, a CLIP fine-tuned on noisy pairs and told the time: the run's own scorer, on the image
predicted from the candidate by the evaluation that the next step needs anyway (the authors' model sees the same image). A
scorer of clean images judges the blurred ones of early steps badly, one that reads letters or counts objects most of all: `start_fraction`.
Differs from the code: the last step, whose noise is next to nothing (none on SD3 and FLUX), is left out, and so are SDXL's several
inner steps before a comparison; on SD3 and FLUX the presets have Flow-GRPO's stochastic step; the division by beta, which keeps
the gradient at the reference independent of it, is this file's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import Kernel, ddim, sde, split
from ..bench.losses import step_dpo
from ..bench.spec import Choice, LogUniform, Optim, Range, Rig, Uniform
from ..bench.training.pairs import compare


@dataclass(frozen=True)
class Candidates:
    """N latents, each with the better and the worse of its next ones."""

    x: Tensor  # (N, C, h, w) at t
    t: Tensor  # (N,)
    s: Tensor  # (N,)
    to: Tensor  # (N, 2, C, h, w) at s, the better one first
    prompt_ids: Tensor  # (N,)


@dataclass(frozen=True)
class SPO:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(3e-5, 1e-3),
        "beta": LogUniform(1, 100),
        "clip_range": LogUniform(1e-2, 0.3),
        "temperature": LogUniform(0.02, 1),
        "start_fraction": Choice((0.1, 0.2, 0.4)),
        "noise_level": Uniform(0.4, 1.0),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=6e-5, minibatches=1))
    prompts: int = 10  # prompts per iteration
    candidates: int = 4  # next latents drawn from each latent, k
    start_fraction: float = 0.2  # steps without candidates, at first: scores of images predicted there say little
    gap: float = 0.0  # least difference between the softmax shares of best and worst; 0 keeps all that differ
    temperature: float = 1.0  # of that softmax, in units of reward; PickScore's own is 1
    beta: float = 10.0  # inverse temperature of the sigmoid
    clip_range: float = 0.1  # clip of each ratio to the reference
    sde_type: Literal["ddim", "sde"] = "ddim"  # the stochastic step: DDIM's, or Flow-GRPO's
    noise_level: float = 1.0  # of the stochastic step; ddim: its eta
    steps: int = 0  # sampler steps of the rollout; 0: the protocol's
    guidance: float = 0.0  # guidance of rollout and training; 0: the protocol's

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("prompts", self.prompts >= 1, "at least 1"),
            ("candidates", self.candidates >= 2, "at least 2: one has nothing to be compared with"),
            ("start_fraction", 0 <= self.start_fraction < 1, "in [0, 1)"),
            ("gap", 0 <= self.gap < 1, "in [0, 1)"),
            ("temperature", self.temperature > 0, "above 0"),
            ("beta", self.beta > 0, "above 0"),
            ("clip_range", 0 < self.clip_range < 1, "between 0 and 1"),
            ("noise_level", self.noise_level > 0 and (self.sde_type == "sde" or self.noise_level <= 1), "above 0, for ddim at most 1"),
            ("steps", self.steps >= 0, "at least 0"),
            ("guidance", self.guidance >= 0, "at least 0"),
        ):  # fmt: skip
            if not valid:
                raise UserError(f"spo: {name} must be {rule}, got {getattr(self, name)}")

    @property
    def kernel(self) -> Kernel:
        return sde(self.noise_level) if self.sde_type == "sde" else ddim(self.noise_level)

    @property
    def margin(self) -> float:
        """The difference of two rewards at which their softmax shares differ by `gap`."""
        return self.temperature * math.log((1 + self.gap) / (1 - self.gap))

    def compared_steps(self, steps: int) -> range:
        """The steps that have candidates, of a walk of so many steps whose last is left out."""
        compared = range(int(steps * self.start_fraction + 0.5), steps - 1)
        if not compared:
            raise UserError(f"spo: start_fraction {self.start_fraction} of steps {steps} leaves none with candidates")
        return compared

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        """Of each candidate, for each is scored: a walk is one evaluation a latent, an update one of each model a pair."""
        steps, passes = self.steps or steps, 1 if (self.guidance or guidance) == 1 else 2
        compared = self.compared_steps(steps)
        images = self.candidates * len(compared)
        pairs = len(compared) * self.optim.epochs * passes / images
        return {"rollout": (1 + compared.start + images) * passes / images, "policy": 3 * pairs, "ref": pairs}

    @torch.no_grad()
    def collect(self, rig: Rig) -> Candidates:
        """Walk from one noise for each prompt: draw candidates, keep the best and the worst, go on with a random one."""
        steps, n = self.steps or rig.model.steps, self.prompts
        compared, guidance = self.compared_steps(steps), self.guidance or rig.model.guidance
        prompt_ids, x = rig.prompts(n), rig.noise(n)
        grid = rig.model.times(steps).to(x)
        v = rig.velocity(x, grid[0].expand(n), prompt_ids, guidance=guidance, role="rollout")
        rows: list[tuple[Tensor, ...]] = []
        rewards: list[Tensor] = []
        for i in range(steps - 1):
            k, t, s = self.candidates if i in compared else 1, grid[i].expand(n), grid[i + 1].expand(n)
            ids, late = prompt_ids.repeat_interleave(k), s.repeat_interleave(k)
            step = self.kernel(rig.path, x, v, t, s)
            drawn = step.mean[:, None] + step.std[:, None] * rig.noise(n * k).unflatten(0, (n, k))
            v = rig.velocity(drawn.flatten(0, 1), late, ids, guidance=guidance, role="rollout")
            usable = late.view(n, k) >= 0
            if i in compared:
                rewards.append(rig.score(split(rig.path, drawn.flatten(0, 1), v, late)[0], ids).view(n, k))
                which, win, lose = compare(rewards[-1], "extremes", self.margin, rig.uniform(n))
                pairs = torch.stack([drawn[which, win], drawn[which, lose]], 1)
                rows.append((x[which], t[which], s[which], pairs, prompt_ids[which]))
                usable = rewards[-1].isfinite()
            u = rig.uniform(n * k).view(n, k)
            chosen = torch.where(usable, u, u - 1).argmax(1)  # a random one that could be scored, whatever its score
            each = torch.arange(n, device=chosen.device)
            x, v = drawn[each, chosen], v.unflatten(0, (n, k))[each, chosen]
        reward = torch.stack(rewards)
        rig.note("reward/mean", reward.nanmean())
        rig.note("reward/spread", (reward - reward.nanmean(2, keepdim=True)).square().nanmean().sqrt())
        rig.note("pairs/kept", sum(len(row[0]) for row in rows) / (n * len(rows)))
        return Candidates(*(torch.cat(column) for column in zip(*rows, strict=True)))

    def loss(self, rig: Rig, batch: Candidates) -> Tensor:
        """-log sigmoid(beta (log clip(rho_w) - log clip(rho_l))) / beta, a mean over latents."""
        guidance, at = self.guidance or rig.model.guidance, (batch.x, batch.t, batch.s, batch.prompt_ids)
        step = rig.step(self.kernel, *at, guidance=guidance)
        ref = rig.step(self.kernel, *at, weights="ref", guidance=guidance)
        policy_w, policy_l, ref_w, ref_l = (law.logp(batch.to[:, i]) for law in (step, ref) for i in (0, 1))
        ratios = torch.stack([policy_w - ref_w, policy_l - ref_l]).detach()
        rig.note("policy/accuracy", ((ratios[0] - ratios[1]).sign() + 1).mean() / 2)
        rig.note("policy/clipped", ((ratios.exp() - 1).abs() > self.clip_range).float().mean())
        return step_dpo(policy_w, ref_w, policy_l, ref_l, self.beta, self.clip_range).mean() / self.beta
