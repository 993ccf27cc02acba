"""Times an iteration of a method here beside a plain loop written from Flow-GRPO's published formulas, at equal batch.

The plain loop is what a published script does with the same parts: diffusers' transformer with PEFT's LoRA on, the SDE step and its
log-probability (arXiv 2505.05470, Eqs. 7 to 9), the same decoder and scorer, PPO's clipped loss with the KL to the base, AdamW. It
imports nothing of bench/flow.py, bench/losses.py or methods/. Both sides have the same weights, prompts and noise in every round, and
which one is first alternates. Printed: the time of the plain loop over that of this package for the rollout, the update and the whole
iteration, as the median of the rounds' ratios with quartiles; how many rewards differ, how far log-probabilities and gradients lie apart.

    python benchmarks/peers.py [rounds] [--threads N] [--prompts P] [--group G]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpobench.bench import registry
from gpobench.bench.budget import Budget, Meter
from gpobench.bench.experiments import config
from gpobench.bench.model_spec import find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.rendering import to_uint8
from gpobench.bench.scoring.scorers import ask
from gpobench.bench.spec import Prompt, Rig, Transitions, select_rows
from gpobench.bench.training.rig import MeteredRig
from gpobench.bench.training.train import optimiser, train


@dataclass(frozen=True)
class Noise:
    """The random numbers of one rollout: both sides take the same ones."""

    start: Tensor  # (B, C, h, w)
    steps: Sequence[Tensor]  # (B, C, h, w) for each step


@dataclass(frozen=True)
class Trajectories:
    """What a rollout of the plain loop keeps: a tensor for each step."""

    x: Sequence[Tensor]  # (B, C, h, w), one more than there are steps
    logp: Sequence[Tensor]  # (B,)
    reward: Tensor  # (B,)


class PlainLoop:
    """Flow-GRPO as its scripts do it, on one device."""

    def __init__(self, model: Any, scorer: Any, settings: Any) -> None:
        self.transformer, self.vae = model.pipe.transformer, model.pipe.vae
        self.scorer, self.settings = scorer, settings
        self.sigmas: list[float] = model.times(model.steps).tolist()
        self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        o = settings.optim
        self.adam = torch.optim.AdamW(self.parameters, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)

    def velocity(self, x: Tensor, k: int, text: Tensor, pooled: Tensor) -> Tensor:
        """The transformer at the time of step k."""
        t = torch.full((len(x),), self.sigmas[k] * 1000)
        return self.transformer(
            hidden_states=x, timestep=t, encoder_hidden_states=text, pooled_projections=pooled, return_dict=False
        )[0]

    def distribution(self, x: Tensor, v: Tensor, k: int) -> tuple[Tensor, float, float]:
        """The Gaussian of step k: its mean, its standard deviation, and s of the paper's Eq. 7."""
        sigma, dt = self.sigmas[k], self.sigmas[k + 1] - self.sigmas[k]
        s = self.settings.noise_level * math.sqrt(sigma / (1 - (self.sigmas[1] if sigma == 1 else sigma)))
        mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, s * math.sqrt(-dt), s

    @staticmethod
    def log_probability(to: Tensor, mean: Tensor, std: float) -> Tensor:
        """(B,): the mean over elements of the Gaussian's log-density."""
        density = -((to - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
        return density.mean(dim=(1, 2, 3))

    @torch.no_grad()
    def rollout(self, noise: Noise, text: Tensor, pooled: Tensor, prompts: Sequence[Prompt]) -> Trajectories:
        """Sample stochastically and score."""
        x, xs, logps = noise.start, [noise.start], list[Tensor]()
        for k, eps in enumerate(noise.steps):
            mean, std, _ = self.distribution(x, self.velocity(x, k, text, pooled), k)
            x = mean + std * eps
            xs.append(x)
            logps.append(self.log_probability(x, mean, std))
        images = self.vae.decode(
            x / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0), return_dict=False
        )[0]
        scores = ask(self.scorer, to_uint8(images / 2 + 0.5), prompts)
        return Trajectories(xs, logps, torch.tensor(scores.value[self.scorer.metrics[0]], dtype=torch.float32))

    def advantages(self, reward: Tensor, group: int) -> Tensor:
        """(B,): rewards less their group's mean, over the standard deviation of all."""
        grouped = reward.view(-1, group)
        advantage = (grouped - grouped.mean(1, keepdim=True)) / (reward.std(unbiased=False) + 1e-4)
        limit = self.settings.adv_clip_max
        return advantage.flatten().clamp(-limit, limit)

    def loss(
        self, x: Tensor, to: Tensor, k: int, old: Tensor, advantage: Tensor, text: Tensor, pooled: Tensor
    ) -> Tensor:
        """PPO's clipped loss and the KL to the base, of the transitions of step k."""
        mean, std, s = self.distribution(x, self.velocity(x, k, text, pooled), k)
        ratio = torch.exp(self.log_probability(to, mean, std) - old)
        clip = self.settings.clip_range
        policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
        with torch.no_grad():
            self.transformer.disable_adapters()
            base, _, _ = self.distribution(x, self.velocity(x, k, text, pooled), k)
            self.transformer.enable_adapters()
        kl = ((mean - base) ** 2).mean(dim=(1, 2, 3)) / (2 * s**2)
        return policy + self.settings.kl * kl.mean()

    def update(self, taken: Trajectories, group: int, text: Tensor, pooled: Tensor) -> None:
        """The optimiser's steps of one iteration: the trained steps of each half of the images, one backward pass a step."""
        advantage, trained = self.advantages(taken.reward, group), range(self.settings.trained_steps(len(taken.logp)))
        for rows in torch.randperm(len(advantage)).chunk(self.settings.optim.minibatches):
            for k in trained:
                batch = (taken.x[k][rows], taken.x[k + 1][rows], k, taken.logp[k][rows], advantage[rows])
                (self.loss(*batch, text[rows], pooled[rows]) / len(trained)).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.optim.clip)
            self.adam.step()
            self.adam.zero_grad(set_to_none=True)


