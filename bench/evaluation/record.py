"""The record of a run: one JSON file with its settings, scores, spend and provenance, under a published schema."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UserError, error_line
from ..files import digest, read_json, write_atomically

INVALID = 0.005  # share of images that could not be scored above which a row is invalid
INVALID_RULE = f"more than {100 * INVALID:g} % of the images of a scorer have no score"
RECORD = "record.json"  # the record's own name among its checksums
SCHEMA = 4  # the version that is written, and the only one that is read
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

    p: float | None = Field(description="two-sided, of the paired t-test over prompts; null below five prompts")
    mde: float | None = Field(description="smallest difference this many prompts would show with 80 % power")


class Point(_Part):
    """One evaluation on the validation prompts during training."""

    spent: dict[str, float]
    scores: dict[Key, Number]


class FrontierPoint(_Part):
    """The images that a search would serve after fewer candidates than it tried; of the last point all it tried."""

    candidates: float = Field(description="images tried for one that is served, the mean over images")
    nfe: float = Field(description="evaluations of the network for a served image, the mean over images")
    delta: dict[Key, Difference]


class Stratum(_Part):
    """The same numbers over the prompts of one stratum: a tag of GenEval, a style of HPSv2."""

    before: dict[Key, Number]
    after: dict[Key, Number]
    delta: dict[Key, Difference]


class Flags(_Part):
    """What a reader should know before using the numbers."""

    hack: bool = Field(
        description="the training scorer rises for sure, and the held-out ones by less than .4 of it or a quality column falls for sure"
    )
    reasons: list[str] = Field(default_factory=list, description="why the hack flag is set")
    invalid: bool = Field(description="more than 0.5 % of the images of a scorer could not be scored")
    single_seed: bool = True


class RecordedTransfer(_Part):
    """A held-out gain over the training gain, on the same images: null where the training scorer does not rise for sure."""

    training: Key
    unit: Literal["score", "sd"] = Field(
        description="of both gains: the score, or standard deviations of the base's scores between prompts"
    )
    ratio: float | None
    ci: tuple[float | None, float | None]
    p_below: float | None = Field(description="one-sided, of a ratio below .4")
    n: int = Field(description="prompts")


class ScorerUse(_Part):
    """A scorer of the run, and how much training used it."""

    id: str
    role: Role
    metrics: list[str] = Field(default_factory=list, description="the first is the one a method is trained on")
    calls: int = Field(description="in training; evaluation is off budget")
    seconds: float
    errors: int
    unscored: int = Field(default=0, description="images of the evaluations before and after without a score")
    backwards: int = Field(default=0, description="images of training whose score was differentiated, of the calls")


class ObservedCounts(_Part):
    """Calls that were counted from beside the rig, in rows of a batch, images and steps."""

    nfe: int = Field(description="forward-equivalents: a row without a gradient 1, with one 3")
    nfe_by_weights: dict[str, int] = Field(description="policy, ref, or the name of another copy")
    forwards: int = Field(description="rows through the network without a gradient; two-pass guidance has two an image")
    gradient_forwards: int = Field(description="rows with a gradient")
    backwards: int = Field(description="rows whose gradient came back through the network")
    images: int = Field(description="decoded")
    scored: dict[str, int] = Field(description="images given to each scorer and embedder")
    gradient_images: int = Field(default=0, description="decoded with a gradient")
    gradient_scored: dict[str, int] = Field(default_factory=dict, description="images scored with a gradient")
    updates: int = Field(description="steps of any optimiser")


class Observed(_Part):
    """What was really computed, counted where it happens and not where it is charged."""

    training: ObservedCounts
    evaluation: ObservedCounts
    seconds: float = Field(description="of training, by a clock beside the meter's")
    differences: list[str] = Field(
        description="what was computed and not charged, and what changed that nothing may change; any makes the run a fault"
    )


class LookEntry(_Part):
    """The line in the ledger of test looks that stands for this run's evaluation on test prompts."""

    entry: str = Field(default="", description="sha256 of the line; '' if it could not be written")
    looks: int = Field(default=0, description="at these test prompts with this method so far, this one included")
    settings: int = Field(default=0, description="distinct settings among these looks")
    not_recorded: str = Field(default="", description="why the look is in no ledger")


