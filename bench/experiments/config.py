"""From a command line to one resolved, checked and hashable mapping that says everything a run will do."""

from __future__ import annotations

import hashlib
import json
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
from ..files import digest as file_digest
from ..model_spec import Adapter, ModelSpec, find_model_spec
from ..scoring.references import ScorerLocation, ScorerReference
from ..scoring.references import scorer_locations as parse_locations

Table = dict[str, Any]
# Fields of a card that a run may set: they change memory and speed, and a result by its rounding only.
EXECUTION = ("rows", "checkpointing", "offload", "compile")


@dataclass(frozen=True)
class Config:
    """What a run will do, resolved: the same Config gives the same bytes."""

    method: str
    task: str
    model: str
    seed: int
    budget: Budget
    settings: Any  # the method's dataclass, its fields set
    adapter: Adapter
    evaluation: Any  # spec.Judging
    precision: str  # fp32 | bf16 | fp16
    reward: str  # the scorer to train on
    execution: Table = field(default_factory=dict[str, Any])  # of EXECUTION, what is not as the model's card has it
    tuned: Table = field(default_factory=dict[str, Any])  # how the settings were chosen: trials, spent, command
    # scorer -> where it runs, if not in this process
    scorer_locations: Mapping[str, ScorerLocation] = field(default_factory=dict[str, ScorerLocation])
    prompts: Mapping[Any, Path] = field(default_factory=dict[Any, Path])  # split -> the person's own file
    asked: Mapping[Any, str] = field(default_factory=dict[Any, str])  # split -> that file's name and its content's hash
    sources: Mapping[str, str] = field(default_factory=dict[str, str])  # a part's own file -> its content's hash

    def mapping(self) -> Table:
        """Plain, printable, hashable: what --dry-run shows and the record keeps.

        How settings were chosen and where scorers run is no part of it: neither changes what a run does.
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
            **({"prompts": dict(self.asked)} if self.asked else {}),
            **({"sources": dict(self.sources)} if self.sources else {}),
            **self.execution,
        }

    def unchanged(self) -> None:
        """Raise UserError where a file that this run is named after has changed since it was planned."""
        now = {**_asked(self.prompts), **_sources(self.method, self.task, self.reward)}
        for name, content in {**self.asked, **self.sources}.items():
            if now.get(name) != content:
                what = self.prompts.get(name, name)
                raise UserError(f"{what} changed since this run was planned: the same command plans it anew")

    def model_spec(self) -> ModelSpec:
        """The model's card with what this run says about execution."""
        return replace(find_model_spec(self.model), **self.execution)

    def digest(self) -> str:
        """8 hex digits that name the run; what the budget is called does not matter."""
        mapping = {**self.mapping(), "budget": self.budget.bounds()}
        return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()[:8]

    def slug(self) -> str:
        """The run directory's name."""
        clean = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(self.model).name)
        name = Path(self.method.rpartition(":")[0]).stem if ".py:" in self.method else self.method.replace(":", "-")
        return f"{name}-{Path(self.task).name.replace(':', '-')}-{clean}-s{self.seed}-{self.digest()}"


