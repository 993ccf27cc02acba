"""`gpobench serve-scorer`: serves a scorer over HTTP to runs in other environments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .options import check_names, named_scorer

if TYPE_CHECKING:
    pass


EPILOG = (
    "Example: `gpobench serve-scorer geneval:mmdet --port 8500`, then there `gpobench run "
    "... --scorer geneval:mmdet=http://127.0.0.1:8500`"
)


def serve_scorer(
    name: Annotated[str, typer.Argument(help="A scorer that `gpobench list` prints, or path/to/file.py:Name.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and prints it.")] = 8500,
    host: Annotated[str, typer.Option(help="Anything but this machine's own address needs a token.")] = "127.0.0.1",
    token: Annotated[
        str, typer.Option(envvar="GPOBENCH_SCORER_TOKEN", help="What callers must show; best given by the environment.")
    ] = "",
    max_images: Annotated[int, typer.Option(min=1, help="Images a request may hold.")] = 64,
    max_megabytes: Annotated[int, typer.Option(min=1, help="What a request may weigh.")] = 64,
) -> None:
    """Serve a scorer to runs in other environments or on other machines: PNG and JSON over HTTP, nothing pickled."""
    check_names(**named_scorer(name))
    from ..scoring.server import serve

    serve(name, host=host, port=port, token=token, max_images=max_images, max_bytes=max_megabytes * 2**20)
