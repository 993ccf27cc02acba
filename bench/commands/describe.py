"""`gpobench list` and `gpobench show`: what methods, tasks, models, scorers, embedders and recipes there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import registry
from .console import open_console

if TYPE_CHECKING:
    pass


def list_() -> None:
    """All methods, tasks, models, scorers, embedders and recipes, built-in and installed."""
    from rich.table import Table

    table = Table("kind", "name", "what it is", box=None, pad_edge=False, header_style="bold")
    for kind in ("method", "task", "model", "scorer", "embedder", "recipe"):
        for name in registry.entries(kind):
            if registry.canonical(kind, name) == name:
                said = _model_line(name) if kind == "model" else registry.caption(kind, name)
                table.add_row(kind, name, said + _also(kind, name))
    open_console().print(table)
    open_console().print("\nFields, defaults and source of one: [bold]gpobench show NAME[/]", highlight=False)


SHOW_EPILOG = "Example: `gpobench show gpo`"


def show(
    name: Annotated[str, typer.Argument(help="A name that `gpobench list` prints, or path/to/file.py:Name.")],
) -> None:
    """What a part is: its description, fields, defaults, presets and source."""
    kinds = [kind for kind in registry.GROUPS if name in registry.entries(kind)]
    if ".py:" not in name and not kinds:
        raise registry.unknown("name", name, {n for kind in registry.GROUPS for n in registry.entries(kind)})
    for kind in kinds or [_kind(name)]:
        _show(kind, name)


def _also(kind: str, name: str) -> str:
    """The other names of a part, and the variants of a method."""
    from ..experiments.config import variants

    parts = [f"alias {alias}" for alias in registry.aliases(kind, name)]
    parts += [f"{name}:{variant}" for variant in (variants(name) if kind == "method" else ())]
    return f" [{', '.join(parts)}]".replace("[", "\\[") if parts else ""


def _model_line(name: str) -> str:
    from ..model_spec import find_model_spec

    model_spec = find_model_spec(name)
    licence = model_spec.licence.replace("[", "\\[")  # no markup
    return f"{model_spec.pipeline}, {model_spec.width}x{model_spec.height}, prompts of the domain {model_spec.domain}; {licence}"


def _kind(reference: str) -> str:
    """What `path/to/file.py:Name` is, by what only such a part has."""
    from ..model_spec import ModelSpec

    made = registry.load("method", reference)
    marks = {"method": ("collect", "answer"), "task": ("held_out",), "scorer": ("metrics",), "embedder": ("distance",)}
    known = next((kind for kind, names in marks.items() if any(hasattr(made, name) for name in names)), "part")
    return "model" if isinstance(made, ModelSpec) else known


def _show(kind: str, name: str) -> None:
    import dataclasses
    import inspect

    from rich.table import Table

    from ..experiments.config import preset_path

    console = open_console()
    made = registry.load(kind, name)
    source = made if inspect.isclass(made) or inspect.isfunction(made) else type(made)
    module = inspect.getmodule(source)
    console.print(f"[bold]{name}[/] ({kind})", highlight=False)
    if kind != "model" and module:
        console.print(_reflow(inspect.cleandoc(module.__doc__ or "")), highlight=False, markup=False)
    if dataclasses.is_dataclass(made):
        table = Table("field", "default", "meaning", box=None, pad_edge=False, header_style="bold")
        for row in _fields(made() if isinstance(made, type) else made):
            table.add_row(*row)
        console.print()
        console.print(table, markup=False)
    if kind == "method" and (preset := preset_path(name)):
        console.print(f"\npreset {preset}", highlight=False, soft_wrap=True, style="dim")
        console.print(preset.read_text("utf-8").strip(), highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nsource {inspect.getsourcefile(source)}\n", highlight=False, soft_wrap=True, style="dim")


def _reflow(text: str) -> str:
    """Paragraphs as one line each, for the terminal to wrap at its own width; indented lines stay."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and line and lines[-1] and not line.startswith(" ") and not lines[-1].startswith(" "):
            lines[-1] += " " + line
        else:
            lines.append(line)
    return "\n".join(lines)


def _fields(value: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Name, default and the comment behind it, of a dataclass and those inside it."""
    import dataclasses
    import inspect
    import re

    said = dict(re.findall(r"^    (\w+):[^#\n]*?  # (.*)$", inspect.getsource(type(value)), re.MULTILINE))
    for f in dataclasses.fields(value):
        own = getattr(value, f.name)
        if dataclasses.is_dataclass(own):
            yield from _fields(own, f"{prefix}{f.name}.")
        else:
            literal = re.match(r"Literal\[(.*)\]", str(f.type))
            choices = literal[1].replace("'", "").replace('"', "").replace(", ", " | ") if literal else ""
            meaning = ": ".join(part for part in (choices, said.get(f.name, "")) if part)
            yield f"{prefix}{f.name}", str(own), meaning
