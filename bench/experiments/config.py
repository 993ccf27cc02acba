"""Config of a run: resolves a request through presets, files and --set into one checked and hashable description."""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from .. import registry
from ..budget import CURRENCIES, Budget, load_budget
from ..errors import UserError
from ..files import content_digest, utf_8_name
from ..files import digest as file_digest
from ..model_spec import Adapter, ModelSpec, find_model_spec, registered_name
from ..scoring.references import ScorerLocation, ScorerReference
from ..scoring.references import scorer_locations as parse_locations
from ..scoring.worker_setting import WorkerSetting

Table = dict[str, Any]
DEEPEST = 16  # levels of nested settings
LARGEST_FLOAT32 = 3.4028234663852886e38  # in which losses and updates are computed
AGGREGATIONS = ("sum", "gdpo", "pareto")  # of `training/several_rewards.py`, which loads torch
# Fields of a model spec that a run may set: they change memory and speed, and results only by rounding.
EXECUTION = ("rows", "checkpointing", "offload", "merge", "compile", "sampling_precision")
# The values that are no number of rows, and not true and false alone.
CHOICES: Mapping[str, Sequence[Any]] = {
    "compile": (True, "auto", False),
    "sampling_precision": ("auto", "fp32", "bf16"),
}
NOT_OF_METHOD = (
    "adapter",
    "evaluation",
    "precision",
    "reward_aggregation",
    *EXECUTION,
)  # keys beside the fields of a method
# Names that trainers of the field give to settings; an error names ours.
OTHER_TRAINERS = {
    "learning_rate": "optim.lr",
    "warmup_steps": "optim.warmup",
    "ema_decay": "optim.ema",
    "max_grad_norm": "optim.clip",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "num_inference_steps": "steps",
    "num_steps": "steps",
    "guidance_scale": "guidance",
    "group_size": "group",
    "num_generations": "group",
    "num_image_per_prompt": "group",
    "mixed_precision": "precision",
    "gradient_checkpointing": "checkpointing",
    "kl_beta": "kl",
}


@dataclass(frozen=True)
class RunRequest:
    """What a person asks of one run: the options of `gpobench run` that decide what it computes."""

    method: str  # a name, NAME:VARIANT or path/to/file.py:Name
    task: str
    model: str
    seed: int = 0  # of the training
    budget: str | None = None  # a name, a TOML file or nfe=200000; None: the model's
    reward: str | None = None  # the scorer to train on, or a blend; None: the task's
    config: Path | None = None  # a TOML file of settings
    sets: Sequence[str] = ()  # key=value, the last word
    scorer_locations: Sequence[str] = ()  # NAME=URL, where a scorer is served
    prompts: Sequence[str] = ()  # FILE for the train split, or SPLIT=FILE

    def words(self) -> list[str]:
        """The command line behind `gpobench` that makes the same request."""
        words = ["run", "--method", self.method, "--task", self.task, "--model", self.model, "--seed", str(self.seed)]
        config = str(self.config) if self.config else None
        for option, text in (("--budget", self.budget), ("--reward", self.reward), ("--config", config)):
            words += [option, text] if text else []
        lists = (("--set", self.sets), ("--scorer-at", self.scorer_locations), ("--prompts", self.prompts))
        return words + [word for option, texts in lists for text in texts for word in (option, text)]


