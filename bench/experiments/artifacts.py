"""The files of a run directory: their names, and the one place that writes each of them.

Beside these a run directory holds `checkpoint/` (training/checkpoint.py), `before.*`, the evaluation of the base
(evaluation/evaluation_cache.py), and `inputs.json` with `.lock` (run_dir.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..errors import UserError
from ..evaluation import plots, record
from ..evaluation.estimates import Evaluation
from ..evaluation.ranking import BINARY_METRICS
from ..evaluation.record import Record
from ..files import digest, read_json, write_atomically
from ..spec import Scorer
from .config import EXECUTION, Config, RunRequest, resolve

if TYPE_CHECKING:
    import pandas as pd

# The files whose content tables, reports and exports believe: they are bound to the record by checksums.
CURVE = "curve.parquet"  # every score of the points of the curve
FRONTIER = "frontier.parquet"  # every score of the points of a search's frontier
BELIEVED = ("scores.parquet", CURVE, FRONTIER, "samples/*", "adapter/*", "config.toml")
REQUIRED = ("config.toml", "metrics.jsonl", "scores.parquet", CURVE)  # in the directory of every finished run


@dataclass(frozen=True)
class FrontierEvaluation:
    """The images that a search would serve after so many candidates, evaluated."""

    candidates: float  # images tried for one
    nfe: float  # of a served image
    evaluation: Evaluation


@dataclass(frozen=True)
class RunResult:
    """What a run found, beside the record: evaluations before and after, and the curve in between."""

    stop: str  # why training or search ended
    before: Evaluation
    after: Evaluation
    curve: Sequence[dict[str, Any]]  # points {spent, scores}, the base first
    cmmd: Mapping[str, Any]  # embedder -> {mean, ci, n}
    frontier: Sequence[FrontierEvaluation] = ()  # of a search


@dataclass(frozen=True)
class RunFiles:
    """The files of one run directory."""

    run_dir: Path

    @property
    def checkpoint(self) -> Path:
        """The folder of checkpoints."""
        return self.run_dir / "checkpoint"

    @property
    def base_evaluation(self) -> Path:
        """The stem of the files that hold the evaluation of the base."""
        return self.run_dir / "before"

    @property
    def adapter(self) -> Path:
        """The folder of the trained LoRA; the model writes it."""
        return self.run_dir / "adapter"

    @property
    def metrics(self) -> Path:
        """One JSON line for each iteration."""
        return self.run_dir / "metrics.jsonl"

    @property
    def look_token(self) -> Path:
        """What names this run in the ledger of test looks, however often it is interrupted."""
        return self.run_dir / "look.json"

    @property
    def record(self) -> Path:
        """The record, written last: its presence says that the run is complete."""
        return self.run_dir / "record.json"

    def write_config(self, config: Config) -> None:
        """Write config.toml."""
        _write_text(self.run_dir / "config.toml", config_toml(config))

    def open_metrics(self, iteration: int) -> MetricsLog:
        """Open metrics.jsonl for more lines, without those after the checkpoint of this iteration."""
        truncate_metrics(self.metrics, iteration)
        return MetricsLog(self.metrics)

    def write_curve_point(self, number: int, evaluation: Evaluation, stored: str) -> str:
        """Write every score of point `number` of the curve behind the points before it; later ones are of an earlier start.

        Args:
            number: of the point, from 0.
            evaluation: the scores of the point.
            stored: what the call for the point before returned.

        Returns:
            A hash of the scores of all points up to this one, for the next call and for the checkpoint.

        Raises:
            UserError: where the points before this one are not those that were written.
        """
        import pandas as pd

        scores = evaluation.table.drop(columns=["text", "reason", "note"]).assign(eval_point=number)
        tables: list[Any] = [self.read_curve(number, stored), scores] if number else [scores]
        table = pd.concat(tables, ignore_index=True)
        _write_parquet(self.run_dir / CURVE, table)
        return _table_hash(table)

    def read_curve(self, points: int, stored: str) -> pd.DataFrame:
        """The scores of the first points of the curve. Raises UserError where their hash is not the stored one."""
        import pandas as pd

        path = self.run_dir / CURVE
        try:
            table = pd.read_parquet(path)
            table = table.loc[table.eval_point < points]
            if _table_hash(table) == stored:
                return table
            reason = "its scores do not match the checksum in the checkpoint"
        except (ValueError, OSError, AttributeError, pa.ArrowException) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} was changed or cut ({reason}): restore it, or --fresh starts over")

    def write_scores(self, before: Evaluation, after: Evaluation) -> None:
        """Write scores.parquet: every score before and after."""
        import pandas as pd

        phases = [before.table.assign(phase="before"), after.table.assign(phase="after")]
        _write_parquet(self.run_dir / "scores.parquet", pd.concat(phases, ignore_index=True))

    def write_frontier(self, frontier: Sequence[FrontierEvaluation]) -> None:
        """Write frontier.parquet: every score of the points of a search's frontier, by their place in the record."""
        import pandas as pd

        tables = [
            point.evaluation.table.drop(columns=["text", "reason", "note"]).assign(point=k)
            for k, point in enumerate(frontier)
        ]
        _write_parquet(self.run_dir / FRONTIER, pd.concat(tables, ignore_index=True))

    def write_samples(self, before: Evaluation, after: Evaluation, scorer: Scorer) -> None:
        """Write samples/: sheets of the images for people, and the images themselves."""
        folder = self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        plots.samples([before], ["before"], scorer).save(folder / "before.png")
        plots.samples([after], ["after"], scorer).save(folder / "after.png")
        plots.samples([before, after], ["before", "after"], scorer).save(folder / "pairs.png")
        rows = after.shown()
        prompt, ordinal = rows.prompt.to_numpy(), rows.ordinal.to_numpy()

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(file, before=before.images, after=after.images, prompt=prompt, ordinal=ordinal)

        write_atomically(folder / "images.npz", write)

    def write_curve_plot(self, curve: Sequence[dict[str, Any]], scorer: Scorer, currency: str) -> None:
        """Write curve.png: the metrics that say most, over what was spent of a currency."""
        shown = (scorer.metrics[0], *BINARY_METRICS)
        keys = [key for key in curve[0]["scores"] if key.partition("/")[2] in shown]
        plots.curve(self.run_dir / "curve.png", curve, keys, currency)

    def own_look_token(self) -> str:
        """The token of this run in the ledger of test looks, made at the first call; a run that starts over has another one."""
        try:
            token = read_json(self.look_token)["token"]
            if isinstance(token, str) and token:
                return token
        except (OSError, ValueError, KeyError, TypeError):
            pass
        token = uuid.uuid4().hex
        _write_text(self.look_token, json.dumps({"token": token}) + "\n")
        return token

    def checksums(self) -> dict[str, str]:
        """The sha256 of each file of a finished run that readers believe, by its path in the run directory.

        Raises UserError where a file that every run has was removed while the run was at work.
        """
        if gone := [name for name in REQUIRED if not (self.run_dir / name).is_file()]:
            raise UserError(
                f"{self.run_dir / gone[0]} was removed while the run was at work; the same command goes on and writes it again"
            )
        paths = sorted(path for pattern in BELIEVED for path in self.run_dir.glob(pattern))
        return {path.relative_to(self.run_dir).as_posix(): digest(path) for path in paths}

    def write_record(self, finished: Record, readme: str) -> None:
        """Write README.md and then, as the run's last file, record.json."""
        _write_text(self.run_dir / "README.md", readme)
        record.write(self.record, finished)


