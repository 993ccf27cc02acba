"""Reads and writes baseline files: reported numbers with their margins as TOML, and every image's score as CSV beside it."""

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
from ..bench.stats.intervals import per_prompt
from .board import BASE

Array = NDArray[np.float64]
FORMAT = 3  # 1 had the words of settings before they were renamed, 2 neither gains nor the scores of single images
HEAD = ("row", "key", "seed")
STRATUM = "stratum"  # the key of the line with each prompt's stratum, where there are several
UNSCORED = "-"  # an image without a score, in the cell of its prompt


class _BaselinePart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaselineNumber(_BaselinePart):
    """The mean of one scorer/metric over the prompts, after training, and the margin within which a new mean is the same."""

    key: str
    mean: float
    ci: tuple[float, float]
    n: int = Field(gt=1, description="prompts with a score")
    margin: float = Field(gt=0, allow_inf_nan=False, description="absolute, in units of the score")
    repeat: float | None = Field(
        default=None,
        description="half the 90 % interval of the difference that training again with other seeds is expected to show",
    )
    rule: str | None = Field(
        default=None, description="the share of the gain that `margin` was computed from, as `--margin` takes it"
    )
    gain: float | None = Field(default=None, description="over the base, paired; None for the base")
    gain_ci: tuple[float, float] | None = None
    told: bool | None = Field(
        default=None, description="whether the gain is above 0 at 5 %, corrected (Holm) over the rows: it must be again"
    )


class Claim(_BaselinePart):
    """The numbers of a method with one set of settings; the base is a claim without seeds."""

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


class Baseline(_BaselinePart):
    """The claims of one task, the inputs that they were measured with, and where and when."""

    format: Literal[3] = FORMAT
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
    """Scores of every image; of files that were written before format 3, of every prompt, as one image."""

    by: Mapping[
        tuple[str, str], Sequence[Array]
    ]  # (row, key) -> (prompts, images) for each seed of the row; NaN = no score
    strata: Sequence[str] | None = None  # (prompts,), where there are several


def find_baseline(name: str) -> Path:
    """Find the file of a baseline, given its path or the name of one in the package."""
    path = Path(name)
    packaged = Path(__file__).parent / f"{path.name}.toml"
    return packaged if not path.is_file() and path.name == name and packaged.is_file() else path


def baseline_files(path: Path) -> list[Path]:
    """Return the baselines of a file: itself, or those that an index lists, one a task. Raises UserError on a damaged index."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return [path]  # read_baseline reports the error
    if "parts" not in table:
        return [path]
    names: Any = table["parts"]
    if set(table) != {"format", "parts"} or not isinstance(names, list) or not names:
        raise UserError(
            f"{path} is no list of baselines: it holds `format = {FORMAT}` and `parts`, the names of files beside it"
        )
    _check_format(path, table)
    return [path.with_name(str(name)) for name in cast(list[Any], names)]


def write_index(path: Path, files: Sequence[Path]) -> None:
    """Write a file that names several baselines beside it."""
    names = "".join(f"  {literal(file.name)},\n" for file in files)
    head = "# Reported numbers, one file a task: `gpobench regress` takes this file for all of them."
    text = f"{head}\nformat = {FORMAT}\nparts = [\n{names}]\n"
    try:
        write_atomically(path, lambda p: p.write_text(text, "utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def scores_path(path: Path) -> Path:
    """Return the path of the scores of a baseline."""
    return path.with_name(f"{path.stem}.scores.csv")


def write_baseline(path: Path, baseline: Baseline, scores: BaselineScores) -> Baseline:
    """Write both files, each whole or not at all; returns the baseline with the hash of its scores."""
    table = _scores_text(baseline, scores)
    baseline = baseline.model_copy(update={"scores_sha256": hashlib.sha256(table.encode()).hexdigest()})
    try:
        write_atomically(scores_path(path), lambda p: p.write_text(table, "utf-8"))
        write_atomically(path, lambda p: p.write_text(_text(baseline, path), "utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return baseline


def read_baseline(path: Path) -> tuple[Baseline, BaselineScores]:
    """Read a baseline and its scores.

    Raises UserError where either cannot be read, the format is another one, the scores are not those the baseline was written
    with, a mean is not that of its scores, or a method is not registered.
    """
    baseline = _read_toml(path)
    for claim in baseline.row:
        name = claim.method.partition(":")[0]
        if claim.label != BASE and ".py:" not in claim.method and name not in registry.entries("method"):
            raise registry.unknown(f"method in {path}", name, registry.entries("method"))
    try:
        raw = scores_path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {scores_path(path)}: {error.strerror}") from None
    if hashlib.sha256(raw).hexdigest() != baseline.scores_sha256:
        raise UserError(f"{scores_path(path)} is not the file that {path} was written with: its sha256 differs")
    scores = _parse_scores(scores_path(path), raw.decode("utf-8"), baseline)
    for claim in baseline.row:
        for number in claim.number:
            mean = mean_over_prompts(scores.by[claim.label, number.key], scores.strata)
            if not abs(mean - number.mean) <= 10.0**-baseline.digits:  # both are rounded
                raise UserError(
                    f"{path} says {claim.label} has a {number.key} of {number.mean:g}, its scores say {mean:g}"
                )
    return baseline, scores


def _read_toml(path: Path) -> Baseline:
    try:
        table = tomllib.loads(path.read_text("utf-8"))
        _check_format(path, table)
        return Baseline.model_validate(table)
    except FileNotFoundError:
        raise UserError(f"no baseline at {path}; `--update` writes one from runs") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is no baseline: {where}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {(str(error).splitlines() or ['damaged'])[0]}") from None


def _check_format(path: Path, table: Mapping[str, Any]) -> None:
    """Raise UserError where a file is of another format than this code reads and writes."""
    stated = table.get("format")
    if stated != FORMAT:
        raise UserError(
            f"{path} has format {stated}, this gpobench reads format {FORMAT}: write a new one with --update"
        )


def mean_over_prompts(vectors: Sequence[Array], strata: Sequence[str] | None = None) -> float:
    """Average (prompts,) or (prompts, images) scores, one a seed: over images, seeds, prompts, then strata.

    A prompt without a score under some seed is left out.
    """
    x = np.mean([per_prompt(vector) for vector in vectors], axis=0)
    labels = np.array(strata if strata is not None else [""] * len(x))
    scored = np.isfinite(x)
    if not scored.any():
        return math.nan
    return float(np.mean([x[scored & (labels == label)].mean() for label in np.unique(labels[scored])]))


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested table to dotted key -> value, values of JSON's types; None, which TOML lacks, is left out."""
    flattened: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flattened |= flat(value, f"{prefix}{key}.")  # type: ignore[arg-type]
        elif value is not None:
            flattened[prefix + key] = json.loads(json.dumps(value, default=str))
    return flattened


