"""The laws that every method must keep, each a small function, tried on two or four miniature models and a toy scorer in seconds."""

from __future__ import annotations

import ast
import copy
import importlib.util
import inspect
import io
import math
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import registry
from ..budget import Budget, Meter, Spent
from ..errors import UserError
from ..experiments import config
from ..model_spec import SMALL, Adapter, find_model_spec
from ..models import mini
from ..models.open import open_model
from ..spec import (
    Choice,
    Images,
    LogUniform,
    Model,
    Optim,
    Prompt,
    Scores,
    Search,
    Uniform,
    batch_size,
    counted_guidance,
    select_rows,
)
from ..training import checkpoint
from ..training.rig import Rig
from ..training.train import optimiser, train

# What is tried unless more is asked for: one that predicts a velocity, one that predicts noise. The other two take nearly as long again.
FAMILIES: dict[str, Callable[[Path], Path]] = {"sd3": mini.write_sd3, "sd15": mini.write_sd15}
ALL = {**FAMILIES, "flux": mini.write_flux, "sdxl": mini.write_sdxl}
BOOK = ["a red circle", "two blue squares", "a green triangle", "three red squares", "a blue circle", "a photo"]
SHRUNK = {"prompts": 3, "group": 4, "steps": 0}  # where a method has such fields: small enough to be tried in seconds
EAGER = {
    "lr": 3e-3,
    "warmup": 0,
    "weight_decay": 0.0,
    "ema": 0.0,
}  # what a model of a few thousand parameters learns with
GRIDS = (4, 7, 10)  # steps of the protocol, the first that a method's settings fit: windows may want more
PUSH = 0.05  # standard deviation of what moves the trained weights off the reference
AMPLE = 1e9


@dataclass(frozen=True)
class LawResult:
    """What one law says of a method on one family of models."""

    law: str
    family: str  # "" where the law looks at no model
    ok: bool
    seconds: float
    detail: str = ""  # what was broken, with numbers
    skipped: str = ""  # why the law has nothing to say here
    hard: bool = True  # a broken soft law is a warning: the method may only want other settings

    @property
    def broken(self) -> bool:
        """A method with such a verdict is not one."""
        return self.hard and not self.ok


class Broken(Exception):
    """A law is broken; the text says how, with numbers."""


class Skip(Exception):
    """A law has nothing to say; the text says why."""