@dataclass(frozen=True)
class Config:
    """A resolved run: everything that decides its result, so that equal configs give equal bytes."""

    method: str
    task: str
    model: str
    seed: int
    budget: Budget
    settings: Any  # the method's dataclass, its fields set
    adapter: Adapter
    evaluation: Any  # spec.EvaluationSettings
    precision: str  # fp32 | bf16 | fp16
    reward: str  # the scorer to train on
    # How the parts of a blend become one reward in a group: a name of `several_rewards.AGGREGATIONS`.
    reward_aggregation: str = "sum"
    # Values of EXECUTION that differ from the model spec.
    execution: Table = field(default_factory=dict[str, Any])
    # How the settings were chosen: trials, spent, command.
    tuned: Table = field(default_factory=dict[str, Any])
    # Scorer -> ScorerLocation, for scorers that run elsewhere.
    scorer_locations: Mapping[str, ScorerLocation] = field(default_factory=dict[str, ScorerLocation])
    # Processes that score images; they change no result.
    scorer_workers: WorkerSetting = field(default_factory=WorkerSetting)
    # Split -> a prompt file of the person's own.
    prompts: Mapping[Any, Path] = field(default_factory=dict[Any, Path])
    # Split -> that file's name and the hash of its content.
    prompt_hashes: Mapping[Any, str] = field(default_factory=dict[Any, str])
    # File of a method, task or scorer of the person's own -> the hash of its content.
    source_hashes: Mapping[str, str] = field(default_factory=dict[str, str])

    def mapping(self) -> Table:
        """Return the config as plain values: what --dry-run prints, the record keeps and the digest hashes.

        `tuned`, `scorer_locations` and `scorer_workers` are left out, because none changes what a run computes.
        """
        return {
            "method": self.method,
            "task": self.task,
            "model": self.model,
            "seed": self.seed,
            "budget": {"name": self.budget.name, **self.budget.bounds()},
            "settings": _plain(asdict(self.settings)),
            "adapter": _plain(asdict(self.adapter)),
            "evaluation": _plain(asdict(self.evaluation)),
            "precision": self.precision,
            "reward": self.reward,
            **({"reward_aggregation": self.reward_aggregation} if self.reward_aggregation != "sum" else {}),
            **({"prompts": dict(self.prompt_hashes)} if self.prompt_hashes else {}),
            **({"sources": dict(self.source_hashes)} if self.source_hashes else {}),
            **self.execution,
        }

    def refuse_changed_files(self) -> None:
        """Raise UserError where a file whose hash is part of this config has changed since the config was resolved."""
        hashes_now = {**_prompt_hashes(self.prompts), **_source_hashes(self.method, self.task, self.reward)}
        for name, content_hash in {**self.prompt_hashes, **self.source_hashes}.items():
            if hashes_now.get(name) != content_hash:
                file = self.prompts.get(name, name)
                raise UserError(f"{file} changed since this run was planned; give the same command again")

    def model_spec(self) -> ModelSpec:
        """Return the model spec with this run's execution settings."""
        return replace(find_model_spec(self.model), **self.execution)

    def digest(self) -> str:
        """Return 8 hex digits that identify the run; the budget's name is not hashed, its bounds are."""
        mapping = {**self.mapping(), "budget": self.budget.bounds()}
        return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()[:8]

    def slug(self) -> str:
        """Return the name of the run directory."""
        model = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(self.model).name)
        method = Path(self.method.rpartition(":")[0]).stem if ".py:" in self.method else self.method.replace(":", "-")
        return f"{method}-{Path(self.task).name.replace(':', '-')}-{model}-s{self.seed}-{self.digest()}"


def resolve(request: RunRequest) -> Config:
    """Resolve a request into a config.

    Settings come from, later ones winning: field defaults, methods/NAME.toml [model], its [model.task], for a variant
    `flow-grpo:fast` its [fast], [fast.model] and [fast.model.task], then --config FILE, then --set key=value.

    Raises:
        UserError: on an unknown name, with the nearest valid one, a value of the wrong type or an unreadable file.
    """
    from ..assets.prompts import parse_option
    from ..spec import EvaluationSettings

    method = registry.canonical("method", request.method)
    method_class = registry.load("method", method)
    task = registry.task(request.task)
    model = registered_name(request.model)
    model_spec = find_model_spec(model)
    evaluation: EvaluationSettings = task.evaluation(model_spec.domain)
    table: Table = {}
    preset_settings = preset(method, model_spec.preset or model_spec.name, request.task)
    for layer in (preset_settings, _read_toml(request.config), parse_settings(request.sets)):
        _merge(table, layer)
    adapter_table, evaluation_table = table.pop("adapter", {}), table.pop("evaluation", {})
    tuned = _tuned(table.pop("tuned", {}))
    prompt_files = parse_option(request.prompts)
    for path in prompt_files.values():
        if not path.exists():
            raise UserError(f"--prompts: there is no file {path}")
    scorer_table = _table("scorer", table.pop("scorer", {}))
    # A table of this name says where a scorer called `workers` runs.
    workers = None if isinstance(scorer_table.get("workers"), Mapping) else scorer_table.pop("workers", None)
    locations = parse_locations(request.scorer_locations, scorer_table)
    precision = table.pop("precision", model_spec.precision)
    if precision not in ("fp32", "bf16", "fp16"):
        raise registry.unknown("precision", str(precision), ("fp32", "bf16", "fp16"))
    reward_aggregation = table.pop("reward_aggregation", "sum")
    if reward_aggregation not in AGGREGATIONS:
        raise registry.unknown("reward_aggregation", str(reward_aggregation), AGGREGATIONS)
    execution = _execution({key: table.pop(key) for key in EXECUTION if key in table}, model_spec)
    _check_seed(request.seed)
    reward = request.reward or task.reward(model_spec.domain)
    return Config(
        method=method,
        task=request.task,
        model=model,
        seed=request.seed,
        budget=load_budget(request.budget or model_spec.budget),
        settings=_build_method(method_class, table, type(evaluation)),
        adapter=_build_group(Adapter, "adapter", asdict(model_spec.adapter), adapter_table),
        evaluation=_build_group(EvaluationSettings, "evaluation", asdict(evaluation), evaluation_table),
        precision=precision,
        reward=reward,
        reward_aggregation=reward_aggregation,
        execution=execution,
        tuned=tuned,
        scorer_locations=locations,
        scorer_workers=WorkerSetting.parse(workers),
        prompts=prompt_files,
        prompt_hashes=_prompt_hashes(prompt_files),
        source_hashes=_source_hashes(method, request.task, reward),
    )


