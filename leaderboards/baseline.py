"""Numbers that are to hold, as a text file a person can review, with the score of every prompt in a second one beside it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..bench import registry
from ..bench.errors import UserError
from ..bench.files import write_atomically
from .board import BASE

Array = NDArray[np.float64]
HEAD = ("row", "key", "seed")
STRATUM = "stratum"  # the line of the scores that says which stratum each prompt is of, where there are several


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaselineNumber(_Part):
    """The mean of one scorer/metric over the prompts, after training, and how far from it is still the same."""

    key: str
    mean: float
    ci: tuple[float, float]
    n: int = Field(gt=1, description="prompts with a score")
    margin: float = Field(gt=0, allow_inf_nan=False, description="absolute, in units of the score")
    repeat: float | None = Field(
        default=None,
        description="half the 90 % interval of the difference that training again with other seeds is expected to show",
    )


class Claim(_Part):
    """A method with one set of settings and its numbers; the base is one, without seeds."""

    label: str
    method: str
    seeds: tuple[int, ...] = ()
    sets: tuple[str, ...] = Field(
        default=(), description="what differs from the method's preset, as `gpobench run --set` takes it"
    )
    reward: str = ""
    settings: dict[str, Any] = Field(
        default_factory=dict, description="resolved: key -> value, nested keys with points"
    )
    number: tuple[BaselineNumber, ...]


class Baseline(_Part):
    """What was measured, on what ground, by whom and when."""

    format: Literal[1] = 1
    command: str
    date: str
    commit: str
    runs_commits: tuple[str, ...]
    device: str
    processor: str = Field(
        default="", description="the kind that made the runs, on which alone they repeat to the last digit"
    )
    versions: dict[str, str]
    task: str
    task_version: str
    model: str
    weights: str
    training: str = Field(description="the scorer that methods were trained on")
    digits: int = Field(ge=0, le=12, description="decimals of the scores beside this file")
    scores_sha256: str
    budget: dict[str, float]
    evaluation: dict[str, Any]
    prompts: dict[str, str]
    scorers: dict[str, str] = Field(description="name -> id")
    row: tuple[Claim, ...] = Field(min_length=1)


@dataclass(frozen=True)
class BaselineScores:
    """The score of every prompt, a mean over its images."""

    by: Mapping[tuple[str, str], Sequence[Array]]  # (row, key) -> (prompts,) for each seed of the row; NaN = no score
    strata: Sequence[str] | None = None  # (prompts,), where there are several


def locate(name: str) -> Path:
    """A baseline's file: a path, or the name of one that comes with the package."""
    path = Path(name)
    own = Path(__file__).parent / f"{path.name}.toml"
    return own if not path.is_file() and path.name == name and own.is_file() else path


def parts(path: Path) -> list[Path]:
    """The baselines behind a file: itself, or those that an index lists, one a task. Raises UserError on a damaged index."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return [path]  # `read` says what is wrong
    if "parts" not in table:
        return [path]
    listed: Any = table["parts"]
    if set(table) != {"format", "parts"} or not isinstance(listed, list) or not listed:
        raise UserError(
            f"{path} is no list of baselines: it holds `format = 1` and `parts`, the names of files beside it"
        )
    return [path.with_name(str(name)) for name in cast(list[Any], listed)]


def write_index(path: Path, listed: Sequence[Path]) -> None:
    """A file that stands for several baselines beside it."""
    names = "".join(f"  {literal(part.name)},\n" for part in listed)
    head = "# Reported numbers that are to hold, one file a task: `gpobench regress` takes this one for all."
    text = f"{head}\nformat = 1\nparts = [\n{names}]\n"
    try:
        write_atomically(path, lambda p: p.write_text(text, "utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def beside(path: Path) -> Path:
    """Where a baseline's scores are."""
    return path.with_name(f"{path.stem}.scores.csv")