def check(
    reference: str,
    *,
    sets: Iterable[str] = (),
    families: Iterable[str] = tuple(FAMILIES),
    soft: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> list[LawResult]:
    """Try every law on the method behind a name or `path/to/file.py:Name`.

    sets: settings as `--set` takes them, over the method's preset for tiny models. families: of ALL. soft: also try the laws that
    only warn.
    say: told what is tried next.
    Raises UserError on an unknown name or family.
    """
    kind = registry.load("method", reference)
    families = tuple(families)
    for family in families:
        if family not in ALL:
            raise registry.unknown("family", family, ALL)
    make = partial(_settings, reference, kind, config.pairs(sets))
    given = Given(kind, make)
    verdicts: list[LawResult] = []

    def judge(law: Law, subject: Any, family: str) -> None:
        say(f"{law.name}{f' ({family})' if family else ''}")
        verdicts.append(_judged(law, subject, family))

    for law in LAWS:
        if law.on == "source":
            judge(law, given, "")
    if verdicts[0].broken or verdicts[1].broken:  # without an instance there is nothing to try
        return verdicts
    asked: Literal["training", "search"] = "search" if isinstance(make(), Search) else "training"
    with tempfile.TemporaryDirectory() as folder:
        if _values(make()).get("pairs") and "pairs" not in config.pairs(sets):  # it learns from a data set: a toy one
            make = partial(make, pairs=str(write_pairs(Path(folder))))
        for family in families:
            with _quiet():
                model_spec = find_model_spec(str(ALL[family](Path(folder) / family)))
                model = open_model(model_spec, device="cpu", precision="fp32", adapter=_small(model_spec.adapter))
            with _bench(kind, make, model) as bench:
                judge(FITS, bench, family)
                for law in LAWS if verdicts[-1].ok else ():
                    if law.on == asked and family in (law.families or families) and (soft or law.hard):
                        judge(law, bench, family)
    return verdicts


def _values(made: Any) -> dict[str, Any]:
    return {f.name: getattr(made, f.name) for f in fields(made)}


def _small(adapter: Adapter) -> Adapter:
    return Adapter(rank=8, alpha=16, targets=adapter.targets)


def _settings(reference: str, kind: Any, own: Mapping[str, Any], **changes: Any) -> Any:
    """A fresh instance: the method's preset for tiny models, made small, then what the person set.

    changes: by field, `optim` as a mapping; they give way to what the person set.
    """
    table = config.preset(registry.canonical("method", reference), str(SMALL["preset"]), "")
    for key in ("adapter", "evaluation", "precision", "tuned", *config.EXECUTION):
        table.pop(key, None)
    names = {f.name for f in fields(kind)}
    for layer in ({**SHRUNK, **changes}, own):
        for key, value in layer.items():
            if key not in names and layer is not own:
                continue
            mine = table.get(key)
            table[key] = {**mine, **value} if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return config.build(kind, table)


# What a law stands on


def redness(images: Images, prompts: Sequence[Prompt]) -> Any:
    """(B,) in [0, 1]: how much redder the left half of an image is than the right; random decoders hide overall colour."""
    red, half = images[..., 0] / 255.0, images.shape[2] // 2
    return 1 / (1 + np.exp(-8 * (red[:, :, :half].mean((1, 2)) - red[:, :, half:].mean((1, 2)))))


def stark(images: Images, prompts: Sequence[Prompt]) -> Any:
    """(B,): the same order, and every two images far apart."""
    return 1000 * redness(images, prompts)


def ties(images: Images, prompts: Sequence[Prompt]) -> Any:
    """(B,): likes every image the same."""
    return np.ones(len(images))


def gaps(images: Images, prompts: Sequence[Prompt]) -> Any:
    """(B,): cannot score the first image of each prompt."""
    value = redness(images, prompts)
    value[_first([p.text for p in prompts])] = np.nan
    return value


def silence(images: Images, prompts: Sequence[Prompt]) -> Any:
    """(B,): cannot score anything."""
    return np.full(len(images), np.nan)


def _first(names: Sequence[Any]) -> list[int]:
    """Where each name comes first."""
    return [names.index(name) for name in dict.fromkeys(names)]


@dataclass
class Toy:
    """A scorer that needs no engine, and keeps what it was asked and what it answered."""

    rule: Callable[[Images, Sequence[Prompt]], Any] = redness
    id: str = "toy-v1"
    name: str = "toy"
    metrics: Sequence[str] = ("mean",)
    images: list[Images] = field(default_factory=list[Images])
    values: list[Any] = field(default_factory=list[Any])

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        self.images.append(images)
        self.values.append(self.rule(images, prompts))
        return Scores({"mean": self.values[-1]})


def write_pairs(folder: Path) -> Path:
    """A small set of preference pairs on disk: of two noisy pictures the one with the redder left half was liked."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    luck, columns = np.random.default_rng(0), dict[str, list[Any]]()
    for i in range(48):
        sides = luck.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
        liked = int(redness(sides, ())[1] > redness(sides, ())[0])
        row: dict[str, Any] = {"caption": BOOK[i % len(BOOK)]}
        for side in (0, 1):
            content = io.BytesIO()
            Image.fromarray(sides[side]).save(content, "PNG")
            row[f"jpg_{side}"], row[f"label_{side}"] = content.getvalue(), float(side == liked)
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    return folder / "pairs.parquet"


@dataclass(frozen=True)
class Given:
    """A method as it stands in its file."""

    kind: Any
    make: Callable[..., Any]


@dataclass(frozen=True)
class Count:
    """What really happened behind a rig, seen from beside it, and the meter it should have gone to."""

    meter: Meter
    nfe: list[int] = field(default_factory=list[int])  # of each call of the network
    decoded: list[int] = field(default_factory=list[int])


class Bench:
    """A method and a model of one family: fresh rigs for each law, and the runs that several laws look at."""

    def __init__(self, kind: Any, make: Callable[..., Any], model: Any):
        self.kind, self.make, self.model = kind, make, model
        self.rigs: list[Rig] = []

    @property
    def method(self) -> Any:
        """A fresh instance: what one law did to its own is no other law's affair."""
        return self.make()

    def rig(self, rule: Any = redness, *, seed: int = 0, push: float = 0.0, **bounds: float) -> Any:
        """A rig around a copy of the model. push: how far its trained weights are from the reference."""
        limits: Any = bounds or {"nfe": AMPLE}
        rig: Any = Rig(
            copy.deepcopy(self.model), [Prompt(text) for text in BOOK], Toy(rule),
            Meter(Budget(**limits)), seed=seed, rows=64,
        )  # fmt: skip
        shift(rig, push)
        self.rigs.append(rig)
        return rig

    def trained(self, *, seed: int = 0, chaos: int = 0) -> Trained:
        """After two iterations of a fresh instance. chaos: the state the rest of the world's randomness is in."""
        rig, method = self.rig(seed=seed), self.make()
        count = watch(rig)
        done = Trained(rig, method, optimiser(method, rig), count)
        before = done.photos(self.kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(chaos)
            np.random.seed(chaos)
            random.seed(chaos)
            fit(method, rig, 2, done.adam)
        done.weights, done.spent = weights(rig), rig.meter.spent()
        done.changed = [
            f"{where}: {key}"
            for where, one, two in zip(("instance", "class", "module"), before, done.photos(self.kind), strict=True)
            for key in {**one, **two}
            if one.get(key) != two.get(key)
        ]
        return done

    @cached_property
    def first(self) -> Trained:
        """With seed 0."""
        return self.trained()

    @cached_property
    def other(self) -> Trained:
        """With seed 1."""
        return self.trained(seed=1)


@dataclass
class Trained:
    """A rig and what was trained on it; weights and spent are of that moment, whatever the rig does later."""

    rig: Any
    method: Any
    adam: torch.optim.Optimizer
    count: Count
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    spent: dict[str, float] = field(default_factory=dict[str, float])
    changed: list[str] = field(default_factory=list[str])  # outside the rig, by the run

    def photos(self, kind: Any) -> list[dict[str, str]]:
        """What instance, class and module hold, in words."""
        return [_photo(vars(owner)) for owner in (self.method, kind, sys.modules[kind.__module__])]


@contextmanager
def _bench(kind: Any, make: Callable[..., Any], model: Any) -> Generator[Bench]:
    bench = Bench(kind, make, model)
    try:
        yield bench
    finally:
        for rig in bench.rigs:
            rig.close()


@contextmanager
def _quiet() -> Generator[None]:
    """diffusers and transformers draw progress bars over ours."""
    import diffusers.utils.logging as diffusers
    import transformers.utils.logging as transformers

    diffusers.disable_progress_bar()
    transformers.disable_progress_bar()
    yield


def shift(rig: Any, push: float) -> None:
    """Move the trained weights by a fixed random step."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in rig.model.parameters():
            p.add_(push * torch.randn(p.shape, generator=generator))


def watch(rig: Any) -> Count:
    """Count what the network and the autoencoder do from now on, whoever asks them."""
    count, network, decode = Count(rig.meter), rig.model.lora.module, rig.model.decode

    def called(module: Any, args: Any, kwargs: Any) -> None:
        # A row each: pictures, or tokens in a line.
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        count.nfe.append(len(x) * (3 if torch.is_grad_enabled() else 1))

    def decoded(x0: Tensor) -> Tensor:
        count.decoded.append(len(x0) if bool(x0.any()) else 0)  # a blank one only tells the size of an image
        return decode(x0)

    network.register_forward_pre_hook(called, with_kwargs=True)
    rig.model.decode = decoded
    return count


def fit(
    method: Any,
    rig: Any,
    iterations: int,
    adam: torch.optim.Optimizer | None = None,
    after: Callable[[dict[str, float]], None] = lambda numbers: None,
) -> str:
    """The loop until so many iterations are done; returns why it stopped. Raises Broken where it stopped before."""
    why = train(
        method, rig, adam or optimiser(method, rig), after=after,
        interrupted=lambda: rig.iteration >= iterations,
    )  # fmt: skip
    if why != "interrupted" and not why.startswith("budget"):
        raise Broken(f"training ended by itself: {why}")
    return why


def collected(method: Any, rig: Any) -> Any:
    """A batch with rows. Raises Broken when three collections bring none, though the rewards differ."""
    for _ in range(3):
        batch = method.collect(rig)
        if batch_size(batch):
            return batch
    raise Broken("collect brought no rows in three iterations, though the rewards of all images differ")


def gradient(method: Any, rig: Any, batch: Any, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a batch whose rows draw from these keys, and its gradient as one vector."""
    with rig.keyed(keys):
        loss = method.loss(rig, batch)
    if not isinstance(loss, Tensor) or loss.ndim:
        raise Broken(f"loss must be one number, got {tuple(loss.shape) if isinstance(loss, Tensor) else type(loss)}")
    own = rig.model.parameters()
    if not loss.requires_grad:
        return loss, torch.cat([torch.zeros_like(p).flatten() for p in own])
    found = torch.autograd.grad(loss, own, allow_unused=True)
    return loss.detach(), torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(own, found, strict=True)]
    )


