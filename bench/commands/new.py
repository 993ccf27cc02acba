"""`gpobench new`: writes a part of your own from a template that works."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

new = typer.Typer(no_args_is_help=True, help="Write a new part from a template that works.")


@new.command("method", epilog="Example: `gpobench new method my-method --out methods`")
def new_method(
    name: Annotated[str, typer.Argument(help="Lower-case words joined by dashes: my-method.")],
    out: Annotated[Path, typer.Option(help="The folder to write in.")] = Path("."),
) -> None:
    """Write a working method and its presets, as a start for your own."""
    from .scaffold import new_method as write_method

    file, class_name = write_method(name, out)
    print(f"wrote {file} and {file.with_suffix('.toml')}; next:")
    print(f"  gpobench check --method {file}:{class_name}")
    print(f"  gpobench run --method {file}:{class_name} --task ocr --model tiny")