def write(path: Path, known: Baseline, scores: BaselineScores) -> Baseline:
    """Both files, each whole or not at all; returns the baseline with the sum of its scores."""
    table = _scores_text(known, scores)
    known = known.model_copy(update={"scores_sha256": hashlib.sha256(table.encode()).hexdigest()})
    try:
        write_atomically(beside(path), lambda p: p.write_text(table, "utf-8"))
        write_atomically(path, lambda p: p.write_text(_text(known, path), "utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return known


def read(path: Path) -> tuple[Baseline, BaselineScores]:
    """A baseline and its scores.

    Raises UserError where either cannot be read, the scores are not those the baseline was written with, a mean is not
    that of its scores, or a method is unknown here.
    """
    try:
        known = Baseline.model_validate(tomllib.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        raise UserError(f"no baseline at {path}; `--update` writes one from runs") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is no baseline: {where}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {(str(error).splitlines() or ['damaged'])[0]}") from None
    for claim in known.row:
        name = claim.method.partition(":")[0]
        if claim.label != BASE and ".py:" not in claim.method and name not in registry.entries("method"):
            raise registry.unknown(f"method in {path}", name, registry.entries("method"))
    try:
        raw = beside(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {beside(path)}: {error.strerror}") from None
    if hashlib.sha256(raw).hexdigest() != known.scores_sha256:
        raise UserError(f"{beside(path)} is not the file that {path} was written with: its sha256 differs")
    scores = _parse(beside(path), raw.decode("utf-8"), known)
    for claim in known.row:
        for number in claim.number:
            told = mean(scores.by[claim.label, number.key], scores.strata)
            if not abs(told - number.mean) <= 10.0**-known.digits:  # both are rounded
                raise UserError(
                    f"{path} says {claim.label} has a {number.key} of {number.mean:g}, its scores say {told:g}"
                )
    return known, scores


def mean(vectors: Sequence[Array], strata: Sequence[str] | None = None) -> float:
    """Of (prompts,) vectors, one a seed: over seeds, then prompts, then strata; prompts without a score under a seed left out."""
    x = np.mean(vectors, axis=0)
    labels = np.array(strata if strata is not None else [""] * len(x))
    there = np.isfinite(x)
    return (
        float(np.mean([x[there & (labels == one)].mean() for one in np.unique(labels[there])]))
        if there.any()
        else math.nan
    )


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys with points; None, which TOML cannot hold, is left out. Values as JSON knows them."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")  # type: ignore[arg-type]
        elif value is not None:
            found[prefix + key] = json.loads(json.dumps(value, default=str))
    return found


def literal(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(key)} = {literal(one)}" for key, one in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(literal(one) for one in value) + "]"
    # JSON's strings are TOML's, but for the one control character that JSON leaves as it is
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _text(known: Baseline, path: Path) -> str:
    """The TOML, in the order of the model."""
    lines = [
        "# Reported numbers that are to hold. `gpobench regress RUNS --against` this file judges new runs by it; `--update` writes it.",
        f"# The score of every prompt is in {beside(path).name}. A margin is a person's choice and may be edited; all else is measured.",
        "",
    ]
    whole = known.model_dump()
    rows: Sequence[dict[str, Any]] = whole.pop("row")
    lines += [f"{key} = {literal(value)}" for key, value in whole.items() if not isinstance(value, dict)]
    for key, value in whole.items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]", *_pairs(flat(value))]  # type: ignore[arg-type]
    for row in rows:
        settings, numbers = row.pop("settings"), row.pop("number")
        lines += ["", "[[row]]", *(f"{key} = {literal(value)}" for key, value in row.items())]
        lines += ["", "[row.settings]", *_pairs(settings)] if settings else []
        for number in numbers:
            said = [f"{key} = {literal(value)}" for key, value in number.items() if value is not None]
            lines += ["", "[[row.number]]", *said]
    return "\n".join(lines) + "\n"


def _pairs(table: Mapping[str, Any]) -> Iterator[str]:
    """Keys are quoted whole, so that a point in one opens no table: what is flat stays flat."""
    for key, value in table.items():
        bare = key.replace("_", "").replace("-", "")
        yield f"{key if bare.isascii() and bare.isalnum() else literal(key)} = {literal(value)}"


def _scores_text(known: Baseline, scores: BaselineScores) -> str:
    """One line a row, key and seed, one column a prompt: a number that did not change leaves its line as it was."""
    out = io.StringIO()
    sheet = csv.writer(out, lineterminator="\n")
    prompts = len(next(iter(scores.by.values()))[0])
    sheet.writerow([*HEAD, *range(prompts)])
    if scores.strata is not None:
        sheet.writerow(["", STRATUM, "", *scores.strata])
    for claim in known.row:
        for number in claim.number:
            for seed, vector in zip(claim.seeds or ("",), scores.by[claim.label, number.key], strict=True):
                cells = [f"{x:.{known.digits}f}" if math.isfinite(x) else "" for x in vector.tolist()]
                sheet.writerow([claim.label, number.key, seed, *cells])
    return out.getvalue()


def _parse(path: Path, text: str, known: Baseline) -> BaselineScores:
    found: dict[tuple[str, str, str], Array] = {}
    strata: list[str] | None = None
    try:
        head, *lines = csv.reader(io.StringIO(text))
        for row, key, seed, *cells in lines:
            if len(cells) != len(head) - len(HEAD):
                raise ValueError(
                    f"{len(cells)} prompts in the line of {row} {key} {seed}, {len(head) - len(HEAD)} in the head"
                )
            if (row, key) == ("", STRATUM):
                strata = cells
            else:
                found[row, key, seed] = np.array([float(cell) if cell else math.nan for cell in cells])
        by = {
            (claim.label, number.key): [found[claim.label, number.key, str(seed)] for seed in claim.seeds or ("",)]
            for claim in known.row
            for number in claim.number
        }
    except (ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except KeyError as error:
        raise UserError(f"{path} lacks the scores of {' '.join(map(str, error.args[0]))}") from None
    return BaselineScores(by, strata)
