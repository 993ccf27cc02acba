"""Verification levels: statements beside a record that say how its numbers were obtained again, bound to it by hashes.

`verification.json` holds at most one statement a level, the newest. Each names the sha256 of the record that it is about: a statement on a
record that was changed since is ignored with a note. The file holds the sha256 of its own content, as record.json does. A hash finds damage
and edits; it is no signature, so who needs more repeats the verification.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UserError
from ..files import read_json, write_atomically
from . import record
from .record import Key, Number

VERIFICATION = "verification.json"  # beside record.json
Level = Literal["rejudged", "rerun", "audited"]
LEVELS: tuple[str, ...] = ("self", *get_args(Level))  # from the weakest on
REFUTED = "does not hold"  # shown in a level's place
Verdict = Literal["holds", "does not hold", "cannot tell"]
MEANINGS = {
    "self": "the record's own numbers",
    "rejudged": "the adapter was judged again on the same protocol",
    "rerun": "the run was made again and agrees",
    "audited": "base and result were judged on prompts and noise that the author did not know",
}


class _OfStatement(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")


class Compared(_OfStatement):
    """One number of the record, and what was found for it."""

    claimed: Number
    found: Number
    difference: float | None = Field(description="found minus claimed, in the mean")
    se: float | None = Field(default=None, description="standard error of the difference, where one was estimated")
    p: float | None = Field(default=None, description="of the difference, two-sided; null where it was not tested")
    equal_images: float | None = Field(
        default=None, description="share of images with the same score to the last digit"
    )
    close_images: float | None = Field(
        default=None, description="share of images whose scores differ by rounding at most"
    )


class Statement(_OfStatement):
    """What one verification found."""

    level: Level
    verdict: Verdict
    reason: str = Field(description="one sentence")
    record: str = Field(description="sha256 of the content of the record that this is about")
    other_record: str = Field(default="", description="sha256 of the content of the record that was made again")
    key: str = Field(description="the scorer/metric that ranks")
    gain: dict[Key, Compared] = Field(description="after minus before, claimed and found")
    scores: dict[str, Compared] = Field(
        default_factory=dict, description="`before key` and `after key`, where images compare"
    )
    notes: list[str] = Field(default_factory=list)
    conditions: dict[str, Any] = Field(default_factory=dict, description="prompts, evaluation seed and the like")
    time: str = Field(description="UTC")
    provenance: dict[str, Any]


class _StatementFile(_OfStatement):
    """The file."""

    schema_version: Literal[1] = 1
    statements: list[Statement]
    sha256: str = ""


@dataclass(frozen=True)
class Verified:
    """The statements on a record that fit it, and a note where some do not."""

    statements: tuple[Statement, ...] = ()
    note: str = ""

    @property
    def level(self) -> str:
        """Return the highest level that holds, REFUTED where any statement says so, else self."""
        if any(statement.verdict == REFUTED for statement in self.statements):
            return REFUTED
        held = [statement.level for statement in self.statements if statement.verdict == "holds"]
        return max(held, key=LEVELS.index, default="self")


def lowest_level(levels: Iterable[str]) -> str:
    """Return the weakest of several runs' levels; self of none."""
    order = (REFUTED, *LEVELS)
    return min(levels, key=order.index, default="self")


def read_statements(run_dir: Path) -> Verified:
    """Read the statements beside a record; those that do not fit it are left out with a note."""
    path = run_dir / VERIFICATION
    if not path.is_file():
        return Verified()
    try:
        table = read_json(path)
        file = _StatementFile.model_validate(table)
        if file.sha256 != _content_hash(table):
            return Verified(note=f"{path} was changed after it was written and is ignored")
        about = record.content_hash(run_dir / record.RECORD)
    except (ValidationError, OSError, ValueError, TypeError, KeyError, AttributeError):
        return Verified(note=f"{path} is no statement of gpobench and is ignored")
    fitting = tuple(statement for statement in file.statements if statement.record == about)
    left_out = len(file.statements) - len(fitting)
    note = f"{path}: {left_out} of {len(file.statements)} statements are about another record and are ignored"
    return Verified(fitting, note if left_out else "")


def write_statement(run_dir: Path, statement: Statement) -> Path:
    """Write a statement beside a record in the place of an earlier one of its level. Raises UserError where that is not possible."""
    path = run_dir / VERIFICATION
    kept = [old for old in read_statements(run_dir).statements if old.level != statement.level]
    table = json.loads(_StatementFile(statements=[*kept, statement]).model_dump_json())
    table["sha256"] = _content_hash(table)
    try:
        write_atomically(path, lambda p: p.write_text(json.dumps(table, indent=1) + "\n", "utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def verification_line(verified: Verified) -> str:
    """Say a run's level in one sentence."""
    level = verified.level
    refuted = [statement for statement in verified.statements if statement.verdict == REFUTED]
    if refuted:
        return f"Verification: does not hold ({refuted[-1].level}): {refuted[-1].reason}"
    return f"Verification: {level}, {MEANINGS[level]}."


def _content_hash(table: Mapping[str, Any]) -> str:
    """sha256 of the content of the file without its own hash."""
    content = {name: value for name, value in table.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
