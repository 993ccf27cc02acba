"""Source rules: find what a method's code must not use, from its syntax tree, without running it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..spec import PolicyModel, Rig

# What a method may use of this package: the contract and its formulas. Everything else is the harness.
PACKAGE = __name__.partition(".")[0]
CONTRACT = [f"{PACKAGE}.bench.{module}" for module in ("spec", "flow", "trees", "losses", "errors")]
ALLOWED_NAMES = {
    *(f"{PACKAGE}.bench.{name}" for name in (
        "Choice EvaluationSettings Groups InitialNoise LogUniform Method Missing Optim Pairs Prompt Rig Search Spent Transitions "
        "Uniform UserError"
    ).split()),
    f"{PACKAGE}.bench.budget.Spent",
    f"{PACKAGE}.bench.training.pairs.compare",
}  # fmt: skip
# Modules of the standard library that compute; all others reach outside of a method: files, processes, clocks, other objects' insides.
ALLOWED_STANDARD = set(
    "__future__ abc bisect cmath collections contextlib copy dataclasses decimal enum fractions functools heapq itertools math "
    "numbers operator statistics typing warnings".split()
)
# Names that a method must not import or use, with everything below them where they are imported.
FORBIDDEN_NAMES = (
    "torch.optim torch.cuda torch.mps torch.device torch.load torch.save torch.manual_seed torch.Generator torch.seed "
    "torch.distributed torch.backends torch.nn.functional.dropout torch.dropout torch.hub torch.jit torch.package torch.serialization "
    "torch.multiprocessing torch.utils.cpp_extension torch.utils.data torch.library torch.nn.modules torch.overrides torch.fx "
    "numpy.random numpy.load numpy.save numpy.memmap numpy.fromfile numpy.ctypeslib diffusers transformers peft accelerate "
    "safetensors typing.get_type_hints typing.ForwardRef operator.attrgetter operator.methodcaller"
).split()
RANDOM_DRAWS = {
    f"torch.{name}"
    for name in "rand randn randint randperm normal bernoulli multinomial poisson rand_like randn_like randint_like".split()
}
FORBIDDEN_ATTRIBUTES = set(
    "cuda cpu backward zero_grad manual_seed normal_ uniform_ random_ bernoulli_ exponential_ log_normal_ charge "
    # From a tensor, a generator or an error to what lies behind it.
    "grad_fn next_functions register_hook gi_frame gi_yieldfrom cr_frame ag_frame f_back f_locals f_globals f_builtins tb_frame "
    "tb_next".split()
)
FORBIDDEN_BUILTINS = set("open exec eval compile input globals locals vars dir breakpoint setattr delattr".split())
# Builtins by which a method may read its own fields, and nothing else.
READS_FIELDS = {"getattr", "hasattr"}
# Names with two underscores that a class needs.
PLAIN_DUNDERS = {"__init__", "__post_init__", "__name__", "__doc__", "__all__", "__future__"}


def _members(protocol: type) -> set[str]:
    return {name for name in (*inspect.get_annotations(protocol), *vars(protocol)) if not name.startswith("_")}


MODEL_MEMBERS, RIG_MEMBERS = _members(PolicyModel), _members(Rig)


def rule_violations(source: str, module: str) -> Iterator[str]:
    """Yield each violation in a method's source, with its line number. module: the dotted name that resolves relative imports."""
    tree = ast.parse(source)
    full_names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for local_name, full_name, imported in _imports(node, module.rpartition(".")[0]):
                full_names[local_name] = full_name
                yield from _forbidden_name(imported, node)
                yield from _forbidden_module(imported, node)
    rigs, of_self = _rig_names(tree), _uses_of_self(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            if id(node) not in of_self:
                yield from _name_violations(node, _dotted_name(node, full_names))
                yield from _inside_violations(node, rigs)
        elif isinstance(node, ast.Call):
            yield from _call_violations(node, full_names, rigs)
        elif isinstance(node, ast.MatchClass) and node.kwd_attrs:
            yield f"line {node.lineno}: a pattern that reads attributes"


def local_files(source: str, module: str, file: Path) -> dict[str, Path]:
    """The modules beside a method's file, or in its package, that its source imports: dotted name -> file.

    Their code is the method's own, so the same rules hold for it. This package's own modules are not among them: of those the
    rules name the few that may be imported.

    Args:
        source: of the method's module.
        module: its dotted name.
        file: where it lies.
    """
    package, top = module.rpartition(".")[0], module.partition(".")[0]
    root = file.parents[module.count(".") - (file.name == "__init__.py")] if "." in module else file.parent
    files: dict[str, Path] = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for _, _, imported in _imports(node, package):
            parts = imported.lstrip(".").split(".")
            if parts[0] == PACKAGE:
                continue
            folders = [file.parent, *([root.parent] if parts[0] == top else []), root]
            for folder in folders:
                for length in range(len(parts), 0, -1):
                    path = folder.joinpath(*parts[:length])
                    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
                        if candidate.is_file() and candidate.resolve() != file.resolve():
                            files.setdefault(".".join(parts[:length]), candidate)
    return files


def _rig_names(tree: ast.Module) -> set[str]:
    """Names that hold the rig: the parameters that `collect`, `loss`, `answer` and `answers` are given it by, and those annotated so."""
    names = {"rig"}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args]
            if node.name in ("collect", "loss", "answer", "answers") and len(arguments) > 1:
                names.add(arguments[1].arg)
            names |= {
                a.arg for a in arguments if a.annotation is not None and ast.unparse(a.annotation).endswith("Rig")
            }
    return names


