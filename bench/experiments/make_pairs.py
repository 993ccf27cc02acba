"""Preference pairs from a model and a scorer: groups are sampled and scored, and images of a group paired by reward.

OUT/pairs.parquet has the columns of `training/pairs.py`; its metadata state how it was made and what that cost.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from .. import registry
from ..budget import Budget, Meter
from ..errors import UserError
from ..evaluation.splits import refuse_overlap
from ..files import delete_leftovers, make_folder, write_atomically
from ..losses import informative
from ..model_spec import ModelSpec, find_model_spec
from ..models.open import open_model
from ..progress import Progress
from ..scoring.scorers import close_scorers, open_scorer
from ..scoring.worker_setting import WorkerSetting
from ..spec import Images, Scorer, Task
from ..training.pairs import STATEMENT, Choose, compare
from ..training.rig import MeteredRig

FILE, README = "pairs.parquet", "README.md"
CHUNK = 32  # rows of a row group: a reader of one pair reads so many
TYPES = {
    "caption": pa.string(),
    "jpg_0": pa.binary(),
    "jpg_1": pa.binary(),
    "label_0": pa.float64(),
    "label_1": pa.float64(),
    "has_label": pa.bool_(),
    "reward_0": pa.float64(),
    "reward_1": pa.float64(),
}


@dataclass(frozen=True)
class PairsRequest:
    """Which pairs to make."""

    model: str
    task: str
    scorer: str = ""  # whose scores decide; "" is the task's reward
    prompts: int = 64  # training prompts, a group of images for each
    group: int = 8  # images a prompt
    choose: Choose = "extremes"  # which pairs of a group
    margin: float = 0.0  # rewards of a pair differ by more than this
    seed: int = 0  # of prompts, noise, random pairs and the winner's side
    adapter: Path | None = None  # a LoRA folder; None samples the base

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.group < 2 or not 0 <= self.margin < math.inf or self.seed < 0:
            values = f"prompts={self.prompts}, group={self.group}, margin={self.margin}, seed={self.seed}"
            raise UserError(
                f"pairs: prompts must be at least 1, group at least 2, margin and seed finite and not negative, got {values}"
            )

    def settings(self, model_spec: ModelSpec, task: Task, scorer: Scorer) -> dict[str, Any]:
        """What decides the set, as its metadata state it."""
        return {
            "model": model_spec.name,
            "revision": model_spec.revision,
            "adapter": str(self.adapter) if self.adapter else None,
            "task": task.name,
            "task_version": task.version,
            "scorer": scorer.id,
            "prompts": self.prompts,
            "group": self.group,
            "choose": self.choose,
            "margin": self.margin,
            "seed": self.seed,
        }


@dataclass
class _PairTable:
    """The rows of the set so far."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in TYPES})
    flat_groups: int = 0  # whose rewards are all equal

    def __len__(self) -> int:
        return len(self.columns["caption"])


def make_pairs(request: PairsRequest, out: Path, progress: Progress) -> dict[str, Any]:
    """Sample and score a group for each of the training prompts, and write the pairs to `out`.

    The file is written whole at the end or not at all; a set that is there already is left as it is. Returns settings, counts,
    the spend, and the file's path.
    Raises UserError on another set in `out`, or when there is not one pair.
    """
    for name in (FILE, README):
        delete_leftovers(out / name)
    model_spec, task = find_model_spec(request.model), registry.task(request.task)
    refuse_overlap(task, model_spec.domain)
    scorer = open_scorer(request.scorer or task.reward(model_spec.domain), workers=WorkerSetting.parse())
    try:
        settings = request.settings(model_spec, task, scorer)
        if (stored := _stored_statement(out / FILE, settings)) is not None:
            progress.message(f"these pairs are already there: {out / FILE}")
            return stored
        make_folder(out)
        rig = _open_rig(request, model_spec, task, scorer, progress)
        try:
            table = _sample_pairs(request, rig, progress)
        finally:
            rig.close()
        statement = {**settings, **_counts(request, rig, table)}
        _write(out, table.columns, statement)
        return {**statement, "path": str(out / FILE)}
    finally:
        close_scorers([scorer])


def _open_rig(
    request: PairsRequest, model_spec: ModelSpec, task: Task, scorer: Scorer, progress: Progress
) -> MeteredRig:
    """A rig on the model, whose budget is the images of all groups."""
    model = open_model(model_spec, device=_device())
    if request.adapter is not None:
        for note in model.load_adapter(request.adapter):
            progress.message(note)
    meter = Meter(Budget(images=request.prompts * request.group))
    prompts = task.prompts("train", model_spec.domain)
    return MeteredRig(model, prompts, scorer, meter, seed=request.seed, rows=model_spec.rows)