def literal(value: Any) -> str:
    """Format a value as TOML."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(key)} = {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(literal(item) for item in value) + "]"
    # A JSON string is a TOML string, except for the one control character that JSON does not escape.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _text(baseline: Baseline, path: Path) -> str:
    """Format the baseline as TOML, in the order of the model."""
    lines = [
        "# Reported numbers. `gpobench regress RUNS --against` this file compares new runs with them; `--update` writes it.",
        f"# The score of every image is in {scores_path(path).name}. Margins are chosen and may be edited; all else is measured.",
        "",
    ]
    whole = baseline.model_dump()
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
            entries = [f"{key} = {literal(value)}" for key, value in number.items() if value is not None]
            lines += ["", "[[row.number]]", *entries]
    return "\n".join(lines) + "\n"


def _pairs(table: Mapping[str, Any]) -> Iterator[str]:
    """Format pairs as lines of TOML. A key with a dot is quoted whole, so that it opens no nested table."""
    for key, value in table.items():
        bare = key.replace("_", "").replace("-", "")
        yield f"{key if bare.isascii() and bare.isalnum() else literal(key)} = {literal(value)}"


def _scores_text(baseline: Baseline, scores: BaselineScores) -> str:
    """Format scores as CSV: a line for each row, key and seed, a column for each prompt, in a cell the scores of its images.

    So a diff shows only the changed numbers, and numpy reads them without this package.
    """
    out = io.StringIO()
    sheet = csv.writer(out, lineterminator="\n")
    prompts = len(next(iter(scores.by.values()))[0])
    sheet.writerow([*HEAD, *range(prompts)])
    if scores.strata is not None:
        sheet.writerow(["", STRATUM, "", *scores.strata])
    for claim in baseline.row:
        for number in claim.number:
            for seed, vector in zip(claim.seeds or ("",), scores.by[claim.label, number.key], strict=True):
                images = np.atleast_2d(vector.T).T.tolist()
                sheet.writerow([claim.label, number.key, seed, *(_cell(scored, baseline.digits) for scored in images)])
    return out.getvalue()


def _cell(images: Sequence[float], digits: int) -> str:
    """Format the scores of one prompt's images; empty where none has one."""
    words = [f"{x:.{digits}f}".rstrip("0").rstrip(".") if math.isfinite(x) else UNSCORED for x in images]
    return "" if set(words) == {UNSCORED} else " ".join("0" if word == "-0" else word for word in words)


def _matrix(cells: Sequence[str]) -> Array:
    """Parse the cells of a line as (prompts, images). Raises ValueError where prompts have different numbers of images."""
    words = [cell.split() for cell in cells]
    counts = {len(images) for images in words if images} or {1}
    if len(counts) > 1:
        raise ValueError(f"prompts have {' and '.join(map(str, sorted(counts)))} images in one line")
    nothing = [UNSCORED] * counts.pop()
    return np.array([[math.nan if x == UNSCORED else float(x) for x in images or nothing] for images in words])


def _parse_scores(path: Path, text: str, baseline: Baseline) -> BaselineScores:
    vectors: dict[tuple[str, str, str], Array] = {}
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
                vectors[row, key, seed] = _matrix(cells)
        by = {
            (claim.label, number.key): [vectors[claim.label, number.key, str(seed)] for seed in claim.seeds or ("",)]
            for claim in baseline.row
            for number in claim.number
        }
    except (ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except KeyError as error:
        raise UserError(f"{path} lacks the scores of {' '.join(map(str, error.args[0]))}") from None
    return BaselineScores(by, strata)
