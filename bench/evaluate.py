"""The judge: the same prompts, the same noise and the same scorers for every method and for the base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from . import stats
from .errors import UserError
from .flow import ode
from .rig import judged, pixels
from .spec import Images, Model, Prompt, Scorer, Scores, Task, fold_text

COLUMNS = ("prompt", "ordinal", "text", "scorer", "metric", "value", "reason", "note")
INVALID = 0.005  # share of images that could not be scored above which a row is invalid
Asked = tuple[int, int]  # which prompt, and the ordinal of the image among those of the prompt


def noise(prompt: str, ordinal: int, seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal (C, h, w) that depends on nothing but (prompt, image ordinal, evaluation seed)."""
    digest = hashlib.sha256(f"{seed}\n{ordinal}\n{prompt}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")))


def asked(prompts: Sequence[Prompt], images: int) -> list[Asked]:
    """Every image that a look asks for, in order."""
    return [(i, o) for i in range(len(prompts)) for o in range(images)]


def starts(model: Model, prompts: Sequence[Prompt], part: Sequence[Asked], seed: int) -> Tensor:
    """(B, C, h, w): the noise of these images, on the model's device."""
    return torch.stack([noise(prompts[i].text, o, seed, model.shape) for i, o in part]).to(model.device)


@torch.no_grad()
def protocol(model: Model, x: Tensor, prompts: Sequence[Prompt], by: str = "live") -> Tensor:
    """(B, C, h, w): the clean latent that the protocol's ODE reaches from noise x, one prompt a row."""
    times = model.times(model.steps).to(model.device)
    # Each text by itself, as the rig does it: in another company the last bits of an embedding would differ.
    each = {text: model.encode([text]) for text in dict.fromkeys(p.text for p in prompts)}
    cond = {key: torch.cat([each[p.text][key] for p in prompts]) for key in each[prompts[0].text]}
    for t, s in zip(times[:-1], times[1:], strict=True):
        v = model.velocity(x, t.expand(len(x)), cond, guidance=model.guidance, by=by)
        x = ode(model.path, x, v, t.expand(len(x)), s.expand(len(x))).mean
    return x


