"""The judge: the same prompts, the same noise and the same scorers for every method and for the base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..errors import UserError
from ..flow import ode
from ..process_group import ProcessGroup
from ..spec import Embedder, Images, Model, Prompt, Scorer, Scores, Task, fold_text
from ..stats import intervals
from ..stats.distances import cmmd_ci, paired, siblings
from ..training.rig import SINGLE_PROCESS, timed_scores, to_uint8
from .record import INVALID

COLUMNS = ("prompt", "ordinal", "text", "stratum", "scorer", "metric", "value", "reason", "note")
Vectors = np.ndarray[Any, np.dtype[np.float32]]
Embedded = tuple[Vectors, dict[int, str]]  # (images, D), and the rows that failed with their reasons
ImageIndex = tuple[int, int]  # which prompt, and the ordinal of the image among those of the prompt


def noise(prompt: str, ordinal: int, seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal (C, h, w) that depends on nothing but (prompt, image ordinal, evaluation seed)."""
    digest = hashlib.sha256(f"{seed}\n{ordinal}\n{prompt}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")))


def image_indices(prompts: Sequence[Prompt], images: int) -> list[ImageIndex]:
    """Every image that a look asks for, in order."""
    return [(i, o) for i in range(len(prompts)) for o in range(images)]


def initial_noise(model: Model, prompts: Sequence[Prompt], part: Sequence[ImageIndex], seed: int) -> Tensor:
    """(B, C, h, w): the noise of these images, on the model's device."""
    return torch.stack([noise(prompts[i].text, o, seed, model.shape) for i, o in part]).to(model.device)


@torch.no_grad()
def sample_protocol(model: Model, x: Tensor, prompts: Sequence[Prompt], weights: str = "policy") -> Tensor:
    """(B, C, h, w): the clean latent that the protocol's ODE reaches from noise x, one prompt a row."""
    times = model.times(model.steps).to(model.device)
    # Each text by itself, as the rig does it: in another company the last bits of an embedding would differ.
    each = {text: model.encode([text]) for text in dict.fromkeys(p.text for p in prompts)}
    cond = {key: torch.cat([each[p.text][key] for p in prompts]) for key in each[prompts[0].text]}
    for t, s in zip(times[:-1], times[1:], strict=True):
        v = model.velocity(x, t.expand(len(x)), cond, guidance=model.guidance, weights=weights)
        x = ode(model.path, x, v, t.expand(len(x)), s.expand(len(x))).mean
    return x


