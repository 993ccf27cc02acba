"""A counter window: pictures and prompts are handed in over HTTP, one scorer behind the glass hands numbers back.

The wire is described in `bench/scoring/remote.py`. What is handed in is data of strangers: sizes are bounded while it is
read, pictures are PNG and nothing else, their headers are looked at before they are decoded, and nothing is ever unpickled.
"""

import argparse
import asyncio
import base64
import hmac
import ipaddress
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from ..errors import Missing, UserError
from ..images import png_pixels
from ..spec import Images, Prompt, Scorer
from .remote import MAGIC, PROTOCOL, READY, TOKEN, About, Answer, Limits, Question, wrong
from .scorers import ask, close_scorers, open_scorer

if TYPE_CHECKING:
    from fastapi import FastAPI

WAITING = 64  # connections at once; further ones are told 503


def _printed(line: str) -> None:
    print(line, flush=True)


def serve(
    reference: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str = "",
    max_images: int = 64,
    max_bytes: int = 64 * 2**20,
    max_pixels: int = 64 * 2**20,
    say: Callable[[str], object] = _printed,
) -> None:
    """Serve a scorer until SIGINT or SIGTERM; says `ready: URL ID` when it answers. Port 0 takes a free one.

    The three bounds are those of one request: pictures, bytes of its body, pixels of its pictures together.
    Raises UserError on a bound that is none, a port that is taken, and an address others can reach without a token; Missing without
    fastapi and uvicorn.
    """
    if not token and not _private(host):
        raise UserError(
            f"{host} can be reached from elsewhere: set a token in the environment variable {TOKEN}, or use 127.0.0.1"
        )
    try:
        limits = Limits(images=max_images, bytes=max_bytes, pixels=max_pixels)
    except ValidationError:
        raise UserError(
            "a server takes at least 1 image, 1024 bytes and 1 pixel a request, e.g. --max-images 64"
        ) from None
    try:
        import_module("fastapi")
        import uvicorn
    except ImportError as error:
        raise Missing(
            f"serving a scorer needs fastapi and uvicorn ({error}); install with: pip install 'gpobench[serve]'"
        ) from None
    scorer = open_scorer(reference)
    try:
        line = _bound(host, port)
        name = f"[{host}]" if line.family == socket.AF_INET6 else host
        ready = f"{READY}http://{name}:{line.getsockname()[1]} {scorer.id}"
        app = application(scorer, limits, token=token, reference=reference, up=lambda: say(ready))
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, limit_concurrency=WAITING, timeout_graceful_shutdown=5
        )
        server = uvicorn.Server(config)
        main = threading.current_thread() is threading.main_thread()
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # its parent ends it
            main = False
            server.capture_signals = nullcontext  # type: ignore[method-assign]
        # uvicorn ends in good order at the first signal, then sends it again to whoever it found in its place
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM) if main}
        try:
            server.run(sockets=[line])
        finally:
            line.close()
            for number, action in before.items():
                signal.signal(number, action)
    finally:
        close_scorers([scorer])


def _private(host: str) -> bool:
    """Can only this machine reach it?"""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {host} port {port}: {error}") from None


def application(
    scorer: Scorer, limits: Limits, *, token: str = "", reference: str = "", up: Callable[[], object] = lambda: None
) -> "FastAPI":
    """The window for one scorer; `up` is called when it opens. Engines are not made for several threads: one question at a time."""
    from fastapi import FastAPI, HTTPException, Request, Response
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect

    about = About(
        id=scorer.id,
        name=scorer.name,
        metrics=list(scorer.metrics),
        protocol=PROTOCOL,
        limits=limits,
        reference=reference,
    )
    turn = asyncio.Lock()

    @asynccontextmanager
    async def open_window(_: FastAPI) -> AsyncGenerator[None]:
        up()
        yield

    app = FastAPI(openapi_url=None, lifespan=open_window)

    def let_in(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("utf-8", "replace")
        if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, "the token is missing or wrong", {"WWW-Authenticate": "Bearer"})

    async def read(request: Request) -> bytes:
        body = bytearray()
        async for part in request.stream():  # what Content-Length says is no promise
            body += part
            if len(body) > limits.bytes:
                why = f"a request has at most {limits.bytes} bytes"
                raise HTTPException(413, why, {"Connection": "close"})  # the rest would be read, if only to be dropped
        return bytes(body)

    async def health() -> dict[str, bool]:
        return {"ok": True}

    async def who(request: Request) -> About:
        let_in(request)
        return about

    async def score(request: Request) -> Response:
        let_in(request)
        try:
            question = _understood(await read(request))
        except ClientDisconnect:
            return Response(status_code=408)
        if isinstance(question, str):
            raise HTTPException(422, question)
        if len(question.images) > limits.images:
            raise HTTPException(413, f"a request has at most {limits.images} images, not {len(question.images)}")
        async with turn:
            if await request.is_disconnected():  # it did not want to wait that long
                return Response(status_code=408)
            answer = await run_in_threadpool(answered, scorer, question, limits.pixels)
        if answer is None:
            raise HTTPException(413, f"the images of a request have at most {limits.pixels} pixels together")
        return Response(answer.model_dump_json(), media_type="application/json")

    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/about", who, methods=["GET"])
    app.add_api_route("/score", score, methods=["POST"])
    return app