def _check_seed(seed: int) -> None:
    """Raise UserError unless the seed is in [0, 2^32), the range that numpy accepts."""
    if seed < 0:
        raise UserError(f"--seed must not be negative, got {seed}")
    if seed >= 2**32:
        raise UserError(f"--seed must be below {2**32}, got {seed}")


def _build_method(method_class: Any, table: Mapping[str, Any], evaluation_class: Any) -> Any:
    """Build the method; of an unknown `group.key` the error names a group that has this key, as `evaluation.split`."""
    method = method_class()
    defaults = {f.name: getattr(method, f.name) for f in fields(method)}
    nested = {name: value for name, value in defaults.items() if is_dataclass(value)}
    keys_by_group = {
        group: {f.name for f in fields(kind)}
        for group, kind in {"adapter": Adapter, "evaluation": evaluation_class, **nested}.items()
    }
    for name, value in table.items():
        if name in defaults or name in NOT_OF_METHOD:
            continue
        if full_name := _full_name(name, defaults, keys_by_group):
            raise UserError(f"unknown setting {name!r}; did you mean {full_name!r}?")
        if not isinstance(value, Mapping) or get_close_matches(name, keys_by_group, cutoff=0.4):
            continue  # `build` names the nearest group
        for key in dict[str, Any](value):
            if group := next((group for group, keys in keys_by_group.items() if key in keys), ""):
                raise UserError(f"unknown setting {f'{name}.{key}'!r}; did you mean {f'{group}.{key}'!r}?")
    return build(method_class, table, extra=NOT_OF_METHOD)


def _full_name(name: str, defaults: Mapping[str, Any], keys_by_group: Mapping[str, Iterable[str]]) -> str:
    """The setting that a key means which lacks its group, as lr, or has the name that other trainers give it; "" where none is."""
    key = OTHER_TRAINERS.get(name, name)
    if key in defaults or key in NOT_OF_METHOD:
        return key
    group, _, leaf = key.rpartition(".")
    return next((f"{g}.{leaf}" for g, keys in keys_by_group.items() if group in ("", g) and leaf in keys), "")


def _build_group(kind: type, name: str, defaults: Mapping[str, Any], table: Any) -> Any:
    """Build the dataclass of a group of settings, as adapter.KEY, from its defaults and what was set."""
    return build(kind, {**defaults, **_table(name, table)}, prefix=f"{name}.")


def _prompt_hashes(files: Mapping[Any, Path]) -> dict[Any, str]:
    """Return split -> NAME@HASH, 12 hex digits."""
    try:
        return {split: f"{utf_8_name(path.name)}@{content_digest(path)[:12]}" for split, path in files.items()}
    except OSError as error:
        raise UserError(f"--prompts: cannot read {error.filename}: {error.strerror or error}") from None


def _source_hashes(method: str, task: str, reward: str) -> dict[str, str]:
    """Return file name -> 12 hex digits of its content, for parts named path/to/file.py:Name: an edited method is another run.

    Files that such a file imports are not hashed.
    """
    references = [method, task, *(scorer.text for scorer in ScorerReference.parse(reward).scorers)]
    hashes: dict[str, str] = {}
    for path in dict.fromkeys(Path(reference.rpartition(":")[0]) for reference in references if ".py:" in reference):
        if not path.is_file():
            raise UserError(f"no such file: {path}")
        hashes[path.name] = hashes.get(path.name, "") + file_digest(path)[:12]
    return hashes


def _execution(table: Table, model_spec: ModelSpec) -> Table:
    """Return the execution settings that differ from the model spec. Raises UserError on a value of the wrong type."""
    for key, value in table.items():
        if key == "rows" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise UserError(
                f"rows is a number of images sampled at once (0: the model's {model_spec.rows}), got {value!r}"
            )
        choices = CHOICES.get(key, (True, False))
        if key != "rows" and not any(
            value is choice or (isinstance(value, str) and value == choice) for choice in choices
        ):
            *others, last = (str(choice).lower() if isinstance(choice, bool) else choice for choice in choices)
            choices = f"{', '.join(others)} or {last}"
            raise UserError(
                f"{key} is {choices} (the model's spec says {str(getattr(model_spec, key)).lower()}), got {value!r}"
            )
    return {
        key: value for key, value in table.items() if value != getattr(model_spec, key) and (key != "rows" or value)
    }


