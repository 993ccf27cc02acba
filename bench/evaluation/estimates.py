"""Scores of evaluated images, and the estimates made of them: means, differences and distances, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..spec import Embedder, Images, SupportsSummary, Task
from ..stats import intervals
from ..stats.distances import cmmd_ci, paired
from .record import INVALID

if TYPE_CHECKING:
    import pandas as pd

# The columns of an evaluation's table.
COLUMNS = ("prompt", "ordinal", "text", "stratum", "scorer", "metric", "value", "reason", "note")
Vectors = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Evaluation:
    """Scores by prompt, image ordinal, scorer and metric, with some of the images and the vectors for drift."""

    table: pd.DataFrame  # COLUMNS, one row for each (prompt, ordinal, scorer, metric)
    images: Images  # (K, H, W, 3): the first image of every prompt, then the second, until there are K
    vectors: Mapping[str, Vectors] = field(default_factory=dict[str, Vectors])  # embedder -> (images, D)

    def matrix(self, key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(prompts, images a prompt) of one `scorer/metric`."""
        scorer, _, metric = key.partition("/")
        rows = self.table[(self.table.scorer == scorer) & (self.table.metric == metric)]
        return rows.pivot(index="prompt", columns="ordinal", values="value").to_numpy(dtype=np.float64)

    def strata(self) -> list[str]:
        """The stratum of each prompt: GenEval's tag, HPSv2's style; "" where a task has none."""
        return [str(s) for s in self.table.drop_duplicates("prompt").sort_values("prompt").stratum]

    def only(self, stratum: str) -> Evaluation:
        """The part of the evaluation on the prompts of one stratum."""
        return Evaluation(self.table.loc[self.table.stratum == stratum], self.images[:0])

    def keys(self) -> list[str]:
        """The `scorer/metric` of the table, in order of appearance."""
        return list(dict.fromkeys(self.table.scorer + "/" + self.table.metric))

    def shown(self, rows: pd.DataFrame | None = None) -> pd.DataFrame:
        """One row for each of `images`, in their order, out of `rows` (the whole table by default)."""
        by_image: Any = (self.table if rows is None else rows).drop_duplicates(["prompt", "ordinal"])
        return by_image.sort_values(["ordinal", "prompt"])[: len(self.images)].sort_values(["prompt", "ordinal"])

    def texts(self) -> list[str]:
        """The prompt of each of `images`."""
        return [str(text) for text in self.shown().text]

    def reasons(self) -> list[str]:
        """Why images could not be scored, each once."""
        return [str(reason) for reason in dict.fromkeys(self.table.reason) if reason]

    def notes(self, scorer: str) -> list[str]:
        """What a scorer noted about each of `images`, such as the text it read."""
        rows: Any = self.table.loc[self.table.scorer == scorer]
        return [str(note) for note in self.shown(rows).note]


def add_drift(before: Evaluation, after: Evaluation, embedders: Sequence[Embedder]) -> tuple[Evaluation, Evaluation]:
    """Add `drift-NAME/paired` to both tables: each image's distance from the base's image on the same noise; 0 before."""
    import pandas as pd

    for embedder in embedders:
        rows = before.table.drop_duplicates(["prompt", "ordinal"]).sort_values(["prompt", "ordinal"])
        distance = paired(before.vectors[embedder.name], after.vectors[embedder.name], embedder.distance)
        reason = np.where(np.isnan(distance), f"{embedder.name} could not embed the image or the base's image", "")
        zero = rows.assign(scorer=f"drift-{embedder.name}", metric="paired", value=0.0, reason="", note="")
        moved = zero.assign(value=distance, reason=reason)
        before = replace(before, table=pd.concat([before.table, zero], ignore_index=True))
        after = replace(after, table=pd.concat([after.table, moved], ignore_index=True))
    return before, after


