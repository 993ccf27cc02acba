"""Client of a scorer server: sends images as PNG over HTTP, checks every response, and turns what it cannot use into NaN with a reason.

The protocol, version 1, is HTTP with JSON in UTF-8; `bench/scoring/server.py` is its server, and any program may be one:

    GET /health  -> {"ok": true}
    GET /about   -> {"id", "name", "metrics": [...], "protocol": 1, "limits": {"images", "bytes", "pixels", "values"}, "reference"}
    POST /score  <- {"images": [PNG in base64, 8 bit RGB], "prompts": [{"text", "meta": {}, "stratum"}]}, as many of each
                 -> {"id", "value": {metric: [number or null]}, "reasons": {row: why null}, "notes": [text or null] or null}

limits are those of one request: images, bytes of its body, pixels of its images together, JSON values (optional) as the characters
`{ [ , : \\` in its body. `reference` (optional) is the scorer reference that the server was started with. A server with a token wants
`Authorization: Bearer TOKEN`. Refusals are 4xx with {"detail": why}, and may come before the body was read.
Nothing is pickled, nothing is compressed with loss, no redirect is followed. The client needs the standard library and pydantic.
"""

from __future__ import annotations

import atexit
import base64
import json
import os
import queue
import re
import secrets
import socket
import struct
import subprocess
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UserError
from ..spec import Images, Prompt, Scores, Values, check_images
from .references import TOKEN

PROTOCOL = 1
MAGIC = b"\x89PNG\r\n\x1a\n"
READY = "ready: "  # what the server's line on stdout begins with, before its URL
REFUSALS = (400, 413, 422)  # states that refuse a request and not its sender
TRIES = 3  # of a request that is refused, times out, or fails in the server (5xx)
PAUSE = 0.25  # s before the second try; twice as long before the third
START_TIMEOUT = 600.0  # s until a started scorer must be ready: its weights may have to be fetched first
RESPONSE_BYTES = 2**20  # that a response may have
RESPONSE_BYTES_PER_IMAGE = 2**16  # in addition
VALUES_PER_IMAGE = 1024  # JSON values of a request, for each image that it may have


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Limits(_Message):
    """Upper bounds of one request."""

    images: int = Field(64, ge=1)
    bytes: int = Field(64 * 2**20, ge=1024)
    pixels: int = Field(64 * 2**20, ge=1)  # of all pictures together: 64 of 1024x1024
    values: int = Field(
        64 * VALUES_PER_IMAGE, ge=64
    )  # `{ [ , : \` in its body: each costs a parser many times its byte


class ScorerInfo(_Message):
    """Response to GET /about: the scorer behind a server, and the limits of a request."""

    id: str = Field(min_length=1, max_length=10_000)
    name: str = Field(min_length=1, max_length=500, pattern=r"^[^/\x00-\x1f]+$")  # `name/metric` is a key of tables
    metrics: list[str] = Field(min_length=1, max_length=200)
    protocol: int
    limits: Limits
    reference: str = ""


class PromptPayload(_Message):
    """A prompt in a request."""

    text: str
    meta: dict[str, Any] = Field(default_factory=dict[str, Any])
    stratum: str = ""


class ScoreRequest(_Message):
    """Request to POST /score: PNG images in base64 and their prompts."""

    images: list[str]
    prompts: list[PromptPayload]


class ScoreResponse(_Message):
    """Response to POST /score: a number or null for each metric and image; a null has a reason."""

    id: str
    value: dict[str, list[float | None]]
    reasons: dict[int, str]
    notes: list[str | None] | None = None


M = TypeVar("M", bound=_Message)


class RequestFailed(Exception):
    """A request got no usable response; the text is the reason."""


class RequestRefused(RequestFailed):
    """The request itself was refused: every server of this scorer would."""


# Requests