@dataclass(frozen=True)
class Evaluation:
    """Scores by prompt, image ordinal, scorer and metric, and the first images themselves."""

    table: pd.DataFrame  # COLUMNS, one row a (prompt, ordinal, scorer, metric)
    images: Images  # (K, H, W, 3) for people: the first image of every prompt, then the second, as far as K goes
    vectors: Mapping[str, Vectors] = field(default_factory=dict[str, Vectors])  # embedder -> (images, D), for drift

    def matrix(self, key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(prompts, images a prompt) of one `scorer/metric`."""
        scorer, _, metric = key.partition("/")
        rows = self.table[(self.table.scorer == scorer) & (self.table.metric == metric)]
        return rows.pivot(index="prompt", columns="ordinal", values="value").to_numpy(dtype=np.float64)

    def strata(self) -> list[str]:
        """(prompts,): GenEval's tag, HPSv2's style of each prompt; "" where a task has none."""
        return [str(s) for s in self.table.drop_duplicates("prompt").sort_values("prompt").stratum]

    def only(self, stratum: str) -> Evaluation:
        """The prompts of one stratum."""
        return Evaluation(self.table.loc[self.table.stratum == stratum], self.images[:0])

    def keys(self) -> list[str]:
        """The `scorer/metric` there are, in order of appearance."""
        return list(dict.fromkeys(self.table.scorer + "/" + self.table.metric))

    def shown(self, rows: pd.DataFrame | None = None) -> pd.DataFrame:
        """Of some rows of the table (all by default) one for each of `images`, in their order."""
        each: Any = (self.table if rows is None else rows).drop_duplicates(["prompt", "ordinal"])
        return each.sort_values(["ordinal", "prompt"])[: len(self.images)].sort_values(["prompt", "ordinal"])

    def texts(self) -> list[str]:
        """What was asked for in each of `images`."""
        return [str(text) for text in self.shown().text]

    def reasons(self) -> list[str]:
        """Why images could not be scored, each once."""
        return [str(why) for why in dict.fromkeys(self.table.reason) if why]

    def notes(self, scorer: str) -> list[str]:
        """What a scorer saw in each of `images`."""
        rows: Any = self.table.loc[self.table.scorer == scorer]
        return [str(note) for note in self.shown(rows).note]


@dataclass(frozen=True)
class _Answer:
    """What became of one part of a look."""

    kept: Images
    scores: dict[str, Scores]
    vectors: dict[str, Embedded]


@dataclass(frozen=True)
class _Asking:
    """The same while the scorers are still at work."""

    kept: Images
    scores: dict[str, Future[tuple[Scores, float]]]
    vectors: dict[str, Future[Embedded]]

    def answer(self) -> _Answer:
        scores = {name: future.result()[0] for name, future in self.scores.items()}
        return _Answer(self.kept, scores, {name: future.result() for name, future in self.vectors.items()})


@torch.no_grad()
def judge(
    model: Model,
    prompts: Sequence[Prompt],
    scorers: Sequence[Scorer],
    *,
    images: int,
    seed: int,
    rows: int = 32,
    weights: str = "policy",
    keep: int = 32,
    advance: Callable[[int], None] = lambda _: None,
    draw: Callable[[Tensor, Sequence[ImageIndex]], Tensor] | None = None,
    spread: Sequence[Embedder] = (),
    drift: Sequence[Embedder] = (),
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Evaluation:
    """Sample `images` a prompt and let every scorer score them, each in a thread of its own.

    by: which weights are judged. keep: how many images to return. advance: told how many images are done.
    draw: how clean latents come from the noise (B, C, h, w) of these images; the protocol's ODE unless told otherwise.
    spread: embedders whose distances between the images of a prompt are scored as `diversity-NAME`.
    drift: embedders whose vectors are kept for `with_drift`.
    crew: the processes that share the work; each returns the whole.
    """
    every, spread = (
        image_indices(prompts, images),
        spread if images > 1 else (),
    )  # one image is at no distance from others
    shown = set(sorted(every, key=lambda one: one[::-1])[:keep])
    embedders = {embedder.name: embedder for embedder in (*spread, *drift)}
    threads = {one.name: ThreadPoolExecutor(1, thread_name_prefix=one.name) for one in (*scorers, *embedders.values())}
    asking: list[_Asking | None] = []
    parts = [every[start : start + rows] for start in range(0, len(every), rows)]
    try:
        for k, part in enumerate(parts):
            if processes.owns(k):
                mine = [prompts[i] for i, _ in part]
                x = initial_noise(model, prompts, part, seed)
                x = sample_protocol(model, x, mine, weights) if draw is None else draw(x, part)
                pictures = to_uint8(model.decode(x))
                asking.append(
                    _Asking(
                        pictures[[one in shown for one in part]],
                        {s.name: threads[s.name].submit(timed_scores, s, pictures, mine) for s in scorers},
                        {e.name: threads[e.name].submit(embed, e, pictures) for e in embedders.values()},
                    )
                )
            else:
                asking.append(None)
            advance(len(part))
        answers = processes.exchange_objects([one.answer() if one else None for one in asking])
    finally:
        for thread in threads.values():
            thread.shutdown(wait=True, cancel_futures=True)
    scored = [
        (part, s.name, answer.scores[s.name]) for part, answer in zip(parts, answers, strict=True) for s in scorers
    ]
    embedded = {name: _joined([answer.vectors[name] for answer in answers]) for name in embedders}
    kept = [answer.kept for answer in answers]
    scored += [
        (every, f"diversity-{e.name}", _spread(*embedded[e.name], len(prompts), images, e.distance)) for e in spread
    ]
    return Evaluation(_table(prompts, scored), np.concatenate(kept), {e.name: embedded[e.name][0] for e in drift})


def embed(embedder: Embedder, images: Images) -> Embedded:
    """(B, D) float32 and, by row, why a picture could not be embedded; whatever an embedder does wrong becomes NaN."""
    try:
        vectors = np.asarray(embedder(images), dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(images):
            raise ValueError(f"returned {vectors.shape} for {len(images)} images")
        bad = np.flatnonzero(~np.isfinite(vectors).all(1))
        vectors[bad] = np.nan
        return vectors, {int(row): f"{embedder.name}: returned numbers that are not finite" for row in bad}
    except Exception as error:  # foreign code, as a scorer is
        if len(images) > 1:
            return _joined([embed(embedder, images[row : row + 1]) for row in range(len(images))])
        return np.full((1, 1), np.nan, np.float32), {0: f"{embedder.name}: {type(error).__name__}: {error}"}


def _joined(parts: Sequence[Embedded]) -> Embedded:
    """The parts one below the other; where one has failed as a whole, its row of NaN gets the width of the others."""
    wide = max((vectors.shape[1] for vectors, _ in parts), default=1)
    rows = [np.broadcast_to(v, (len(v), wide)) if v.shape[1] == 1 else v for v, _ in parts]
    starts = np.cumsum([0, *(len(v) for v in rows)])
    whys = {int(at) + row: why for at, (_, reasons) in zip(starts, parts, strict=False) for row, why in reasons.items()}
    return np.concatenate(rows), whys


def _spread(vectors: Vectors, whys: Mapping[int, str], prompts: int, images: int, kind: Any) -> Scores:
    """How far each image lies from its prompt's others; the mean over a prompt is its mean pairwise distance."""
    value = np.full(prompts * images, np.nan)
    reasons = dict(whys)
    for start in range(0, len(value), images):
        rows = np.arange(start, start + images)
        good = rows[[row not in whys for row in rows]]
        value[good] = siblings(vectors[good], kind)
        if len(good) < 2:
            reasons |= {int(row): "the prompt's other images could not be embedded" for row in good}
    return Scores({"pairwise": value}, reasons)


def add_drift(before: Evaluation, after: Evaluation, embedders: Sequence[Embedder]) -> tuple[Evaluation, Evaluation]:
    """Both looks with `drift-NAME/paired`: how far each image went from the base's on the same noise; 0 before."""
    for e in embedders:
        a, b = before.vectors[e.name], after.vectors[e.name]
        rows = before.table.drop_duplicates(["prompt", "ordinal"]).sort_values(["prompt", "ordinal"])
        gone = paired(a, b, e.distance)
        why = np.where(np.isnan(gone), f"{e.name} could not embed the image or its twin", "")
        tail = rows.assign(scorer=f"drift-{e.name}", metric="paired", value=0.0, reason="", note="")
        before = replace(before, table=pd.concat([before.table, tail], ignore_index=True))
        after = replace(after, table=pd.concat([after.table, tail.assign(value=gone, reason=why)], ignore_index=True))
    return before, after


def cmmd_by_embedder(before: Evaluation, after: Evaluation, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Embedder -> the CMMD between the base's images and the tuned ones', resampled by prompt."""
    rows = before.table.drop_duplicates(["prompt", "ordinal"]).sort_values(["prompt", "ordinal"])
    clusters = rows.prompt.to_numpy()
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        a, b = before.vectors[name], after.vectors[name]
        good = np.isfinite(a).all(1) & np.isfinite(b).all(1)
        if len(np.unique(clusters[good])) > 1:
            found[name] = _number(cmmd_ci(a[good], b[good], clusters[good]))
    return found


def _table(prompts: Sequence[Prompt], answers: Iterable[tuple[Sequence[ImageIndex], str, Scores]]) -> pd.DataFrame:
    rows = [
        (
            i,
            o,
            prompts[i].text,
            prompts[i].stratum,
            scorer,
            metric,
            float(column[row]),
            scores.reasons.get(row, ""),
            scores.notes[row] if scores.notes else "",
        )
        for part, scorer, scores in answers
        for metric, column in scores.value.items()
        for row, (i, o) in enumerate(part)
    ]
    order = {name: k for k, name in enumerate(dict.fromkeys(row[4] for row in rows))}
    rows.sort(key=lambda row: (order[row[4]], row[5], row[0], row[1]))
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))


# Numbers from scores: no estimate without an interval


def estimates(judged: Evaluation) -> dict[str, dict[str, Any]]:
    """`scorer/metric` -> {mean, ci}: over prompts, images of a prompt clustered; over strata first, where a task has them."""
    strata = judged.strata()
    return {key: _number(intervals.mean_ci(judged.matrix(key), strata=strata)) for key in judged.keys()}


def differences(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Any]]:
    """`scorer/metric` -> {mean, ci, p, mde}: after minus before on the same prompts and noise, paired by prompt."""
    found: dict[str, dict[str, Any]] = {}
    for key in after.keys():
        if key in before.keys():
            pair = intervals.paired(before.matrix(key), after.matrix(key), strata=after.strata())
            found[key] = {**_number(pair), "p": pair.p, "mde": pair.mde}
    return found


def strata_of(judged: Evaluation) -> list[str]:
    """The strata in order, of a task that has more than one."""
    strata = list(dict.fromkeys(judged.strata()))
    return strata if len(strata) > 1 else []


def by_stratum(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Any]]:
    """Stratum -> {before, after, delta}, of a task that has several."""
    parts = {s: (before.only(s), after.only(s)) for s in strata_of(after)}
    return {
        s: {"before": estimates(a), "after": estimates(b), "delta": differences(a, b)} for s, (a, b) in parts.items()
    }


def _number(estimate: Any) -> dict[str, Any]:
    return {"mean": estimate.mean, "ci": [estimate.low, estimate.high], "n": estimate.n}


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
