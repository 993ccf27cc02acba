"""`gpobench list` and `gpobench show`: list all parts, and describe one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from .. import registry
from .console import open_console
from .options import AsJson


def list_(as_json: AsJson = False) -> None:
    """List all methods, tasks, models, scorers and recipes."""
    parts = list(_all_parts())
    if as_json:
        print(json.dumps({"parts": parts}, indent=1))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table("kind", "name", "what it is", box=None, pad_edge=False, header_style="bold")
    for part in parts:
        others = [f"alias {alias}" for alias in part["aliases"]] + part["variants"]
        brackets = f" [{', '.join(others)}]" if others else ""
        table.add_row(part["kind"], part["name"], part["summary"] + brackets)
    console = open_console()
    console.print(table)
    console.print(
        Text.assemble("\nFields, defaults and source of one: ", ("gpobench show NAME", "bold")), highlight=False
    )


SHOW_EPILOG = "Example: `gpobench show gpo`"


def show(
    name: Annotated[str, typer.Argument(help="A name that `gpobench list` prints, or path/to/file.py:Name.")],
    as_json: AsJson = False,
) -> None:
    """Show a part's description, fields, defaults and presets."""
    kinds = [kind for kind in registry.GROUPS if name in registry.entries(kind)]
    if ".py:" not in name and not kinds:
        raise registry.unknown("name", name, {n for kind in registry.GROUPS for n in registry.entries(kind)})
    kinds = kinds or [_kind(name)]
    if as_json:
        print(json.dumps({"parts": [_part_as_json(kind, name) for kind in kinds]}, indent=1))
        return
    for kind in kinds:
        print_part(kind, name)


def _all_parts() -> Iterator[dict[str, Any]]:
    """Yield kind, name, summary, aliases and variants of every registered part."""
    from ..experiments.config import variants

    for kind in ("method", "task", "model", "scorer", "embedder", "recipe"):
        for name in registry.entries(kind):
            if registry.canonical(kind, name) == name:
                yield {
                    "kind": kind,
                    "name": name,
                    "summary": _model_line(name) if kind == "model" else registry.summary_line(kind, name),
                    "aliases": list(registry.aliases(kind, name)),
                    "variants": [f"{name}:{variant}" for variant in (variants(name) if kind == "method" else ())],
                }


def _part_as_json(kind: str, name: str) -> dict[str, Any]:
    """What `show` prints of a part: kind, name, description, fields, the tables of its preset file, and where both files are."""
    import dataclasses
    import inspect
    import tomllib

    from ..experiments.config import preset_path

    part = registry.load(kind, name)
    source = part if inspect.isclass(part) or inspect.isfunction(part) else type(part)
    module = inspect.getmodule(source)
    fields = _fields(part() if isinstance(part, type) else part) if dataclasses.is_dataclass(part) else ()
    preset = preset_path(name) if kind == "method" else None
    return {
        "kind": kind,
        "name": name,
        "description": "" if kind == "model" else inspect.cleandoc((module and module.__doc__) or ""),
        "fields": [{"name": key, "default": default, "meaning": meaning} for key, default, meaning in fields],
        "preset": tomllib.loads(preset.read_text("utf-8")) if preset else None,
        "preset_file": str(preset) if preset else None,
        "source": inspect.getsourcefile(source),
    }


def _model_line(name: str) -> str:
    """Return a model's pipeline, size, domain and licence in one line."""
    from ..model_spec import find_model_spec

    model_spec = find_model_spec(name)
    return f"{model_spec.pipeline}, {model_spec.width}x{model_spec.height}, prompts of the domain {model_spec.domain}; {model_spec.licence}"


def _kind(reference: str) -> str:
    """Return the kind of `path/to/file.py:Name`, by an attribute that only this kind has."""
    from ..model_spec import ModelSpec

    part = registry.load("method", reference)
    attributes = {
        "method": ("collect", "answer"),
        "task": ("held_out",),
        "scorer": ("metrics",),
        "embedder": ("distance",),
    }
    kind = next((kind for kind, names in attributes.items() if any(hasattr(part, name) for name in names)), "part")
    return "model" if isinstance(part, ModelSpec) else kind


def print_part(kind: str, name: str) -> None:
    """Print a part's module docstring, its fields, its preset file and the path of its source."""
    import dataclasses
    import inspect

    from rich.table import Table
    from rich.text import Text

    from ..experiments.config import preset_path

    console = open_console()
    console.print(Text.assemble((name, "bold"), f" ({kind})"), highlight=False)
    # Read without an import, which takes seconds: the reader begins while the rest is loaded.
    description = "" if ".py:" in name or kind == "model" else registry.docstring(kind, name)
    if description:
        console.print(_reflow(description), highlight=False, markup=False)
    part = registry.load(kind, name)
    source = part if inspect.isclass(part) or inspect.isfunction(part) else type(part)
    module = inspect.getmodule(source)
    if kind != "model" and not description and module:
        console.print(_reflow(inspect.cleandoc(module.__doc__ or "")), highlight=False, markup=False)
    if dataclasses.is_dataclass(part):
        table = Table("field", "default", "meaning", box=None, pad_edge=False, header_style="bold")
        for row in _fields(part() if isinstance(part, type) else part):
            table.add_row(*row)
        console.print()
        console.print(table, markup=False)
    if kind == "method" and (preset := preset_path(name)):
        console.print(f"\npreset {preset}", highlight=False, soft_wrap=True, style="dim")
        console.print(preset.read_text("utf-8").strip(), highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nsource {inspect.getsourcefile(source)}\n", highlight=False, soft_wrap=True, style="dim")


def _reflow(text: str) -> str:
    """Join the lines of each paragraph, so that the terminal wraps them; indented lines stay as they are."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and line and lines[-1] and not line.startswith(" ") and not lines[-1].startswith(" "):
            lines[-1] += " " + line
        else:
            lines.append(line)
    return "\n".join(lines)


def _fields(value: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (name, default, the comment behind it) of each field of a dataclass and of those inside it."""
    import dataclasses
    import inspect
    import re

    comments = dict(re.findall(r"^    (\w+):[^#\n]*?  # (.*)$", inspect.getsource(type(value)), re.MULTILINE))
    for f in dataclasses.fields(value):
        default = getattr(value, f.name)
        if dataclasses.is_dataclass(default):
            yield from _fields(default, f"{prefix}{f.name}.")
        else:
            literal = re.match(r"Literal\[(.*)\]", str(f.type))
            choices = literal[1].replace("'", "").replace('"', "").replace(", ", " | ") if literal else ""
            meaning = ": ".join(part for part in (choices, comments.get(f.name, "")) if part)
            yield f"{prefix}{f.name}", str(default), meaning
