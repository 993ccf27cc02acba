"""`gpobench new`: writes a part of your own from a template that works."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    pass


new = typer.Typer(no_args_is_help=True, help="Begin a part of your own from a template that works.")


@new.command("method", epilog="Example: `gpobench new method my-method --out methods`")
def new_method(
    name: Annotated[str, typer.Argument(help="Lower-case words with dashes between: my-method.")],
    out: Annotated[Path, typer.Option(help="The folder to write in.")] = Path("."),
) -> None:
    """Write a method that works, and its presets, to change from there."""
    from .scaffold import new_method as write

    file, kind = write(name, out)
    print(f"wrote {file} and {file.with_suffix('.toml')}; next:")
    print(f"  gpobench check --method {file}:{kind}")
    print(f"  gpobench run --method {file}:{kind} --task ocr --model tiny")