def resolve(
    method: str,
    task: str,
    model: str,
    *,
    seed: int = 0,
    budget: str | None = None,
    reward: str | None = None,
    config: Path | None = None,
    sets: Iterable[str] = (),
    scorer_locations: Iterable[str] = (),
    prompts: Sequence[str] = (),
) -> Config:
    """Field defaults < methods/NAME.toml [model] < [model.task] < --config FILE < --set key=value.

    A method's name may carry a variant, `flow-grpo:fast`: then [fast], [fast.model] and [fast.model.task] come after [model.task].
    scorer_locations: NAME=URL, where a scorer is served. prompts: FILE for the train split, or SPLIT=FILE.
    Raises UserError on an unknown name (with the nearest valid one), a value of the wrong type, an unreadable file.
    """
    from ..assets.prompts import parse_option
    from ..spec import EvaluationSettings

    method = registry.canonical("method", method)
    kind = registry.load("method", method)
    exam = registry.load("task", task)()
    model_spec = find_model_spec(model)
    evaluation: EvaluationSettings = exam.evaluation(model_spec.domain)
    table: Table = {}
    for layer in (preset(method, model_spec.preset or model_spec.name, task), _file(config), pairs(sets)):
        _merge(table, layer)
    own = {key: table.pop(key, {}) for key in ("adapter", "evaluation")}
    tuned = _tuned(table.pop("tuned", {}))
    files = parse_option(prompts)
    for path in files.values():
        if not path.is_file():
            raise UserError(f"--prompts: there is no file {path}")
    locations = parse_locations(scorer_locations, _table("scorer", table.pop("scorer", {})))
    precision = table.pop("precision", model_spec.precision)
    if precision not in ("fp32", "bf16", "fp16"):
        raise registry.unknown("precision", str(precision), ("fp32", "bf16", "fp16"))
    execution = _execution({key: table.pop(key) for key in EXECUTION if key in table}, model_spec)
    if seed < 0:
        raise UserError(f"--seed must not be negative, got {seed}")
    if seed >= 2**32:
        raise UserError(f"--seed must be below {2**32}, got {seed}")
    return Config(
        method=method,
        task=task,
        model=model,
        seed=seed,
        budget=load_budget(budget or model_spec.budget),
        settings=build(kind, table, extra=("adapter", "evaluation", "precision", *EXECUTION)),
        adapter=build(Adapter, {**asdict(model_spec.adapter), **_table("adapter", own["adapter"])}, prefix="adapter."),
        evaluation=build(
            EvaluationSettings, {**asdict(evaluation), **_table("evaluation", own["evaluation"])}, prefix="judging."
        ),
        precision=precision,
        reward=reward or exam.reward(model_spec.domain),
        execution=execution,
        tuned=tuned,
        scorer_locations=locations,
        prompts=files,
        asked=_asked(files),
        sources=_sources(method, task, reward or exam.reward(model_spec.domain)),
    )


def _asked(files: Mapping[Any, Path]) -> dict[Any, str]:
    return {split: f"{path.name}@{file_digest(path)[:12]}" for split, path in files.items()}


def _sources(method: str, task: str, reward: str) -> dict[str, str]:
    """Of parts that are files of the person's own: their content, 12 hex digits by name. An edited method is another one.

    What such a file imports is not looked at.
    """
    named = [method, task, *(scorer.text for scorer in ScorerReference.parse(reward).scorers)]
    found: dict[str, str] = {}
    for path in dict.fromkeys(Path(one.rpartition(":")[0]) for one in named if ".py:" in one):
        if not path.is_file():
            raise UserError(f"no such file: {path}")
        found[path.name] = found.get(path.name, "") + file_digest(path)[:12]
    return found


def _execution(table: Table, model_spec: ModelSpec) -> Table:
    """What of it differs from the card. Raises UserError on a value of another kind."""
    for key, value in table.items():
        if key == "rows" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise UserError(
                f"rows is a number of images sampled at once (0: the model's {model_spec.rows}), got {value!r}"
            )
        if key != "rows" and not isinstance(value, bool):
            raise UserError(
                f"{key} is true or false (the model's card says {str(getattr(model_spec, key)).lower()}), got {value!r}"
            )
    return {
        key: value for key, value in table.items() if value != getattr(model_spec, key) and (key != "rows" or value)
    }


def _tuned(marker: Any) -> Table:
    """{trials, spent, command} from the flat table `tuned` that `gpobench tune` writes beside the settings it chose."""
    if not isinstance(marker, Mapping):
        raise UserError(f"tuned is a table of trials, command and what was spent, got {marker!r}")
    table: Table = dict(marker)  # type: ignore[arg-type]
    if not table:
        return {}
    trials, command = table.pop("trials", None), table.pop("command", "")
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1 or not isinstance(command, str):
        raise UserError(f"tuned wants a number of trials and the command, got {trials!r} and {command!r}")
    for key, value in table.items():
        if key not in CURRENCIES:
            raise registry.unknown(
                "setting", f"tuned.{key}", [f"tuned.{c}" for c in ("trials", "command", *CURRENCIES)]
            )
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"tuned.{key} must be a number, got {value!r}")
    return {"trials": trials, "command": command, "spent": table}