def keys_of(batch: Any) -> Tensor:
    return torch.arange(batch_size(batch)) + 5


def apart(a: Tensor, b: Tensor) -> float:
    """Distance of two vectors, as a share of the first one's length; 0 where both vanish."""
    return float((a - b).norm() / a.norm()) if float(a.norm()) > 1e-12 else float(b.norm())


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The keys under which two mappings of tensors and plain values are not equal to the last bit."""
    return [key for key in {**a, **b} if key not in a or key not in b or not _equal(a[key], b[key])]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)


def weights(rig: Any) -> dict[str, Tensor]:
    """Every copy of the trained weights."""
    return rig.model.weight_state()


# The laws


@dataclass(frozen=True)
class Law:
    """One law: its name in plain words, what it is tried on, and the function that tries it."""

    name: str
    on: Literal["source", "training", "search"]
    try_it: Callable[[Any], None]
    families: tuple[str, ...] = ()  # all, where empty
    hard: bool = True


LAWS: list[Law] = []


def law(name: str, on: Literal["source", "training", "search"] = "training", **more: Any) -> Callable[..., Any]:
    """Enter a function into the laws; it raises Broken or Skip, and its docstring says why the law is one."""

    def enter(function: Callable[[Any], None]) -> Callable[[Any], None]:
        LAWS.append(Law(name, on, function, **more))
        return function

    return enter


def _fits(bench: Bench) -> None:
    """A protocol of few steps makes the other laws quick; settings that want more get more."""
    for bench.model.steps in GRIDS:
        rig, method = bench.rig(), bench.method
        try:
            if isinstance(method, Search):
                return
            batch = method.collect(rig)
            if batch_size(batch):
                gradient(method, rig, batch, keys_of(batch))
            return
        except UserError:
            if bench.model.steps == GRIDS[-1]:
                raise


FITS = Law("its settings fit the model", "training", _fits)


def _judged(law: Law, subject: Any, family: str) -> LawResult:
    began = time.perf_counter()
    ok, detail, skipped = True, "", ""
    try:
        law.try_it(subject)
    except Skip as skip:
        skipped = str(skip)
    except Broken as broken:
        ok, detail = False, str(broken)
    except Exception as error:  # a method is foreign code: whatever it raises is its verdict
        ok, detail = False, f"{type(error).__name__}: {error}{_where(error, subject.kind)}"
    return LawResult(law.name, family, ok, time.perf_counter() - began, detail, skipped, law.hard)


def _where(error: Exception, kind: Any) -> str:
    """The line of the method's own file that an error came from."""
    file = inspect.getsourcefile(kind)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" (line {lines[-1]} of {Path(str(file)).name})" if lines else ""