class Record(_Part):
    """The outcome of one (method, task, model, budget, seed)."""

    schema_version: Literal[4] = SCHEMA
    kind: Literal["run", "eval"] = "run"
    method: str
    task: str
    model: str
    seed: int
    stop: str = Field(description="why training or search ended")
    fault: str = Field(
        default="", description="what went wrong in a run that is no result and never ranked; '' if nothing"
    )
    before: dict[Key, Number]
    after: dict[Key, Number]
    delta: dict[Key, Difference]
    spent: dict[str, float] = Field(description="nfe, images, reward_calls, updates, seconds, flops")
    run_dir: str
    nfe_by_role: dict[str, int] = Field(default_factory=dict)
    observed: Observed | None = Field(default=None, description="the same as `spent`, counted from beside the rig")
    flags: Flags
    scorers: dict[str, ScorerUse]
    key: Key = Field(
        default="",
        description="the scorer/metric that ranks, fixed by the task; '' in a record from before it was stated",
    )
    transfer: dict[Key, RecordedTransfer] = Field(
        default_factory=dict, description="held-out scorer/metric -> how much of the training gain it shows"
    )
    curve: list[Point] = Field(default_factory=list)
    nfe_an_image: int | None = Field(
        default=None, description="evaluations of the network for one image under the protocol of the evaluation"
    )
    frontier: list[FrontierPoint] = Field(
        default_factory=list, description="of a search: gain against nfe, by rising number of candidates"
    )
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
    checksums: dict[str, str] = Field(
        default_factory=dict,
        description="sha256 of the files of the run directory that readers believe, by relative path",
    )
    look: LookEntry | None = Field(default=None, description="null where no result was evaluated on test prompts")
    wall: dict[str, float] = Field(description="seconds by phase, on the device named in provenance")
    provenance: dict[str, Any]
    tuning: dict[str, Any] = Field(
        default_factory=dict,
        description="how the settings were chosen: trials, spent by currency, the command; {} if by hand",
    )


def disqualification(record: Record) -> str:
    """Why a run is no result, in words: it ended by a fault, or too many images have no score; "" where it is one.

    Such a run is in no ranking and no baseline, and the command that made it ends with errors.NO_RESULT.
    """
    if record.fault:
        return f"ended by a fault: {record.fault}"
    return f"is invalid: {INVALID_RULE}" if record.flags.invalid else ""


def elsewhere(records: Sequence[Record]) -> int:
    """Count the records that another commit made, or that one with uncommitted changes may have made."""
    current = revision()
    revisions = [str(record.provenance.get("revision", "")) for record in records]
    return sum(made_by != current or not current or current.endswith("-dirty") for made_by in revisions)


def write(path: Path, record: Record) -> None:
    """Write a record, whole or not at all, with a checksum of its own content among its checksums."""
    table = json.loads(record.model_dump_json())
    table["checksums"][RECORD] = _content_hash(table)
    text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda p: p.write_text(text, "utf-8"))


def content_hash(path: Path) -> str:
    """sha256 of the content of a record on disk, which names it. Raises OSError, ValueError and KeyError on whatever is no record."""
    return _content_hash(read_json(path))


def _content_hash(table: Mapping[str, Any]) -> str:
    """sha256 of the content of a record's JSON without its own checksum; layout and order of keys do not count."""
    others = {name: value for name, value in table["checksums"].items() if name != RECORD}
    return hashlib.sha256(json.dumps({**table, "checksums": others}, sort_keys=True).encode()).hexdigest()


def verified(run_dir: Path, record: Record, name: str) -> Path:
    """The path of a file of a finished run, which holds what the run wrote.

    Args:
        run_dir: the run's directory, wherever it lies now.
        record: of that run.
        name: relative path of the file.

    Raises:
        UserError: where the file is missing, or was changed or cut after the run, or the run did not write it.
    """
    path, remedy = run_dir / name, "restore it, or do the run again with --fresh"
    try:
        actual = digest(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {remedy}") from None
    if name not in record.checksums:
        raise UserError(f"{path} is not of this run: its record names no such file; {remedy}")
    if actual != record.checksums[name]:
        raise UserError(f"{path} was changed or cut after the run wrote it (its checksum differs): {remedy}")
    return path


def read(path: Path) -> Record:
    """Read a record from disk.

    Raises UserError when it is unreadable, of another schema version, not a record, or was changed after it was written.
    """
    try:
        table: Any = read_json(path)
        if not isinstance(table, dict) or not {"schema_version", "method", "task"} & set(table):  # type: ignore[arg-type]
            raise UserError(f"{path} is not a record of gpobench but a file of another program")
        version: Any = table.get("schema_version", SCHEMA)  # type: ignore[union-attr]
        if version != SCHEMA:
            remedy = "update gpobench" if isinstance(version, int) and version > SCHEMA else "do the run again"
            raise UserError(
                f"{path} has schema version {version!r:.40}; this gpobench reads version {SCHEMA}: {remedy}"
            )
        record = Record.model_validate(table)
        if record.checksums.pop(RECORD, "") != _content_hash(table):
            raise UserError(
                f"{path} was changed or cut after the run wrote it (its checksum differs): restore it, or do the run again"
            )
        return record
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise UserError(f"{path} is not a record: {where}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a record: {error_line(error)}") from None


def schema() -> dict[str, Any]:
    """Return the JSON schema that record.schema.json publishes."""
    return Record.model_json_schema()


def provenance(**more: Any) -> dict[str, Any]:
    """Where a number comes from: code revision, versions, machine, processor kind (it decides last digits), and `more`."""
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

    The environment variable GPOBENCH_REVISION takes precedence: a container or a wheel has no git history of its own.
    """
    if stated := os.environ.get("GPOBENCH_REVISION"):
        return stated
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True)
        return commit.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def machine() -> str:
    """The accelerator's name, or the processor's with its number of cores."""
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
    named_facts = [(word, facts[name]) for word, names in parts.items() for name in names if name in facts]
    design = (
        " ".join(f"{word} {value}".strip() for word, value in named_facts) or platform.processor() or platform.machine()
    )
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
