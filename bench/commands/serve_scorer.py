"""`gpobench serve-scorer`: serves a scorer over HTTP to runs in other environments."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import check_names, named_scorer

EPILOG = (
    "Example: `gpobench serve-scorer geneval:mmdet --port 8500`, then there `gpobench run "
    "... --scorer geneval:mmdet=http://127.0.0.1:8500`"
)


def serve_scorer(
    name: Annotated[str, typer.Argument(help="A scorer that `gpobench list` prints, or path/to/file.py:Name.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one and prints it.")] = 8500,
    host: Annotated[
        str, typer.Option(help="The address to listen on; any but this machine's own needs a token.")
    ] = "127.0.0.1",
    token: Annotated[
        str, typer.Option(envvar="GPOBENCH_SCORER_TOKEN", help="What callers must send; best set in the environment.")
    ] = "",
    max_images: Annotated[int, typer.Option(min=1, help="The most images in a request.")] = 64,
    max_megabytes: Annotated[int, typer.Option(min=1, help="The most megabytes in a request.")] = 64,
) -> None:
    """Serve a scorer over HTTP to runs in other environments.

    Images travel as PNG and scores as JSON; nothing is pickled.
    """
    check_names(**named_scorer(name))
    from ..scoring.server import serve

    serve(name, host=host, port=port, token=token, max_images=max_images, max_bytes=max_megabytes * 2**20)
