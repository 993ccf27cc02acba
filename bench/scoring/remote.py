"""A scorer at the other end of a wire: pictures go out as PNG, numbers come back, and nothing that comes back is believed unchecked.

The wire, version 1, is HTTP with JSON in UTF-8; `bench/scoring/server.py` is its server, and any program may be one:

    GET /health  -> {"ok": true}
    GET /about   -> {"id", "name", "metrics": [...], "protocol": 1, "limits": {"images", "bytes", "pixels"}, "reference"}
    POST /score  <- {"images": [PNG in base64, 8 bit RGB], "prompts": [{"text", "meta": {}, "stratum"}]}, as many of each
                 -> {"id", "value": {metric: [number or null]}, "reasons": {row: why null}, "notes": [text or null] or null}

limits are those of one request: pictures, bytes of its body, pixels of its pictures together. `reference` (optional) is what the
server was asked to serve. A server with a token wants `Authorization: Bearer TOKEN`. Refusals are 4xx with {"detail": why}.
Nothing is pickled, nothing is compressed with loss, no redirect is followed. This side needs the standard library and pydantic.
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
TRIES = 3  # of a request that finds nobody, takes too long, or meets an error of the server's (5xx)
PAUSE = 0.25  # s before the second try; twice as long before the third
LOADING = 600.0  # s until a started scorer must be ready: its weights may have to be fetched first
ANSWER = 2**20  # bytes an answer may have, and
ANSWER_ROW = 2**16  # so many more for each picture


class _Wire(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Limits(_Wire):
    """What one request may hold."""

    images: int = Field(64, ge=1)
    bytes: int = Field(64 * 2**20, ge=1024)
    pixels: int = Field(64 * 2**20, ge=1)  # of all pictures together: 64 of 1024x1024


class About(_Wire):
    """What a server says of its scorer."""

    id: str = Field(min_length=1, max_length=10_000)
    name: str = Field(min_length=1, max_length=500, pattern=r"^[^/\x00-\x1f]+$")  # `name/metric` is a key of tables
    metrics: list[str] = Field(min_length=1, max_length=200)
    protocol: int
    limits: Limits
    reference: str = ""


class PromptPayload(_Wire):
    """A prompt."""

    text: str
    meta: dict[str, Any] = Field(default_factory=dict[str, Any])
    stratum: str = ""


class Question(_Wire):
    """Pictures and their prompts."""

    images: list[str]
    prompts: list[PromptPayload]


class Answer(_Wire):
    """Scores; a null has a reason."""

    id: str
    value: dict[str, list[float | None]]
    reasons: dict[int, str]
    notes: list[str | None] | None = None


M = TypeVar("M", bound=_Wire)


class Unanswered(Exception):
    """A request that brought no answer one can use; its text is the reason."""


# What goes out


def png(image: Images) -> bytes:
    """(H, W, 3) uint8 -> PNG (ISO/IEC 15948): 8 bit RGB, no filter, stored and not deflated.

    Compressing costs more than it saves: 35 ms of a core for a 512x512 picture, and 12 ms to undo it, for 28 % fewer bytes;
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


