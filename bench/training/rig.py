"""The rig: what a method may use of model, prompts and rewards, each call charged to the budget.

Every cost is charged before it is spent, so no method can spend more than the budget, or spend unseen.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import fields, replace
from functools import cached_property, partial
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..budget import Meter
from ..errors import UserError
from ..flow import Kernel, Path, Step, dpm2, error_scale, like, mix, ode, precise, split, stochastic
from ..losses import flow_error, informative
from ..process_group import ProcessGroup
from ..random_draws import normal, permuted, random_words, uniform
from ..rendering import RenderedImages, render
from ..scoring.scorers import ask_rendered, calls_at_once
from ..spec import Branchings, Cond, Groups, Images, Model, Pairs, Prompt, Rig, Scorer, Scores, Transitions, fold_text
from ..trees import TreePlan
from .embeddings import EmbeddingCache
from .method_view import method_view
from .network_pass import NetworkPass
from .pairs import PairSet, open_pairs
from .reward_gradient import RewardGradientRig, RewardGradients
from .several_rewards import aggregate, part_rewards
from .tree_rollout import Sampler, grow, numbered, stack

TimedScores = tuple[Scores, float]  # scores, and the latency in seconds
SINGLE_PROCESS = ProcessGroup()
# Batches that wait for the scorer or are scored. With more the sampler waits: they would only take memory.
BATCHES_AHEAD = 4


class MeteredRig(RewardGradientRig):
    """What a method may use: `state` is its memory, `prompts`, `noise`, `normal` and `uniform` its random draws."""

    def __init__(
        self,
        model: Model,
        train_prompts: Sequence[Prompt],
        scorer: Scorer,
        meter: Meter,
        *,
        seed: int = 0,
        rows: int = 32,
        processes: ProcessGroup = SINGLE_PROCESS,
    ):
        """Open a rig.

        Args:
            model: whose copies of weights a method samples and trains.
            train_prompts: the prompts a method draws from; a search gets those it is evaluated on.
            scorer: gives the reward, its first metric.
            meter: charges the budget.
            seed: of every random draw.
            rows: images sampled at once.
            processes: they divide the rows of a batch.
        """
        self.model, self.train_prompts, self.scorer, self.meter, self.rows = model, train_prompts, scorer, meter, rows
        self.processes = processes
        self._computed_elsewhere = False  # another process computes the current part: it is only charged here
        # Whether steps without a density may be computed in bf16; not where the images are the result, whose precision is the protocol's.
        self.half_precision = True
        self.rng = torch.Generator().manual_seed(seed)
        self.state: dict[str, Any] = {}  # the method's memory
        self.bookkeeping: dict[str, Any] = {}  # of rig and search, out of the method's reach; checkpoints hold both
        self.iteration = 0
        self.iterations_without_signal = 0  # iterations in a row in which no group's rewards differed
        self.images_sent = self.images_scored = 0  # to the scorer in this iteration; of these, with a reward
        self.failures: list[str] = []  # why images could not be scored, the last 20
        self.reward_gradients = RewardGradients()
        self.aggregation = "sum"  # how the rewards of a blend become one in a group, see `several_rewards`
        self._embeddings = EmbeddingCache(lambda texts: model.encode(texts), device=model.device)
        self.evaluation_texts: frozenset[str] = frozenset()  # folded evaluation prompts: no data set may teach them
        self._captions: list[Prompt] = []  # of sets of pairs: their ids begin at len(train_prompts)
        self._sets: dict[str, tuple[PairSet, int]] = {}  # opened sets of pairs, with the id of their first caption
        self._keys: Tensor | None = None  # of the rows whose loss is being computed
        self._draws = 0
        self._notes: dict[str, list[Tensor | float]] = defaultdict(list)
        # Scores images while the next ones are sampled.
        self._scoring = ThreadPoolExecutor(calls_at_once(scorer), thread_name_prefix="scorer")
        self._submitted: list[Future[TimedScores]] = []  # charged, and perhaps not scored yet

    @cached_property
    def view(self) -> Rig:
        """The rig as a method gets it: what `spec.Rig` names, and nothing else."""
        return method_view(self)

    @property
    def path(self) -> Path:
        """The model's path between image and noise."""
        return self.model.path

    # Randomness. Inside a loss every row has a key of its own, so that splitting a batch, over micro-batches or over
    # devices, changes no draw; elsewhere rows take their keys from rng in order.

    def prompts(self, n: int) -> Tensor:
        """Draw n training prompts, without repeats while there are enough; (n,) the ids that other calls take."""
        count, rng = len(self.train_prompts), self._python_rng()
        orders = (permuted(count, rng) for _ in range(-(-n // count)))
        return torch.tensor(list(islice(chain.from_iterable(orders), n)), dtype=torch.long)

    def noise(self, n: int) -> Tensor:
        """(n, C, h, w) standard normal, on the model's device."""
        keys, draw, places = self._row_keys(n)
        # As many rows at once as are sampled at once: the words of a number take several times its memory.
        parts = zip(keys.split(self.rows), places.split(self.rows), strict=True)
        drawn = [normal(random_words(key, math.prod(self.model.shape), draw, place)) for key, place in parts]
        return torch.cat(drawn).view(n, *self.model.shape)

    def normal(self, n: int) -> Tensor:
        """(n,) standard normal."""
        return normal(self._words(n))

    def uniform(self, n: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(n,) uniform in [low, high)."""
        return low + (high - low) * uniform(self._words(n))

    def _words(self, n: int) -> Tensor:
        """(n,): a random word for each of n rows."""
        keys, draw, places = self._row_keys(n)
        return random_words(keys, 1, draw, places).view(n)

    def _row_keys(self, n: int) -> tuple[Tensor, int, Tensor]:
        """Of one draw of n rows: the rows' keys (n,), the draw's number, and the rows' places (n,) under their key."""
        device = self.model.device
        if self._keys is None:
            return self._new_keys(n).to(device), 0, torch.zeros(n, dtype=torch.long, device=device)
        rows = len(self._keys)
        if n % rows:
            raise ValueError(f"{n} draws for {rows} rows: a loss draws the same number for each of its rows")
        self._draws += 1
        keys = self._keys.to(device).repeat_interleave(n // rows)
        return keys, self._draws, torch.arange(n // rows, device=device).repeat(rows)

    def _new_keys(self, n: int) -> Tensor:
        return torch.randint(2**62, (n,), generator=self.rng)

    def _python_rng(self) -> random.Random:
        """A generator for what is drawn number by number."""
        return random.Random(int(self._new_keys(1)))

    @contextmanager
    def keyed(self, keys: Tensor) -> Generator[None]:
        """Inside the block the rows of the current batch draw from these keys (rows,)."""
        self._keys, self._draws = keys, 0
        try:
            yield
        finally:
            self._keys = None

    @contextmanager
    def turn(self, part: int) -> Generator[bool]:
        """Inside the block part number `part` of a batch is done; yields whether this process computes it."""
        with self.processes.part(part) as computed_here:
            self._computed_elsewhere = not computed_here
            try:
                yield computed_here
            finally:
                self._computed_elsewhere = False

    # The model

    def texts(self, prompt_ids: Tensor) -> list[Prompt]:
        """The prompts behind the ids (B,)."""
        return [self._prompt(i) for i in prompt_ids.tolist()]

    @property
    def captions(self) -> list[str]:
        """The captions of the sets of pairs that were opened."""
        return [caption.text for caption in self._captions]

    def _prompt(self, i: int) -> Prompt:
        return self.train_prompts[i] if i < len(self.train_prompts) else self._captions[i - len(self.train_prompts)]

    def _embed(self, prompt_ids: Tensor) -> Cond:
        return self._embeddings([self._prompt(i).text for i in prompt_ids.tolist()])

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
        """(B, C, h, w): the model's velocity at x (B, C, h, w) and t (B,).

        Charged: 1 nfe a row, 3 where a backward follows, doubled by guidance where that takes a second evaluation.

        Args:
            x: latents (B, C, h, w).
            t: times (B,), 1 noise and 0 image.
            prompt_ids: (B,).
            weights: "policy", "ref", or a copy that model.update_copy made. Only "policy" has a gradient.
            guidance: None is what one evaluation gives: none, or the protocol's where guidance is an input of the network.
            detach: no gradient through the unconditional branch of guidance.
            role: the name under which the nfe are counted.
        """
        if guidance is None:
            guidance = self.model.guidance if self.model.guided_cost == 1 else 1.0
        return self.charged_velocity(x, t, prompt_ids, NetworkPass(weights, guidance, detach, role))

    def charged_velocity(self, x: Tensor, t: Tensor, prompt_ids: Tensor, how: NetworkPass) -> Tensor:
        """(B, C, h, w): what `velocity` and every step of a walk compute; charged here, and nowhere else."""
        grad = torch.is_grad_enabled() and how.weights == "policy"
        each = (3 if grad else 1) * (1 if how.guidance == 1.0 else self.model.guided_cost)
        self.meter.charge(nfe=len(x) * each, role=how.role or ("policy" if grad else how.weights))
        if self._computed_elsewhere:
            return torch.zeros_like(x)
        with torch.set_grad_enabled(grad):
            return self.model.velocity(
                x,
                t,
                self._embed(prompt_ids),
                guidance=how.guidance,
                weights=how.weights,
                detach=how.detach,
                merged=how.merged,
                half=how.half,
            )

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
        """The kernel's step from x at t to s, charged as one velocity.

        Args:
            kernel: gives the step's distribution.
            x: latents (B, C, h, w).
            t: times (B,) of x.
            s: times (B,) of the end, below t.
            prompt_ids: (B,).
            weights: as in `velocity`.
            guidance: as in `velocity`.
            detach: as in `velocity`.
            role: as in `velocity`.
        """
        v = self.velocity(x, t, prompt_ids, weights=weights, guidance=guidance, detach=detach, role=role)
        return kernel(self.path, x, v, t, s)

    @torch.no_grad()
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
        """Take the kernels' steps from times(of)[start] on; yields (i, x, t, s, step, x_next) for each step i.

        Args:
            x: latents (B, C, h, w) at the first time.
            prompt_ids: (B,).
            kernels: one for each step.
            start: number of the first step in the grid.
            of: number of steps of the whole grid; 0 ends the walk at t = 0.
            times: (start + len(kernels) + 1,), another grid than the model's.
            weights: as in `velocity`.
            guidance: None is the protocol's.
        """
        grid = self.model.times(of or start + len(kernels)) if times is None else times
        guidance = self.model.guidance if guidance is None else guidance
        how = NetworkPass(weights, guidance, role="rollout", merged=True)

        def velocity(x: Tensor, t: Tensor, kernel: Kernel) -> Tensor:
            # A stochastic step has a density, and the ratio of the first update must be 1.
            half = self.half_precision and not stochastic(kernel)
            return self.charged_velocity(x, t, prompt_ids, replace(how, half=half))

        for i, step in enumerate(walk(self.path, velocity, x, grid[start:], kernels, self.noise), start):
            yield i, step.x, step.t, step.s, step.step, step.x_next

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
        """(B, C, h, w): the clean latents reached from x with one kernel for every step.

        Args:
            x: latents (B, C, h, w) at the time of step `start`.
            prompt_ids: (B,).
            steps: of the whole grid; 0 is the protocol's number.
            start: number of the first step in the grid.
            weights: as in `velocity`.
            guidance: None is the protocol's.
            kernel: of every step, the ODE by default.
        """
        steps = steps or self.model.steps
        kernels = [kernel] * (steps - start)
        for *_, x_next in self.walk(x, prompt_ids, kernels, start=start, of=steps, weights=weights, guidance=guidance):
            x = x_next
        return x

    def error(self, v: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """(B,): mean squared difference of two velocities at t, in the units of what the model predicts.

        For a model that predicts epsilon this is the epsilon error: published betas and loss scales refer to it
        (`flow.error_scale`).
        """
        error = flow_error(v, target)
        if self.model.prediction == "velocity":
            return error
        return error * like(error_scale(self.path, t, self.model.prediction), error)

    def errors(self, x0: Tensor, prompt_ids: Tensor, t: Tensor, eps: Tensor, *weights: str) -> list[Tensor]:
        """Denoising error of x0 (B, C, h, w) noised to t (B,) by eps, under each set of weights; each (B,)."""
        x, target = mix(self.path, x0, eps, t)
        return [self.error(self.velocity(x, t, prompt_ids, weights=name), target, t) for name in weights]

    # Rewards

    def score(self, x0: Tensor, prompt_ids: Tensor) -> Tensor:
        """(B,): rewards of the images that x0 decodes to; NaN where an image could not be scored, which is counted."""
        return self.score_images(x0, prompt_ids)[0]

    def score_images(self, x0: Tensor, prompt_ids: Tensor) -> tuple[Tensor, Images]:
        """The rewards (B,) of `score`, and the pixels (B, H, W, 3) that were scored.

        Decoded again in another batch, the pixels could differ: the last digits of a product depend on its shape.
        """
        assert not self._computed_elsewhere, "a method never scores inside `turn`"
        self._charge_scoring(len(x0))
        images = render(self.model.decode, x0.detach())
        return self._reward(self._start_scoring(images, prompt_ids).result()), images.pixels

    @torch.no_grad()
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
        """Draw prompts, sample a group of images for each, and score them while the next ones are sampled.

        Args:
            prompts: number of prompts P.
            group: images a prompt G.
            steps: 0 is the protocol's number.
            weights: as in `velocity`.
            guidance: None is the protocol's.
            kernel: of every step.
        """
        prompt_ids = self.prompts(prompts)
        image_ids = prompt_ids.repeat_interleave(group)
        noise = self.noise(len(image_ids))
        x0: list[Tensor] = []
        pending: list[list[Future[TimedScores]]] = []
        for k, rows in enumerate(torch.arange(len(image_ids)).split(self.rows)):
            start, ids = noise[rows.to(noise.device)], image_ids[rows]
            with self.turn(k):
                x0.append(self.sample(start, ids, steps=steps, weights=weights, guidance=guidance, kernel=kernel))
                pending.append(self._submit(x0[-1], ids))
        self.processes.broadcast_parts(x0)
        reward = self._rewards(pending, prompts, group)
        return Groups(torch.cat(x0).unflatten(0, (prompts, group)), prompt_ids, reward)

    @torch.no_grad()
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
        """Draw prompts, take the kernels' steps for a group of each, score the ends; (kept transitions, rewards (P, G)).

        The advantages are 0 until `spec.assign_advantages` gives them.

        Args:
            prompts: number of prompts P.
            group: images a prompt G.
            kernels: one for each step.
            keep: numbers of the steps that are kept; None keeps the stochastic ones.
            times: (len(kernels) + 1,), another grid than the model's.
            drop: log-probabilities in Flow-CPS's form (`flow.Step.logp`).
            shared: one initial noise for the whole group.
            weights: as in `velocity`.
            guidance: None is the protocol's.

        Raises:
            ValueError: when a step without noise is to be kept: it has no log-probability.
        """
        keep = [i for i, kernel in enumerate(kernels) if stochastic(kernel)] if keep is None else keep
        if not keep or not all(0 <= i < len(kernels) and stochastic(kernels[i]) for i in keep):
            raise ValueError(f"steps {list(keep)} cannot be kept: a step without noise has no log-probability")
        prompt_ids = self.prompts(prompts)
        image_ids = prompt_ids.repeat_interleave(group)
        noise = self.noise(prompts).repeat_interleave(group, 0) if shared else self.noise(len(image_ids))
        step_transitions: list[Transitions] = []
        smallest_std: list[Tensor] = []
        pending: list[list[Future[TimedScores]]] = []
        for k, rows in enumerate(torch.arange(len(image_ids)).split(self.rows)):
            x_next = start = noise[rows.to(noise.device)]
            ids = image_ids[rows]
            with self.turn(k):
                steps = self.walk(start, ids, kernels, times=times, weights=weights, guidance=guidance)
                for i, x, t, s, step, x_next in steps:
                    if i in keep:
                        smallest_std.append(step.std.amin())
                        logp = step.logp(x_next, drop)
                        step_transitions.append(
                            Transitions(x, t, s, x_next, step.mean, logp, torch.zeros_like(t), ids, rows)
                        )
                pending.append(self._submit(x_next, ids))
        if not drop and min(read_numbers(smallest_std)) <= 0:
            raise ValueError("a deterministic step (std = 0) has no density")
        step_transitions = self._exchanged(step_transitions, len(keep))
        reward = self._rewards(pending, prompts, group)
        return Transitions(
            *(torch.cat([getattr(m, f.name) for m in step_transitions]) for f in fields(Transitions))
        ), reward

    @torch.no_grad()
    def trees(
        self,
        prompts: int,
        plan: TreePlan,
        *,
        seeds: int = 1,
        weights: str = "policy",
        guidance: float | None = None,
    ) -> tuple[Branchings, Tensor]:
        """Draw prompts, grow `seeds` trees for each and score their images; (branchings, rewards (R, L, S)).

        Args:
            prompts: number of prompts.
            plan: branches, grid and strides of a tree.
            seeds: trees a prompt, each from an initial noise of its own; R = prompts * seeds.
            weights: as in `velocity`.
            guidance: None is the protocol's.
        """
        prompt_ids = self.prompts(prompts).repeat_interleave(seeds)
        noise = self.noise(len(prompt_ids))
        grid = self.model.times(plan.steps).to(noise.device)
        how = NetworkPass(weights, self.model.guidance if guidance is None else guidance, role="rollout", merged=True)
        grown: list[Branchings] = []
        pending: list[list[Future[TimedScores]]] = []
        for k, trees in enumerate(torch.arange(len(prompt_ids)).split(max(1, self.rows // plan.images))):
            sampler = Sampler(self.path, partial(self._velocities, how=how), self.noise)
            with self.turn(k):
                branchings, x0 = grow(sampler, noise[trees.to(noise.device)], prompt_ids[trees], grid, plan)
                grown.append(numbered(branchings, int(trees[0]), plan.leaves))
                pending.append(self._submit(x0.flatten(0, 2), prompt_ids[trees].repeat_interleave(plan.images)))
        for name in ("x", "to", "logp"):
            self.processes.broadcast_parts([getattr(part, name) for part in grown])
        reward = self._rewards(pending, len(prompt_ids), plan.images).unflatten(1, (plan.leaves, len(plan.strides)))
        return stack(grown), reward

    def _velocities(self, x: Tensor, t: Tensor, prompt_ids: Tensor, how: NetworkPass) -> Tensor:
        """(B, C, h, w): velocities of any number of latents, `rows` of them at once."""
        parts = zip(x.split(self.rows), t.split(self.rows), prompt_ids.split(self.rows), strict=True)
        return torch.cat([self.charged_velocity(*part, how) for part in parts])

    def _exchanged(self, step_transitions: list[Transitions], steps: int) -> list[Transitions]:
        """The transitions with the tensors that other processes computed; `steps` of each part lie together."""
        for name in ("x", "to", "mean", "logp"):
            parts = [
                torch.stack([getattr(m, name) for m in step_transitions[i : i + steps]])
                for i in range(0, len(step_transitions), steps)
            ]
            self.processes.broadcast_parts(parts)
            columns = (column for part in parts for column in part)
            step_transitions = [
                replace(m, **{name: column}) for m, column in zip(step_transitions, columns, strict=True)
            ]
        return step_transitions

    # Preferences

    @torch.no_grad()
    def pairs(self, reference: str, n: int) -> Pairs:
        """Draw n pairs of a data set (`bench/training/pairs.py`) as latents, without repeats while there are enough.

        Its captions become prompts with ids behind the training prompts; `prompts` never draws them. What the set states its
        making cost is charged once a run, before the first draw: nfe under the role "data", its images, its reward calls. A
        row whose images turn out unreadable is counted and another one drawn.
        Raises UserError on a set that cannot serve, or that changed since this run began.
        """
        pair_set, first = self._open_pairs(reference)
        rows, images = self._draw_pairs(pair_set, reference, n)
        self._note_skipped(pair_set, self.bookkeeping[f"pairs/{reference}"]["bad"])
        stacked = np.stack(images, 1).reshape(2 * n, *images[0].shape[1:])  # the winners, then the losers
        flat = torch.from_numpy(stacked).permute(0, 3, 1, 2)
        x0 = torch.cat([self.model.latents(part.to(self.model.device) / 255) for part in flat.split(self.rows)])
        if not bool(x0.isfinite().all()):
            raise UserError(
                f"pairs {reference}: the model's autoencoder makes latents of its images that are not finite; try --precision bf16"
            )
        win, lose = x0.chunk(2)
        return Pairs(win, lose, torch.as_tensor(pair_set.caption[rows]) + first)

    def _draw_pairs(self, pair_set: PairSet, reference: str, n: int) -> tuple[list[int], list[Images]]:
        """n usable rows of a set, and the images (2, H, W, 3) of each; rows that cannot serve are remembered."""
        unusable: dict[str, str] = self.bookkeeping[f"pairs/{reference}"]["bad"]
        rows: list[int] = []
        images: list[Images] = []
        while len(rows) < n:
            before = len(rows)
            for row in permuted(len(pair_set), self._python_rng()):
                pair = unusable.get(str(row)) or pair_set.images(row, *self.model.image_size)
                if isinstance(pair, str):
                    unusable[str(row)] = pair
                else:
                    rows.append(row)
                    images.append(pair)
                if len(rows) == n:
                    break
            if len(rows) == before:
                raise UserError(
                    f"pairs {reference}: no usable pair: of its {len(pair_set)} rows no image could be used"
                )
        return rows, images

    def _open_pairs(self, reference: str) -> tuple[PairSet, int]:
        """A set and the id of its first caption; on the first use it is checked and what it cost is charged."""
        if reference not in self._sets:
            pair_set = open_pairs(reference)
            leaked = [caption for caption in pair_set.captions if fold_text(caption) in self.evaluation_texts]
            if leaked:
                raise UserError(
                    f"pairs {reference}: {len(leaked)} of its captions are evaluation prompts, such as {leaked[0]!r}"
                )
            memory = self.bookkeeping.get(f"pairs/{reference}")
            if memory is None:
                self.meter.charge_stated(pair_set.spent())
                self.bookkeeping[f"pairs/{reference}"] = {"sha256": pair_set.sha256, "bad": {}}
            elif memory["sha256"] != pair_set.sha256:
                raise UserError(f"pairs {reference}: the set changed since this run was begun; --fresh starts over")
            self._sets[reference] = pair_set, len(self.train_prompts) + len(self._captions)
            self._captions += [Prompt(caption) for caption in pair_set.captions]
        return self._sets[reference]

    def _note_skipped(self, pair_set: PairSet, unusable: dict[str, str]) -> None:
        skipped = pair_set.skipped + Counter(unusable.values())
        self.note("pairs/usable", len(pair_set) - len(unusable))
        self.note("pairs/skipped", skipped.total())
        if skipped:
            prefix = f"pairs {pair_set.reference}: skipped "
            reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()))
            others = [line for line in self.failures if not line.startswith(prefix)]
            total = len(pair_set) + pair_set.skipped.total()
            self.failures = [*others, f"{prefix}{skipped.total()} of {total}: {reasons}"][-20:]

    def _rewards(self, pending: Sequence[Sequence[Future[TimedScores]]], prompts: int, group: int) -> Tensor:
        """(P, G): the rewards of all parts; their statistics are noted."""
        parts = self.processes.exchange_objects([[future.result() for future in part] for part in pending])
        scored = [timed for part in parts for timed in part]
        reward = torch.cat([self._reward(timed) for timed in scored]).view(prompts, group)
        self.note("reward/mean", reward.nanmean())
        self.note("reward/spread", (reward - reward.nanmean(1, keepdim=True)).square().nanmean().sqrt())
        if self.aggregation != "sum":
            rewards = torch.cat([part_rewards(self.scorer, scores) for scores, _ in scored])
            reward = aggregate(self.aggregation, self.scorer, rewards.unflatten(0, (prompts, group))).to(reward)
        self.note("groups/informative", informative(reward).float().mean())
        return reward

    def affords(self, **each: int) -> int:
        """How many times this spend (nfe, images, reward_calls ...) still fits into the budget."""
        return self.meter.affords(**each)

    def _submit(self, x0: Tensor, prompt_ids: Tensor) -> list[Future[TimedScores]]:
        """Charge and start the scoring of images, `rows` of them at once; nothing where another process scores them."""
        self._charge_scoring(len(x0))
        parts = [] if self._computed_elsewhere else zip(x0.split(self.rows), prompt_ids.split(self.rows), strict=True)
        return [self._start_scoring(render(self.model.decode, latents.detach()), ids) for latents, ids in parts]

    def _charge_scoring(self, images: int) -> None:
        self.meter.charge_scorer(self.scorer.name, images, images=images)

    def _start_scoring(self, images: RenderedImages, prompt_ids: Tensor) -> Future[TimedScores]:
        while len(unscored := [future for future in self._submitted if not future.done()]) >= BATCHES_AHEAD:
            wait(unscored, return_when=FIRST_COMPLETED)
        # In the context of this call: whether the images are a part that processes divide.
        call = copy_context().run
        self._submitted.append(self._scoring.submit(call, timed_scores, self.scorer, images, self.texts(prompt_ids)))
        return self._submitted[-1]

    def _reward(self, timed: TimedScores) -> Tensor:
        """(B,): the reward metric; latency, errors and reasons are kept."""
        scores, seconds = timed
        value = scores.value[self.scorer.metrics[0]]
        self.meter.note_scorer(self.scorer.name, seconds, int(np.isnan(value).sum()))
        self.images_sent += len(value)
        self.images_scored += int(np.isfinite(value).sum())
        self.failures = [*self.failures, *scores.reasons.values()][-20:]
        return torch.as_tensor(value, dtype=torch.float32, device=self.model.device)

    # Numbers that a method reports

    def note(self, name: str, value: Tensor | float) -> None:
        """Report a number under a path such as `policy/ratio`; values of one iteration are averaged."""
        if not self._computed_elsewhere:
            self._notes[name].append(value.detach() if isinstance(value, Tensor) else value)

    def noted(self, name: str) -> list[Tensor | float]:
        """The values of one note since the last iteration, in this process."""
        return list(self._notes.get(name, []))

    def mean(self, name: str) -> float:
        """The mean of one note since the last iteration, over all processes; NaN where there is none."""
        values = [v for part in self.processes.gather(read_numbers(self._notes.get(name, []))) for v in part]
        return float(np.mean(values)) if values else float("nan")

    def notes(self) -> dict[str, float]:
        """The means of all notes since the last call, over all processes."""
        notes, self._notes = self._notes, defaultdict(list)
        numbers = iter(read_numbers([v for values in notes.values() for v in values]))
        parts = self.processes.gather({name: [next(numbers) for _ in values] for name, values in notes.items()})
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: float(np.mean([v for part in parts for v in part.get(name, [])])) for name in names}

    def drain(self) -> None:
        """Wait until everything that was charged is scored, also what nobody asks for any more."""
        wait(self._submitted)
        self._submitted.clear()
        self.settle_reward_gradients()

    def close(self) -> None:
        """Stop the scoring thread."""
        self._scoring.shutdown(wait=True, cancel_futures=True)


class WalkStep(NamedTuple):
    """One step of a walk: from x (B, C, h, w) at times t (B,) to x_next at s; `step` is the kernel's distribution."""

    x: Tensor
    t: Tensor
    s: Tensor
    step: Step
    x_next: Tensor


def walk(
    path: Path,
    velocity: Callable[[Tensor, Tensor, Kernel], Tensor],
    x: Tensor,
    grid: Tensor,
    kernels: Sequence[Kernel],
    noise: Callable[[int], Tensor] | None = None,
) -> Iterator[WalkStep]:
    """Take the kernels' steps along a time grid: the one sampler of training, search and evaluation.

    Args:
        path: between image and noise.
        velocity: (x (B, C, h, w), t (B,), the step's kernel) -> the model's velocity there (B, C, h, w).
        x: latents (B, C, h, w) at grid[0].
        grid: times (at least len(kernels) + 1,), falling; on the CPU, where reading one waits for nothing.
        kernels: one for each step.
        noise: n -> (n, C, h, w) standard normal; needed where a kernel is stochastic.
    """
    # The last estimate of x0 and its time, for the solver that has a memory.
    previous: tuple[Tensor, Tensor] | None = None
    ends, grid = grid.tolist(), grid.to(x.device)
    for i, kernel in enumerate(kernels):
        t, s = grid[i].expand(len(x)), grid[i + 1].expand(len(x))
        v = velocity(x, t, kernel)
        if kernel == dpm2 and previous is not None and ends[i + 1] > 0:
            step = dpm2.second(path, x, v, t, s, previous)
        else:
            step = kernel(path, x, v, t, s)
        previous = (split(path, x, v, t)[0], t) if kernel == dpm2 else None
        if stochastic(kernel):
            assert noise is not None, "a stochastic kernel draws noise"
            x_next = step.draw(noise(len(x)))
        else:
            x_next = step.mean
        yield WalkStep(x, t, s, step, x_next)
        x = x_next


def read_numbers(values: Sequence[Tensor | float]) -> list[float]:
    """The values of numbers, those on a device in one copy: each copy waits until the device has done all before."""
    tensors = [value.detach().reshape(()) for value in values if isinstance(value, Tensor)]
    # float32 and half precision are exact in float64, and in float32 on a GPU without it.
    read = iter(torch.stack([precise(tensor) for tensor in tensors]).tolist() if tensors else [])
    return [next(read) if isinstance(value, Tensor) else float(value) for value in values]


def timed_scores(scorer: Scorer, images: RenderedImages, prompts: Sequence[Prompt]) -> TimedScores:
    """Score images; whatever the scorer does wrong becomes NaN with a reason. Returns scores and latency in seconds.

    The latency is that of this call. Where several calls are made at once (`calls_at_once`), their latencies overlap.
    """
    start = time.perf_counter()
    scores = ask_rendered(scorer, images, prompts)
    return scores, time.perf_counter() - start