def build(kind: Any, table: Mapping[str, Any], *, prefix: str = "", extra: Iterable[str] = ()) -> Any:
    """A dataclass from a mapping, checked by pydantic; nested dataclasses too; unknown keys refused with a suggestion."""
    from pydantic import TypeAdapter, ValidationError

    default = kind()
    values: Table = {}
    known = {f.name: getattr(default, f.name) for f in fields(kind)}
    for key, value in table.items():
        if key not in known:
            raise registry.unknown("setting", prefix + key, [prefix + k for k in (*known, *extra)])
        if is_dataclass(known[key]) and not isinstance(known[key], type):
            inner = {**asdict(known[key]), **_table(prefix + key, value)}  # what is not set keeps this method's default
            value = build(type(known[key]), inner, prefix=f"{prefix}{key}.")
        values[key] = value
    whole = {**{name: value for name, value in known.items() if name not in values}, **values}
    try:
        # A dataclass instance would pass unchecked, so nested ones go in as they are and the rest as plain values.
        return TypeAdapter(kind).validate_python(whole)
    except ValidationError as error:
        first = error.errors()[0]
        where = prefix + ".".join(str(part) for part in first["loc"])
        raise UserError(f"setting {where}: {first['msg']}, got {first['input']!r}") from None


def preset_path(method: str) -> Path | None:
    """The preset TOML that stands beside a method's file, if there is one."""
    if ".py:" in method:
        path = Path(method.rpartition(":")[0]).with_suffix(".toml")
    else:
        entry = registry.entries("method")[method.partition(":")[0]]
        package, _, leaf = entry.value.partition(":")[0].rpartition(".")
        path = Path(str(resources.files(package))) / f"{leaf}.toml" if package else Path(f"{leaf}.toml")
    return path if path.is_file() else None


def preset(method: str, model: str, task: str) -> Table:
    """The settings of a method's preset file for a model and a task, those of its variant last."""
    path = preset_path(method)
    presets = _file(path) if path else {}
    if path and ".py:" in method:
        _presets_only(path, presets, model)
    table = _section(presets, model, task)
    variant = "" if ".py:" in method else method.partition(":")[2]
    if variant:
        if variant not in variants(method):
            raise registry.unknown(f"variant of {method.partition(':')[0]}", variant, variants(method))
        models = {*registry.entries("model"), model}
        _merge(table, {key: value for key, value in presets[variant].items() if key not in models})
        _merge(table, _section(presets[variant], model, task))
    return table


def _presets_only(path: Path, presets: Mapping[str, Any], model: str) -> None:
    """Raise UserError where a file beside a person's method holds no presets, or has a section that is nearly a model's name."""
    known = {*registry.entries("model"), model}
    for key, value in presets.items():
        if not isinstance(value, Mapping):
            raise UserError(
                f"{path} stands beside a method and should hold its presets, but {key!r} is in no section of a model"
            )
        if key not in known and get_close_matches(key, known, n=1, cutoff=0.75):
            raise registry.unknown(f"section of {path}", key, known)


def _section(presets: Mapping[str, Any], model: str, task: str) -> Table:
    """[model] without its tasks, then [model.task]; pickscore-full is pickscore too, and what is its own comes last."""
    section, tasks = presets.get(model, {}), registry.entries("task")
    table: Table = {}
    _merge(table, {key: value for key, value in section.items() if key not in tasks})
    for name in dict.fromkeys((task.partition("-")[0], task)):
        _merge(table, section.get(name, {}))
    return table


def variants(method: str) -> list[str]:
    """The variants a method's preset file names: its sections that are no model."""
    path = preset_path(method)
    return [key for key in (_file(path) if path else {}) if key not in registry.entries("model")]


def scorer_tables(path: Path | None) -> Mapping[str, Table]:
    """The [scorer.NAME] tables of a settings file: where scorers run."""
    return _table("scorer", _file(path).get("scorer", {}))


def _file(path: Path | None) -> Table:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"cannot read config {path}: {error}") from None


def pairs(sets: Iterable[str]) -> Table:
    """`a.b=1` and its like as one nested mapping. Raises UserError on text without an equals sign."""
    table: Table = {}
    for text in sets:
        _merge(table, _pair(text))
    return table


def _pair(text: str) -> Table:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set wants key=value, got {text!r}")
    try:
        parsed = tomllib.loads(f"x = {value.strip()}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare word is a string
    table: Any = parsed
    for part in reversed(key.strip().split(".")):
        table = {part: table}
    return table


def _merge(into: Table, more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)  # type: ignore[arg-type]
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value  # type: ignore[arg-type]


def _table(name: str, value: Any) -> Table:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if not isinstance(value, Mapping):
        raise UserError(f"setting {name} holds several values, set one of them: {name}.KEY=VALUE")
    return dict(value)  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def with_seed(config: Config, seed: int) -> Config:
    """The same run under another seed."""
    return replace(config, seed=seed)