def _tuned(value: Any) -> Table:
    """Parse the flat table `tuned` that `gpobench tune` writes beside chosen settings into {trials, spent, command}."""
    if not isinstance(value, Mapping):
        raise UserError(f"tuned is a table of trials, command and what was spent, got {value!r}")
    table: Table = dict(value)  # type: ignore[arg-type]
    if not table:
        return {}
    trials, command = table.pop("trials", None), table.pop("command", "")
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1 or not isinstance(command, str):
        raise UserError(f"tuned needs a number of trials and the command, got {trials!r} and {command!r}")
    for key, amount in table.items():
        if key not in CURRENCIES:
            raise registry.unknown(
                "setting", f"tuned.{key}", [f"tuned.{c}" for c in ("trials", "command", *CURRENCIES)]
            )
        if not isinstance(amount, int | float) or isinstance(amount, bool):
            raise UserError(f"tuned.{key} must be a number, got {amount!r}")
        _refuse_infinite(f"tuned.{key}", amount)
    return {"trials": trials, "command": command, "spent": table}


def build(kind: Any, table: Mapping[str, Any], *, prefix: str = "", extra: Iterable[str] = ()) -> Any:
    """Build a dataclass, and the dataclasses inside it, from a mapping whose values pydantic checks.

    Args:
        kind: the dataclass; every field has a default.
        table: values by field; a nested dataclass as a mapping, of which missing keys keep this dataclass's default.
        prefix: put before the keys in error messages, as "optim.".
        extra: further valid keys of the level, for the suggestion in the error message.

    Raises:
        UserError: on an unknown key, with the nearest valid one, or a value of the wrong type.
    """
    from pydantic import TypeAdapter, ValidationError

    default = kind()
    values: Table = {}
    defaults = {f.name: getattr(default, f.name) for f in fields(kind)}
    for key, value in table.items():
        if key not in defaults:
            raise registry.unknown("setting", prefix + key, [prefix + k for k in (*defaults, *extra)])
        if is_dataclass(defaults[key]) and not isinstance(defaults[key], type):
            inner = {**asdict(defaults[key]), **_table(prefix + key, value)}
            value = build(type(defaults[key]), inner, prefix=f"{prefix}{key}.")
        _refuse_infinite(prefix + key, value)
        values[key] = value
    complete = {**{name: value for name, value in defaults.items() if name not in values}, **values}
    try:
        # pydantic does not check a dataclass instance: nested ones were checked above, the rest are plain values.
        return TypeAdapter(kind).validate_python(complete)
    except ValidationError as error:
        first = error.errors()[0]
        key = prefix + ".".join(str(part) for part in first["loc"])
        raise UserError(f"setting {key}: {first['msg']}, got {first['input']!r}") from None


def _refuse_infinite(key: str, value: Any) -> None:
    """Raise UserError on a number, or one in a list or table, that is infinite or NaN: 1e400 is one, and 1e39 in float32."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"setting {key} must be a finite number, got {value}")
    if isinstance(value, int | float) and abs(value) > LARGEST_FLOAT32:
        raise UserError(f"setting {key} must be at most {LARGEST_FLOAT32:.3g}, the largest float32, got {value:.3g}")
    if isinstance(value, str):
        return
    inner: Iterable[Any] = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, Iterable) else ()
    )  # type: ignore[reportUnknownMemberType]
    for part in inner:
        _refuse_infinite(key, part)


def preset_path(method: str) -> Path | None:
    """Return the preset TOML beside a method's file, if there is one."""
    if ".py:" in method:
        path = Path(method.rpartition(":")[0]).with_suffix(".toml")
    else:
        entry = registry.entries("method")[method.partition(":")[0]]
        package, _, leaf = entry.value.partition(":")[0].rpartition(".")
        path = Path(str(resources.files(package))) / f"{leaf}.toml" if package else Path(f"{leaf}.toml")
    return path if path.is_file() else None


def preset(method: str, model: str, task: str) -> Table:
    """Return the settings of a method's preset file for a model and a task; those of its variant come last and win."""
    path = preset_path(method)
    presets = _read_toml(path) if path else {}
    if path and ".py:" in method:
        _check_presets(path, presets, model)
    table = _section(presets, model, task)
    variant = "" if ".py:" in method else method.partition(":")[2]
    if variant:
        if variant not in variants(method):
            raise registry.unknown(f"variant of {method.partition(':')[0]}", variant, variants(method))
        models = {*registry.entries("model"), model}
        _merge(table, {key: value for key, value in presets[variant].items() if key not in models})
        _merge(table, _section(presets[variant], model, task))
    return table