class MetricsLog:
    """metrics.jsonl: one line for each iteration, flushed at once."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, numbers: Mapping[str, float]) -> None:
        """Append a line; JSON has no NaN, so what is not finite becomes null."""
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def truncate_metrics(path: Path, iteration: int) -> None:
    """Drop the lines after an iteration, and lines cut short: they were written after the checkpoint that a run goes on from."""
    if not path.is_file():
        return
    lines: list[str] = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["iteration"] <= iteration:
                lines.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the process was killed while it wrote this line
    _write_text(path, "".join(line + "\n" for line in lines))


def command(config: Config) -> str:
    """The command line, quoted for a shell, that makes the same run; it depends on no file of the run's directory.

    Relative paths in it start from the folder in which the run was started. Where a scorer is served is no part of a run.
    """
    request = RunRequest(
        config.method,
        config.task,
        config.model,
        seed=config.seed,
        budget=",".join(f"{currency}={bound!r}" for currency, bound in config.budget.bounds().items()),
        reward=config.reward,
        prompts=[f"{split}={path}" for split, path in config.prompts.items()],
    )
    preset, wanted = _set_values(resolve(request)), _set_values(config)
    sets = [f"{key}={_toml_value(value)}" for key, value in wanted.items() if key not in preset or preset[key] != value]
    if config.tuned:
        price = {key: value for key, value in config.tuned.items() if key != "spent"}
        sets.append(f"tuned={_toml_value({**price, **config.tuned['spent']})}")
    return shlex.join(["gpobench", *replace(request, sets=sets).words()])


def _set_values(config: Config) -> dict[str, Any]:
    """Every value that --set can give a run, by its key."""
    mapping, model_spec = config.mapping(), config.model_spec()
    values: dict[str, Any] = {"precision": config.precision, **{key: getattr(model_spec, key) for key in EXECUTION}}
    groups = {"": mapping["settings"], "adapter": mapping["adapter"], "evaluation": mapping["evaluation"]}
    groups |= {key: value for key, value in mapping["settings"].items() if is_dataclass(getattr(config.settings, key))}
    for group, table in groups.items():
        prefix = f"{group}." if group else ""
        values |= {f"{prefix}{key}": value for key, value in table.items() if prefix or key not in groups}
    return {key: value for key, value in values.items() if value is not None}


def config_toml(config: Config) -> str:
    """The settings as a TOML file that --config reads; the first line is the run's own command."""
    mapping, own_command = config.mapping(), command(config)
    printable = all(character == "\t" or character.isprintable() for character in own_command)
    lines = [f"# {own_command if printable else 'a name in the command of this run cannot be printed'}"]
    top = {**mapping["settings"], "precision": config.precision, **config.execution}
    tables = {"": top, "adapter": mapping["adapter"], "evaluation": mapping["evaluation"]}
    if config.tuned:
        tables["tuned"] = {**config.tuned, **config.tuned["spent"], "spent": None}
    tables |= {key: top.pop(key) for key in [k for k, v in top.items() if isinstance(v, dict)]}
    for name, table in tables.items():
        lines += ["", f"[{name}]"] if name else [""]
        lines += [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in table.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml_key(key: str) -> str:
    """A TOML key, quoted where it holds other characters than letters, digits, - and _."""
    return key if key.isascii() and key.replace("-", "").replace("_", "").isalnum() else _toml_value(key)


def _toml_value(value: Any) -> str:
    """A TOML value; strings keep every character, in which JSON's escapes of the higher planes are no TOML."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml_key(str(k))} = {_toml_value(v)}" for k, v in value.items()) + " }"  # type: ignore[arg-type]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"  # type: ignore[arg-type]
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _table_hash(table: pd.DataFrame) -> str:
    """sha256 of the rows of a table; floats are written with all their digits."""
    return hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def _write_parquet(path: Path, table: pd.DataFrame) -> None:
    write_atomically(path, lambda temporary: table.to_parquet(temporary, index=False))
