"""Faulty parts: scorers that fail in every way, and servers that give wrong answers, stall and close connections."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import numpy as np
from PIL import Image

from gpobench.bench.scoring import remote
from gpobench.bench.spec import Images, Prompt, Scores

HERE = __file__


@dataclass(frozen=True)
class Sound:
    """A scorer that works: mean and standard deviation of the red channel, per image."""

    id: str = "sound-v1"
    name: str = "sound"
    metrics: Sequence[str] = ("mean", "spread")

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        red = [image[..., 0].astype(np.float64) / 255 for image in images]
        value = {"mean": np.array([r.mean() for r in red]), "spread": np.array([r.std() for r in red])}
        return Scores(value, notes=[f"{prompt.text}: {r.mean():.3f}" for prompt, r in zip(prompts, red)])


@dataclass(frozen=True)
class Spoilt:
    """The sound scorer with its answer spoilt in the rows `bad`."""

    spoil: Callable[[Scores, list[int]], Any]
    bad: tuple[int, ...]
    id: str = "sound-v1"
    name: str = "sound"
    metrics: Sequence[str] = ("mean", "spread")

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> Any:
        return self.spoil(Sound()(images, prompts), list(self.bad))


def raising(error: BaseException) -> Callable[[Scores, list[int]], Any]:
    def spoil(scores: Scores, bad: list[int]) -> Any:
        raise error

    return spoil


def column(change: Callable[[np.ndarray], Any], metric: str = "mean") -> Callable[[Scores, list[int]], Scores]:
    """Replace one metric of the answer."""
    return lambda scores, bad: replace(scores, value={**scores.value, metric: change(scores.value[metric])})


def rows(number: Any, why: str = "") -> Callable[[Scores, list[int]], Scores]:
    """Replace the values of the bad rows, with or without a reason."""

    def spoil(scores: Scores, bad: list[int]) -> Scores:
        values = [number if row in bad else value for row, value in enumerate(scores.value["mean"].tolist())]
        reasons = dict.fromkeys(bad, why) if why else {}
        return replace(scores, value={**scores.value, "mean": values}, reasons=reasons)

    return spoil


class Stubborn(Exception):
    """An exception without a message."""

    def __str__(self) -> str:
        return ""


ERRORS = [
    RuntimeError("on fire"), ValueError("odd"), TypeError("?"), KeyError("k"), IndexError(), ZeroDivisionError("1/0"), OSError(5, "io"),
    MemoryError(), RecursionError("deep"), AssertionError(), AttributeError("x"), NotImplementedError(), StopIteration(), LookupError(""),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), TimeoutError("late"), ConnectionResetError(104, "reset"), EOFError(), Stubborn(),
    ImportError("no engine"), BufferError("b"), FloatingPointError("f"), OverflowError("o"), ArithmeticError(), SyntaxError("s"),
    ExceptionGroup("several", [ValueError("a"), KeyError("b")]), Exception("line one\nline two"), Warning("w"), PermissionError("no"),
]  # fmt: skip

WHOLE: dict[str, Callable[[Scores, list[int]], Any]] = {
    **{f"raises {type(error).__name__}": raising(error) for error in ERRORS},
    "returns None": lambda scores, bad: None,
    "returns a dictionary": lambda scores, bad: dict(scores.value),
    "returns an array": lambda scores, bad: scores.value["mean"],
    "returns a number": lambda scores, bad: 1.0,
    "returns text": lambda scores, bad: "very good",
    "returns a pair": lambda scores, bad: (scores, 1.0),
    "returns its class": lambda scores, bad: Scores,
    "a matrix": column(lambda v: np.stack([v, v], 1)),
    "a column": column(lambda v: v[:, None]),
    "a row": column(lambda v: v[None]),
    "a scalar": column(lambda v: 0.5),
    "one number for all": column(lambda v: v[:1]),
    "too many": column(lambda v: np.append(v, 1.0)),
    "too few": column(lambda v: v[:-1]),
    "none at all": column(lambda v: v[:0]),
    "ragged": column(lambda v: [[1.0], *v[1:]]),
    "words": column(lambda v: ["good"] * len(v)),
    "a value that is None": column(lambda v: None),
    "dictionaries": column(lambda v: [{"score": 1.0}] * len(v)),
    "the second metric too short": column(lambda v: v[1:], "spread"),
    "another metric": lambda scores, bad: Scores({"median": scores.value["mean"], "spread": scores.value["spread"]}),
    "the second metric missing": lambda scores, bad: Scores({"mean": scores.value["mean"]}),
    "no metric": lambda scores, bad: Scores({}),
    "values that are None": lambda scores, bad: Scores(None),  # type: ignore[arg-type]
    "reasons that are None": lambda scores, bad: replace(scores, reasons=None),
    "too few notes": lambda scores, bad: replace(scores, notes=["x"]),
    "NaN throughout": column(lambda v: np.full(len(v), np.nan)),
    "infinite throughout": column(lambda v: np.full(len(v), np.inf)),
}
SOME = {
    "NaN": rows(np.nan),
    "NaN with a reason": rows(np.nan, "it is too dark"),
    "inf": rows(np.inf),
    "-inf": rows(-np.inf),
    "None in a row": rows(None),
    "overflow": rows(1e308 * 10),
    "a 0-d NaN": rows(np.float32("nan")),
}


# Invalid images

PNG = remote.encode_png


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A few bytes of PNG whose header states a very large image."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(bytes(10_000))) + _chunk(b"IEND", b"")


def saved(image: Images, form: str, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).convert(mode).save(out, form)
    return out.getvalue()


def flipped(image: Images) -> bytes:
    content = bytearray(PNG(image))
    content[content.index(b"IDAT") + 20] ^= 0xFF
    return bytes(content)


PICTURES: dict[str, Callable[[Images], bytes]] = {
    "a truncated PNG": lambda image: PNG(image)[: len(PNG(image)) // 2],
    "only a header": lambda image: PNG(image)[:33],
    "half a header": lambda image: PNG(image)[:20],
    "nothing": lambda image: b"",
    "noise": lambda image: image.tobytes(),
    "noise behind a magic number": lambda image: b"\x89PNG\r\n\x1a\n" + image.tobytes(),
    "a flipped byte": flipped,
    "JPEG": lambda image: saved(image, "JPEG"),
    "GIF": lambda image: saved(image, "GIF"),
    "grey": lambda image: saved(image, "PNG", "L"),
    "with alpha": lambda image: saved(image, "PNG", "RGBA"),
    "with a palette": lambda image: saved(image, "PNG", "P"),
    "16 bits": lambda image: saved(image[..., 0].astype(np.uint16) * 257, "PNG", "I;16"),
    "a bomb": lambda image: bomb(50_000, 50_000),
    "a flat bomb": lambda image: bomb(2**31 - 1, 1),
    "no pixels": lambda image: bomb(0, 16),
}

PROMPTS: dict[str, Prompt] = {
    "a set among the facts": Prompt("x", {"tags": {1, 2}}),
    "NaN among the facts": Prompt("x", {"weight": float("nan")}),
    "numbers as keys": Prompt("x", {"counts": {1: 2}}),
    "half a character": Prompt("x \ud800"),
    "an object among the facts": Prompt("x", {"thing": object()}),
    "a text too long for the server": Prompt("x" * 100_000),
}


# Servers


@contextmanager
def served(scorer: Any, limits: remote.Limits | None = None, token: str = "", reference: str = "") -> Iterator[str]:
    """The real server around a scorer, on a thread; its URL."""
    from gpobench.bench.scoring.connections import bounded_server
    from gpobench.bench.scoring.server import application

    app = application(scorer, limits or remote.Limits(), token=token, reference=reference)
    server = bounded_server(app, log_level="critical")
    line = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [line]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{line.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        line.close()


ABOUT = {
    "id": "sound-v1", "name": "sound", "metrics": ["mean", "spread"], "protocol": 1,
    "limits": {"images": 64, "bytes": 2**26, "pixels": 2**26},
}  # fmt: skip
Lie = Callable[["Window", dict[str, Any]], None]


class Window(BaseHTTPRequestHandler):
    """/KIND/about is correct, /KIND/score answers as LIES[KIND] does; with KIND in ABOUTS /KIND/about is wrong already."""

    server: Liar

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        self.server.seen[kind] += 1
        if kind in ABOUTS:
            ABOUTS[kind](self, json.loads(json.dumps(ABOUT)))
        else:
            self.reply(json.dumps(ABOUT))

    def do_POST(self) -> None:
        kind = self.path.split("/")[1]
        self.server.seen[kind] += 1
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in question["images"]]
        scores = Sound()(np.stack(images), [Prompt(**prompt) for prompt in question["prompts"]])
        value = {metric: column.tolist() for metric, column in scores.value.items()}
        with suppress(OSError):
            LIES[kind](self, {"id": "sound-v1", "value": value, "reasons": {}, "notes": scores.notes})

    def reply(self, body: str | bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else body.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def tell(self, answer: dict[str, Any], **changed: Any) -> None:
        self.reply(json.dumps({**answer, **changed}))


class Liar(ThreadingHTTPServer):
    """All the faulty servers at one port, by path."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Window)
        self.seen: Counter[str] = Counter()
        self.over = threading.Event()
        self.turns: Counter[str] = Counter()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def url(self, kind: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{kind}"

    def close(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


def values(change: Callable[[list[float]], Any], metric: str = "mean") -> Lie:
    return lambda window, a: window.tell(a, value={**a["value"], metric: change(a["value"][metric])})


def text(body: str | bytes, status: int = 200, **headers: str) -> Lie:
    return lambda window, a: window.reply(body, status, **headers)


def raw(change: Callable[[str], str]) -> Lie:
    """JSON text that no encoder would write."""
    return lambda window, a: window.reply(change(json.dumps(a)))


def truncated(window: Window, a: dict[str, Any]) -> None:
    data = json.dumps(a).encode()
    window.reply(data[: len(data) // 2], length=len(data))


def truncated_where_it_parses(window: Window, a: dict[str, Any]) -> None:
    data = json.dumps(a).encode()
    window.reply(data, length=len(data) + 10)


def announces(window: Window, a: dict[str, Any]) -> None:
    window.reply(json.dumps(a), length=10**13)


def endless(window: Window, a: dict[str, Any]) -> None:
    window.send_response(200)
    window.end_headers()  # no length: until the connection ends
    while not window.server.over.is_set():
        window.wfile.write(b" " * 2**16)


def silent(window: Window, a: dict[str, Any]) -> None:
    window.server.over.wait(3)


def dripping(window: Window, a: dict[str, Any]) -> None:
    """Sends a byte now and then, and never ends."""
    window.send_response(200)
    window.send_header("Content-Length", "1000")
    window.end_headers()
    while not window.server.over.wait(0.03):
        window.wfile.write(b" ")


def dripping_header(window: Window, a: dict[str, Any]) -> None:
    while not window.server.over.wait(0.03):
        window.wfile.write(b"H")


def hangs_up(window: Window, a: dict[str, Any]) -> None:
    window.connection.shutdown(socket.SHUT_RDWR)


def hangs_up_in_the_middle(window: Window, a: dict[str, Any]) -> None:
    window.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le")
    window.connection.shutdown(socket.SHUT_RDWR)


def resets(window: Window, a: dict[str, Any]) -> None:
    window.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    window.connection.close()


def at_last(kind: str, first: Lie) -> Lie:
    """Twice the wrong answer, then the right one."""

    def lie(window: Window, a: dict[str, Any]) -> None:
        window.server.turns[kind] += 1
        (first if window.server.turns[kind] % 3 else text(json.dumps(a)))(window, a)

    return lie


LIES: dict[str, Lie] = {
    "garbage": text(b"\x00\xff\xfe garbage {"),
    "empty": text(b""),
    "null": text("null"),
    "a-list": text("[1, 2, 3]"),
    "a-number": text("0.5"),
    "html": text("<!doctype html><title>Welcome</title>", Content_Type="text/html"),
    "deep": text("[" * 100_000),
    "too-many": values(lambda v: [*v, 1.0]),
    "too-few": values(lambda v: v[:-1]),
    "second-too-few": values(lambda v: v[:-1], "spread"),
    "nested": values(lambda v: [[x] for x in v]),
    "strings": values(lambda v: [str(x) for x in v]),
    "booleans": values(lambda v: [True for _ in v]),
    "objects": values(lambda v: [{"score": x} for x in v]),
    "one-for-all": values(lambda v: v[0]),
    "nan-token": values(lambda v: [float("nan") for _ in v]),
    "inf-token": values(lambda v: [float("inf") for _ in v]),
    "too-large-a-number": raw(
        lambda said: said.replace('"mean": [', '"mean": [1e999, ').replace('"spread": [', '"spread": [1, ')
    ),
    "nulls-without-reason": values(lambda v: [None for _ in v]),
    "no-value": lambda window, a: window.tell({key: a[key] for key in ("id", "reasons")}),
    "no-metric": lambda window, a: window.tell(a, value={"median": a["value"]["mean"]}),
    "no-id": lambda window, a: window.tell({key: a[key] for key in ("value", "reasons")}),
    "values-a-list": lambda window, a: window.tell(a, value=[a["value"]["mean"]]),
    "another-id": lambda window, a: window.tell(a, id="sound-v2"),
    "reasons-a-list": lambda window, a: window.tell(a, reasons=["x"]),
    "reasons-for-strangers": lambda window, a: window.tell(a, reasons={"999": "x"}),
    "reasons-by-name": lambda window, a: window.tell(a, reasons={"first": "x"}),
    "too-few-notes": lambda window, a: window.tell(a, notes=["x"]),
    "notes-of-numbers": lambda window, a: window.tell(a, notes=[1 for _ in a["value"]["mean"]]),
    "truncated": truncated,
    "truncated-where-it-parses": truncated_where_it_parses,
    "announces-too-much": announces,
    "endless": endless,
    "hangs-up": hangs_up,
    "hangs-up-in-the-middle": hangs_up_in_the_middle,
    "resets": resets,
    "no-http": lambda window, a: (window.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n"), None)[1],
    "500": text('{"detail": "out of memory"}', 500),
    "503": text("busy", 503),
    "400": text('{"detail": "no"}', 400),
    "401": text('{"detail": "who are you"}', 401),
    "404": text("<html>", 404),
    "204": lambda window, a: (window.send_response(204), window.end_headers(), None)[2],
    "redirect": text("", 302, Location="http://127.0.0.1:1/score"),
    "silent": silent,
    "dripping": dripping,
    "dripping-header": dripping_header,
}
SLOW = ("silent", "dripping", "dripping-header")  # each costs three times the time limit
HEALED: dict[str, Lie] = {
    "503-then-well": at_last("503-then-well", text("busy", 503)),
    "hangs-up-then-well": at_last("hangs-up-then-well", hangs_up),
    "resets-then-well": at_last("resets-then-well", resets),
    "truncated-then-well": at_last("truncated-then-well", truncated),
}
LIES |= HEALED | {"honest": text("")}
LIES["honest"] = lambda window, a: window.tell(a)


def about(**changed: Any) -> Lie:
    return lambda window, a: window.tell(a, **changed)


ABOUTS: dict[str, Lie] = {
    "about-garbage": text(b"\xff\xff"),
    "about-html": text("<html>hello</html>"),
    "about-404": text("nothing here", 404),
    "about-500": text("oh", 500),
    "about-401": text('{"detail": "the token is missing or wrong"}', 401),
    "about-redirect": text("", 301, Location="http://127.0.0.1:1/about"),
    "about-endless": endless,
    "about-hangs-up": hangs_up,
    "about-no-metrics": about(metrics=[]),
    "about-metrics-text": about(metrics="mean"),
    "about-no-name": about(name=""),
    "about-name-with-slash": about(name="../sound"),
    "about-name-of-two-lines": about(name="a\nb"),
    "about-no-id": about(id=""),
    "about-id-number": about(id=3),
    "about-protocol-2": about(protocol=2),
    "about-limit-0": about(limits={"images": 0, "bytes": 2**20, "pixels": 1}),
    "about-limits-text": about(limits={"images": "64", "bytes": 2**20, "pixels": 1}),
    "about-truncated": truncated,
}


# Drawing faults at random

Extent = Literal["all", "some", "none"]  # which rows of the batch are lost


@dataclass(frozen=True)
class Fault:
    """One faulty call."""

    family: Literal["scorer", "server", "picture", "prompt", "missing prompts", "too large", "dead"]
    kind: str
    lost: Extent


def kinds() -> list[Fault]:
    """Every fault, once."""
    return [
        *(Fault("scorer", kind, "all") for kind in WHOLE),
        *(Fault("scorer", kind, "some") for kind in SOME),
        *(Fault("server", kind, "all") for kind in LIES if kind not in HEALED and kind != "honest"),
        *(Fault("server", kind, "none") for kind in HEALED),
        *(Fault("picture", kind, "some") for kind in PICTURES),
        *(Fault("prompt", kind, "some") for kind in PROMPTS),
        Fault("missing prompts", "of a scorer", "all"),
        Fault("missing prompts", "of a server", "all"),
        Fault("too large", "for the server", "all"),
        Fault("dead", "server", "all"),
    ]


def drawn(n: int, seed: int) -> list[Fault]:
    """At least n faults: each kind once, then at random; slow ones are drawn seldom."""
    rng = np.random.default_rng(seed)
    each = kinds()
    weight = np.array([0.02 if fault.kind in SLOW else 0.3 if fault.kind == "endless" else 1.0 for fault in each])
    picked = rng.choice(len(each), max(n - len(each), 0), p=weight / weight.sum())
    faults = [*each, *(each[i] for i in picked)]
    rng.shuffle(faults)  # type: ignore[arg-type]
    return faults