def _check_presets(path: Path, presets: Mapping[str, Any], model: str) -> None:
    """Raise UserError where a file beside a person's method holds no presets, or a section that is nearly a model's name."""
    models = {*registry.entries("model"), model}
    for key, value in presets.items():
        if not isinstance(value, Mapping):
            raise UserError(
                f"{path} lies beside a method and should hold its presets, but {key!r} is in no section of a model"
            )
        if key not in models and get_close_matches(key, models, n=1, cutoff=0.75):
            raise registry.unknown(f"section of {path}", key, models)


def _section(presets: Mapping[str, Any], model: str, task: str) -> Table:
    """Merge [model] without its tasks and [model.task]; the task pickscore-full also reads pickscore's, before its own."""
    section, tasks = presets.get(model, {}), registry.entries("task")
    table: Table = {}
    _merge(table, {key: value for key, value in section.items() if key not in tasks})
    for name in dict.fromkeys((task.partition("-")[0], task)):
        _merge(table, section.get(name, {}))
    return table


def variants(method: str) -> list[str]:
    """Return the variants of a method: the sections of its preset file that are no model."""
    path = preset_path(method)
    return [key for key in (_read_toml(path) if path else {}) if key not in registry.entries("model")]


def scorer_tables(path: Path | None) -> Mapping[str, Table]:
    """Return the [scorer.NAME] tables of a settings file, which say where scorers run."""
    tables = _table("scorer", _read_toml(path).get("scorer", {}))
    if not isinstance(tables.get("workers"), Mapping):  # their number, see WorkerSetting
        tables.pop("workers", None)
    return tables


def _read_toml(path: Path | None) -> Table:
    """Read a TOML file; nothing for None. Raises UserError on a file that cannot be read."""
    if path is None:
        return {}
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # ValueError: no TOML, no UTF-8, or a path that no file can have
        raise UserError(f"cannot read config {path}: {error}") from None
    except RecursionError:
        raise UserError(f"cannot read config {path}: it is nested too deeply") from None
    return _shallow(table, str(path))


def parse_settings(sets: Iterable[str]) -> Table:
    """Parse `a.b=1` and the like into one nested mapping. Raises UserError on text without an equals sign."""
    table: Table = {}
    for text in sets:
        _merge(table, _parse_setting(text))
    return table


def _parse_setting(text: str) -> Table:
    """Parse one key=value; the value is TOML, or else a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set needs key=value, got {text!r}")
    try:
        parsed = tomllib.loads(f"x = {value.strip()}")["x"]
    except RecursionError:
        raise UserError(f"--set {key}: the value is nested too deeply") from None
    except ValueError:
        parsed = value.strip()  # a bare word is a string
    table: Any = parsed
    for part in reversed(key.strip().split(".")):
        table = {part: table}
    return _shallow(table, f"--set {key[:40]}")


def _shallow(table: Table, source: str) -> Table:
    """Return the table; UserError where it is nested deeper than any setting, or where a text is not UTF-8."""
    pending: list[tuple[Any, int]] = [(table, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > DEEPEST:
            raise UserError(f"{source}: nested deeper than {DEEPEST} levels")
        if isinstance(value, Mapping):
            pending += [(inner, depth + 1) for pair in value.items() for inner in pair]  # type: ignore[arg-type]
        elif isinstance(value, list | tuple):
            pending += [(inner, depth + 1) for inner in value]  # type: ignore[arg-type]
        elif isinstance(value, str) and value != utf_8_name(value):
            raise UserError(f"{source}: {utf_8_name(value)!r} is not UTF-8, which settings are written in")
    return table


def _merge(target: Table, layer: Mapping[str, Any]) -> None:
    """Write a layer of nested settings over the target, key by key."""
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            _merge(target[key], value)  # type: ignore[arg-type]
        else:
            target[key] = dict(value) if isinstance(value, Mapping) else value  # type: ignore[arg-type]


def _table(name: str, value: Any) -> Table:
    """Return a group of settings as a dict. Raises UserError on a single value."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if not isinstance(value, Mapping):
        raise UserError(f"setting {name} holds several values, set one of them: {name}.KEY=VALUE")
    return dict(value)  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    """Return nested values as JSON has them: tuples as lists, unknown types as text."""
    return json.loads(json.dumps(value, default=str))