class Timed:
    """A method whose `collect` is timed."""

    def __init__(self, method: Any, clock: Callable[[], float]) -> None:
        self.method, self.optim, self.clock, self.seconds = method, method.optim, clock, 0.0

    def collect(self, rig: Rig) -> Transitions:
        began = self.clock()
        batch = self.method.collect(rig)
        self.seconds = self.clock() - began
        return batch

    def loss(self, rig: Rig, batch: Transitions) -> Tensor:
        return self.method.loss(rig, batch)


class Sides:
    """Both sides of the comparison, with the same weights."""

    def __init__(self, prompts: int, group: int, micro: int, clock: Callable[[], float] = time.process_time) -> None:
        self.clock, self.reward = clock, torch.zeros(0)
        spec = find_model_spec("tiny")
        sets = ["steps=0", f"prompts={prompts}", f"group={group}", "optim.ema=0", f"optim.micro={micro}"]
        plan = config.resolve(config.RunRequest("flow-grpo", "ocr", "tiny", budget="nfe=1000", sets=sets))
        self.settings, self.group = plan.settings, group
        self.model, self.other = (open_model(spec, device="cpu", adapter=plan.adapter) for _ in range(2))
        scorer = registry.scorer(plan.reward)
        book = registry.load("task", "ocr")().prompts("train", spec.domain)
        self.rig = MeteredRig(self.model, book, scorer, Meter(Budget(nfe=1e12)), rows=prompts * group)
        self.adam = optimiser(self.settings, self.rig)
        self.plain = PlainLoop(self.other, scorer, self.settings)
        self._draw_prompts, self._draw_noise = self.rig.prompts, self.rig.noise
        gather: Callable[..., Tensor] = self.rig._rewards  # pyright: ignore[reportPrivateUsage]

        def remembered(*arguments: Any) -> Tensor:
            self.reward = gather(*arguments)
            return self.reward

        self.rig._rewards = remembered  # pyright: ignore[reportPrivateUsage]

    def round(self, plain_first: bool) -> tuple[dict[str, float], dict[str, float], float]:
        """Seconds of rollout and update here, the same of the plain loop, and the share of rewards that differ."""
        self._same_weights()
        ids = self._draw_prompts(self.settings.prompts)
        images = ids.repeat_interleave(self.group)
        noise = Noise(self._draw_noise(len(images)), [self._draw_noise(len(images)) for _ in range(self.model.steps)])
        texts = self.rig.texts(images)
        embedded = self.rig._embed(images)  # pyright: ignore[reportPrivateUsage]  # before the clock starts, for both
        rewards: dict[str, Tensor] = {}

        def here() -> dict[str, float]:
            drawn: Iterator[Tensor] = iter((noise.start, *noise.steps))
            self.rig.prompts, self.rig.noise = lambda n: ids, lambda n: next(drawn)
            timed = Timed(self.settings, self.clock)
            began = self.clock()
            train(timed, self.rig, self.adam, after=lambda notes: None, interrupted=lambda: True)
            rewards["here"] = self.reward
            return {"rollout": timed.seconds, "update": self.clock() - began - timed.seconds}

        def plain() -> dict[str, float]:
            began = self.clock()
            taken = self.plain.rollout(noise, embedded["text"], embedded["pooled"], texts)
            middle = self.clock()
            self.plain.update(taken, self.group, embedded["text"], embedded["pooled"])
            rewards["plain"] = taken.reward.view(self.reward.shape if self.reward.numel() else (-1, self.group))
            return {"rollout": middle - began, "update": self.clock() - middle}

        sides: list[Callable[[], dict[str, float]]] = [plain, here] if plain_first else [here, plain]
        seconds = {side.__name__: side() for side in sides}
        differ = float((rewards["here"] != rewards["plain"]).float().mean())
        return seconds["here"], seconds["plain"], differ

    def apart(self) -> tuple[float, float]:
        """How far log-probabilities and gradients of the two sides lie apart on one batch; the gradients relative to their norm."""
        self._same_weights()
        self.rig.prompts, self.rig.noise = self._draw_prompts, self._draw_noise
        batch = self.settings.collect(self.rig.view)
        rows = torch.arange(len(batch.t))[batch.t == self.plain.sigmas[3]]
        x, to, ids, old = batch.x[rows], batch.to[rows], batch.prompt_ids[rows], batch.logp[rows]
        embedded = self.rig._embed(ids)  # pyright: ignore[reportPrivateUsage]
        advantage = torch.linspace(-1, 1, len(rows))
        with torch.no_grad():
            mean, std, _ = self.plain.distribution(
                x, self.plain.velocity(x, 3, embedded["text"], embedded["pooled"]), 3
            )
        log_probabilities = (self.plain.log_probability(to, mean, std) - old).abs().max()
        chosen = replace(select_rows(batch, rows), advantage=advantage)
        here = torch.autograd.grad(self.settings.loss(self.rig.view, chosen), self.model.parameters())
        loss = self.plain.loss(x, to, 3, old, advantage, embedded["text"], embedded["pooled"])
        plain = torch.autograd.grad(loss, self.plain.parameters)
        flat = [torch.cat([g.flatten() for g in side]) for side in (here, plain)]
        return float(log_probabilities), float((flat[0] - flat[1]).norm() / flat[1].norm())

    def _same_weights(self) -> None:
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), self.plain.parameters, strict=True):
                theirs.copy_(mine)


