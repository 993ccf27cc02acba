"""From any model and any scorer a set of preference pairs: groups are sampled, scored, and paired by their rewards.

OUT/pairs.parquet has the columns of `pairs.py`, and says in its metadata how it was made and what that cost.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from .. import registry
from ..budget import Budget, Meter
from ..errors import UserError
from ..evaluation import evaluator
from ..files import write_atomically
from ..losses import informative
from ..model_spec import find_model_spec
from ..models.open import open_model
from ..progress import Progress
from ..scoring.scorers import close_scorers, open_scorer
from ..training.pairs import STATEMENT, Choose, compare
from ..training.rig import Rig, to_uint8

FILE = "pairs.parquet"
CHUNK = 32  # rows that are read at once: whoever draws one pair reads so many
TYPES = {
    "caption": pa.string(), "jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64(), "label_1": pa.float64(),
    "has_label": pa.bool_(), "reward_0": pa.float64(), "reward_1": pa.float64(),
}  # fmt: skip


@torch.no_grad()
def make_pairs(
    model_name: str,
    task_name: str,
    out: Path,
    *,
    progress: Progress,
    scorer_name: str = "",
    prompts: int = 64,
    group: int = 8,
    choose: Choose = "extremes",
    margin: float = 0.0,
    seed: int = 0,
    adapter: Path | None = None,
) -> dict[str, Any]:
    """Sample a group for each of `prompts` training prompts, score it, and write the pairs that `choose` makes of it.

    scorer_name: the task's reward unless told otherwise. The file is written whole at the end or not at all; asked for again, a
    set that is there is left as it is. Returns counts, the spend and where the file is.
    Raises UserError on settings that make no sense, another set in `out`, or when not one pair came about.
    """
    if prompts < 1 or group < 2 or margin < 0 or seed < 0:
        got = f"prompts={prompts}, group={group}, margin={margin}, seed={seed}"
        raise UserError(f"pairs: prompts must be at least 1, group at least 2, margin and seed not negative, got {got}")
    model_spec, task = find_model_spec(model_name), registry.load("task", task_name)()
    evaluator.refuse_overlap(task, model_spec.domain)
    scorer = open_scorer(scorer_name or task.reward(model_spec.domain))
    try:
        settings: dict[str, Any] = {
            "model": model_spec.name, "revision": model_spec.revision, "adapter": str(adapter) if adapter else None, "task": task.name,
            "task_version": task.version, "scorer": scorer.id, "prompts": prompts, "group": group, "choose": choose, "margin": margin,
            "seed": seed,
        }  # fmt: skip
        if (done := _done(out / FILE, settings)) is not None:
            progress.say(f"these pairs are already there: {out / FILE}")
            return done
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}") from None

        model = open_model(model_spec, device=_device())
        if adapter is not None:
            model.load_adapter(adapter)
        meter = Meter(Budget(images=prompts * group))
        rig = Rig(model, task.prompts("train", model_spec.domain), scorer, meter, seed=seed, rows=model_spec.rows)
        columns: dict[str, list[Any]] = {name: [] for name in TYPES}
        flat = 0
        progress.phase("sampling groups", prompts)
        try:
            for prompt_ids in rig.prompts(prompts).split(max(1, model_spec.rows // group)):
                each = prompt_ids.repeat_interleave(group)
                x0 = torch.cat([rig.sample(rig.noise(len(some)), some) for some in each.split(model_spec.rows)])
                scored = zip(x0.split(model_spec.rows), each.split(model_spec.rows), strict=True)
                reward = torch.cat([rig.score(x, some) for x, some in scored]).cpu().view(len(prompt_ids), group)
                flat += int((~informative(reward)).sum())
                which, win, lose = compare(reward, choose, margin, rig.uniform(len(prompt_ids)))
                swap = rig.uniform(len(which)).cpu() < 0.5 if len(which) else torch.zeros(0, dtype=torch.bool)
                png: dict[int, bytes] = {}  # an image can be in several pairs
                for p, i, j, swapped in zip(which.tolist(), win.tolist(), lose.tolist(), swap.tolist(), strict=True):
                    sides = (j, i) if swapped else (i, j)
                    columns["caption"].append(rig.texts(prompt_ids[p : p + 1])[0].text)
                    columns["has_label"].append(True)
                    for side, member in enumerate(sides):
                        at = p * group + member
                        if at not in png:
                            png[at] = _png(to_uint8(model.decode(x0[at : at + 1]))[0])
                        columns[f"jpg_{side}"].append(png[at])
                        columns[f"label_{side}"].append(float(member == i))
                        columns[f"reward_{side}"].append(float(reward[p, member]))
                progress.advance(len(prompt_ids))
        finally:
            rig.close()
        counts = {"pairs": len(columns["caption"]), "groups": prompts, "flat_groups": flat, "not_scored": meter.errors}
        if not counts["pairs"]:
            why = f"{flat} of {prompts} groups had no spread, {meter.errors} images were not scored, margin={margin}"
            raise UserError("; ".join([f"pairs: not one pair came about: {why}", *dict.fromkeys(rig.failures[-1:])]))
        told = {
            **settings, **counts, "failures": list(dict.fromkeys(rig.failures)),
            "spent": {"nfe": meter.nfe, "images": meter.images, "reward_calls": meter.reward_calls},
        }  # fmt: skip
        _write(out, columns, told)
        return {**told, "path": str(out / FILE)}
    finally:
        close_scorers([scorer])


def _done(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What is told of a set that is already there; None where none is."""
    if not path.exists():
        return None
    try:
        told = json.loads((pq.read_schema(path).metadata or {}).get(STATEMENT, b"{}"))
    except (OSError, ValueError):  # arrow's own errors are ValueErrors
        told = {}
    if differing := [key for key, value in settings.items() if told.get(key, ...) != value]:
        raise UserError(f"{path} is another set (it differs in {', '.join(differing)}): choose another --out")
    return {**told, "path": str(path)}


def _write(out: Path, columns: dict[str, list[Any]], told: dict[str, Any]) -> None:
    schema = pa.schema(list(TYPES.items()), metadata={STATEMENT: json.dumps(told).encode()})
    table = pa.table(columns, schema=schema)
    try:
        write_atomically(out / "README.md", lambda p: p.write_text(_readme(told), "utf-8"))
        write_atomically(out / FILE, lambda p: pq.write_table(table, p, row_group_size=CHUNK))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error


def _readme(told: dict[str, Any]) -> str:
    spent = ", ".join(f"{key} {value:,}" for key, value in told["spent"].items())
    return "\n".join(
        [
            f"# {told['pairs']:,} preference pairs of {told['model']} on {told['task']}",
            "",
            f"Made by `gpobench pairs`: {told['groups']:,} training prompts (task version {told['task_version']}), a group of "
            f"{told['group']} images each, judged by `{told['scorer']}`, paired by `{told['choose']}`, margin {told['margin']:g}, "
            f"seed {told['seed']}, adapter {told['adapter'] or 'none'}.",
            "",
            f"{told['flat_groups']:,} groups had no spread; {told['not_scored']:,} images were not scored. Spent: {spent}.",
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