@law("it is a frozen dataclass with annotated fields", "source")
def _dataclass(given: Given) -> None:
    """What is not a field is in no record, and what is not frozen is not what the record says."""
    kind = given.kind
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise Broken(f"{kind!r} is not a dataclass")
    if not getattr(kind, "__dataclass_params__").frozen:  # noqa: B009 - not in the type of a class
        raise Broken("the dataclass is not frozen: @dataclass(frozen=True)")
    loose = [
        name for name, value in vars(kind).items()
        if not name.startswith("_") and name not in inspect.get_annotations(kind)
        and not isinstance(value, property | staticmethod | classmethod | cached_property) and not callable(value)
    ]  # fmt: skip
    if loose:
        raise Broken(f"without an annotation these are constants, not settings: {', '.join(loose)}")


@law("its defaults and its settings for tiny models construct", "source")
def _constructs(given: Given) -> None:
    """`gpobench run` makes a method from its defaults, its preset and what was set."""
    given.kind()
    made = given.make()
    if not isinstance(made, Search) and not isinstance(made.optim, Optim):
        raise Broken(f"optim is {type(made.optim).__name__}, not Optim")


@law("its search space and its cost are declared", "source")
def _declared(given: Given) -> None:
    """A comparison tunes every method alike, and predicts what a run will spend."""
    space: Any = getattr(given.kind, "space", None)
    if not isinstance(space, Mapping):
        raise Broken("space is missing: the key of a --set -> Log, Even or Choice; {} where nothing may be tuned")
    ranges: dict[str, Any] = dict(space)
    for key, span in ranges.items():
        if not isinstance(span, LogUniform | Uniform | Choice):
            raise Broken(f"space[{key!r}] is {span!r}, not Log, Even or Choice")
        if (
            isinstance(span, LogUniform | Uniform)
            and not span.low < span.high
            or isinstance(span, LogUniform)
            and not span.low > 0
        ):
            raise Broken(f"space[{key!r}] = {span} is empty, or has no logarithm")
    luck = random.Random(0)
    for draw in range(30):
        drawn = {key: _drawn(span, luck, draw) for key, span in ranges.items()}
        table: dict[str, Any] = {}
        for key, value in drawn.items():
            table |= _nested(table, key.split("."), value)
        if "adapter" in table:
            config.build(Adapter, table.pop("adapter"), prefix="adapter.")
        try:
            config.build(given.kind, table)
        except UserError as error:
            raise Broken(f"a draw from space is refused: {drawn}: {error}") from None
    made = given.make()
    if isinstance(made, Search):
        return
    cost = dict(made.cost(GRIDS[-1], 1.0))
    if not cost or not all(isinstance(value, int | float) and value >= 0 for value in cost.values()):
        raise Broken(f"cost({GRIDS[-1]}, 1.0) must map roles to nfe an image, got {cost}")


def _drawn(span: Any, luck: random.Random, draw: int) -> Any:
    """A draw; the first two are the ends."""
    if isinstance(span, Choice):
        return span.options[draw % len(span.options)]
    share = (0.0, 1.0)[draw] if draw < 2 else luck.random()
    if isinstance(span, LogUniform):
        return min(span.high, span.low * (span.high / span.low) ** share)
    return span.low + (span.high - span.low) * share