@torch.no_grad()
def _sample_pairs(request: PairsRequest, rig: MeteredRig, progress: Progress) -> _PairTable:
    """Sample and score the groups, as many at once as fit into the model's rows, and pair their images."""
    table = _PairTable()
    progress.phase("sampling groups", request.prompts)
    for prompt_ids in rig.prompts(request.prompts).split(max(1, rig.rows // request.group)):
        image_ids = prompt_ids.repeat_interleave(request.group)
        x0 = torch.cat([rig.sample(rig.noise(len(ids)), ids) for ids in image_ids.split(rig.rows)])
        parts = zip(x0.split(rig.rows), image_ids.split(rig.rows), strict=True)
        rewards, images = zip(*(rig.score_images(x, ids) for x, ids in parts), strict=True)
        reward = torch.cat(rewards).cpu().view(len(prompt_ids), request.group)
        table.flat_groups += int((~informative(reward)).sum())
        _add_pairs(table, request, rig, prompt_ids, np.concatenate(images), reward)
        progress.advance(len(prompt_ids))
    return table


def _add_pairs(
    table: _PairTable, request: PairsRequest, rig: MeteredRig, prompt_ids: Tensor, images: Images, reward: Tensor
) -> None:
    """Pair the images (P G, H, W, 3) that were scored by their rewards (P, G); the winner's side is drawn."""
    which, win, lose = compare(reward, request.choose, request.margin, rig.uniform(len(prompt_ids)))
    swap = rig.uniform(len(which)).cpu() < 0.5 if len(which) else torch.zeros(0, dtype=torch.bool)
    columns = table.columns
    png: dict[int, bytes] = {}  # row of images -> its PNG, which can be in several pairs
    for p, i, j, swapped in zip(which.tolist(), win.tolist(), lose.tolist(), swap.tolist(), strict=True):
        columns["caption"].append(rig.texts(prompt_ids[p : p + 1])[0].text)
        columns["has_label"].append(True)
        for side, member in enumerate((j, i) if swapped else (i, j)):
            row = p * request.group + member
            if row not in png:
                png[row] = _png(images[row])
            columns[f"jpg_{side}"].append(png[row])
            columns[f"label_{side}"].append(float(member == i))
            columns[f"reward_{side}"].append(float(reward[p, member]))


def _counts(request: PairsRequest, rig: MeteredRig, table: _PairTable) -> dict[str, Any]:
    """Counts, failures and spend. Raises UserError when there is not one pair."""
    meter = rig.meter
    if not len(table):
        reason = (
            f"{table.flat_groups} of {request.prompts} groups had equal rewards, {meter.errors} images were not scored, "
            f"margin={request.margin}"
        )
        raise UserError("; ".join([f"pairs: not one pair was found: {reason}", *dict.fromkeys(rig.failures[-1:])]))
    return {
        "pairs": len(table),
        "groups": request.prompts,
        "flat_groups": table.flat_groups,
        "not_scored": meter.errors,
        "failures": list(dict.fromkeys(rig.failures)),
        "spent": {"nfe": meter.nfe, "images": meter.images, "reward_calls": meter.reward_calls},
    }


def _stored_statement(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What a set that is there already states of itself; None where there is none. Raises UserError on another set."""
    if not path.exists():
        return None
    try:
        statement = json.loads((pq.read_schema(path).metadata or {}).get(STATEMENT, b"{}"))
    except (OSError, ValueError):  # arrow's own errors are ValueErrors
        statement = {}
    if differing := [key for key, value in settings.items() if statement.get(key, ...) != value]:
        raise UserError(f"{path} is another set (it differs in {', '.join(differing)}): choose another --out")
    return {**statement, "path": str(path)}


def _write(out: Path, columns: dict[str, list[Any]], statement: dict[str, Any]) -> None:
    schema = pa.schema(list(TYPES.items()), metadata={STATEMENT: json.dumps(statement).encode()})
    table = pa.table(columns, schema=schema)
    try:
        write_atomically(out / README, lambda p: p.write_text(_readme(statement), "utf-8"))
        write_atomically(out / FILE, lambda p: pq.write_table(table, p, row_group_size=CHUNK))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error


def _readme(statement: dict[str, Any]) -> str:
    spent = ", ".join(f"{key} {value:,}" for key, value in statement["spent"].items())
    return "\n".join(
        [
            f"# {statement['pairs']:,} preference pairs of {statement['model']} on {statement['task']}",
            "",
            f"Made by `gpobench pairs`: {statement['groups']:,} training prompts (task version {statement['task_version']}), a "
            f"group of {statement['group']} images each, scored by `{statement['scorer']}`, paired by "
            f"`{statement['choose']}`, margin {statement['margin']:g}, seed {statement['seed']}, "
            f"adapter {statement['adapter'] or 'none'}.",
            "",
            f"{statement['flat_groups']:,} groups had equal rewards; {statement['not_scored']:,} images were not scored. "
            f"Spent: {spent}.",
            "",
            "`pairs.parquet` has the columns of Pick-a-Pic v2 (caption, jpg_0, jpg_1 as PNG bytes, label_0, label_1, has_label),",
            "and reward_0, reward_1. Learn from it: `gpobench run --method dpo --set pairs=FOLDER ...`",
            "",
        ]
    )


def _png(image: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _device() -> torch.device:
    from accelerate import Accelerator

    return Accelerator(mixed_precision="no").device
