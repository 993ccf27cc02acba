"""gpobench export: writes a run's adapter with a model card, and uploads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import say


def export(
    run: Annotated[Path, typer.Argument(help="A finished run's directory.")],
    to: Annotated[Path, typer.Option("--to", help="The folder to write.")],
    push: Annotated[
        str | None, typer.Option(help="owner/name on the model hub: upload the folder there; needs a token.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: make a new repository private.")] = False,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="A data set on the hub that is registered as a benchmark of this task: also write .eval_results for it."
        ),
    ] = None,
) -> None:
    """Write a run's adapter with a model card of its scores.

    The card states the scores with their intervals, and what the run spent.

    Examples: `gpobench export runs/NAME --to card` · `gpobench export runs/NAME --to card --push me/my-lora`
    """
    from ...bench.experiments.export import export as write
    from ...bench.experiments.export import push as upload

    exported = write(run, to, repo=push, benchmark=benchmark)
    for warning in exported.warnings:
        say(f"gpobench: {warning}", err=True)
    say(f"wrote {', '.join(exported.files)} to {to}", err=True)
    if push:
        say(upload(exported, push, private=private))