def measure(rounds: int, sides: Sides) -> None:
    """Run the rounds and print the ratios."""
    try:
        sides.round(False)  # one-time costs: the scorer's model, the allocator, the optimisers' states
        results = [sides.round(bool(k % 2)) for k in range(rounds)]
        ratios = {
            "rollout": [plain["rollout"] / here["rollout"] for here, plain, _ in results],
            "update": [plain["update"] / here["update"] for here, plain, _ in results],
            "iteration": [sum(plain.values()) / sum(here.values()) for here, plain, _ in results],
        }
        for name, values in ratios.items():
            low, middle, high = np.percentile(values, (25, 50, 75))
            print(f"plain / here, {name:9s} {middle:.3f}, quartiles {low:.3f} to {high:.3f}", flush=True)
        log_probabilities, gradients = sides.apart()
        differ = np.mean([differ for *_, differ in results])
        print(
            f"rewards that differ {100 * differ:.2f} %, log-probabilities apart {log_probabilities:.1e}, "
            f"gradients apart {gradients:.1e} of their norm"
        )
    finally:
        sides.rig.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument(
        "--whole", action="store_true", help="here a minibatch is one backward pass, as the preset has it"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    images = options.prompts * options.group
    rows = images // 2  # of a backward pass of the plain loop
    print(
        f"flow-grpo on tiny, {options.prompts} prompts x {options.group} images, backward passes of {rows} rows"
        f"{', here of a minibatch' if options.whole else ''}, {options.threads} threads, {options.rounds} rounds"
    )
    measure(options.rounds, Sides(options.prompts, options.group, 0 if options.whole else rows, clock))
