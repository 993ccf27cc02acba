"""HTTP server of one scorer: takes PNG images and prompts as JSON and returns scores.

The protocol is described in `bench/scoring/remote.py`. Requests are untrusted: a caller without the token is answered before
the body is read; bytes and JSON values are bounded while they are read, and few bodies are in memory at once; images are PNG and
nothing else, rebuilt from the chunks that hold pixels before they are decoded; nothing is ever unpickled. Whatever takes time
runs on a thread, so that GET /health is answered meanwhile.
"""

import argparse
import asyncio
import binascii
import hmac
import ipaddress
import os
import signal
import socket
import struct
import sys
import threading
import zlib
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from ..errors import Missing, UserError
from ..images import png_pixels
from ..spec import Images, Prompt, Scorer
from ..text import printable
from .remote import (
    MAGIC,
    PROTOCOL,
    READY,
    TOKEN,
    VALUES_PER_IMAGE,
    Limits,
    ScoreRequest,
    ScoreResponse,
    ScorerInfo,
    first_error,
    json_values,
)
from .scorers import ask, close_scorers, open_scorer
from .worker_setting import WorkerSetting

if TYPE_CHECKING:
    from fastapi import FastAPI

MAX_BODIES = (
    4  # requests that are read, wait for the scorer or are scored at once; further ones wait before they are read
)
BODY_SECONDS = 60.0  # that a body may take to arrive
BASE64_PART = 2**20  # characters decoded at once: other threads wait meanwhile
HEADER_BYTES, HEAD_CHARACTERS = 33, 44  # of a PNG: its signature and the chunk IHDR; the same in base64
BYTES_PER_CHUNK = 512  # chunks of a PNG are at least so long on average, apart from the first CHUNKS
CHUNKS = 64
ZLIB_PART, ZLIB_OUTPUT = 2**16, 2**20  # bytes of a PNG's data decompressed at once, and the most that come out
# (x, y, x step, y step) of the seven passes of an interlaced PNG
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def _print_line(line: str) -> None:
    print(printable(line), flush=True)


def serve(
    reference: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str = "",
    max_images: int = 64,
    max_bytes: int = 64 * 2**20,
    max_pixels: int = 64 * 2**20,
    say: Callable[[str], object] = _print_line,
) -> None:
    """Serve a scorer until SIGINT or SIGTERM; says `ready: URL ID` when it answers. Port 0 takes a free one.

    The three bounds are those of one request: images, bytes of its body, pixels of its images together.
    Raises UserError on an invalid bound, a port that is taken, and an address others can reach without a token; Missing without
    fastapi and uvicorn.

    Args:
        reference: a scorer or a blend, as `open_scorer` takes it.
        host: the address to listen on.
        port: 0 takes a free one.
        token: what callers must show; "" asks for none.
        max_images: images of one request.
        max_bytes: bytes of one request's body.
        max_pixels: pixels of one request's images together.
        say: given the line that says where the scorer is served.
    """
    if not token and not _is_loopback(host):
        raise UserError(
            f"{host} can be reached from elsewhere: set a token in the environment variable {TOKEN}, or use 127.0.0.1"
        )
    try:
        values = VALUES_PER_IMAGE * max(max_images, Limits.model_fields["images"].default)
        limits = Limits(images=max_images, bytes=max_bytes, pixels=max_pixels, values=values)
    except ValidationError:
        raise UserError(
            "a server takes at least 1 image, 1024 bytes and 1 pixel a request, e.g. --max-images 64"
        ) from None
    try:
        import_module("fastapi")
        import_module("uvicorn")
    except ImportError as error:
        raise Missing(
            f"serving a scorer needs fastapi and uvicorn ({error}); install with: pip install 'gpobench[serve]'"
        ) from None
    from .connections import bounded_server

    scorer = open_scorer(reference, workers=WorkerSetting.parse())
    try:
        listener = _listening_socket(host, port)
        name = f"[{host}]" if listener.family == socket.AF_INET6 else host
        ready = f"{READY}http://{name}:{listener.getsockname()[1]} {scorer.id}"
        server = bounded_server(application(scorer, limits, token=token, reference=reference, up=lambda: say(ready)))
        try:
            with _ending_on_signals(server):
                server.run(sockets=[listener])
        finally:
            listener.close()
    finally:
        close_scorers([scorer])


@contextmanager
def _ending_on_signals(server: Any) -> Generator[None]:
    """Within the block SIGINT and SIGTERM end the server in good order, except one that this process was started to ignore.

    A shell starts a script's background jobs with SIGINT ignored; a run starts its scorers with both ignored and ends them itself.
    """
    server.capture_signals = nullcontext  # uvicorn's would replace ignored signals, and send them once more at the end
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, server.handle_exit)
    try:
        yield
    finally:
        for number, action in previous.items():
            signal.signal(number, action)