def _plain(value: Any) -> Any:
    """The value as JSON has it; ValueError where it would come out as something else."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("a prompt's facts have text as keys")
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _row(image: Images, prompt: Prompt) -> tuple[bytes, bytes]:
    """A picture and its prompt, as they stand in a request; ValueError, TypeError or RecursionError where they cannot."""
    asked = {"text": prompt.text, "meta": _plain(prompt.meta), "stratum": prompt.stratum}
    said = json.dumps(asked, ensure_ascii=False, allow_nan=False).encode()
    return b'"' + base64.b64encode(png(image)) + b'"', said


def _body(rows: Sequence[tuple[bytes, bytes]]) -> bytes:
    images, prompts = (b",".join(column) for column in zip(*rows))
    return b'{"images":[' + images + b'],"prompts":[' + prompts + b"]}"


# The exchange


def _address(url: str) -> str:
    """The URL without a slash at its end; UserError on one that is none."""
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
        raise UserError(f"{url!r} is no address of a scorer server; write it as http://127.0.0.1:8100")
    return url.rstrip("/")


def _exchange(url: str, body: bytes | None, token: str, seconds: float, most: int) -> tuple[int, bytes]:
    """One request (POST where there is a body, else GET) -> status and at most `most` bytes.

    All of it, not each read, takes at most `seconds`: then TimeoutError. OSError and HTTPException as they come; Unanswered when the
    answer is too large.
    """
    at = urlsplit(url)
    kind = HTTPSConnection if at.scheme == "https" else HTTPConnection
    link = kind(at.hostname or "", at.port, timeout=seconds)
    late = threading.Event()
    link.connect()
    line: socket.socket = link.sock

    def cut() -> None:
        late.set()
        with suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)  # whoever waits on it is woken

    clock = threading.Timer(seconds, cut)
    clock.daemon = True
    clock.start()
    response = None
    try:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        link.request("GET" if body is None else "POST", at.path, body, headers)
        response = link.getresponse()
        if (response.length or 0) > most:
            raise Unanswered(f"announced an answer of {response.length} bytes, more than {most}")
        data = response.read(most + 1)
        if late.is_set():
            raise TimeoutError
        if len(data) > most:
            raise Unanswered(f"sent an answer of more than {most} bytes")
        if response.length:  # http.client does not mind a body that ends too soon
            raise IncompleteRead(data, response.length)
        return response.status, data
    except (OSError, HTTPException) as error:
        raise TimeoutError if late.is_set() else error from None
    finally:
        clock.cancel()
        if response is not None:
            response.close()
        link.close()


def wrong(error: ValidationError) -> str:
    """The first thing that is wrong with a message, in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return ": ".join([".".join(str(step) for step in first["loc"])] * bool(first["loc"]) + [first["msg"]])


def _parsed(kind: type[M], data: bytes) -> M:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise Unanswered(f"sent no answer of this protocol: {wrong(error)}") from None


