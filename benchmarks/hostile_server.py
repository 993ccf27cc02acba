"""Measures what hostile requests cost a scorer server: its memory, and how long GET /health takes meanwhile.

A server is started in a process of its own, as `[scorer.NAME] python = ...` starts it. For every kind of request several callers
send it at once, again and again, while GET /health is asked on connections of its own. Prints a Markdown table: the answer, the peak
of the server's memory above what it held before, and the latency of /health. Linux only: memory is read from /proc.
Run: python benchmarks/hostile_server.py [megabytes of a request] [callers] [seconds for each kind]
"""

import base64
import http.client
import json
import socket
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from gpobench.bench.scoring.remote import MAGIC, ScorerProcess, encode_png

SCORER = """
import numpy as np
from gpobench.bench.spec import Scores
class Zero:
    id, name, metrics = "zero-v1", "zero", ("mean",)
    def __call__(self, images, prompts):
        return Scores({"mean": np.zeros(len(images))})
"""


SILENT = 200  # connections that send nothing


@dataclass(frozen=True)
class Measured:
    """What one kind of request cost the server."""

    kind: str
    answers: tuple[str, ...]  # the distinct ones: a status, or "closed"
    memory: float  # MB, peak above what the server held before
    median: float  # ms of GET /health meanwhile
    p99: float
    slowest: float
    asked: int  # times


def repeated(unit: bytes, size: int, before: bytes = b'{"images":[', after: bytes = b'],"prompts":[]}') -> bytes:
    """JSON of `size` bytes in all that is mostly one unit over and over."""
    return before + unit * ((size - len(before) - len(after)) // len(unit)) + after


def chunked_png(size: int) -> bytes:
    """A request with one PNG of `size` bytes whose chunks are empty."""
    header = struct.pack(">I4sIIBBBBB", 13, b"IHDR", 16, 16, 8, 2, 0, 0, 0) + bytes(4)
    empty = struct.pack(">I4sI", 0, b"IDAT", zlib.crc32(b"IDAT"))
    return request_of([MAGIC + header + empty * (size * 3 // 4 // len(empty))])


def request_of(images: list[bytes]) -> bytes:
    """A request for these images."""
    encoded = [base64.b64encode(image).decode() for image in images]
    return json.dumps({"images": encoded, "prompts": [{"text": "a"}] * len(images)}).encode()


def large_images(size: int) -> bytes:
    """A request with as many pixels as a server takes: 64 images of 1024x1024 in few bytes."""
    header = struct.pack(">IIBBBBB", 1024, 1024, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1024 * (1 + 3 * 1024)))), (b"IEND", b""))
    parts = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return request_of([MAGIC + b"".join(parts)] * 64)


def whole_images(size: int) -> bytes:
    """A request within every limit: images of 512x512, as many as go into `size` bytes."""
    image = encode_png(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8))
    return request_of([image] * max(size // (len(image) * 4 // 3 + 64), 1))


BODIES: dict[str, Callable[[int], bytes]] = {
    "empty objects, `{},`": lambda size: repeated(b"{},", size),
    'empty texts, `"",`': lambda size: repeated(b'"",', size),
    "nested lists, `[`": lambda size: repeated(b"[", size, b"", b""),
    "one number": lambda size: repeated(b"7", size),
    "one text of escapes": lambda size: repeated(rb"\u00e9", size, b'{"images":["', b'"],"prompts":[{"text":""}]}'),
    "one image that is none": lambda size: repeated(b"AAAA", size, b'{"images":["', b'"],"prompts":[{"text":""}]}'),
    "a PNG of empty chunks": chunked_png,
    "large images": large_images,
    "whole images": whole_images,
}


class Server:
    """A scorer server in its own process, its address, token and memory."""

    def __init__(self, folder: Path) -> None:
        (folder / "zero.py").write_text(SCORER, "utf-8")
        self.process = ScorerProcess(sys.executable, f"{folder / 'zero.py'}:Zero")
        self.process.ensure_running()
        at = urlsplit(self.process.url)
        self.address = at.hostname or "", at.port or 0

    def memory(self, field: str = "VmRSS") -> float:
        """MB that the server holds; VmHWM: its peak since `forget_peak`."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text("utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    def forget_peak(self) -> None:
        """Let the peak of its memory begin anew."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5", "utf-8")

    def post(self, body: bytes, token: str) -> str:
        """Send a request as one that reads no answer before it has sent all it can; the status, or "closed"."""
        head = (
            f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(self.address, timeout=120) as link:
            with suppress(OSError):
                link.sendall(head.encode())
                link.sendall(body)
            try:
                return link.recv(4096).split(b" ", 2)[1].decode()
            except (OSError, IndexError):
                return "closed"

    def health(self) -> float:
        """Seconds until GET /health is answered on a new connection."""
        began = time.perf_counter()
        link = http.client.HTTPConnection(*self.address, timeout=120)
        try:
            link.request("GET", "/health")
            if link.getresponse().status != 200:
                raise RuntimeError("the server refuses GET /health")
        finally:
            link.close()
        return time.perf_counter() - began

    @contextmanager
    def silent(self, connections: int) -> Iterator[None]:
        """Within the block so many connections are open that send nothing."""
        links = [socket.create_connection(self.address, timeout=120) for _ in range(connections)]
        try:
            yield
        finally:
            for link in links:
                link.close()


def measure(server: Server, kind: str, load: Callable[[], list[str]]) -> Measured:
    """Ask GET /health every 5 ms while the load lasts."""
    before = server.memory()
    server.forget_peak()
    seconds: list[float] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            seconds.append(server.health())
            time.sleep(0.005)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            answers = load()
        finally:
            done.set()
        asking.result()
    median, p99, slowest = 1000 * np.quantile(seconds, [0.5, 0.99, 1.0])
    return Measured(
        kind, tuple(sorted(set(answers))), server.memory("VmHWM") - before, median, p99, slowest, len(seconds)
    )


def measure_all(megabytes: float, callers: int, seconds: float) -> list[Measured]:
    """One row for every kind of request."""
    size = int(megabytes * 2**20)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(callers) as pool:
        server = Server(Path(folder))
        token = server.process.token

        def load_of(body: bytes, token: str) -> Callable[[], list[str]]:
            def repeat(caller: int) -> list[str]:
                ends = time.monotonic() + seconds
                answers = [server.post(body, token)]
                while time.monotonic() < ends:
                    answers.append(server.post(body, token))
                return answers

            return lambda: [answer for answers in pool.map(repeat, range(callers)) for answer in answers]

        try:
            server.post(whole_images(2**20), token)  # imports what the first request needs
            rows = [measure(server, kind, load_of(make(size), token)) for kind, make in BODIES.items()]
            rows.append(measure(server, "no token", load_of(whole_images(size), "")))
            with server.silent(SILENT):
                rows.append(measure(server, f"{SILENT} silent connections", load_of(whole_images(2**20), token)))
        finally:
            server.process.close()
    return rows


def main(megabytes: float, callers: int, seconds: float) -> None:
    print("| request | answer | memory, MB | /health median, ms | 99 % | slowest | asked |")
    print("|---" * 7 + "|")
    for row in measure_all(megabytes, callers, seconds):
        numbers = " | ".join(f"{x:.0f}" for x in (row.memory, row.median, row.p99, row.slowest))
        print(f"| {row.kind} | {', '.join(row.answers)} | {numbers} | {row.asked} |", flush=True)


if __name__ == "__main__":
    numbers = [float(word) for word in sys.argv[1:]] + [60.0, 4.0, 5.0][len(sys.argv) - 1 :]
    main(numbers[0], int(numbers[1]), numbers[2])