def encode_png(image: Images) -> bytes:
    """Encode (H, W, 3) uint8 as PNG (ISO/IEC 15948): 8 bit RGB, no filter, stored and not deflated.

    Compressing costs more than it saves: 35 ms of a core for a 512x512 image, and 12 ms to undo it, for 28 % fewer bytes;
    this takes 1 ms and 1 ms.
    """
    height, width, _ = image.shape
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # a line starts with its filter's number, 0
    lines[:, 1:] = image.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 0)), (b"IEND", b""))
    return MAGIC + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _checked_json(value: Any) -> Any:
    """Return the value if JSON preserves it; ValueError where JSON would change it."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("a prompt's facts have text as keys")
        return {key: _checked_json(each) for key, each in value.items()}
    return [_checked_json(each) for each in value] if isinstance(value, (list, tuple)) else value


def _encode_row(image: Images, prompt: Prompt) -> tuple[bytes, bytes]:
    """Encode an image and its prompt as JSON; ValueError, TypeError or RecursionError where JSON cannot represent them."""
    payload = {"text": prompt.text, "meta": _checked_json(prompt.meta), "stratum": prompt.stratum}
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False).encode()
    return b'"' + base64.b64encode(encode_png(image)) + b'"', text


def _encode_body(rows: Sequence[tuple[bytes, bytes]]) -> bytes:
    images, prompts = (b",".join(column) for column in zip(*rows))
    return b'{"images":[' + images + b'],"prompts":[' + prompts + b"]}"


def json_values(body: bytes) -> int:
    """Return an upper bound of the values and escapes in JSON: each but the first value stands behind one of `{ [ , :`."""
    return len(body) - len(body.translate(None, b"{[,:\\"))


# The exchange


def server_address(url: str) -> str:
    """Return the URL without a slash at its end; UserError where it is not the URL of a server."""
    try:
        at = urlsplit(url)
        good = (
            at.scheme in ("http", "https")
            and at.hostname
            and at.port != 0
            and not (at.query or at.fragment or at.username)
        )
        good = good and url.isascii() and url.isprintable() and " " not in url
    except ValueError:
        good = False
    if not good:
        raise UserError(f"{url!r} is no URL of a scorer server; write it as http://127.0.0.1:8100")
    return url.rstrip("/")


def _exchange(url: str, body: bytes | None, token: str, seconds: float, most: int) -> tuple[int, bytes]:
    """Send one request (POST where there is a body, else GET); return the status and at most `most` bytes.

    The whole exchange, not each read, takes at most `seconds`: then TimeoutError. OSError and HTTPException as they come;
    RequestFailed when the response is too large.
    """
    at = urlsplit(url)
    kind = HTTPSConnection if at.scheme == "https" else HTTPConnection
    connection = kind(at.hostname or "", at.port, timeout=seconds)
    timed_out = threading.Event()
    connection.connect()
    sock: socket.socket = connection.sock

    def cut() -> None:
        timed_out.set()
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits on it

    clock = threading.Timer(seconds, cut)
    clock.daemon = True
    clock.start()
    response = None
    try:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        with suppress(BrokenPipeError, ConnectionResetError):  # a refusal may come before the body was read
            connection.request("GET" if body is None else "POST", at.path, body, headers)
        response = connection.getresponse()
        if (response.length or 0) > most:
            raise RequestFailed(f"announced an answer of {response.length} bytes, more than {most}")
        data = response.read(most + 1)
        if timed_out.is_set():
            raise TimeoutError
        if len(data) > most:
            raise RequestFailed(f"sent an answer of more than {most} bytes")
        if response.length:  # http.client accepts a body that ends too soon
            raise IncompleteRead(data, response.length)
        return response.status, data
    except (OSError, HTTPException) as error:
        raise TimeoutError if timed_out.is_set() else error from None
    finally:
        clock.cancel()
        if response is not None:
            response.close()
        connection.close()


def first_error(error: ValidationError) -> str:
    """Return the first error of a message, in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return ": ".join([".".join(str(step) for step in first["loc"])] * bool(first["loc"]) + [first["msg"]])