def _is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listening_socket(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {host} port {port}: {error}") from None


def application(
    scorer: Scorer, limits: Limits, *, token: str = "", reference: str = "", up: Callable[[], object] = lambda: None
) -> "FastAPI":
    """Build the web application of one scorer; `up` is called when it starts.

    Engines are not thread-safe in general: the scorer is called for one request at a time.

    Args:
        scorer: the scorer to serve.
        limits: bounds of one request.
        token: what callers must show; "" asks for none.
        reference: the scorer's name as it was given.
        up: called when the application starts.
    """
    from fastapi import FastAPI, HTTPException, Request, Response
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect

    info = ScorerInfo(
        id=scorer.id, name=scorer.name, metrics=list(scorer.metrics), protocol=PROTOCOL, limits=limits,
        reference=reference,
    )  # fmt: skip
    parsing, scoring = (
        asyncio.Lock(),
        asyncio.Lock(),
    )  # at most one thread parses: the parser runs nothing else meanwhile
    bodies = asyncio.Semaphore(MAX_BODIES)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        up()
        yield

    app = FastAPI(openapi_url=None, lifespan=lifespan)

    async def health() -> dict[str, bool]:
        return {"ok": True}

    async def about(request: Request) -> ScorerInfo:
        _authorise(request, token)
        return info

    async def score(request: Request) -> Response:
        _authorise(request, token)
        try:
            async with bodies:
                return await scored(request)
        except ClientDisconnect:
            return Response(status_code=408)

    async def scored(request: Request) -> Response:
        body = await _read_body(request, limits)
        async with parsing:
            parsed = await run_in_threadpool(_parse_request, body)
        del body
        if isinstance(parsed, str):
            raise HTTPException(422, parsed)
        if len(parsed.images) > limits.images:
            raise HTTPException(413, f"a request has at most {limits.images} images, not {len(parsed.images)}")
        async with scoring:
            if await request.is_disconnected():  # the client gave up while it waited
                return Response(status_code=408)
            response = await run_in_threadpool(score_request, scorer, parsed, limits.pixels)
        if response is None:
            raise HTTPException(413, f"the images of a request have at most {limits.pixels} pixels together")
        return Response(response.model_dump_json(), media_type="application/json")

    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/about", about, methods=["GET"])
    app.add_api_route("/score", score, methods=["POST"])
    return app


def _authorise(request: Any, token: str) -> None:
    """Refuse a request without the token, where there is one."""
    from fastapi import HTTPException

    given = request.headers.get("authorization", "").encode("utf-8", "replace")
    if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
        # Closed, else the body of a caller without the token would be read to its end.
        headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
        raise HTTPException(401, "the token is missing or wrong", headers)


async def _read_body(request: Any, limits: Limits) -> bytearray:
    """Read the body of a request; refuse it as soon as it exceeds a limit, whatever its Content-Length says."""
    from fastapi import HTTPException

    body, values = bytearray(), 0
    refused = ""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                values += json_values(part)
                if len(body) > limits.bytes:
                    refused = f"a request has at most {limits.bytes} bytes"
                elif values > limits.values:
                    refused = f"a request has at most {limits.values} JSON values"
                if refused:  # closed, else the rest would be read and dropped
                    raise HTTPException(413, refused, {"Connection": "close"})
    except TimeoutError:
        raise HTTPException(
            408, f"the body did not arrive within {BODY_SECONDS:g} s", {"Connection": "close"}
        ) from None
    return body


def _parse_request(body: bytearray) -> ScoreRequest | str:
    """Parse the request, or return the reason why it is refused."""
    try:
        request = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        return first_error(error)
    if len(request.images) != len(request.prompts):
        return f"{len(request.images)} images but {len(request.prompts)} prompts"
    return request


def score_request(scorer: Scorer, request: ScoreRequest, pixels: int) -> ScoreResponse | None:
    """Score a request; an image that cannot be read costs its own row only. None: more than `pixels` pixels together."""
    n = len(request.images)
    reasons: dict[int, str] = {}
    files: dict[int, bytes] = {}
    for row, text in enumerate(request.images):
        try:
            files[row] = _checked_png(text, pixels)
        except (ValueError, zlib.error) as error:
            reasons[row] = f"image refused: {error}"
    if sum(height * width for height, width in map(_png_size, files.values())) > pixels:
        return None
    shapes: dict[tuple[int, int], dict[int, Images]] = {}
    for row, content in files.items():
        try:
            image = png_pixels(content)
            if image.shape[:2] != _png_size(content):
                raise ValueError(f"{image.shape[1]}x{image.shape[0]} pixels, its header says otherwise")
            shapes.setdefault(_png_size(content), {})[row] = image
        except Exception as error:  # on foreign bytes Pillow may raise anything
            reasons[row] = f"image refused: {type(error).__name__}: {error}"
    prompts = [Prompt(prompt.text, prompt.meta, prompt.stratum) for prompt in request.prompts]
    value: dict[str, list[float | None]] = {metric: [None] * n for metric in scorer.metrics}
    notes: list[str | None] = [None] * n
    for batch in shapes.values():  # images of one size are one batch
        rows = list(batch)
        if not rows:
            continue
        scores = ask(scorer, np.stack(list(batch.values())), [prompts[row] for row in rows])
        for metric, column in scores.value.items():
            for row, number in zip(rows, column.tolist()):
                value[metric][row] = number if np.isfinite(number) else None
        reasons |= {rows[at]: why for at, why in scores.reasons.items()}
        for row, note in zip(rows, scores.notes or ()):
            notes[row] = str(note)
    return ScoreResponse(
        id=scorer.id, value=value, reasons=reasons, notes=notes if any(n is not None for n in notes) else None
    )


def _checked_png(text: str, pixels: int) -> bytes:
    """Return a PNG in 8 bit RGB with at most `pixels` pixels, of its chunks that hold pixels and no others.

    ValueError on anything else. Nothing is decoded: what a decoder would do with further headers, text, profiles or animation
    need not be known, because it never sees them.
    """
    head = _base64_bytes(text[:HEAD_CHARACTERS])
    if len(head) < HEADER_BYTES or not head.startswith(MAGIC) or head[8:16] != b"\x00\x00\x00\x0dIHDR":
        raise ValueError("not a PNG")
    if head[24:26] != bytes((8, 2)):  # bits a channel, colour type
        raise ValueError("not 8 bit RGB")
    height, width = _png_size(head)
    if not 0 < height * width <= pixels:
        raise ValueError(f"{width}x{height} pixels, at most {pixels} can be taken")
    content = _base64_bytes(text)
    whole = memoryview(content)
    parts = [whole[:HEADER_BYTES]]
    start, chunks = HEADER_BYTES, 0
    while start < len(content):
        kind, end = content[start + 4 : start + 8], start + 12 + int.from_bytes(content[start : start + 4])
        if end > len(content):
            raise ValueError("truncated")
        if kind == b"IHDR":
            raise ValueError("two headers")
        chunks += 1
        if chunks > CHUNKS + len(content) // BYTES_PER_CHUNK:
            raise ValueError(f"more than {chunks - 1} chunks")
        if kind in (b"IDAT", b"IEND"):
            parts.append(whole[start:end])
        if kind == b"IEND":
            if not _holds(parts[1:], _decompressed_size(height, width, interlaced=bool(content[28]))):
                raise ValueError("truncated")
            return b"".join(parts)
        start = end
    raise ValueError("truncated")


def _decompressed_size(height: int, width: int, interlaced: bool) -> int:
    """Return the bytes of a PNG's lines, each with its filter's number; interlaced ones are of seven smaller images."""
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-((y - height) // rows), -((x - width) // columns)) for x, y, columns, rows in passes]
    return sum(lines * (1 + 3 * pixels) for lines, pixels in sizes if lines > 0 and pixels > 0)


def _holds(chunks: Sequence[memoryview], size: int) -> bool:
    """Return whether chunks of pixels decompress to `size` bytes: Pillow leaves what is missing black, without an error."""
    decompressor = zlib.decompressobj()
    for chunk in chunks:
        data = chunk[8:-4]  # without length, kind and checksum
        for at in range(0, len(data), ZLIB_PART):
            part: Any = data[at : at + ZLIB_PART]
            while len(part) and size > 0:
                size -= len(decompressor.decompress(part, ZLIB_OUTPUT))
                part = decompressor.unconsumed_tail
    return size <= 0


def _base64_bytes(text: str) -> bytes:
    """Decode base64 in parts, so that other threads run in between. ValueError where it is not base64."""
    parts = [text[at : at + BASE64_PART] for at in range(0, len(text), BASE64_PART)]
    if any("=" in part for part in parts[:-1]):
        raise ValueError("not base64")
    try:
        return b"".join(binascii.a2b_base64(part, strict_mode=True) for part in parts)
    except ValueError:
        raise ValueError("not base64") from None


def _png_size(content: bytes) -> tuple[int, int]:
    """Read (height, width) from the header of a PNG."""
    width, height = struct.unpack(">II", content[16:24])
    return height, width


def _end_with_parent() -> None:
    """End this process when its standard input ends: then the process that started it has ended."""

    def watch() -> None:
        with suppress(OSError, ValueError):
            while os.read(0, 4096):
                pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str] | None = None) -> int:
    """Run `python -m gpobench.bench.scoring.server reader --port 8100`; the token comes from the environment. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="gpobench.bench.scoring.server", description="Serve a scorer over HTTP.")
    parser.add_argument("reference", help="name, name:variant, path/to/file.py:Name, or a blend")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--max-images", type=int, default=64, help="in one request")
    parser.add_argument("--with-parent", action="store_true", help="end when standard input does")
    given: Any = parser.parse_args(arguments)
    if given.with_parent:
        for number in (signal.SIGINT, signal.SIGTERM):  # sent to a whole job, they are handled by the parent
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
        print(printable(str(error)), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