def _understood(body: bytes) -> Question | str:
    """The question, or what is wrong with it."""
    try:
        question = Question.model_validate_json(body)
    except ValidationError as error:
        return wrong(error)
    if len(question.images) != len(question.prompts):
        return f"{len(question.images)} images but {len(question.prompts)} prompts"
    return question


def answered(scorer: Scorer, question: Question, pixels: int) -> Answer | None:
    """What the scorer says; a picture that cannot be read costs its own row only. None: more than `pixels` pixels together."""
    n = len(question.images)
    reasons: dict[int, str] = {}
    files: dict[int, bytes] = {}
    for row, text in enumerate(question.images):
        try:
            files[row] = _png(text, pixels)
        except ValueError as error:
            reasons[row] = f"image refused: {error}"
    if sum(height * width for height, width in map(_size, files.values())) > pixels:
        return None
    shapes: dict[tuple[int, int], dict[int, Images]] = {}
    for row, content in files.items():
        try:
            shapes.setdefault(_size(content), {})[row] = png_pixels(content)
        except Exception as error:  # Pillow meets the bytes of strangers: there is no end to what it raises
            reasons[row] = f"image refused: {type(error).__name__}: {error}"
    prompts = [Prompt(asked.text, asked.meta, asked.stratum) for asked in question.prompts]
    value: dict[str, list[float | None]] = {metric: [None] * n for metric in scorer.metrics}
    notes: list[str | None] = [None] * n
    for pictures in shapes.values():  # pictures of one size are one batch
        rows = list(pictures)
        if not rows:
            continue
        scores = ask(scorer, np.stack(list(pictures.values())), [prompts[row] for row in rows])
        for metric, column in scores.value.items():
            for row, number in zip(rows, column.tolist()):
                value[metric][row] = number if np.isfinite(number) else None
        reasons |= {rows[at]: why for at, why in scores.reasons.items()}
        for row, note in zip(rows, scores.notes or ()):
            notes[row] = str(note)
    return Answer(
        id=scorer.id, value=value, reasons=reasons, notes=notes if any(n is not None for n in notes) else None
    )


def _png(text: str, pixels: int) -> bytes:
    """The bytes of a PNG of at most so many pixels in 8 bit RGB; ValueError on anything else. Nothing is decoded."""
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError("not base64") from None
    if len(content) < 33 or not content.startswith(MAGIC) or content[12:16] != b"IHDR":
        raise ValueError("not a PNG")
    if content[24:26] != bytes((8, 2)):  # bits a channel, colour type
        raise ValueError("not 8 bit RGB")
    height, width = _size(content)
    if not 0 < height * width <= pixels:
        raise ValueError(f"{width}x{height} pixels, at most {pixels} can be taken")
    return content


def _size(content: bytes) -> tuple[int, int]:
    """(height, width) as the header of a PNG says."""
    width, height = struct.unpack(">II", content[16:24])
    return height, width


def _end_with_parent() -> None:
    """End this process when its standard input does: whoever started it is gone, however it went."""

    def watch() -> None:
        with suppress(OSError, ValueError):
            while os.read(0, 4096):
                pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str] | None = None) -> int:
    """`python -m gpobench.bench.scoring.server reader --port 8100`; the token comes from the environment. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="gpobench.bench.scoring.server", description="Serve a scorer over HTTP.")
    parser.add_argument("reference", help="name, name:variant, path/to/file.py:Name, or a blend")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--max-images", type=int, default=64, help="in one request")
    parser.add_argument("--with-parent", action="store_true", help="end when standard input does")
    given: Any = parser.parse_args(arguments)
    if given.with_parent:
        for number in (signal.SIGINT, signal.SIGTERM):  # sent to a whole job, they are the parent's to obey
            signal.signal(number, signal.SIG_IGN)
        _end_with_parent()
    try:
        serve(
            given.reference,
            host=given.host,
            port=given.port,
            token=os.environ.get(TOKEN, ""),
            max_images=given.max_images,
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