def _nested(table: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    if len(path) == 1:
        return {**table, path[0]: value}
    return {**table, path[0]: _nested(table.get(path[0], {}), path[1:], value)}


@law("its source touches no optimiser, device, file, other method or model family", "source")
def _modest(given: Given) -> None:
    """What a method does not own it cannot get wrong; a resume, a device and a budget rest on that."""
    module = sys.modules[given.kind.__module__]
    found = list(trespasses(inspect.getsource(module), module.__name__))
    if found:
        raise Broken("; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else ""))


FOREIGN = (
    "torch.optim torch.cuda torch.mps torch.device torch.load torch.save torch.manual_seed torch.Generator torch.seed "
    "torch.distributed torch.backends torch.nn.functional.dropout torch.dropout random secrets numpy.random os io sys pathlib "
    "shutil tempfile subprocess socket pickle threading multiprocessing diffusers transformers peft accelerate safetensors "
    "gpobench.methods gpobench.rewards gpobench.tasks gpobench.leaderboards gpobench.bench.models gpobench.bench.model_spec "
    "gpobench.bench.training.train gpobench.bench.training.checkpoint gpobench.bench.experiments.run gpobench.bench.models.lora "
    "gpobench.bench.budget.Meter gpobench.bench.budget.Budget"
).split()
DRAWS = {
    f"torch.{name}"
    for name in "rand randn randint randperm normal bernoulli multinomial poisson rand_like randn_like randint_like".split()
}
ATTRIBUTES = set(
    "cuda cpu backward zero_grad manual_seed normal_ uniform_ random_ bernoulli_ exponential_ log_normal_ charge".split()
)
BUILTINS = {"open", "exec", "eval", "compile", "input", "__import__"}
FAMILY = {"name", "prediction"}  # of the contract's, what tells one family from another


def trespasses(source: str, module: str) -> Iterator[str]:
    """What a method's source does that is not a method's business, each with its line."""
    tree = ast.parse(source)
    package = module.rpartition(".")[0]
    allowed = {*inspect.get_annotations(Model), *vars(Model)} - FAMILY
    known: dict[str, str] = {}  # the names that imports bound -> what they stand for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                yield from _foreign(alias.name, node)
        elif isinstance(node, ast.ImportFrom):
            run_dir = "." * node.level + (node.module or "")
            run_dir = importlib.util.resolve_name(run_dir, package) if node.level else run_dir
            for alias in node.names:
                known[alias.asname or alias.name] = f"{run_dir}.{alias.name}"
                yield from _foreign(f"{run_dir}.{alias.name}", node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = _dotted(node, known)
            owner, _, leaf = name.rpartition(".")
            if isinstance(node, ast.Attribute):
                yield from _foreign(name, node)
                if leaf in ATTRIBUTES:
                    yield f"line {node.lineno}: .{leaf}"
                if owner.rpartition(".")[2] == "model" and leaf not in allowed:
                    yield f"line {node.lineno}: {name} tells one family of models from another"
            elif name in BUILTINS:
                yield f"line {node.lineno}: {name}"
        elif isinstance(node, ast.Call):
            name = _dotted(node.func, known)
            options = {word.arg: word.value for word in node.keywords}
            if name in DRAWS and not ("generator" in options and _dotted(options["generator"], known).endswith(".rng")):
                yield f"line {node.lineno}: {name} draws randomness of its own, not the rig's"
            if name in ("isinstance", "type") and node.args and _dotted(node.args[0], known).endswith("model"):
                yield f"line {node.lineno}: {name} of a model"
            places = [
                *(node.args if name.endswith(".to") else ()),
                *([options["device"]] if "device" in options else ()),
            ]
            if any(isinstance(place, ast.Constant) and isinstance(place.value, str) for place in places):
                yield f"line {node.lineno}: a device by name"


def _foreign(name: str, node: Any) -> Iterator[str]:
    """The same name is met as an import and where it is used; the longest chain would be met at each of its links."""
    hit = next(
        (
            f
            for f in FOREIGN
            if name == f or (isinstance(node, ast.Import | ast.ImportFrom) and name.startswith(f + "."))
        ),
        "",
    )
    if hit:
        yield f"line {node.lineno}: {name}"


def _dotted(node: ast.AST, known: Mapping[str, str]) -> str:
    """`a.b.c` of a chain of attributes, its head as the imports understand it; other heads are '?'."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    return f"{_dotted(node.value, known)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


@law("the loss is a mean over rows")
def _mean(bench: Bench) -> None:
    """The loop splits rows into micro-batches and over devices: the parts must add up to the whole."""
    rig, method = bench.rig(push=PUSH), bench.method
    whole = collected(method, rig)
    shift(rig, PUSH / 2)  # away from the policy that sampled, where every term counts
    few = select_rows(whole, torch.arange(min(5, batch_size(whole))))
    for batch, pieces in ((whole, 2), (few, batch_size(few))):
        rows, keys = torch.arange(batch_size(batch)), keys_of(batch)
        if len(rows) < 2:
            raise Skip("a batch is one row")
        loss, slope = gradient(method, rig, batch, keys)
        parts = [
            (len(r) / len(rows), *gradient(method, rig, select_rows(batch, r), keys[r])) for r in rows.chunk(pieces)
        ]
        total = sum(share * float(part) for share, part, _ in parts)
        sum_of = torch.stack([share * part for share, _, part in parts]).sum(0)
        if abs(total - float(loss)) > 1e-4 * max(abs(share * float(part)) for share, part, _ in parts) + 1e-7:
            raise Broken(
                f"the loss of {len(rows)} rows is {float(loss):.6g}, the mean of its {pieces} parts {total:.6g}"
            )
        if apart(slope, sum_of) > 1e-3:
            raise Broken(
                f"the gradient of {len(rows)} rows and the mean of its {pieces} parts' differ by {apart(slope, sum_of):.1%}"
            )


@law("where all rewards are equal nothing is learnt")
def _ties(bench: Bench) -> None:
    """Without a difference there is no preference: what moved the weights then would be noise."""
    rig, method = bench.rig(ties, nfe=2e5), bench.method
    try:
        batch = method.collect(rig)
    except Spent:
        return
    _asked(rig)
    if batch_size(batch):
        _, slope = gradient(method, rig, batch, keys_of(batch))
        other = bench.rig()
        sound = collected(method, other)
        _, scale = gradient(method, other, sound, keys_of(sound))
        share = float(slope.norm() / scale.norm().clamp(min=1e-12))
        if not share < 1e-4:
            raise Broken(
                f"{batch_size(batch)} rows with equal rewards have a gradient of {share:.2g} times that of rows with different ones"
            )


def _asked(rig: Any) -> None:
    if not rig.scorer.images:
        raise Skip("it asks for no reward")


@law("the policy ratio is 1 before the first update")
def _ratio(bench: Bench) -> None:
    """The policy that sampled is the policy that learns, until the first step: anything else is a mismatch of two formulas."""
    for push in (0.0, PUSH):
        rig, method = bench.rig(push=push), bench.method
        batch = collected(method, rig)
        gradient(method, rig, batch, keys_of(batch))
        ratio, limit = rig.mean("policy/ratio"), 1e-6 if rig.model.prediction == "velocity" else 1e-5
        if math.isnan(ratio):
            raise Skip("it notes no policy/ratio")
        if not abs(ratio - 1) < limit:
            raise Broken(f"policy/ratio is 1 {ratio - 1:+.2g} before any update")


@law("at the reference the accuracy is one half and the drift zero")
def _reference(bench: Bench) -> None:
    """Before the first update live and reference weights say the same."""
    rig, method = bench.rig(), bench.method
    batch = collected(method, rig)
    gradient(method, rig, batch, keys_of(batch))
    accuracy, drift = rig.mean("policy/accuracy"), rig.mean("policy/kl")
    if math.isnan(accuracy) and math.isnan(drift):
        raise Skip("it notes neither policy/accuracy nor policy/kl")
    if not math.isnan(accuracy) and abs(accuracy - 0.5) > 1e-6:
        raise Broken(f"policy/accuracy is {accuracy:.4g} at the reference, not 0.5")
    if not math.isnan(drift) and abs(drift) > 1e-9:
        raise Broken(f"policy/kl is {drift:.3g} at the reference, not 0")


@law("an image that could not be scored leaves no trace")
def _unscored(bench: Bench) -> None:
    """NaN is no reward: whatever such an image shows, the weights must not learn it.

    The same rollout twice: once as it is, once with the path of the unscored images bent. Every gradient must be the same.
    """
    seen: list[tuple[Any, Any, Tensor, Tensor]] = []
    for bend in (0.0, 0.5):
        rig, method = bench.rig(gaps, push=PUSH), bench.method
        straight = rig.velocity
        setattr(rig, "velocity", partial(_bent, straight, bend))  # noqa: B010 - a method of the rig
        batch = method.collect(rig)
        _asked(rig)
        setattr(rig, "velocity", straight)  # noqa: B010
        if not batch_size(batch):
            loss, slope = torch.zeros(()), torch.zeros(1)
        else:
            shift(rig, PUSH / 2)
            loss, slope = gradient(method, rig, batch, keys_of(batch))
        if not (bool(loss.isfinite()) and bool(slope.isfinite().all())):
            raise Broken(f"with one unscored image a prompt the loss is {float(loss):g} and its gradient not finite")
        seen.append((rig.scorer, batch_size(batch), loss, slope))
    _silent(bench)
    (straight, rows, loss, slope), (other, others, loss2, slope2) = seen
    known = [np.isfinite(np.concatenate(toy.values)) for toy in (straight, other)]
    images = [np.concatenate(toy.images) for toy in (straight, other)]
    if not np.array_equal(known[0], known[1]) or not np.array_equal(images[0][known[0]], images[1][known[1]]):
        raise Skip("its unscored images cannot be changed without changing others")
    if np.array_equal(images[0], images[1]):
        raise Skip("its unscored images cannot be changed from outside")
    if rows != others:
        raise Broken(f"the pictures of unscored images decide over rows: {rows} or {others}")
    if apart(slope, slope2) > 1e-4 or abs(float(loss - loss2)) > 1e-4 * abs(float(loss)) + 1e-7:
        raise Broken(
            f"other pictures where there is no score change the loss from {float(loss):.6g} to {float(loss2):.6g} "
            f"and the gradient by {apart(slope, slope2):.2g} of its length"
        )


def _bent(
    straight: Callable[..., Tensor], bend: float, x: Tensor, t: Tensor, prompt_ids: Tensor, **more: Any
) -> Tensor:
    v = straight(x, t, prompt_ids, **more)
    rows = torch.zeros(len(v), *[1] * (v.ndim - 1))
    rows[_first(prompt_ids.tolist())] = bend
    return v + rows.to(v)


def _silent(bench: Bench) -> None:
    """No image could be scored at all."""
    rig, method = bench.rig(silence, nfe=2e5), bench.method
    try:
        batch = method.collect(rig)
    except Spent:
        return
    if batch_size(batch):
        loss, slope = gradient(method, rig, batch, keys_of(batch))
        if not bool(loss.isfinite()) or not float(slope.norm()) < 1e-6:
            raise Broken(
                f"where no image could be scored the loss is {float(loss):g} and its gradient {float(slope.norm()):.2g}"
            )


@law("the seed decides and nothing else")
def _seed(bench: Bench) -> None:
    """The same seed gives the same weights, whatever state the rest of the world's randomness is in; another seed others."""
    if off := differing(bench.first.weights, bench.trained(chaos=1).weights):
        raise Broken(f"the same seed twice gives other weights: {len(off)} tensors differ, {off[0]} among them")
    if not differing(bench.first.weights, bench.other.weights):
        raise Broken("two seeds give the same weights")


@law("it leaves nothing behind for the next run")
def _leaks(bench: Bench) -> None:
    """The instance, its class and its module are after a run what they were before; the next run is as the first was."""
    if bench.other.changed:
        raise Broken(f"a run changed its {', '.join(bench.other.changed)}")
    rig = bench.rig()
    fit(bench.other.method, rig, 2)  # the instance that was trained with seed 1, now with seed 0
    if off := differing(bench.first.weights, weights(rig)):
        raise Broken(f"after another run the same seed gives other weights: {len(off)} tensors differ")


def _photo(values: Mapping[str, Any]) -> dict[str, str]:
    """Data in words, deep enough that a change inside shows; functions, classes and modules are no data."""
    return {
        key: repr(value)
        for key, value in values.items()
        if not key.startswith("__") and not callable(value) and not inspect.ismodule(value)
        and not isinstance(value, property | staticmethod | classmethod | cached_property)
    }  # fmt: skip


@law("a run that was cut off goes on to the same bytes")
def _resume(bench: Bench) -> None:
    """Two iterations, a checkpoint, fresh objects, two more: as four in one go."""
    straight, rig, method = bench.first, bench.rig(), bench.make()
    adam = optimiser(method, rig)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), 2, straight.rig, straight.adam, {})
        checkpoint.restore(Path(folder), rig, adam, lambda text: None)
    fit(straight.method, straight.rig, 4, straight.adam)
    fit(method, rig, 4, adam)
    if off := differing(_end(straight.rig, straight.adam), _end(rig, adam)):
        raise Broken(f"after a resume these differ from an uncut run: {', '.join(off[:4])} ({len(off)} in all)")


def _end(rig: Any, adam: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a run leaves, but the clock's seconds."""
    moments = adam.state_dict()["state"]
    meter = rig.meter
    return {
        **{f"weights {key}": value for key, value in weights(rig).items()},
        **{f"optimiser {i} {key}": value for i, own in moments.items() for key, value in own.items()},
        **{f"rig.state[{key!r}]": value for key, value in rig.state.items()},
        "random numbers": rig.rng.get_state(),
        "counts": (
            rig.iteration,
            rig.iterations_without_signal,
            dict(meter.roles),
            meter.images,
            meter.reward_calls,
            meter.updates,
        ),
    }


@law("its cost is what the meter shows")
def _cost(bench: Bench) -> None:
    """A plan that says what a run will spend must be right, by role, with guidance and without.

    An image is one sampled for training; where none is sampled, one of a data set's pairs, whose making (role "data") is
    no cost of the method's.
    Into FLUX guidance was distilled: it costs nothing there, and who forgets its price is caught on the other families.
    """
    for guidance in (1.0, 2.5):
        rig, rows = bench.rig(stark), list[float]()
        rig.model.guidance = guidance
        fit(bench.make(), rig, 1, after=lambda numbers, rows=rows: rows.append(numbers["batch/rows"]))
        images = rig.meter.images or 2 * sum(rows)
        said = {
            role: each for role, each in bench.method.cost(rig.model.steps, counted_guidance(rig.model)).items() if each
        }
        spent = {role: nfe / images for role, nfe in rig.meter.roles.items() if nfe and role != "data"}
        off = [role for role in {**said, **spent} if abs(said.get(role, 0) - spent.get(role, 0)) > 1e-6]
        if off:
            line = ", ".join(f"{role} {spent.get(role, 0):g}, declared {said.get(role, 0):g}" for role in off)
            raise Broken(f"nfe an image at guidance {guidance:g}: {line}")


@law("nothing is spent outside the rig")
def _honest(bench: Bench) -> None:
    """What the network, the autoencoder and the scorer did, seen from beside the rig, is what the meter shows."""
    _tally(bench.first.rig, bench.first.count)


def _tally(rig: Any, count: Count) -> None:
    if rig.meter is not count.meter:
        raise Broken("the meter was replaced")
    asked = sum(len(images) for images in rig.scorer.images)
    for what, real, shown in (
        ("network evaluations", sum(count.nfe), count.meter.nfe),
        ("decoded images", sum(count.decoded), count.meter.images),
        ("scored images", asked, count.meter.reward_calls),
    ):
        if real != shown:
            raise Broken(f"{what}: {real} really, {shown} on the meter")


@law("no budget is passed, and the last complete update stays")
def _budget(bench: Bench) -> None:
    """Spent comes before the spend and ends the run; what an unfinished update had gathered is dropped."""
    for currency, share in {"nfe": 0.8, "images": 0.3, "updates": 0.3}.items():
        if not bench.first.spent[currency]:
            continue  # it draws no images of its own
        bound = max(1, int(bench.first.spent[currency] * share))
        limit: dict[str, Any] = {currency: float(bound)}
        rig, method = bench.rig(**limit), bench.make()
        adam = optimiser(method, rig)
        last = [_live(rig)]
        adam.register_step_post_hook(lambda *_, rig=rig, last=last: last.append(_live(rig)))
        why = fit(method, rig, 50, adam)
        if why != f"budget: {currency}":
            raise Broken(f"a budget of {bound} {currency} did not end the run: {why} after {rig.iteration} iterations")
        if getattr(rig.meter, currency) > bound:
            raise Broken(f"{getattr(rig.meter, currency)} {currency} were spent of {bound}")
        if not torch.equal(last[-1], _live(rig)):
            raise Broken(f"at the end of a budget of {bound} {currency} the weights are not those of the last update")


def _live(rig: Any) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in rig.model.parameters()])


