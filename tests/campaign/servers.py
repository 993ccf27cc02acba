"""Hostile requests to the scorer server: each is refused with a 4xx or costs only its own rows, and others are still served."""

from __future__ import annotations

import base64
import http.client
import json
import socket
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import faulty
import numpy as np
from fault import NotHeld, Row, row

from gpobench.bench.scoring.remote import Limits
from gpobench.bench.spec import Prompt

LIMITS = Limits(images=8, bytes=300_000, pixels=4096)
Body = Callable[[dict[str, Any], np.random.Generator], bytes]


def _dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


def _changed(**change: Any) -> Body:
    return lambda request, rng: _dumps({**request, **change})


def _mutated(request: dict[str, Any], rng: np.random.Generator) -> bytes:
    """A valid body with a few bytes changed, lost or doubled anywhere."""
    body = bytearray(_dumps(request))
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(len(body)))
        act = int(rng.integers(4))
        if act == 0:
            body[at] = int(rng.integers(256))
        elif act == 1:
            del body[at : at + int(rng.integers(1, 200))]
        elif act == 2:
            body[at:at] = body[at : at + 50]
        else:
            body[at:at] = rng.bytes(int(rng.integers(1, 20)))
    return bytes(body) or b" "


BODIES: dict[str, Body] = {
    "nothing": lambda request, rng: b"",
    "random bytes": lambda request, rng: rng.bytes(int(rng.integers(1, 5000))),
    "a valid body with bytes changed": _mutated,
    "a valid body cut": lambda request, rng: _dumps(request)[: int(rng.integers(1, len(_dumps(request)) - 1))],
    "null": lambda request, rng: b"null",
    "a list": lambda request, rng: b"[]",
    "text": lambda request, rng: b'"x"',
    "deep lists": lambda request, rng: b"[" * int(rng.integers(1000, 100_000)),
    "deep facts": lambda request, rng: _dumps(request).replace(
        b'"meta": {}', b'"meta": {"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 1
    ),
    "a million empty objects": lambda request, rng: b'{"images":[],"prompts":[' + b"{}," * 90_000 + b"{}]}",
    "a million empty images": lambda request, rng: b'{"images":[' + b'"",' * 90_000 + b'""],"prompts":[]}',
    "over the limit of bytes": lambda request, rng: b" " * (LIMITS.bytes + 1),
    "images that are null": _changed(images=None),
    "images that are numbers": _changed(images=[1, 2]),
    "more images than prompts": lambda request, rng: _dumps({**request, "prompts": request["prompts"][:1]}),
    "more images than a request may have": lambda request, rng: _dumps(
        {"images": request["images"][:1] * 9, "prompts": request["prompts"][:1] * 9}
    ),
    "a prompt without text": _changed(prompts=[{}, {}]),
    "a prompt that is text": _changed(prompts=["x", "y"]),
    "a key too many": _changed(surprise=1),
    "NaN among the facts": lambda request, rng: _dumps(request).replace(b'"meta": {}', b'"meta": {"a": NaN}', 1),
    "a number of 100,000 digits": lambda request, rng: _dumps(request).replace(
        b'"meta": {}', b'"meta": {"a": ' + b"9" * 100_000 + b"}", 1
    ),
    "half a surrogate": lambda request, rng: _dumps(request).replace(b'"number 0"', b'"\\ud800"', 1),
    "UTF-16": lambda request, rng: json.dumps(request).encode("utf-16"),
}


def _sound(images: Any) -> list[float]:
    return np.asarray(faulty.Sound()(images, [Prompt("")] * len(images)).value["mean"]).tolist()