def _uses_of_self(tree: ast.Module) -> set[int]:
    """The nodes of `getattr(self, ...)` and `object.__setattr__(self, ...)`, by which a frozen class reaches its own fields."""
    return {
        id(call.func)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and call.args and ast.unparse(call.args[0]) == "self"
        and ast.unparse(call.func) in (*READS_FIELDS, "object.__setattr__")
    }  # fmt: skip


def _inside_violations(node: ast.Attribute | ast.Name, rigs: set[str]) -> Iterator[str]:
    """Yield what reaches past the contract: members that the rig does not have, private names, stored attributes."""
    if isinstance(node, ast.Name):
        if node.id in READS_FIELDS:
            yield f"line {node.lineno}: {node.id} of something else than self"
        elif node.id.startswith("__") and node.id not in PLAIN_DUNDERS:
            yield f"line {node.lineno}: {node.id}"
        return
    owner = node.value.id if isinstance(node.value, ast.Name) else ""
    name = f"{owner or '?'}.{node.attr}"
    if owner in rigs and node.attr not in RIG_MEMBERS:
        yield f"line {node.lineno}: {name} is not in the contract"
    if node.attr.startswith("__") and node.attr not in PLAIN_DUNDERS:
        yield f"line {node.lineno}: {name} is not a method's business"
    elif node.attr.startswith("_") and not node.attr.startswith("__") and owner not in ("self", "cls"):
        yield f"line {node.lineno}: {name} is private"
    if not isinstance(node.ctx, ast.Load) and owner != "self":
        yield f"line {node.lineno}: {name} is assigned"


def _imports(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[tuple[str, str, str]]:
    """Yield (local name, the full name it stands for, the full name imported) of an import statement."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            top = alias.name.partition(".")[0]
            yield alias.asname or top, alias.name if alias.asname else top, alias.name
        return
    origin = "." * node.level + (node.module or "")
    origin = importlib.util.resolve_name(origin, package) if node.level else origin
    for alias in node.names:
        yield alias.asname or alias.name, f"{origin}.{alias.name}", f"{origin}.{alias.name}"


def _name_violations(node: ast.Attribute | ast.Name, name: str) -> Iterator[str]:
    """Yield what is wrong with the use of a name; `name` is its full dotted name."""
    if isinstance(node, ast.Name):
        if name in FORBIDDEN_BUILTINS:
            yield f"line {node.lineno}: {name}"
        return
    yield from _forbidden_name(name, node)
    owner, _, leaf = name.rpartition(".")
    if leaf in FORBIDDEN_ATTRIBUTES:
        yield f"line {node.lineno}: .{leaf}"
    if owner.rpartition(".")[2] == "model" and leaf not in MODEL_MEMBERS:
        yield f"line {node.lineno}: {name} tells one family of models from another, or is the harness's"


def _call_violations(node: ast.Call, full_names: Mapping[str, str], rigs: set[str]) -> Iterator[str]:
    """Yield what is wrong with a call: randomness that is not the rig's, a test of the model's class, a device by name."""
    name = _dotted_name(node.func, full_names)
    options = {word.arg: word.value for word in node.keywords}
    if name in RANDOM_DRAWS:
        yield f"line {node.lineno}: {name} draws randomness of its own, not the rig's"
    if name in ("isinstance", "type") and node.args and _dotted_name(node.args[0], full_names).endswith("model"):
        yield f"line {node.lineno}: {name} of a model"
    if name == "type" and any(isinstance(argument, ast.Name) and argument.id in rigs for argument in node.args):
        yield f"line {node.lineno}: type of the rig"
    devices = [*(node.args if name.endswith(".to") else ()), *([options["device"]] if "device" in options else ())]
    if any(isinstance(device, ast.Constant) and isinstance(device.value, str) for device in devices):
        yield f"line {node.lineno}: a device by name"


def _forbidden_module(name: str, node: ast.AST) -> Iterator[str]:
    """Yield a violation where an import is of a module, or a part of this package, that no method needs."""
    top, line = name.partition(".")[0], getattr(node, "lineno", 0)
    if top == PACKAGE:
        if name not in ALLOWED_NAMES and not any(name == part or name.startswith(f"{part}.") for part in CONTRACT):
            yield f"line {line}: {name} is not in the contract"
    elif top in sys.stdlib_module_names and top not in ALLOWED_STANDARD:
        yield f"line {line}: {name}"
    if any(part.startswith("_") and part != "__future__" for part in name.split(".")):
        yield f"line {line}: {name} is private"


def _forbidden_name(name: str, node: ast.AST) -> Iterator[str]:
    """Yield a violation where a name is forbidden; an import also where it lies below a forbidden name.

    An attribute must be equal, because a chain `a.b.c` is visited at each of its links.
    """
    imported = isinstance(node, ast.Import | ast.ImportFrom)
    if any(name == forbidden or (imported and name.startswith(forbidden + ".")) for forbidden in FORBIDDEN_NAMES):
        yield f"line {getattr(node, 'lineno', 0)}: {name}"


def _dotted_name(node: ast.AST, full_names: Mapping[str, str]) -> str:
    """Return `a.b.c` for a chain of attributes, its head replaced by the full name it was imported as; other heads are '?'."""
    if isinstance(node, ast.Name):
        return full_names.get(node.id, node.id)
    return f"{_dotted_name(node.value, full_names)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"