def cmmd_by_embedder(before: Evaluation, after: Evaluation, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Embedder -> the CMMD between the base's images and the tuned model's, resampled by prompt."""
    rows = before.table.drop_duplicates(["prompt", "ordinal"]).sort_values(["prompt", "ordinal"])
    clusters = rows.prompt.to_numpy()
    cmmd: dict[str, dict[str, Any]] = {}
    for name in names:
        a, b = before.vectors[name], after.vectors[name]
        finite = np.isfinite(a).all(1) & np.isfinite(b).all(1)
        if len(np.unique(clusters[finite])) > 1:
            cmmd[name] = _number(cmmd_ci(a[finite], b[finite], clusters[finite]))
    return cmmd


def estimates(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """`scorer/metric` -> {mean, ci, n}: over prompts, a prompt's images clustered; over strata first, where a task has them."""
    strata = evaluation.strata()
    return {key: _number(intervals.mean_ci(evaluation.matrix(key), strata=strata)) for key in evaluation.keys()}


def differences(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Any]]:
    """`scorer/metric` -> {mean, ci, n, p, mde}: after minus before on the same prompts and noise, paired by prompt."""
    delta: dict[str, dict[str, Any]] = {}
    for key in after.keys():
        if key in before.keys():
            estimate = intervals.paired(before.matrix(key), after.matrix(key), strata=after.strata())
            delta[key] = {**_number(estimate), "p": estimate.p, "mde": estimate.mde}
    return delta


def strata_of(evaluation: Evaluation) -> list[str]:
    """The strata in order of appearance; [] where there is only one."""
    strata = list(dict.fromkeys(evaluation.strata()))
    return strata if len(strata) > 1 else []


def by_stratum(before: Evaluation, after: Evaluation) -> dict[str, dict[str, Any]]:
    """Stratum -> {before, after, delta}; {} where a task has only one stratum."""
    parts = {stratum: (before.only(stratum), after.only(stratum)) for stratum in strata_of(after)}
    return {
        stratum: {"before": estimates(a), "after": estimates(b), "delta": differences(a, b)}
        for stratum, (a, b) in parts.items()
    }


def task_summary(task: Task, **evaluations: Evaluation) -> Any:
    """Phase -> the aggregates that the task's publication defines; NaN becomes None, {} where it defines none."""
    if not isinstance(task, SupportsSummary):
        return {}
    summaries = {phase: task.summary(evaluation.table) for phase, evaluation in evaluations.items()}
    return {
        phase: {name: value if math.isfinite(value) else None for name, value in summary.items()}
        for phase, summary in summaries.items()
    }


def invalid(table: pd.DataFrame) -> bool:
    """Return whether more than INVALID of the images of some scorer could not be scored."""
    missing = table.groupby(["scorer", "metric"]).value.apply(lambda column: column.isna().mean())
    return bool((missing > INVALID).any())


def check_base(base: Evaluation, message: Callable[[str], None]) -> None:
    """Raise UserError where a metric has no score on any image of the base: whatever was trained would be no result.

    message: called with one line where so many scores are missing that the run will be invalid.
    """
    groups: Any = base.table.groupby(["scorer", "metric"], sort=False)
    for (scorer, metric), rows in groups:
        missing, reasons = int(rows.value.isna().sum()), [str(reason) for reason in rows.reason if reason]
        why = f" ({reasons[0]})" if reasons else ""
        if missing == len(rows):
            raise UserError(
                f"{scorer} gave none of the {missing:,} images of the base a score by {metric}{why}: nothing was trained; "
                "once it does, the same command goes on"
            )
        if missing > INVALID * len(rows):
            message(
                f"{scorer} left {missing:,} of {len(rows):,} images of the base without {metric}{why}: the run will be marked invalid"
            )


def unscored_images(table: pd.DataFrame, scorer: str) -> tuple[int, int]:
    """How many images of an evaluation have no score by a scorer, in any of its metrics, and how many there are."""
    rows: Any = table.loc[table.scorer == scorer]
    missing: Any = rows.value.isna().groupby([rows.prompt, rows.ordinal]).any()
    return int(missing.sum()), len(missing)


def _number(estimate: Any) -> dict[str, Any]:
    ends = [end if math.isfinite(end) else None for end in (estimate.low, estimate.high)]  # too few prompts: as on disk
    return {"mean": estimate.mean, "ci": ends, "n": estimate.n}