@law("it learns", families=("sd3",), hard=False)
def _learns(bench: Bench) -> None:
    """On a reward that is easy to raise a few thousand evaluations are enough, on the same noise, by three standard errors."""
    method, rig = bench.make(prompts=4, group=8, optim=EAGER), bench.rig(nfe=8_000.0)
    fit(method, rig, 10_000)
    mean, error = gain(rig)
    if not mean > 3 * error:
        raise Broken(f"the reward rose by {mean:+.4f} with a standard error of {error:.4f} on the same noise")


def gain(rig: Any, each: int = 10) -> tuple[float, float]:
    """How much better the trained weights are than the reference on the same noise: mean and standard error."""
    rig.meter = Meter(Budget(nfe=AMPLE))
    prompt_ids = torch.arange(len(BOOK)).repeat(each)
    x = rig.noise(len(prompt_ids))
    with torch.no_grad():
        more = rig.score(rig.sample(x, prompt_ids), prompt_ids) - rig.score(
            rig.sample(x, prompt_ids, weights="ref"), prompt_ids
        )
    return float(more.mean()), float(more.std()) / math.sqrt(len(prompt_ids))


# Methods without training


def _answers(
    bench: Bench, *, seed: int = 0, chaos: int = 0, parts: int = 2
) -> tuple[Any, Count, Tensor, Tensor, Tensor]:
    """A search asked for an image of every prompt, in two parts: (rig, count, noise, who, what it drew)."""
    prompt_ids = torch.arange(len(BOOK))
    rig = bench.rig(seed=seed, nfe=float(len(prompt_ids) * 8 * bench.model.steps))
    count = watch(rig)
    noise = torch.randn(len(prompt_ids), *bench.model.shape, generator=torch.Generator().manual_seed(7))
    drawn: list[Tensor] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(chaos)
        method = bench.make()
        for rows in torch.arange(len(prompt_ids)).chunk(parts):
            start = noise[rows]
            try:
                with rig.keyed(rows + 1000 * seed):
                    drawn.append(method.answer(rig, start, prompt_ids[rows], len(prompt_ids)))
            except Spent as spent:  # the judge then takes the base's own images
                raise Skip(f"with these settings the budget of 8 plain images an image ends it: {spent}") from None
            if not torch.equal(start, noise[rows]):
                raise Broken("the noise it was given is no longer what it was: others are compared on the same")
    return rig, count, noise, prompt_ids, torch.cat(drawn)


