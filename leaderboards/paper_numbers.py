"""Numbers as papers print them: shown beside what was measured, entered in no test and in no ranking."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..bench.errors import UserError

MODELS = {"SD3.5-M": "sd35m", "SD1.5": "sd15"}  # what papers call a base model -> its name here


class Reported(BaseModel):
    """One number of one paper."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal[
        "base", "awm", "best-of-n", "dgpo", "diffusion-dpo", "diffusion-nft", "flow-grpo", "gpo", "grpo-guard",
        "mix-grpo", "rwr", "sft",
    ]  # fmt: skip
    base_model: Annotated[str, Field(min_length=1)]  # as the paper calls it
    task: Literal["counting", "geneval", "hpsv2", "ocr", "pickscore"]
    metric: Annotated[str, Field(min_length=1)]
    value: Annotated[float, Field(allow_inf_nan=False)]
    unit: Literal["fraction", "percent", "percentage points", "exp(logit_scale)*cosine", "100*cosine"]
    setting: str  # how it was had, as far as it is said
    arxiv: Annotated[str, Field(pattern=r"^\d{4}\.\d{5}$")]
    table: Annotated[str, Field(min_length=1)]  # where it stands
    provenance: Literal["paper", "readme", "abstract"]


def load(path: Path | None = None) -> list[Reported]:
    """All rows of the table, each checked. Raises UserError naming the line that is not one."""
    if path is None:
        text = resources.files(__package__ or "").joinpath("reported.csv").read_text("utf-8")
    else:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
    rows: list[Reported] = []
    for number, row in enumerate(csv.DictReader(text.splitlines()), start=2):
        try:
            rows.append(Reported.model_validate(row))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(
                f"reported numbers, line {number}, {where}: {first['msg']}, got {first['input']!r}"
            ) from None
    return rows


def beside(task: str, model: str, rows: Sequence[Reported] | None = None) -> list[Reported]:
    """What papers report of this task on this model, by the names they have here."""
    return [r for r in (load() if rows is None else rows) if r.task == task and MODELS.get(r.base_model) == model]
