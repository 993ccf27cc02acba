"""Registry: loads methods, tasks, scorers, models and other parts by entry point or from a Python file."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from functools import cache
from hashlib import sha256
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from .errors import DownloadLimitExceeded, UserError, error_line
from .signals import raised_by_user

GROUPS = {
    "method": "gpobench.methods",
    "task": "gpobench.tasks",
    "scorer": "gpobench.rewards",
    "model": "gpobench.models",
    "pipeline": "gpobench.pipelines",
    "embedder": "gpobench.embedders",
    "recipe": "gpobench.recipes",
    "command": "gpobench.commands",
}
CLASSES = ("method", "pipeline", "recipe")  # the kinds that are classes
# Prefix of the names of modules that are loaded from Python files.
PLUGIN = "gpobench_plugin_"
# Prompts that a model understands: those of the embedded models, and all others.
DOMAINS = ("glyphs", "open")


def unknown(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """A UserError for a name that does not exist, which names the nearest valid one and lists all."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}; {hint}valid: {', '.join(names) or 'none'}")


def known_domain(task: str, domain: str) -> str:
    """The prompt domain, where it is one of DOMAINS. Raises UserError for another."""
    if domain not in DOMAINS:
        raise unknown(f"prompt domain of the task {task}", domain, DOMAINS)
    return domain


def entries(kind: str) -> dict[str, metadata.EntryPoint]:
    """The entry points of one kind, by name. Raises UserError where two packages claim a name."""
    by_name: dict[str, metadata.EntryPoint] = {}
    for entry in sorted(_installed(GROUPS[kind], tuple(sys.path)), key=lambda e: (e.name, e.value)):
        twin = by_name.get(entry.name)
        if twin is not None and twin.value != entry.value:
            raise UserError(f"two packages claim the {kind} {entry.name!r}: {twin.value} and {entry.value}")
        by_name[entry.name] = entry
    return by_name


@cache
def _installed(group: str, path: tuple[str, ...]) -> metadata.EntryPoints:
    """The entry points of a group on this path, cached: a look-up takes milliseconds, and a table makes hundreds."""
    return metadata.entry_points(group=group)


def split_variant(reference: str) -> tuple[str, str]:
    """`name:variant` as name and variant; `path/to/file.py:Name` is a name as a whole."""
    if ".py:" in reference:
        return reference, ""
    name, _, variant = reference.partition(":")
    return name, variant


def canonical(kind: str, name: str) -> str:
    """The name that an alias stands for: of several entry points with one target, the one its file is named after.

    `dpo` and `diffusion-dpo` are one method, methods/diffusion_dpo.py; a variant behind a colon stays: `dpo:offline`.
    """
    if ".py:" in name:
        return name
    base, _ = split_variant(name)
    points = entries(kind)
    if base not in points:
        return name
    target = points[base].value
    twins = [other for other, entry in points.items() if entry.value == target]
    leaf = target.partition(":")[0].rpartition(".")[2].replace("_", "-")
    return (leaf if leaf in twins else base) + name[len(base) :]


def aliases(kind: str, name: str) -> list[str]:
    """The aliases of a part: its other names."""
    return [other for other in entries(kind) if other != name and canonical(kind, other) == name]


def load(kind: str, reference: str) -> Any:
    """Load the part called by a name or by `path/to/file.py:Name`.

    Raises UserError on an unknown name, an unreadable file, or a part that cannot be imported.
    """
    if ".py:" in reference:
        return _checked_part(kind, reference, _load_from_file(reference))
    points = entries(kind)
    if kind == "method":  # the variant behind the colon is read with the settings
        reference, _ = split_variant(reference)
    if reference not in points:
        raise unknown(kind, reference, points)
    try:
        part = points[reference].load()
    except UserError:
        raise
    except BaseException as error:  # a third party's module may fail in any way
        if raised_by_user(error):
            raise
        reason = f"{kind} {reference!r} cannot be loaded from {points[reference].value}: {error_line(error)}"
        raise UserError(reason) from error
    return _checked_part(kind, reference, part)