class Servers:
    """The real server with small limits, and what a valid request to it looks like."""

    def __init__(self, place: Path):
        self.place = place

    @cached_property
    def port(self) -> int:
        served = faulty.served(faulty.Sound(), LIMITS, token="secret")
        self._keep = served
        port = urlsplit(served.__enter__()).port  # until this process ends
        assert port is not None
        return port

    def request(self, rng: np.random.Generator) -> tuple[Any, dict[str, Any]]:
        images = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
        prompts = [{"text": f"number {i}", "meta": {}, "stratum": ""} for i in range(2)]
        return images, {"images": [base64.b64encode(faulty.PNG(i)).decode() for i in images], "prompts": prompts}

    def post(self, body: bytes, token: str = "secret", path: str = "/score", method: str = "POST") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, {"Authorization": f"Bearer {token}"})
            reply = connection.getresponse()
            return reply.status, reply.read()
        except (http.client.HTTPException, OSError):
            return 0, b""  # closed without an answer, as after a refusal whose sender still sends
        finally:
            connection.close()

    def still_serves(self, rng: np.random.Generator) -> None:
        images, request = self.request(rng)
        status, reply = self.post(_dumps(request))
        if status != 200 or json.loads(reply)["value"]["mean"] != _sound(images):
            raise NotHeld(f"wrong outcome: a sound request after it is answered {status} {reply[:200]!r}")

    def body(self, make: Body) -> Any:
        def inject(rng: np.random.Generator) -> str:
            _, request = self.request(rng)
            status, reply = self.post(make(request, rng))
            if status >= 500 or b"Traceback" in reply:
                raise NotHeld(f"traceback: answered {status} {reply[:300]!r}")
            if status == 200 and set(json.loads(reply)) < {"id", "value", "reasons"}:
                raise NotHeld(f"wrong outcome: {reply[:300]!r}")
            self.still_serves(rng)
            return "parsed" if status == 200 else "answered"

        return inject

    def picture(self, kind: str) -> Any:
        """An image that is none costs its own row and not its neighbour's."""

        def inject(rng: np.random.Generator) -> str:
            images, request = self.request(rng)
            bad = int(rng.integers(2))
            request["images"][bad] = base64.b64encode(faulty.PICTURES[kind](images[bad])).decode()
            status, reply = self.post(_dumps(request))
            if status != 200:
                if 400 <= status < 500:
                    return "answered"
                raise NotHeld(f"traceback: answered {status} {reply[:300]!r}")
            scores = json.loads(reply)
            sound = _sound(images)
            if scores["value"]["mean"][bad] is not None or not scores["reasons"].get(str(bad)):
                raise NotHeld(f"silent number: {kind} is scored {scores['value']['mean'][bad]}")
            if scores["value"]["mean"][1 - bad] != sound[1 - bad]:
                raise NotHeld("silent number: the image beside it has another score")
            return "unscored"

        return inject

    def no_token(self, rng: np.random.Generator) -> str:
        _, request = self.request(rng)
        token = str(rng.choice(["", "secre", "secrets", "Secret", "é"]))
        status, reply = self.post(_dumps(request), token.encode("latin-1").decode("latin-1"))
        if status != 401:
            raise NotHeld(f"wrong outcome: answered {status} {reply[:200]!r} without the token")
        return "answered"

    def no_route(self, rng: np.random.Generator) -> str:
        method, path = (
            str(rng.choice(["GET", "PUT", "DELETE", "HEAD", "POST"])),
            str(rng.choice(["/score/", "/", "/../etc", "/docs"])),
        )
        status, _ = self.post(b"", path=path, method=method)
        if not 300 <= status < 500:
            raise NotHeld(f"wrong outcome: {method} {path} is answered {status}")
        return "answered"

    def raw(self, make: Callable[[np.random.Generator], bytes]) -> Any:
        """Bytes that are no request, on a connection that is then closed."""

        def inject(rng: np.random.Generator) -> str:
            with socket.create_connection(("127.0.0.1", self.port), timeout=20) as line:
                line.sendall(make(rng))
            self.still_serves(rng)
            return "answered"

        return inject


RAW: dict[str, Callable[[np.random.Generator], bytes]] = {
    "random bytes": lambda rng: rng.bytes(int(rng.integers(1, 2000))),
    "another protocol": lambda rng: b"SSH-2.0-OpenSSH\r\n\r\n",
    "a header without end": lambda rng: b"POST /score HTTP/1.1\r\nA: " + b"x" * int(rng.integers(10, 60_000)),
    "a body that never comes": lambda rng: (
        b"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: 99999\r\n\r\n{"
    ),
    "a negative length": lambda rng: b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n{}",
    "two lengths": lambda rng: b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 40\r\n\r\n{}",
    "chunks of wrong sizes": lambda rng: (
        b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"
    ),
    "a connection and nothing": lambda rng: b"",
}


def rows(place: Path) -> list[Row]:
    servers = Servers(place)
    more: dict[str, Any] = {"seconds": 60.0}
    return [
        *(row("servers", what, "the body of a request", ["answered", "parsed"], servers.body(make), **more,
              weight=6.0 if "bytes changed" in what else 1.0) for what, make in BODIES.items()),
        *(row("servers", what, "an image of a request", ["unscored", "answered"], servers.picture(what), **more)
          for what in faulty.PICTURES),
        *(row("servers", what, "the connection", "answered", servers.raw(make), **more) for what, make in RAW.items()),
        row("servers", "a wrong token", "the header", "answered", servers.no_token, **more),
        row("servers", "no such route", "the request line", "answered", servers.no_route, **more),
    ]  # fmt: skip