def _parsed(kind: type[M], data: bytes) -> M:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise RequestFailed(f"sent no answer of this protocol: {first_error(error)}") from None


def _refusal(status: int, data: bytes) -> str:
    """Return the detail of a response other than 200, in one short line."""
    if 300 <= status < 400:
        return f"answered with a redirect ({status}), which is not followed"
    try:
        detail = str(json.loads(data)["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        detail = ""
    detail = " ".join(detail.split())[:200]
    return f"answered {status}{': ' + detail if detail else ''}"


# A scorer in another process


class ScorerProcess:
    """A process of another Python that serves one scorer on a free port, and ends when this process does."""

    def __init__(self, python: str, reference: str) -> None:
        self.python, self.reference = str(Path(python).expanduser()), reference
        self.url = ""
        self.token = secrets.token_urlsafe(24)
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._closed = False

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def ensure_running(self) -> bool:
        """Start the process if it does not run; True if it was started. UserError, with its last output, where it fails to start."""
        with self._lock:
            if self._closed:
                raise UserError(f"the scorer {self.reference!r} was closed")
            if self._process is not None and self._process.poll() is None:
                return False
            self._launch()
            return True

    def _launch(self) -> None:
        self._end()
        what = f"the scorer {self.reference!r} in {self.python}"
        # -P: a file in the working directory must not replace a module
        command = [
            self.python,
            "-P",
            "-m",
            "gpobench.bench.scoring.server",
            "--port",
            "0",
            "--with-parent",
            "--",
            self.reference,
        ]
        pipe = subprocess.PIPE
        try:
            self._process = process = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                text=True,
                errors="replace",
                env=os.environ | {TOKEN: self.token},
                start_new_session=True,  # Ctrl-C goes to this process alone: the current iteration still needs its scores
            )
        except OSError as error:
            raise UserError(f"{what} cannot be started: {error.strerror or error}") from None
        atexit.register(self.close)
        last_lines: deque[str] = deque(maxlen=5)
        ready: queue.Queue[str] = queue.Queue()
        readers = [
            threading.Thread(target=_drain, args=(process.stdout, ready, None), daemon=True),
            threading.Thread(target=_drain, args=(process.stderr, None, last_lines), daemon=True),
        ]
        for thread in readers:
            thread.start()
        try:
            self.url = ready.get(timeout=START_TIMEOUT)
        except queue.Empty:
            self._end()
            raise UserError(f"{what} was not ready after {START_TIMEOUT:g} s") from None
        if not self.url:
            self._end()
            readers[1].join(1.0)
            hint = f"; install it there: {self.python} -m pip install 'gpobench[serve]'"
            last = " | ".join(last_lines) or f"exit code {process.returncode}"
            raise UserError(f"{what} did not start: {last}{hint if 'No module named' in last else ''}")

    def _end(self) -> None:
        process = self._process
        if process is None:
            return
        with suppress(OSError, ValueError):
            if process.stdin:
                process.stdin.close()  # the process ends when its standard input does
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def close(self) -> None:
        """End the process; it is not started again."""
        with self._lock:
            self._closed = True
            self._end()
        atexit.unregister(self.close)


def _drain(stream: Any, ready: queue.Queue[str] | None, lines: deque[str] | None) -> None:
    """Read a stream to its end, so that its writer never blocks. ready: gets the URL of the ready line, then ""; lines: the last ones."""
    with suppress(ValueError, OSError), stream:
        for line in stream:
            if ready is not None and (match := re.match(rf"{READY}(https?://\S+)", line)):
                ready.put(match[1])
            if lines is not None and line.strip():
                lines.append(line.strip()[:300])
    if ready is not None:
        ready.put("")


# The scorer


@dataclass
class _Call:
    """State of one call of the scorer: its process may be started again once."""

    restarts: int = 1
    broken: str = ""  # why the rest of the call is not tried
    reasons: dict[int, str] = field(default_factory=dict[int, str])


class RemoteScorer:
    """Calls a scorer over HTTP; safe to call from several threads. Its id, name and metrics are the server's."""

    def __init__(self, url: str, token: str, timeout: float, process: ScorerProcess | None = None) -> None:
        """Read /about. Raises UserError in one line where the server does not answer."""
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise UserError("a scorer's token is printable ASCII without spaces")
        if not 0 < timeout < threading.TIMEOUT_MAX:
            raise UserError(f"a scorer's timeout is a number of seconds above 0, got {timeout}")
        self._url, self._token, self.timeout, self._process = server_address(url), token, timeout, process
        try:
            info = _parsed(ScorerInfo, self._send("/about", None, RESPONSE_BYTES, _Call(restarts=0)))
            if info.protocol != PROTOCOL:
                raise RequestFailed(
                    f"speaks protocol {info.protocol}, not {PROTOCOL}: install the same gpobench on both sides"
                )
        except RequestFailed as error:
            hint = (
                f"; its token is token in [scorer.NAME], or the environment's {TOKEN}"
                if "answered 401" in str(error)
                else ""
            )
            raise UserError(f"the scorer server at {self.url}: {error}{hint}") from None
        self.id, self.name, self.reference, self.limits = info.id, info.name, info.reference, info.limits
        self.metrics: Sequence[str] = tuple(info.metrics)

    @property
    def url(self) -> str:
        return self._process.url if self._process else self._url

    @property
    def pid(self) -> int:
        """Return the id of the process that was started for this scorer; 0 where there is none."""
        return self._process.pid if self._process else 0

    def close(self) -> None:
        """End the process that was started for this scorer, if there is one."""
        if self._process:
            self._process.close()

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Map (B, H, W, 3) and B prompts to every metric (B,); NaN with a reason where there is no number. ValueError for other shapes."""
        return self.attempt(images, prompts)[0]

    def attempt(self, images: Images, prompts: Sequence[Prompt]) -> tuple[Scores, str]:
        """The scores of a call, and how the server failed, "" where it did not; ValueError for images of other shapes."""
        check_images(images, prompts)
        value: dict[str, Values] = {metric: np.full(len(images), np.nan) for metric in self.metrics}
        notes: list[str] | None = None
        call, failed = _Call(), ""
        for rows, body in self._requests(images, prompts, call):
            try:
                if call.broken:
                    raise RequestFailed(call.broken)
                limit = RESPONSE_BYTES + RESPONSE_BYTES_PER_IMAGE * len(rows)
                response = _parsed(ScoreResponse, self._send("/score", body, limit, call))
                self._check(response, len(rows))
            except RequestFailed as error:
                call.reasons |= dict.fromkeys(rows, f"{self.name} at {self.url}: {error}")
                failed = failed or ("" if isinstance(error, RequestRefused) else str(error))
                continue
            for metric in self.metrics:
                value[metric][rows] = [np.nan if number is None else number for number in response.value[metric]]
            call.reasons |= {rows[at]: why for at, why in response.reasons.items() if why}
            if response.notes is not None:
                notes = notes or [""] * len(images)
                for row, note in zip(rows, response.notes):
                    notes[row] = note or ""
        for row in np.flatnonzero(np.isnan(np.stack(list(value.values()))).any(0)):
            call.reasons.setdefault(int(row), f"{self.name} at {self.url}: gave no number and no reason")
        return Scores(value, call.reasons, notes), failed

    def _requests(self, images: Images, prompts: Sequence[Prompt], call: _Call) -> Iterator[tuple[list[int], bytes]]:
        """Yield rows and the request for them, each within the server's limits; a row that fits in none gets its reason."""
        frame, frame_values = len(_encode_body([(b"", b"")])), json_values(_encode_body([(b"", b"")]))
        height, width = images.shape[1:3]
        max_rows = min(self.limits.images, self.limits.pixels // max(height * width, 1))
        rows: list[int] = []
        pending: list[tuple[bytes, bytes]] = []
        size, values = frame, frame_values
        for row, (image, prompt) in enumerate(zip(images, prompts)):
            try:
                if not max_rows:
                    raise ValueError(f"{width}x{height} are more pixels than the server takes ({self.limits.pixels})")
                sent = _encode_row(image, prompt)
                more, more_values = len(sent[0]) + len(sent[1]) + 2, json_values(sent[1]) + 2
                if frame + more > self.limits.bytes:
                    raise ValueError(f"{frame + more} bytes are more than the server takes ({self.limits.bytes})")
                if frame_values + more_values > self.limits.values:
                    raise ValueError(f"its prompt has more JSON values than the server takes ({self.limits.values})")
            except (ValueError, TypeError, RecursionError, OSError) as error:
                call.reasons[row] = f"{self.name}: cannot be sent: {str(error) or type(error).__name__}"
                continue
            full = size + more > self.limits.bytes or values + more_values > self.limits.values
            if rows and (len(rows) == max_rows or full):
                yield rows, _encode_body(pending)
                rows, pending, size, values = [], [], frame, frame_values
            rows, pending, size, values = [*rows, row], [*pending, sent], size + more, values + more_values
        if rows:
            yield rows, _encode_body(pending)

    def _send(self, path: str, body: bytes | None, most: int, call: _Call) -> bytes:
        """Return the response to one request, tried up to TRIES times; RequestFailed with the reason where there is none."""
        why = ""
        for turn in range(TRIES):
            time.sleep(PAUSE * 2 ** (turn - 1) if turn else 0)
            try:
                if self._process and call.restarts and self._process.ensure_running():
                    call.restarts -= 1
                token = self._process.token if self._process else self._token
                status, data = _exchange(self.url + path, body, token, self.timeout, most)
            except UserError as error:  # its process did not start again
                call.broken = str(error)
                raise RequestFailed(call.broken) from None
            except TimeoutError:
                why = f"no answer within {self.timeout:g} s"
            except (OSError, HTTPException) as error:
                why = f"{type(error).__name__}: {str(error) or 'the connection was closed'}"
            else:
                if status == 200:
                    return data
                why = _refusal(status, data)
                if status < 500:
                    raise RequestRefused(why) if status in REFUSALS else RequestFailed(why)
        call.broken = f"{why} ({TRIES} tries)"
        raise RequestFailed(call.broken)

    def _check(self, response: ScoreResponse, n: int) -> None:
        """Raise RequestFailed where the response is of another scorer or has not n numbers for each metric."""
        if response.id != self.id:
            raise RequestFailed(f"answers as {response.id}, was {self.id}")
        for metric in self.metrics:
            if metric not in response.value:
                raise RequestFailed(f"sent no {metric!r}")
            if len(response.value[metric]) != n:
                raise RequestFailed(f"sent {len(response.value[metric])} numbers of {metric} for {n} images")
        if response.notes is not None and len(response.notes) != n:
            raise RequestFailed(f"sent {len(response.notes)} notes for {n} images")
        if not all(0 <= row < n for row in response.reasons):
            raise RequestFailed(f"sent reasons for rows {sorted(response.reasons)} of {n} images")


def connect(url: str, *, token: str = "", timeout: float = 60.0) -> RemoteScorer:
    """Connect to the scorer served at a URL. timeout: seconds a request may take. UserError where no scorer is served there."""
    return RemoteScorer(url, token, timeout)


def start(python: str, reference: str, *, timeout: float = 60.0) -> RemoteScorer:
    """Start a scorer in another Python, which must have gpobench[serve]: its own process, with a random token, on the loopback.

    A process that ended is started again, once a call. UserError, with its last output, where it fails to start.
    """
    process = ScorerProcess(python, reference)
    try:
        process.ensure_running()
        return RemoteScorer(process.url, process.token, timeout, process)
    except BaseException:
        process.close()
        raise