def _refusal(status: int, data: bytes) -> str:
    """What an answer other than 200 says, in one short line."""
    if 300 <= status < 400:
        return f"answered with a redirect ({status}), which is not followed"
    try:
        said = str(json.loads(data)["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        said = ""
    said = " ".join(said.split())[:200]
    return f"answered {status}{': ' + said if said else ''}"


# The other process


class Child:
    """Another Python that serves one scorer on a port of its own choice, and ends when this process does."""

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

    def revive(self) -> bool:
        """Start it if it does not run; True when that was done. UserError where it does not come up, with its last words."""
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
        # -P: a file of the folder at hand must not stand in for a module
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
                start_new_session=True,  # a Ctrl-C is ours: the iteration at hand still wants its scores
            )
        except OSError as error:
            raise UserError(f"{what} cannot be started: {error.strerror or error}") from None
        atexit.register(self.close)
        words: deque[str] = deque(maxlen=5)
        ready: queue.Queue[str] = queue.Queue()
        listening = [
            threading.Thread(target=_listen, args=(process.stdout, ready, None), daemon=True),
            threading.Thread(target=_listen, args=(process.stderr, None, words), daemon=True),
        ]
        for thread in listening:
            thread.start()
        try:
            self.url = ready.get(timeout=LOADING)
        except queue.Empty:
            self._end()
            raise UserError(f"{what} was not ready after {LOADING:g} s") from None
        if not self.url:
            self._end()
            listening[1].join(1.0)
            hint = f"; install it there: {self.python} -m pip install 'gpobench[serve]'"
            last = " | ".join(words) or f"exit code {process.returncode}"
            raise UserError(f"{what} did not start: {last}{hint if 'No module named' in last else ''}")

    def _end(self) -> None:
        process = self._process
        if process is None:
            return
        with suppress(OSError, ValueError):
            if process.stdin:
                process.stdin.close()  # which it watches
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def close(self) -> None:
        """End it for good."""
        with self._lock:
            self._closed = True
            self._end()
        atexit.unregister(self.close)


def _listen(stream: Any, ready: queue.Queue[str] | None, words: deque[str] | None) -> None:
    """Read a stream to its end, so that nobody ever waits for it: the URL of the ready line, "" at the end; the last words."""
    with suppress(ValueError, OSError), stream:
        for line in stream:
            if ready is not None and (found := re.match(rf"{READY}(https?://\S+)", line)):
                ready.put(found[1])
            if words is not None and line.strip():
                words.append(line.strip()[:300])
    if ready is not None:
        ready.put("")


# The scorer


@dataclass
class _Call:
    """One call of the scorer: a child may be started again once in it."""

    revivals: int = 1
    broken: str = ""  # why the rest of the call is not even tried
    reasons: dict[int, str] = field(default_factory=dict[int, str])


class Remote:
    """A scorer that is asked over HTTP; safe to call from several threads. id, name and metrics are what the server says they are."""

    def __init__(self, url: str, token: str, timeout: float, child: Child | None = None) -> None:
        """Asks the server who it is. Raises UserError in one line where it cannot be had."""
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise UserError("a scorer's token is printable ASCII without spaces")
        if not 0 < timeout < threading.TIMEOUT_MAX:
            raise UserError(f"a scorer's timeout is a number of seconds above 0, got {timeout}")
        self._url, self._token, self.timeout, self._child = _address(url), token, timeout, child
        try:
            about = _parsed(About, self._send("/about", None, ANSWER, _Call(revivals=0)))
            if about.protocol != PROTOCOL:
                raise Unanswered(
                    f"speaks protocol {about.protocol}, not {PROTOCOL}: install the same gpobench on both sides"
                )
        except Unanswered as error:
            hint = (
                f"; its token is token in [scorer.NAME], or the environment's {TOKEN}"
                if "answered 401" in str(error)
                else ""
            )
            raise UserError(f"the scorer server at {self.url}: {error}{hint}") from None
        self.id, self.name, self.reference, self.limits = about.id, about.name, about.reference, about.limits
        self.metrics: Sequence[str] = tuple(about.metrics)

    @property
    def url(self) -> str:
        return self._child.url if self._child else self._url

    @property
    def pid(self) -> int:
        """The process that was started for it; 0 where there is none."""
        return self._child.pid if self._child else 0

    def close(self) -> None:
        """End the process that was started for it, if one was."""
        if self._child:
            self._child.close()

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """(B, H, W, 3) and B prompts -> every metric (B,); NaN with a reason where no number can be had. ValueError for other shapes."""
        check_images(images, prompts)
        value: dict[str, Values] = {metric: np.full(len(images), np.nan) for metric in self.metrics}
        notes: list[str] | None = None
        call = _Call()
        for rows, body in self._requests(images, prompts, call):
            try:
                if call.broken:
                    raise Unanswered(call.broken)
                answer = self._checked(
                    _parsed(Answer, self._send("/score", body, ANSWER + ANSWER_ROW * len(rows), call)), len(rows)
                )
            except Unanswered as error:
                call.reasons |= dict.fromkeys(rows, f"{self.name} at {self.url}: {error}")
                continue
            for metric in self.metrics:
                value[metric][rows] = [np.nan if number is None else number for number in answer.value[metric]]
            call.reasons |= {rows[at]: why for at, why in answer.reasons.items() if why}
            if answer.notes is not None:
                notes = notes or [""] * len(images)
                for row, note in zip(rows, answer.notes):
                    notes[row] = note or ""
        for row in np.flatnonzero(np.isnan(np.stack(list(value.values()))).any(0)):
            call.reasons.setdefault(int(row), f"{self.name} at {self.url}: gave no number and no reason")
        return Scores(value, call.reasons, notes)

    def _requests(self, images: Images, prompts: Sequence[Prompt], call: _Call) -> Iterator[tuple[list[int], bytes]]:
        """Rows and the request for them, each within the server's limits; a row that fits in none gets its reason."""
        frame = len(_body([(b"", b"")]))
        height, width = images.shape[1:3]
        most = min(self.limits.images, self.limits.pixels // max(height * width, 1))
        rows: list[int] = []
        held: list[tuple[bytes, bytes]] = []
        size = frame
        for row, (image, prompt) in enumerate(zip(images, prompts)):
            try:
                if not most:
                    raise ValueError(f"{width}x{height} are more pixels than the server takes ({self.limits.pixels})")
                sent = _row(image, prompt)
                more = len(sent[0]) + len(sent[1]) + 2
                if frame + more > self.limits.bytes:
                    raise ValueError(f"{frame + more} bytes are more than the server takes ({self.limits.bytes})")
            except (ValueError, TypeError, RecursionError, OSError) as error:
                call.reasons[row] = f"{self.name}: cannot be sent: {str(error) or type(error).__name__}"
                continue
            if rows and (len(rows) == most or size + more > self.limits.bytes):
                yield rows, _body(held)
                rows, held, size = [], [], frame
            rows, held, size = [*rows, row], [*held, sent], size + more
        if rows:
            yield rows, _body(held)

    def _send(self, path: str, body: bytes | None, most: int, call: _Call) -> bytes:
        """The answer to one request, asked for up to TRIES times; Unanswered with why there is none."""
        why = ""
        for turn in range(TRIES):
            time.sleep(PAUSE * 2 ** (turn - 1) if turn else 0)
            try:
                if self._child and call.revivals and self._child.revive():
                    call.revivals -= 1
                token = self._child.token if self._child else self._token
                status, data = _exchange(self.url + path, body, token, self.timeout, most)
            except UserError as error:  # the child did not come up again
                call.broken = str(error)
                raise Unanswered(call.broken) from None
            except TimeoutError:
                why = f"no answer within {self.timeout:g} s"
            except (OSError, HTTPException) as error:
                why = f"{type(error).__name__}: {str(error) or 'the connection was closed'}"
            else:
                if status == 200:
                    return data
                why = _refusal(status, data)
                if status < 500:
                    raise Unanswered(why)
        call.broken = f"{why} ({TRIES} tries)"
        raise Unanswered(call.broken)

    def _checked(self, answer: Answer, n: int) -> Answer:
        """The answer, when it is one to n pictures by the scorer that was asked; else Unanswered."""
        if answer.id != self.id:
            raise Unanswered(f"answers as {answer.id}, was {self.id}")
        for metric in self.metrics:
            if metric not in answer.value:
                raise Unanswered(f"sent no {metric!r}")
            if len(answer.value[metric]) != n:
                raise Unanswered(f"sent {len(answer.value[metric])} numbers of {metric} for {n} images")
        if answer.notes is not None and len(answer.notes) != n:
            raise Unanswered(f"sent {len(answer.notes)} notes for {n} images")
        if not all(0 <= row < n for row in answer.reasons):
            raise Unanswered(f"sent reasons for rows {sorted(answer.reasons)} of {n} images")
        return answer


def connect(url: str, *, token: str = "", timeout: float = 60.0) -> Remote:
    """The scorer served at a URL. timeout: seconds a request may take. UserError where nobody serves one there."""
    return Remote(url, token, timeout)


def start(python: str, reference: str, *, timeout: float = 60.0) -> Remote:
    """The scorer in another Python, which must have gpobench[serve]: a process of its own, behind a random token, on the loopback.

    A process that died is started again, once a call. UserError where it does not come up, with its last words.
    """
    child = Child(python, reference)
    try:
        child.revive()
        return Remote(child.url, child.token, timeout, child)
    except BaseException:
        child.close()
        raise
