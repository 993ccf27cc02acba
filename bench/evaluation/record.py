"""The record of a run: one JSON file that says all about it, under a published schema."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from ..errors import UserError
from ..files import write_atomically

INVALID = 0.005  # share of images that could not be scored above which a row is invalid
SCHEMA = 2  # 1 had no strata, no summary and no auxiliary columns
SURE = 1.96  # standard errors
# How the libraries under torch are told to use fewer instructions; torch's own limit shows in the instruction set it names.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
Key = str  # `scorer/metric`
Role = Literal["training", "held-out", "auxiliary", "quality"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")


class Number(_Part):
    """An estimate over prompts with its 95 % interval; null where nothing could be scored."""

    mean: float | None
    ci: tuple[float | None, float | None]
    n: int = Field(description="prompts")


class Difference(Number):
    """After minus before, paired by prompt on the same noise."""

    p: float | None = Field(description="two-sided sign-flip permutation p")
    mde: float | None = Field(description="smallest difference this many prompts would show with 80 % power")


class Point(_Part):
    """One look at the validation prompts during training."""

    spent: dict[str, float]
    scores: dict[Key, Number]


class Stratum(_Part):
    """The same numbers over the prompts of one stratum: a tag of GenEval, a style of HPSv2."""

    before: dict[Key, Number]
    after: dict[Key, Number]
    delta: dict[Key, Difference]


class Flags(_Part):
    hack: bool = Field(
        description="the training scorer rises and the held-out ones do not follow, or a quality column falls by more than 2 SE"
    )
    invalid: bool = Field(description="more than 0.5 % of the images of a scorer could not be scored")
    single_seed: bool = True


class ScorerUse(_Part):
    id: str
    role: Role
    metrics: list[str] = Field(default_factory=list, description="the first is the one a method is trained on")
    calls: int = Field(description="in training; evaluation is off budget")
    seconds: float
    errors: int


class Record(_Part):
    """Everything about one (method, task, model, budget, seed)."""

    schema_version: Literal[1, 2] = SCHEMA
    kind: Literal["run", "eval"] = "run"
    method: str
    task: str
    model: str
    seed: int
    stop: str = Field(description="why training ended")
    before: dict[Key, Number]
    after: dict[Key, Number]
    delta: dict[Key, Difference]
    spent: dict[str, float] = Field(description="nfe, images, reward_calls, updates, seconds, flops")
    run_dir: str
    nfe_by_role: dict[str, int] = Field(default_factory=dict)
    flags: Flags
    scorers: dict[str, ScorerUse]
    curve: list[Point] = Field(default_factory=list)
    config: dict[str, Any] = Field(description="the resolved mapping; its hash names the run")
    task_version: str
    prompts: dict[str, str] = Field(description="split -> sha256 of its texts in order")
    failures: list[str] = Field(default_factory=list, description="why images could not be scored, the last few")
    strata: dict[str, Stratum] = Field(default_factory=dict, description="by stratum, where a task has several")
    summary: dict[Literal["before", "after"], dict[str, float | None]] = Field(
        default_factory=dict, description="the task's own aggregates, as its publication makes them"
    )
    embedders: dict[str, str] = Field(default_factory=dict, description="of diversity and drift: name -> id")
    cmmd: dict[str, Number] = Field(
        default_factory=dict, description="embedder -> CMMD between the base's images and the tuned ones"
    )
    wall: dict[str, float] = Field(description="seconds by phase, on the device named in provenance")
    provenance: dict[str, Any]
    tuning: dict[str, Any] = Field(
        default_factory=dict,
        description="how the settings were chosen: trials, spent by currency, the command; {} if by hand",
    )


def elsewhere(records: Sequence[Record]) -> int:
    """How many of these runs were not surely made by this code: by another commit, or one of the two has changes in none."""
    now = revision()
    made = [str(one.provenance.get("revision", "")) for one in records]
    return sum(one != now or not now or now.endswith("-dirty") for one in made)


def hacked(
    delta: Mapping[str, Mapping[str, Any]], training: str, held_out: Sequence[str], quality: Sequence[str] = ()
) -> bool:
    """The training scorer rises for sure and no held-out scorer follows, or a quality column falls by more than 2 SE.

    Not following: it does not rise for sure, and its rise can be told from the training scorer's, each in its own standard
    errors. A small rise that the held-out scorer shows with a little less certainty is no hack but a small rise.
    training: `scorer/metric`; held_out, quality: names of scorers. A quality column's first metric counts.
    """
    metric = training.partition("/")[2]
    others = [delta[key] for key in (_counterpart(delta, name, metric) for name in held_out) if key]
    others = [other for other in others if not math.isnan(_sure(other))]  # what could not be scored says nothing
    columns = [delta[key] for key in (_counterpart(delta, name, "") for name in quality) if key]
    rise = _sure(delta[training])
    alone = others and all(_sure(other) < SURE and rise - _sure(other) > SURE * math.sqrt(2) for other in others)
    return rise > SURE and bool(alone or any(_sure(column) < -2 for column in columns))


def flagged(record: Record) -> bool:
    """The hack flag of a record by the rule of this version, whichever wrote it."""
    by_role = {role: [n for n, use in record.scorers.items() if use.role == role] for role in get_args(Role)}
    trained = [f"{name}/{metric}" for name in by_role["training"] for metric in record.scorers[name].metrics[:1]]
    if not trained or trained[0] not in record.delta:
        return record.flags.hack
    delta = {key: number.model_dump() for key, number in record.delta.items()}
    return hacked(delta, trained[0], by_role["held-out"], by_role["quality"])


def _sure(number: Mapping[str, Any]) -> float:
    """The mean in standard errors, those behind its 95 % interval; NaN where there is none."""
    mean, (low, high) = number["mean"], number["ci"]
    if mean is None or low is None or high is None or not math.isfinite(mean):
        return math.nan
    se = (high - low) / (2 * SURE)
    return math.nan if math.isnan(se) else mean / se if se > 0 else math.copysign(math.inf, mean) if mean else 0.0


def _counterpart(delta: Mapping[str, Any], scorer: str, metric: str) -> str | None:
    """The scorer's metric of that name, else the first it has."""
    own = [key for key in delta if key.startswith(f"{scorer}/")]
    return f"{scorer}/{metric}" if f"{scorer}/{metric}" in own else next(iter(own), None)


