"""The rig: the one metered door through which a method reaches model, prompts and rewards.

Everything behind it is charged before it is spent, so two methods cannot spend differently unseen.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..budget import Meter
from ..errors import UserError
from ..flow import Kernel, Path, Step, dpm2, error_scale, like, mix, ode, split
from ..losses import flow_error, informative
from ..process_group import ProcessGroup
from ..scoring.scorers import ask
from ..spec import Cond, Groups, Images, Model, Pairs, Prompt, Scorer, Scores, Transitions, fold_text
from .pairs import PairSet, open_pairs

Answer = tuple[Scores, float]  # what a scorer said, and the seconds it took
SINGLE_PROCESS = ProcessGroup()
CAPTIONS = 1024  # embeddings kept for the captions of pairs, besides those of the training book


class Rig:
    """What a method may touch. Its memory is `state` (tensors and numbers), its randomness `noise` and its kin."""

    def __init__(
        self,
        model: Model,
        book: Sequence[Prompt],
        scorer: Scorer,
        meter: Meter,
        *,
        seed: int = 0,
        rows: int = 32,
        processes: ProcessGroup = SINGLE_PROCESS,
    ):
        """book: the training prompts; scorer: what a method may optimise; rows: images sampled at once."""
        self.model, self.book, self.scorer, self.meter, self.rows = model, book, scorer, meter, rows
        self.processes = processes
        self._stands_by = False  # the part of the work at hand is another process's: charged here, computed there
        self.rng = torch.Generator().manual_seed(seed)
        self.state: dict[str, Any] = {}
        self.iteration = 0
        self.barren = 0  # iterations in a row that brought nothing to learn from
        self.failures: list[str] = []  # why images could not be scored, the last few
        self._cache: dict[int, Cond] = {}  # prompt -> its embedding, made once
        self.sealed: frozenset[str] = frozenset()  # folded texts that judge: no data set may teach them
        self._captions: list[Prompt] = []  # of sets of pairs: prompts with handles from len(book) on
        self._size: tuple[int, int] | None = None  # of an image in pixels, height and width
        self._sets: dict[str, tuple[PairSet, int]] = {}  # opened sets of pairs, with the handle of their first caption
        self._keys: Tensor | None = None  # of the rows that a loss is being computed on
        self._draws = 0
        self._notes: dict[str, list[Tensor | float]] = defaultdict(list)
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="scorer")  # scores while the next images are sampled

    @property
    def path(self) -> Path:
        return self.model.path

    # Randomness. Inside a loss every row has a key of its own, so that splitting a batch, over micro-batches or over
    # devices, changes no draw; elsewhere rows take their keys from rng in order.

    def prompts(self, n: int) -> Tensor:
        """(n,): which prompts, without repeats while there are enough; the handle other calls take in place of text."""
        book = len(self.book)
        return torch.cat([torch.randperm(book, generator=self.rng) for _ in range(-(-n // book))])[:n]

    def noise(self, n: int) -> Tensor:
        """(n, C, h, w) standard normal, on the model's device."""
        return self._draw(n, lambda g: torch.randn(self.model.shape, generator=g)).to(self.model.device)

    def normal(self, n: int) -> Tensor:
        """(n,) standard normal."""
        return self._draw(n, lambda g: torch.randn((), generator=g)).to(self.model.device)

    def uniform(self, n: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(n,) uniform in [low, high)."""
        return low + (high - low) * self._draw(n, lambda g: torch.rand((), generator=g)).to(self.model.device)

    def _draw(self, n: int, one: Any) -> Tensor:
        if self._keys is None:
            keys = torch.randint(2**62, (n,), generator=self.rng).tolist()
        else:
            rows = self._keys.tolist()
            if n % len(rows):
                raise ValueError(f"{n} draws for {len(rows)} rows: a loss draws the same number for each of its rows")
            self._draws += 1
            keys = [
                hash((key, self._draws, i)) for key in rows for i in range(n // len(rows))
            ]  # ints hash the same anywhere
        generator = torch.Generator()
        return torch.stack([one(generator.manual_seed((key ^ (key >> 31)) & 0xFFFFFFFF)) for key in keys])

    @contextmanager
    def keyed(self, keys: Tensor) -> Generator[None]:
        """Within: the rows of the batch at hand draw from these keys (rows,)."""
        self._keys, self._draws = keys, 0
        try:
            yield
        finally:
            self._keys = None

    @contextmanager
    def turn(self, part: int) -> Generator[bool]:
        """Within: part number `part` of a piece of work; yields whether this process computes it or stands by."""
        self._stands_by = not self.processes.owns(part)
        try:
            yield not self._stands_by
        finally:
            self._stands_by = False

    # The model

    def texts(self, prompt_ids: Tensor) -> list[Prompt]:
        return [self._prompt(i) for i in prompt_ids.tolist()]

    def _prompt(self, i: int) -> Prompt:
        return self.book[i] if i < len(self.book) else self._captions[i - len(self.book)]

    def _embed(self, prompt_ids: Tensor) -> Cond:
        index = prompt_ids.tolist()
        for i in dict.fromkeys(index):
            if i not in self._cache:  # one at a time: in another company, after a resume, its last bits would differ
                self._cache[i] = {key: value[0] for key, value in self.model.encode([self._prompt(i).text]).items()}
        first = self._cache[index[0]]
        return {key: torch.stack([self._cache[i][key] for i in index]) for key in first}

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
        """(B, C, h, w), (B,) -> (B, C, h, w). Weights other than "policy" carry no gradient.

        by: live | ref | a copy that model.blend made. detach: no gradient through the unconditional branch of guidance.
        guidance None is what one evaluation gives: none, or the protocol's where guidance is an input of the network.
        Charged: 1 a row, 3 where a backward follows, doubled by guidance where that takes a second evaluation.
        """
        if guidance is None:
            guidance = self.model.guidance if self.model.guided_cost == 1 else 1.0
        grad = torch.is_grad_enabled() and weights == "policy"
        each = (3 if grad else 1) * (1 if guidance == 1.0 else self.model.guided_cost)
        self.meter.charge(nfe=len(x) * each, role=role or ("policy" if grad else weights))
        if self._stands_by:
            return torch.zeros_like(x)
        with torch.set_grad_enabled(grad):
            return self.model.velocity(x, t, self._embed(prompt_ids), guidance=guidance, weights=weights, detach=detach)

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
        """One transition of the walk, charged as one velocity."""
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
        """Walk the kernels from times(of)[start] on; yields (i, x, t, s, step, x_next) for each.

        `of` is the number of steps of the whole grid; 0 lets the walk end at t = 0. times (start + len(kernels) + 1,) is a
        grid of one's own instead. guidance None is the protocol's.
        """
        grid = (self.model.times(of or start + len(kernels)) if times is None else times).to(x.device)
        guidance = self.model.guidance if guidance is None else guidance
        before: tuple[Tensor, Tensor] | None = (
            None  # the last estimate of x0 and its time, for the solver that has a memory
        )
        for i, kernel in enumerate(kernels, start):
            t, s = grid[i].expand(len(x)), grid[i + 1].expand(len(x))
            v = self.velocity(x, t, prompt_ids, weights=weights, guidance=guidance, role="rollout")
            if kernel == dpm2 and before is not None and float(grid[i + 1]) > 0:
                step = dpm2.second(self.path, x, v, t, s, before)
            else:
                step = kernel(self.path, x, v, t, s)
            before = (split(self.path, x, v, t)[0], t) if kernel == dpm2 else None
            to = step.draw(self.noise(len(x))) if stochastic(kernel) else step.mean
            yield i, x, t, s, step, to
            x = to

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
        """(B, C, h, w): the clean latent that the kernel, the ODE by default, reaches from x; 0 steps is the protocol's number."""
        steps = steps or self.model.steps
        end = x
        for *_, to in self.walk(
            x, prompt_ids, [kernel] * (steps - start), start=start, of=steps, weights=weights, guidance=guidance
        ):
            end = to
        return end

    def error(self, v: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """(B,): mean squared difference of two velocities at t, in the units of what the model predicts.

        An epsilon model's is the epsilon error: published betas and loss scales refer to it (`flow.error_scale`).
        """
        error = flow_error(v, target)
        return (
            error
            if self.model.prediction == "velocity"
            else error * like(error_scale(self.path, t, self.model.prediction), error)
        )

    def errors(self, x0: Tensor, prompt_ids: Tensor, t: Tensor, eps: Tensor, *weights: str) -> list[Tensor]:
        """Denoising error of x0 (B, C, h, w) noised to t (B,) by eps, under each set of weights; each (B,)."""
        x, target = mix(self.path, x0, eps, t)
        return [self.error(self.velocity(x, t, prompt_ids, weights=name), target, t) for name in weights]

    # Rewards

    def score(self, x0: Tensor, prompt_ids: Tensor) -> Tensor:
        """(B,) rewards of the images that x0 decodes to; NaN where an image could not be scored, counted."""
        return self.score_images(x0, prompt_ids)[0]

    def score_images(self, x0: Tensor, prompt_ids: Tensor) -> tuple[Tensor, Images]:
        """The same rewards and the (B, H, W, 3) pixels that were scored: decoded again in another batch, they would differ."""
        assert not self._stands_by, "nobody stands by where a method asks for itself"
        self._charge_scoring(len(x0))
        images = to_uint8(self.model.decode(x0))
        return self._take(self._submit(images, prompt_ids).result()), images

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
        """Draw prompts, sample a group for each, by the ODE unless told otherwise, and score it, the scorer at work beside the sampler."""
        prompt_ids = self.prompts(prompts)
        each = prompt_ids.repeat_interleave(group)
        noise = self.noise(len(each))
        x0: list[Tensor] = []
        asked: list[Future[Answer] | None] = []
        for k, part in enumerate(torch.arange(len(each)).split(self.rows)):
            start = noise[part.to(noise.device)]
            with self.turn(k):
                x0.append(
                    self.sample(start, each[part], steps=steps, weights=weights, guidance=guidance, kernel=kernel)
                )
                asked.append(self._ask(x0[-1], each[part]))
        self.processes.broadcast_parts(x0)
        reward = self._rewards(asked, prompts, group)
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
        """Draw prompts, walk a group for each along the kernels, score the ends; (kept transitions, reward (P, G)).

        keep: which steps are kept, the stochastic ones unless told otherwise. drop: log-probabilities in Flow-CPS's form
        (`flow.Step.logp`). shared: one initial noise for the whole group. The advantages are 0 until `spec.credit` gives them.
        Raises ValueError when a step without noise is to be kept: it has no log-probability.
        """
        keep = [i for i, kernel in enumerate(kernels) if stochastic(kernel)] if keep is None else keep
        if not keep or not all(0 <= i < len(kernels) and stochastic(kernels[i]) for i in keep):
            raise ValueError(f"steps {list(keep)} cannot be kept: a step without noise has no log-probability")
        prompt_ids = self.prompts(prompts)
        each = prompt_ids.repeat_interleave(group)
        noise = self.noise(prompts).repeat_interleave(group, 0) if shared else self.noise(len(each))
        kept: list[Transitions] = []
        asked: list[Future[Answer] | None] = []
        for k, part in enumerate(torch.arange(len(each)).split(self.rows)):
            to = start = noise[part.to(noise.device)]
            with self.turn(k):
                for i, x, t, s, step, to in self.walk(
                    start, each[part], kernels, times=times, weights=weights, guidance=guidance
                ):
                    if i in keep:
                        kept.append(
                            Transitions(
                                x, t, s, to, step.mean, step.logp(to, drop), torch.zeros_like(t), each[part], part
                            )
                        )
                asked.append(self._ask(to, each[part]))
        for name in ("x", "to", "mean", "logp"):
            walked = [
                torch.stack([getattr(m, name) for m in kept[i : i + len(keep)]]) for i in range(0, len(kept), len(keep))
            ]
            self.processes.broadcast_parts(walked)
            kept = [replace(m, **{name: one}) for m, one in zip(kept, (o for w in walked for o in w), strict=True)]
        reward = self._rewards(asked, prompts, group)
        return Transitions(*(torch.cat([getattr(m, f.name) for m in kept]) for f in fields(Transitions))), reward

    # Preferences

    @torch.no_grad()
    def pairs(self, reference: str, n: int) -> Pairs:
        """n pairs of a data set (`bench/training/pairs.py`), without repeats while there are enough, as latents.

        Its captions become prompts behind the training book; `prompts` never draws them. What the set says its making cost is
        charged once a run, before the first draw: nfe under the role "data", its images, its reward calls. A row whose images
        turn out unreadable is counted and another one drawn.
        Raises UserError on a set that cannot serve, or that is not the one this run began with.
        """
        found, first = self._opened(reference)
        if self._size is None:
            blank = self.model.decode(torch.zeros(1, *self.model.shape, device=self.model.device))
            self._size = blank.shape[2], blank.shape[3]
        height, width = self._size
        bad: dict[str, str] = self.state[f"pairs/{reference}"]["bad"]
        rows: list[int] = []
        images: list[Images] = []  # (2, H, W, 3) each
        while len(rows) < n:
            before = len(rows)
            for row in torch.randperm(len(found), generator=self.rng).tolist():
                two = bad.get(str(row)) or found.images(row, height, width)
                if isinstance(two, str):
                    bad[str(row)] = two
                else:
                    rows.append(row)
                    images.append(two)
                if len(rows) == n:
                    break
            if len(rows) == before:
                raise UserError(f"pairs {reference}: no usable pair: of its {len(found)} rows no image could be used")
        self._tell_skipped(found, bad)
        own = {i: cond for i, cond in self._cache.items() if i < len(self.book)}
        if len(self._cache) > len(own) + CAPTIONS:  # a set may have more captions than memory holds embeddings
            self._cache = own
        stacked = np.stack(images, 1).reshape(2 * n, height, width, 3)  # the winners, then the losers
        flat = torch.from_numpy(stacked).permute(0, 3, 1, 2)
        x0 = [self.model.latents(part.to(self.model.device) / 255) for part in flat.split(self.rows)]
        win, lose = torch.cat(x0).chunk(2)
        return Pairs(win, lose, torch.as_tensor(found.caption[rows]) + first)

    def _opened(self, reference: str) -> tuple[PairSet, int]:
        if reference not in self._sets:
            found = open_pairs(reference)
            taught = [caption for caption in found.captions if fold_text(caption) in self.sealed]
            if taught:
                raise UserError(
                    f"pairs {reference}: {len(taught)} of its captions are prompts that judge, such as {taught[0]!r}"
                )
            memory = self.state.get(f"pairs/{reference}")
            if memory is None:
                spent = found.spent()
                self.meter.charge(nfe=spent.get("nfe", 0), images=spent.get("images", 0), role="data")
                if spent.get("reward_calls"):
                    self.meter.charge_scorer("data", spent["reward_calls"])
                self.state[f"pairs/{reference}"] = {"sha256": found.sha256, "bad": {}}
            elif memory["sha256"] != found.sha256:
                raise UserError(f"pairs {reference}: the set changed since this run was begun; --fresh starts over")
            self._sets[reference] = found, len(self.book) + len(self._captions)
            self._captions += [Prompt(caption) for caption in found.captions]
        return self._sets[reference]

    def _tell_skipped(self, found: PairSet, bad: dict[str, str]) -> None:
        skipped = found.skipped + Counter(bad.values())
        self.note("pairs/usable", len(found) - len(bad))
        self.note("pairs/skipped", skipped.total())
        if skipped:
            begins = f"pairs {found.reference}: skipped "
            why = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()))
            others = [line for line in self.failures if not line.startswith(begins)]
            self.failures = [*others, f"{begins}{skipped.total()} of {len(found) + found.skipped.total()}: {why}"][-20:]

    def _rewards(self, asked: Sequence[Future[Answer] | None], prompts: int, group: int) -> Tensor:
        """(P, G): what the scorer answered, and its statistics noted."""
        answers = self.processes.exchange_objects([future.result() if future else None for future in asked])
        reward = torch.cat([self._take(answer) for answer in answers]).view(prompts, group)
        self.note("reward/mean", reward.nanmean())
        self.note("reward/spread", (reward - reward.nanmean(1, keepdim=True)).square().nanmean().sqrt())
        self.note("groups/informative", informative(reward).float().mean())
        return reward

    def affords(self, **each: int) -> int:
        """How many times this spend (nfe, images, reward_calls ...) still fits into the budget."""
        return self.meter.affords(**each)

    def _ask(self, x0: Tensor, prompt_ids: Tensor) -> Future[Answer] | None:
        """None where another process asks."""
        self._charge_scoring(len(x0))
        return None if self._stands_by else self._submit(to_uint8(self.model.decode(x0)), prompt_ids)

    def _charge_scoring(self, images: int) -> None:
        self.meter.charge(images=images)
        self.meter.charge_scorer(self.scorer.name, images)

    def _submit(self, images: Images, prompt_ids: Tensor) -> Future[Answer]:
        return self._asking.submit(timed_scores, self.scorer, images, self.texts(prompt_ids))

    def _take(self, answer: Answer) -> Tensor:
        scores, seconds = answer
        value = scores.value[self.scorer.metrics[0]]
        self.meter.note_scorer(self.scorer.name, seconds, int(np.isnan(value).sum()))
        self.failures = [*self.failures, *scores.reasons.values()][-20:]
        return torch.as_tensor(value, dtype=torch.float32, device=self.model.device)

    # What a method wants seen

    def note(self, name: str, value: Tensor | float) -> None:
        """Report a number under a path such as `policy/ratio`; values of one iteration are averaged."""
        if not self._stands_by:
            self._notes[name].append(value.detach() if isinstance(value, Tensor) else value)

    def mean(self, name: str) -> float:
        """The mean of one note since the last iteration, over all processes; NaN where there is none."""
        values = [v for part in self.processes.gather([float(v) for v in self._notes.get(name, [])]) for v in part]
        return float(np.mean(values)) if values else float("nan")

    def notes(self) -> dict[str, float]:
        """The means since the last call."""
        taken, self._notes = self._notes, defaultdict(list)
        parts = self.processes.gather({name: [float(v) for v in values] for name, values in taken.items()})
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: float(np.mean([v for part in parts for v in part.get(name, [])])) for name in names}

    def close(self) -> None:
        self._asking.shutdown(wait=True, cancel_futures=True)


def stochastic(kernel: Kernel) -> bool:
    """Does a step of this kernel draw noise?"""
    return kernel not in (ode, dpm2)


def to_uint8(images: Tensor) -> Images:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8, rounded as a PNG of the pipeline would be."""
    return (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()


def timed_scores(scorer: Scorer, images: Images, prompts: Sequence[Prompt]) -> Answer:
    """Ask a scorer; whatever it does wrong becomes NaN with a reason. Returns the scores and the seconds they took."""
    began = time.perf_counter()
    scores = ask(scorer, images, prompts)
    return scores, time.perf_counter() - began