@law("its answers are latents, and the seed decides them", "search")
def _answer(bench: Bench) -> None:
    """One finite latent for each noise; the same again for the same seed."""
    *_, noise, _, drawn = _answers(bench)
    if drawn.shape != noise.shape or not bool(drawn.isfinite().all()):
        raise Broken(
            f"{tuple(drawn.shape)} came back for noise {tuple(noise.shape)}, finite: {bool(drawn.isfinite().all())}"
        )
    if not torch.equal(drawn, _answers(bench, chaos=1)[-1]):
        raise Broken("the same seed twice gives other images")


@law("a search spends nothing outside the rig", "search")
def _searches(bench: Bench) -> None:
    """What the network, the autoencoder and the scorer did, seen from beside the rig, is what the meter shows."""
    rig, count, *_ = _answers(bench)
    _tally(rig, count)


@law("a search shares its budget out over all images", "search")
def _shares(bench: Bench) -> None:
    """It never passes the budget, and the last image is answered too."""
    rig, *_ = _answers(bench)
    bound = rig.meter.budget.nfe
    if rig.meter.nfe > bound:
        raise Broken(f"{rig.meter.nfe} nfe were spent of {bound:g}")


@law("a search finds better images than a plain draw", "search", hard=False)
def _finds(bench: Bench) -> None:
    """Otherwise the budget buys nothing."""
    rig, _, noise, prompt_ids, drawn = _answers(bench)
    rig.meter = Meter(Budget(nfe=AMPLE))
    with torch.no_grad():
        more = rig.score(drawn, prompt_ids) - rig.score(rig.sample(noise, prompt_ids), prompt_ids)
    if not float(more.mean()) > 0:
        raise Broken(f"the reward of its images is {float(more.mean()):+.4f} above that of plain ones")