def write(path: Path, record: Record) -> None:
    """record.json, whole or not at all."""
    write_atomically(path, lambda p: p.write_text(record.model_dump_json(indent=1) + "\n", "utf-8"))


def read(path: Path) -> Record:
    """A record from disk. Raises UserError when it is unreadable, of a newer schema, or not a record."""
    try:
        table = json.loads(path.read_text("utf-8"))
        if isinstance(table, dict) and table.get("schema_version", 0) > SCHEMA:
            raise UserError(
                f"{path} has schema {table['schema_version']}; this gpobench reads up to {SCHEMA}: update it"
            )
        return Record.model_validate(table)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a record: {str(error).splitlines()[0]}") from None


def schema() -> dict[str, Any]:
    """The JSON schema that record.schema.json publishes."""
    return Record.model_json_schema()


def provenance(**more: Any) -> dict[str, Any]:
    """Where a number comes from: code revision, versions, machine, and the kind of processor, which decides its last digits."""
    import torch

    names = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "rapidocr", "onnxruntime", "gpobench")
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "revision": revision(),
        "versions": versions,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "processor": processor(),
        **more,
    }


def revision() -> str:
    """The git commit of this package's checkout, `-dirty` when files differ from it; "" when it is no checkout.

    What the environment's GPOBENCH_REVISION says wins: a copy of the files (a container, a wheel) has no history of its own.
    """
    if said := os.environ.get("GPOBENCH_REVISION"):
        return said
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        say = ["git", "-C", str(root)]
        commit = subprocess.run([*say, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        dirty = subprocess.run([*say, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True)
        return commit.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def machine() -> str:
    """What computes: the accelerator's name, or the processor's with its cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = _cpuinfo().get("model name") or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def processor() -> str:
    """The kind of processor, as far as last digits depend on it: its design, the instruction set torch computes with, and the
    environment variables that restrict its libraries to less. The accelerator's name stands before it where there is one.

    "AuthenticAMD family 26 model 2, AVX512"
    """
    import torch

    facts = _cpuinfo()
    parts = {
        "": ("vendor_id", "CPU implementer"),
        "family": ("cpu family",),
        "model": ("model",),
        "part": ("CPU part",),
    }
    found = [(word, facts[name]) for word, names in parts.items() for name in names if name in facts]
    design = " ".join(f"{word} {value}".strip() for word, value in found) or platform.processor() or platform.machine()
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name)]
    kind = ", ".join([design, torch.backends.cpu.get_cpu_capability(), *limits])
    return f"{torch.cuda.get_device_name()} with {kind}" if torch.cuda.is_available() else kind


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; {} elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text("utf-8").partition("\n\n")[0]
    except (OSError, UnicodeDecodeError):
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