@dataclass(frozen=True)
class Judged:
    """Scores by prompt, image ordinal, scorer and metric, and the first images themselves."""

    table: pd.DataFrame  # COLUMNS, one row a (prompt, ordinal, scorer, metric)
    images: Images  # (K, H, W, 3) of the first K (prompt, ordinal), for people to look at

    def matrix(self, key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(prompts, images a prompt) of one `scorer/metric`."""
        scorer, _, metric = key.partition("/")
        rows = self.table[(self.table.scorer == scorer) & (self.table.metric == metric)]
        return rows.pivot(index="prompt", columns="ordinal", values="value").to_numpy(dtype=np.float64)

    def keys(self) -> list[str]:
        """The `scorer/metric` there are, in order of appearance."""
        return list(dict.fromkeys(self.table.scorer + "/" + self.table.metric))

    def texts(self) -> list[str]:
        """What was asked for in each of `images`."""
        rows = self.table.loc[~self.table.duplicated(["prompt", "ordinal"])]
        return [str(text) for text in rows.text.iloc[: len(self.images)]]

    def reasons(self) -> list[str]:
        """Why images could not be scored, each once."""
        return [str(why) for why in dict.fromkeys(self.table.reason) if why]

    def notes(self, scorer: str) -> list[str]:
        """What a scorer saw in each of `images`."""
        rows: pd.DataFrame = self.table.loc[self.table.scorer == scorer]
        rows = rows.loc[~rows.duplicated(["prompt", "ordinal"])]
        return [str(note) for note in rows.note.iloc[: len(self.images)]]


@torch.no_grad()
def judge(
    model: Model,
    prompts: Sequence[Prompt],
    scorers: Sequence[Scorer],
    *,
    images: int,
    seed: int,
    rows: int = 32,
    by: str = "live",
    keep: int = 32,
    advance: Callable[[int], None] = lambda _: None,
    draw: Callable[[Tensor, Sequence[Asked]], Tensor] | None = None,
) -> Judged:
    """Sample `images` a prompt and let every scorer score them, each in a thread of its own.

    by: which weights are judged. keep: how many images to return. advance: told how many images are done.
    draw: how clean latents come from the noise (B, C, h, w) of these images; the protocol's ODE unless told otherwise.
    """
    every = asked(prompts, images)
    kept: list[Images] = []
    threads = {scorer.name: ThreadPoolExecutor(1, thread_name_prefix=scorer.name) for scorer in scorers}
    answers: list[tuple[list[Asked], Scorer, Future[tuple[Scores, float]]]] = []
    try:
        for start in range(0, len(every), rows):
            part = every[start : start + rows]
            mine = [prompts[i] for i, _ in part]
            x = starts(model, prompts, part, seed)
            x = protocol(model, x, mine, by) if draw is None else draw(x, part)
            pictures = pixels(model.decode(x))
            kept.append(pictures[: max(0, keep - start)])
            answers += [
                (part, scorer, threads[scorer.name].submit(judged, scorer, pictures, mine)) for scorer in scorers
            ]
            advance(len(part))
        table = _table(prompts, [(part, scorer, future.result()[0]) for part, scorer, future in answers])
    finally:
        for thread in threads.values():
            thread.shutdown(wait=True, cancel_futures=True)
    return Judged(table, np.concatenate(kept))


def _table(prompts: Sequence[Prompt], answers: Iterable[tuple[list[Asked], Scorer, Scores]]) -> pd.DataFrame:
    rows = [
        (
            i,
            o,
            prompts[i].text,
            scorer.name,
            metric,
            float(scores.value[metric][row]),
            scores.reasons.get(row, ""),
            scores.notes[row] if scores.notes else "",
        )
        for part, scorer, scores in answers
        for metric in scorer.metrics
        for row, (i, o) in enumerate(part)
    ]
    order = {name: k for k, name in enumerate(dict.fromkeys(row[3] for row in rows))}
    rows.sort(key=lambda row: (order[row[3]], row[4], row[0], row[1]))
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))


# Numbers from scores: no estimate without an interval


def estimates(judged: Judged) -> dict[str, dict[str, Any]]:
    """`scorer/metric` -> {mean, ci}: over prompts, images of a prompt clustered."""
    return {key: _number(stats.mean_ci(judged.matrix(key))) for key in judged.keys()}


def differences(before: Judged, after: Judged) -> dict[str, dict[str, Any]]:
    """`scorer/metric` -> {mean, ci, p, mde}: after minus before on the same prompts and noise, paired by prompt."""
    found: dict[str, dict[str, Any]] = {}
    for key in after.keys():
        if key in before.keys():
            pair = stats.paired(before.matrix(key), after.matrix(key))
            found[key] = {**_number(pair), "p": pair.p, "mde": pair.mde}
    return found


def _number(estimate: Any) -> dict[str, Any]:
    return {"mean": estimate.mean, "ci": [estimate.low, estimate.high], "n": estimate.n}


def hacked(delta: Mapping[str, Mapping[str, Any]], training: str, held_out: Sequence[str]) -> bool:
    """The training scorer rises for sure while no held-out scorer does (design: the hack flag). training: `scorer/metric`."""
    metric = training.partition("/")[2]
    others = [delta[key] for key in (_counterpart(delta, name, metric) for name in held_out) if key]
    rises = delta[training]["ci"][0] > 0
    return bool(rises and others and not any(other["ci"][0] > 0 for other in others))


def _counterpart(delta: Mapping[str, Any], scorer: str, metric: str) -> str | None:
    """The scorer's metric of that name, else the first it has."""
    own = [key for key in delta if key.startswith(f"{scorer}/")]
    return f"{scorer}/{metric}" if f"{scorer}/{metric}" in own else next(iter(own), None)


def invalid(table: pd.DataFrame) -> bool:
    """More than 0.5 % of the images of some scorer could not be scored."""
    share = table.groupby(["scorer", "metric"]).value.apply(lambda column: column.isna().mean())
    return bool((share > INVALID).any())


# Prompts


def fold(prompt: Prompt) -> str:
    """What makes two prompts the same for a split: case, punctuation and spacing do not."""
    return fold_text(str(prompt.meta.get("target") or prompt.text))


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """sha256 over the texts in order: numbers on different prompts never share a column."""
    return hashlib.sha256("\n".join(p.text for p in prompts).encode()).hexdigest()


def refuse_overlap(task: Task, domain: str) -> None:
    """Raise UserError when a test or validation prompt is also one that is trained on."""
    train = {fold(p): p.text for p in task.prompts("train", domain)}
    test = {fold(p): p.text for p in task.prompts("test", domain)}
    for name, these, those in (
        ("test prompt stands in the train split", test, train),
        (
            "validation prompt stands in the train split",
            {fold(p): p.text for p in task.prompts("validation", domain)},
            train,
        ),
        (
            "validation prompt stands in the test split",
            {fold(p): p.text for p in task.prompts("validation", domain)},
            test,
        ),
    ):
        both = sorted(these.keys() & those.keys())
        if both:
            shown = "; ".join(repr(these[key]) for key in both[:3])
            raise UserError(f"task {task.name}: a {name} ({len(both)} in all): {shown}")
