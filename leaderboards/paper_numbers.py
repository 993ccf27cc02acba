"""Reads the table of numbers that papers report, which boards show beside measured ones and never rank or test."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..bench.errors import UserError

MODELS = {"SD3.5-M": "sd35m", "SD1.5": "sd15"}  # the name of a base model in papers -> in the registry


class PaperNumber(BaseModel):
    """One number of one paper."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal[
        "base", "awm", "best-of-n", "dgpo", "diffusion-dpo", "diffusion-nft", "flow-grpo", "gpo", "grpo-guard",
        "mix-grpo", "rwr", "sft",
    ]  # fmt: skip
    base_model: Annotated[str, Field(min_length=1)]  # its name in the paper
    task: Literal["counting", "geneval", "hpsv2", "ocr", "pickscore"]
    metric: Annotated[str, Field(min_length=1)]
    value: Annotated[float, Field(allow_inf_nan=False)]
    unit: Literal["fraction", "percent", "percentage points", "exp(logit_scale)*cosine", "100*cosine"]
    setting: str  # how it was measured, as far as the paper states it
    arxiv: Annotated[str, Field(pattern=r"^\d{4}\.\d{5}$")]
    table: Annotated[str, Field(min_length=1)]  # of the paper
    provenance: Literal["paper", "readme", "abstract"]


def load_paper_numbers(path: Path | None = None) -> list[PaperNumber]:
    """Read all rows of the table. Raises UserError naming the first line that is invalid."""
    if path is None:
        text = resources.files(__package__ or "").joinpath("reported.csv").read_text("utf-8")
    else:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
    rows: list[PaperNumber] = []
    for number, row in enumerate(csv.DictReader(text.splitlines()), start=2):
        try:
            rows.append(PaperNumber.model_validate(row))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise UserError(
                f"reported numbers, line {number}, {where}: {first['msg']}, got {first['input']!r}"
            ) from None
    return rows


def matching(task: str, model: str, rows: Sequence[PaperNumber] | None = None) -> list[PaperNumber]:
    """Return the numbers that papers report of a task and a model, given by their registered names."""
    return [
        r
        for r in (load_paper_numbers() if rows is None else rows)
        if r.task == task and MODELS.get(r.base_model) == model
    ]
