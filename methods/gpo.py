"""GPO: DPO widened from a pair to a group of the model's own images, each weighed by its standardised reward.

Group Preference Optimization, Chen et al., arXiv 2505.11070.

From the paper's abstract: near-tie pairs hurt DPO, which sees only an order; so generalise the pair to a group and weigh its
members by standardised rewards; train on the model's own images; nothing changes at inference.
Reconstruction (the printed loss, its settings and the code were not found): the three links below, one identity apart,
  sum over pairs i<j of (A_i - A_j)(s_i - s_j)  =  G sum_i A_i s_i,      s_i = e_live(i) - e_ref(i),
with one timestep and one noise for the whole group. "logsigmoid" is the default; "pairwise" keeps a sigmoid for every pair;
"linear" has none. Every default is borrowed from neighbours of the paper (gpo.toml says from whom), not from the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from ..bench.errors import UserError
from ..bench.flow import mix
from ..bench.losses import among, apart, gpo, implicit_accuracy, informative, standardise
from ..bench.spec import LogUniform, Optim, Range, Rig, Uniform, select_rows


@dataclass(frozen=True)
class WeightedGroups:
    """P groups of G images with what each image weighs."""

    x0: Tensor  # (P, G, C, h, w)
    prompt_ids: Tensor  # (P,)
    reward: Tensor  # (P, G); NaN where the image could not be scored
    adv: Tensor  # (P, G); 0 there


@dataclass(frozen=True)
class GPO:
    """The fields are the hyper-parameters; `collect` is the algorithm, `loss` its equation."""

    space: ClassVar[Mapping[str, Range]] = {
        "optim.lr": LogUniform(1e-4, 1e-3),
        "beta": LogUniform(10, 1000),
        "noisy": Uniform(0, 0.8),
    }
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-5))
    prompts: int = 8  # groups an iteration
    group: int = 24  # images a prompt
    beta: float = 100.0  # how soon the sigmoid saturates: the strength of the trust region
    link: Literal["logsigmoid", "pairwise", "linear"] = "logsigmoid"
    std: Literal["group", "global", "none"] = "group"  # what rewards are divided by
    gap_weight: bool = True  # link "pairwise": weigh a pair by its gap; False is plain all-pairs DPO
    gap: float = 0.0  # link "pairwise": only pairs whose rewards differ by more than this
    kl: float = 0.0  # weight of mean (v_live - v_ref)^2, over images that could be scored
    noisy: float = 0.0  # t is drawn from [noisy, 1]: few-step images are a little blurred, low noise would teach that
    steps: int = 0  # of the rollout; 0 is the protocol's number
    guidance: float = 0.0  # of the rollout; 0 is the protocol's

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"gpo: a group needs at least two images to compare, got group={self.group}")
        if self.prompts < 1 or self.beta <= 0:
            raise UserError(f"gpo: prompts must be at least 1 and beta above 0, got {self.prompts} and {self.beta}")
        if self.steps < 0 or self.guidance < 0 or self.kl < 0 or self.gap < 0:
            raise UserError("gpo: steps, guidance, kl and gap must not be negative")
        if not 0 <= self.noisy < 1:
            raise UserError(f"gpo: noisy is a time in [0, 1), got {self.noisy}")

    @property
    def latents(self) -> int:
        return self.group

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        passes, t = 1 if (self.guidance or guidance) == 1 else 2, self.optim.epochs
        return {"rollout": (self.steps or steps) * passes, "policy": 3 * t, "ref": t}

    def collect(self, rig: Rig) -> WeightedGroups:
        """Sample and score P groups; keep those whose images differ in reward; standardise."""
        groups = rig.groups(self.prompts, self.group, steps=self.steps, guidance=self.guidance or None)
        batch = WeightedGroups(groups.x0, groups.prompt_ids, groups.reward, standardise(groups.reward, self.std))
        return select_rows(batch, informative(groups.reward))

    def loss(self, rig: Rig, batch: WeightedGroups) -> Tensor:
        """-log sigmoid(-(beta / G) sum_i A_i s_i) / beta, averaged over groups; s_i from one (t, eps) a group."""
        t = self.noisy + (1 - self.noisy) * rig.normal(len(batch.prompt_ids)).sigmoid()
        t = t.repeat_interleave(self.group)
        eps = rig.noise(len(batch.prompt_ids)).repeat_interleave(self.group, 0)
        prompt_ids = batch.prompt_ids.repeat_interleave(self.group)
        x, target = mix(rig.path, batch.x0.flatten(0, 1), eps, t)
        v, v_ref = (rig.velocity(x, t, prompt_ids, weights=weights) for weights in ("policy", "ref"))
        live, ref = (rig.error(u, target, t).view_as(batch.reward) for u in (v, v_ref))
        rig.note("policy/accuracy", implicit_accuracy(batch.reward, live, ref))
        known = batch.reward.isfinite()
        drift = among(known, rig.error(v, v_ref, t).view_as(batch.reward)).mean()
        rig.note("policy/kl", drift)
        each = gpo(
            batch.adv, live, ref, self.beta, self.link,
            gap_weight=self.gap_weight, known=known, apart=apart(batch.reward, self.gap),
        )  # fmt: skip
        return each.mean() + self.kl * drift