def _checked_part(kind: str, reference: str, part: Any) -> Any:
    """Return the part if it can be one of its kind: methods, pipelines and recipes are classes, all but models are called."""
    value = f"a value of the type {type(part).__name__}"
    if kind in CLASSES and not isinstance(part, type):
        raise UserError(f"{reference} is {value}: a {kind} is a class")
    if kind != "model" and not callable(part):
        raise UserError(f"{reference} is {value}: a {kind} is a class or a function")
    return part


def _made(kind: str, reference: str, make: Callable[[], Any]) -> Any:
    """Return what a class or function of a part returns. Raises UserError where third-party code fails or ends the program."""
    try:
        return make()
    except (UserError, DownloadLimitExceeded):
        raise
    except BaseException as error:
        if raised_by_user(error) or (isinstance(error, Exception) and ".py:" not in reference):
            raise
        raise UserError(f"{kind} {reference} cannot be made: {error_line(error)}") from error


def task(reference: str) -> Any:
    """Make the task called `name` or `path/to/file.py:Name`."""
    return _made("task", reference, load("task", reference))


def scorer(reference: str) -> Any:
    """Make the scorer called `name`, `name:variant` or `path/to/file.py:Name`. Raises Missing where its engine is not there."""
    return _variant("scorer", reference)


def embedder(reference: str) -> Any:
    """Make the embedder called `name`, `name:variant` or `path/to/file.py:Name`. Raises Missing without its engine."""
    return _variant("embedder", reference)


def _variant(kind: str, reference: str) -> Any:
    name, variant = split_variant(reference)
    make = load(kind, name)
    return _made(kind, reference, make if ".py:" in reference else lambda: make(variant or None))


def summary_line(kind: str, name: str) -> str:
    """The first docstring line of a part's file, read without an import; of its function where parts share a file."""
    point = entries(kind)[name]
    module, _, attribute = point.value.partition(":")
    tree = _syntax_tree(module)
    if tree is None:
        return ""
    if len({other.value for other in entries(kind).values() if other.value.partition(":")[0] == module}) > 1:
        functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == attribute]
        described = next((n for n in functions if ast.get_docstring(n)), tree)
        return (ast.get_docstring(described) or "").partition("\n")[0]
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def docstring(kind: str, name: str) -> str:
    """The docstring of a part's file, read without an import; "" where it cannot be read."""
    tree = _syntax_tree(entries(kind)[name].value.partition(":")[0])
    return (ast.get_docstring(tree) if tree else "") or ""


def _syntax_tree(module: str) -> ast.Module | None:
    """The syntax tree of a module's file; None where there is none."""
    parent, _, leaf = module.rpartition(".")
    try:
        package = import_module(parent) if parent else None
        spec = importlib.util.find_spec(module) if package is None else None
        folders = list(getattr(package, "__path__", []))
        source = (
            Path(spec.origin)
            if spec and spec.origin
            else next(
                path
                for folder in folders
                for path in (Path(folder) / f"{leaf}.py", Path(folder) / leaf / "__init__.py")
                if path.is_file()
            )
        )
        return ast.parse(source.read_text("utf-8"))
    except (ImportError, OSError, StopIteration, SyntaxError):
        return None


def _load_from_file(reference: str) -> Any:
    """The object called `path/to/file.py:Name`. Raises UserError where file or name cannot be loaded."""
    file, _, name = reference.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    # Two files of one name are two modules: a class's module is used to find its own file.
    alias = f"{PLUGIN}{path.stem}_{sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(alias, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except BaseException as error:  # it may even ask Python to exit
        if raised_by_user(error):
            raise
        hint = ": it ends the program when it is imported" if isinstance(error, SystemExit) else ""
        raise UserError(f"{path}: {error_line(error)}{hint}") from error
    if name not in vars(module):
        defined_names = [
            n
            for n, value in vars(module).items()
            if getattr(value, "__module__", "") == alias and not n.startswith("_")
        ]
        raise unknown(f"name in {path.name}", name, defined_names or [n for n in vars(module) if not n.startswith("_")])
    return vars(module)[name]
