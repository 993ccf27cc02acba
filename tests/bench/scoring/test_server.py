"""Server of a scorer: any request gets scores or a refusal, and none ends the server."""

from __future__ import annotations

import base64
import gc
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpobench.bench import registry
from gpobench.bench.errors import Missing, UserError
from gpobench.bench.scoring import connections, remote, server
from gpobench.bench.scoring.remote import Limits, connect
from gpobench.bench.scoring.server import main, serve
from gpobench.bench.spec import Prompt, Scores

FAULTY = str(Path(__file__).parents[2] / "faulty.py")
faulty: Any = sys.modules[registry.load("scorer", f"{FAULTY}:Sound").__module__]
LIMITS = Limits(images=8, bytes=20_000, pixels=4096)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with faulty.served(faulty.Sound(), LIMITS, reference="mine.py:Sound") as at:
        yield at


def call(url: str, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of a request as any program would make it."""
    at = urlsplit(url)
    link = http.client.HTTPConnection(at.hostname or "", at.port, timeout=20)
    if isinstance(body, (dict, list)):
        body = json.dumps(body)
    link.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = link.getresponse()
    data = response.read()
    link.close()
    return response.status, json.loads(data) if data else None


def question(*content: bytes, prompts: int | None = None) -> dict[str, Any]:
    images = [base64.b64encode(each).decode() for each in content]
    return {
        "images": images,
        "prompts": [{"text": f"n {i}"} for i in range(len(content) if prompts is None else prompts)],
    }


def picture(seed: int = 0, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_who_is_there(url: str) -> None:
    assert call(url, "GET", "/health") == (200, {"ok": True})
    status, about = call(url, "GET", "/about")
    assert status == 200 and about == {
        "id": "sound-v1", "name": "sound", "metrics": ["mean", "spread"], "protocol": 1, "reference": "mine.py:Sound",
        "limits": {"images": 8, "bytes": 20_000, "pixels": 4096, "values": 65536},
    }  # fmt: skip
    for path in ("/docs", "/openapi.json", "/", "/score"):
        assert call(url, "GET", path)[0] in (404, 405)


def test_scores_come_in_the_order_of_the_pictures_whatever_their_sizes(url: str) -> None:
    images = [picture(i, *size) for i, size in enumerate([(16, 16), (8, 24), (16, 16), (1, 1), (8, 24)])]
    status, answer = call(url, "POST", "/score", question(*map(remote.encode_png, images)))
    assert status == 200 and answer["id"] == "sound-v1" and answer["reasons"] == {}
    each = [faulty.Sound()(image[None], [Prompt(f"n {i}")]) for i, image in enumerate(images)]
    assert answer["value"] == {m: [scores.value[m][0] for scores in each] for m in ("mean", "spread")}
    assert answer["notes"] == [scores.notes[0] for scores in each]
    assert call(url, "POST", "/score", question())[1]["value"] == {"mean": [], "spread": []}


@pytest.mark.parametrize("kind", faulty.PICTURES)
def test_a_picture_that_is_none_costs_its_row_only(url: str, kind: str) -> None:
    image = picture()
    status, answer = call(
        url,
        "POST",
        "/score",
        question(remote.encode_png(image), faulty.PICTURES[kind](image), remote.encode_png(image)),
    )
    assert status == 200
    good = faulty.Sound()(image[None], [Prompt("")]).value["mean"][0]
    assert answer["value"]["mean"] == [good, None, good] and list(answer["reasons"]) == ["1"]
    assert answer["reasons"]["1"].startswith("image refused: ")


@pytest.mark.parametrize("text", ["", "!", "iVBOR", "data:image/png;base64,iVBORw0KGgo=", "é"])
def test_what_is_not_base64_costs_its_row_only(url: str, text: str) -> None:
    status, answer = call(url, "POST", "/score", {"images": [text], "prompts": [{"text": "x"}]})
    assert status == 200 and answer["value"]["mean"] == [None] and "image refused" in answer["reasons"]["0"]


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(height: int, width: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


PIXELS = chunk(b"IDAT", zlib.compress(bytes(16 * (1 + 3 * 16))))
END = chunk(b"IEND")
CHUNKS = {
    "two headers": (header(16, 16) + header(200, 200) + PIXELS + END, "two headers"),
    "a second header behind the pixels": (header(16, 16) + PIXELS + header(200, 200) + END, "two headers"),
    "no end": (header(16, 16) + PIXELS, "truncated"),
    "a chunk longer than the file": (header(16, 16) + b"\xff\xff\xff\xffIDAT" + PIXELS + END, "truncated"),
    "many chunks": (header(16, 16) + chunk(b"teXt") * 200 + PIXELS + END, "chunks"),
    "a header of another length": (b"\0\0\0\x0eIHDR" + header(16, 16)[8:] + PIXELS + END, "not a PNG"),
    "fewer lines than announced": (header(40, 16) + PIXELS + END, ""),
    "no pixels": (header(16, 16) + END, ""),
}


@pytest.mark.parametrize("kind", CHUNKS)
def test_the_pixels_of_a_png_are_those_of_its_one_header(url: str, kind: str) -> None:
    content, reason = CHUNKS[kind]
    good = remote.encode_png(picture())
    status, answer = call(url, "POST", "/score", question(good, remote.MAGIC + content, good))
    assert status == 200 and [number is None for number in answer["value"]["mean"]] == [False, True, False]
    assert answer["reasons"]["1"].startswith("image refused: ") and reason in answer["reasons"]["1"]


def test_what_a_png_holds_beside_its_pixels_is_never_decoded(url: str) -> None:
    plain = remote.MAGIC + header(16, 16) + PIXELS + END
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10_000)))
    frames = chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(
        b"fcTL", struct.pack(">5IHHBB", 0, 9000, 9000, 0, 0, 1, 1, 0, 0)
    )
    more = remote.MAGIC + header(16, 16) + bomb + frames + PIXELS + END + b"and more"
    answer = call(url, "POST", "/score", question(plain, more))[1]
    assert answer["value"]["mean"] == [0.0, 0.0] and answer["reasons"] == {}


@given(
    st.lists(st.sampled_from([header(16, 16), header(8, 200), PIXELS, END, chunk(b"tEXt", b"a\0b"), b"x"]), max_size=5)
)
def test_any_order_of_chunks_is_an_image_or_a_reason(chunks: list[bytes]) -> None:
    images = [
        base64.b64encode(remote.MAGIC + b"".join(chunks)).decode(),
        base64.b64encode(remote.encode_png(picture())).decode(),
    ]
    prompts = [remote.PromptPayload(text="x")] * 2
    answer = server.score_request(faulty.Sound(), remote.ScoreRequest(images=images, prompts=prompts), 4096)
    assert answer is not None and answer.value["mean"][1] is not None
    assert (answer.value["mean"][0] is None) == (0 in answer.reasons)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["images", "prompts", "text", "meta", "stratum"]), inner)
    ),
    max_leaves=8,
)


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode("utf-8", "replace")))
def test_any_body_is_a_request_or_a_reason_in_one_line(body: bytes) -> None:
    parsed = server._parse_request(bytearray(body))  # pyright: ignore[reportPrivateUsage]
    if isinstance(parsed, str):
        assert parsed and "\n" not in parsed
    else:
        assert server.score_request(faulty.Sound(), parsed, 4096) is not None


def test_a_bomb_is_refused_before_it_is_decoded(url: str) -> None:
    began = time.perf_counter()
    _, answer = call(url, "POST", "/score", question(*[faulty.bomb(60_000, 60_000)] * 8))
    assert answer["reasons"]["7"] == "image refused: 60000x60000 pixels, at most 4096 can be taken"
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (question(*[b""] * 9), 413, "at most 8 images, not 9"),
        (question(*[faulty.saved(np.zeros((32, 32, 3), np.uint8), "PNG")] * 5), 413, "at most 4096 pixels together"),
        ("x" * 20_001, 413, "at most 20000 bytes"),
        (question(b"", b"", prompts=1), 422, "2 images but 1 prompts"),
        (question(b"", prompts=0), 422, "1 images but 0 prompts"),
        ({"images": []}, 422, "prompts: Field required"),
        ({"images": [1], "prompts": [{"text": ""}]}, 422, "images.0: Input should be a valid string"),
        ({"images": [""], "prompts": ["text"]}, 422, "prompts.0"),
        ({"images": [""], "prompts": [{"text": 1}]}, 422, "prompts.0.text"),
        ({"images": [""], "prompts": [{"text": "", "meta": []}]}, 422, "prompts.0.meta"),
        ([], 422, "Input should be"),
        ("", 422, "Invalid JSON"),
        (b"\x80\x04\x95", 422, "Invalid JSON"),  # a pickle
        ("[" * 10_000, 422, "Invalid JSON"),
    ],
)
def test_a_request_that_is_none_is_refused_in_one_line(url: str, body: Any, status: int, said: str) -> None:
    got, answer = call(url, "POST", "/score", body)
    assert got == status and said in answer["detail"] and "\n" not in answer["detail"]


def test_the_bound_on_bytes_does_not_trust_what_is_announced(url: str) -> None:
    at = urlsplit(url)
    link = http.client.HTTPConnection(at.hostname or "", at.port, timeout=20)
    link.putrequest("POST", "/score")
    link.putheader("Transfer-Encoding", "chunked")
    link.endheaders()
    sent = 0
    try:
        while sent < 50_000_000:
            link.send(b"%x\r\n" % 10_000 + b" " * 10_000 + b"\r\n")
            sent += 10_000
    except OSError:
        pass  # it hung up: that is what it should do
    assert sent < 50_000_000
    link.close()


def test_the_bound_on_json_values_is_kept_while_they_are_read() -> None:
    with faulty.served(faulty.Sound(), Limits(values=1000)) as open_url:
        for unit in (b"{},", b'"",', b"[", rb"\u00e9"):
            body = b'{"images":["' + unit * 1001
            status, answer = call(open_url, "POST", "/score", body)
            assert status == 413 and answer["detail"] == "a request has at most 1000 JSON values"
        body = question(*[remote.encode_png(picture())] * 4)
        assert call(open_url, "POST", "/score", body)[0] == 200
        scorer = connect(open_url)
        prompts = [Prompt("x", {"facts": [0] * n}) for n in (1200, 10, 800, 100)]
        scores = scorer(np.stack([picture()] * 4), prompts)  # as many requests as the bound makes of them
        assert np.isnan(scores.value["mean"]).tolist() == [True, False, False, False]
        assert scores.reasons == {
            0: "sound: cannot be sent: its prompt has more JSON values than the server takes (1000)"
        }


def test_a_body_that_does_not_arrive_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_SECONDS", 0.2)
    with faulty.served(faulty.Sound()) as url:
        at = urlsplit(url)
        links = [socket.create_connection((at.hostname or "", at.port or 0), timeout=20) for _ in range(6)]
        for link in links:
            link.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert all(b" 408 " in link.recv(100) for link in links)  # those that wait for a place among the bodies, too
        for link in links:
            link.close()
        assert call(url, "POST", "/score", question(remote.encode_png(picture())))[0] == 200


def test_silent_connections_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 8)
    with faulty.served(faulty.Sound(), token="s3cret") as url:
        at = urlsplit(url)
        links = [socket.create_connection((at.hostname or "", at.port or 0), timeout=20) for _ in range(30)]
        links[-1].sendall(b"POST /score HTTP/1.1\r\nHost:")  # half a head is silence, too
        body = question(remote.encode_png(picture()))
        for _ in range(3):
            assert call(url, "POST", "/score", body, Authorization="Bearer s3cret")[0] == 200
        for link in links:
            link.close()


def test_a_connection_that_sends_no_head_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SILENCE", 0.2)
    with faulty.served(faulty.Sound()) as url:
        at = urlsplit(url)
        for head in (b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET"):
            with socket.create_connection((at.hostname or "", at.port or 0), timeout=5) as link:
                link.sendall(head)
                with suppress(ConnectionResetError):
                    while link.recv(4096):
                        pass


def test_a_caller_without_the_token_is_answered_before_the_body() -> None:
    with faulty.served(faulty.Sound(), token="s3cret") as url:
        at = urlsplit(url)
        with socket.create_connection((at.hostname or "", at.port or 0), timeout=20) as link:
            link.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 60000000\r\n\r\n")  # and no body at all
            answer = b""
            with suppress(ConnectionResetError):
                while part := link.recv(4096):  # the server hangs up
                    answer += part
        assert answer.startswith(b"HTTP/1.1 401 ") and b"the token is missing or wrong" in answer
        # a client that sends on gets the reason and no broken pipe
        status, _ = remote._exchange(f"{url}/score", b"0" * 60_000_000, "wrong", 20.0, 10_000)  # pyright: ignore[reportPrivateUsage]
        assert status == 401


def test_a_connection_that_has_ended_is_not_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SILENCE", 3600.0)
    with faulty.served(faulty.Sound(), token="s3cret") as url:
        for _ in range(20):
            remote._exchange(f"{url}/score", b"0" * 500_000, "wrong", 20.0, 10_000)  # pyright: ignore[reportPrivateUsage]
        patience = time.monotonic() + 20
        while kept := sum(type(thing) is connections.BoundedConnection for thing in gc.get_objects()):
            assert time.monotonic() < patience, f"{kept} of 20 connections are still in memory"
            time.sleep(0.05)
            gc.collect()


def test_a_caller_who_leaves_in_the_middle_disturbs_nobody(url: str) -> None:
    at = urlsplit(url)
    for _ in range(5):
        link = http.client.HTTPConnection(at.hostname or "", at.port, timeout=20)
        link.putrequest("POST", "/score")
        link.putheader("Content-Length", "10000")
        link.endheaders()
        link.send(b'{"images":')
        link.close()
    assert call(url, "POST", "/score", question(remote.encode_png(picture())))[0] == 200


def test_a_token_opens_the_window() -> None:
    with faulty.served(faulty.Sound(), token="s3cret") as at:
        body = question(remote.encode_png(picture()))
        for header in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "s3cret"}, {"Authorization": "Bearer s3cret "[:-2]},
                       {"Authorization": "Bearer \xe9"}):  # fmt: skip
            for method, path in (("GET", "/about"), ("POST", "/score")):
                status, answer = call(at, method, path, body, **header)
                assert status == 401 and answer == {"detail": "the token is missing or wrong"}
        assert call(at, "GET", "/health")[0] == 200
        assert call(at, "POST", "/score", body, Authorization="Bearer s3cret")[0] == 200
        assert connect(at, token="s3cret").id == "sound-v1"


class Slow:
    """Notices when two ask at once, and counts what it was asked."""

    id, name, metrics = "slow-v1", "slow", ("mean",)

    def __init__(self) -> None:
        self.inside, self.most, self.calls = 0, 0, 0

    def __call__(self, images: Any, prompts: Any) -> Scores:
        self.inside += 1
        self.calls += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.2)
        self.inside -= 1
        return Scores({"mean": np.array([float(image[0, 0, 0]) for image in images])})


def test_one_question_at_a_time_and_the_window_answers_meanwhile() -> None:
    slow = Slow()
    with faulty.served(slow) as at, ThreadPoolExecutor(5) as pool:
        opened = connect(at)
        images = [picture(i)[None] for i in range(5)]
        asked = [pool.submit(opened, image, [Prompt("x")]) for image in images]
        time.sleep(0.1)
        began = time.perf_counter()
        assert call(at, "GET", "/health")[0] == 200 and time.perf_counter() - began < 0.2
        assert [float(a.result().value["mean"][0]) for a in asked] == [float(image[0, 0, 0, 0]) for image in images]
    assert slow.most == 1 and slow.calls == 5


def test_who_no_longer_waits_is_not_served() -> None:
    """Three tries of an impatient caller must not keep an engine busy that a patient one waits for."""
    slow = Slow()
    with faulty.served(slow) as at:
        patient, hasty = connect(at), connect(at)
        hasty.timeout = 0.05
        first = threading.Thread(target=patient, args=(picture()[None], [Prompt("x")]))
        first.start()
        time.sleep(0.05)
        assert "no answer within 0.05 s" in hasty(picture()[None], [Prompt("x")]).reasons[0]
        first.join()
        time.sleep(0.3)
    assert slow.calls < 4


class Changing(faulty.Sound):
    """Fails in a new way each time."""

    spoil: Any = None

    def __call__(self, images: Any, prompts: Any) -> Any:
        return Changing.spoil(super().__call__(images, prompts), [1])


def test_what_the_scorer_does_wrong_is_null_with_a_reason() -> None:
    with faulty.served(Changing()) as at:
        for kind, spoil in {**faulty.WHOLE, **faulty.SOME}.items():
            Changing.spoil = staticmethod(spoil)
            status, answer = call(at, "POST", "/score", question(*[remote.encode_png(picture(i)) for i in range(3)]))
            mean = answer["value"]["mean"]
            lost = [row for row in range(3) if mean[row] is None]
            assert status == 200 and lost == ([1] if kind in faulty.SOME else [0, 1, 2]), kind
            assert all(answer["reasons"][str(row)].strip() for row in lost), kind


# Opening and closing


def test_the_door_to_the_world_needs_a_token() -> None:
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", ""):
        with pytest.raises(
            UserError, match=f"can be reached from elsewhere: set a token in the environment variable {remote.TOKEN}"
        ):
            serve("reader", host=host)


def test_bounds_and_ports_that_are_none() -> None:
    for wrong in ({"max_images": 0}, {"max_bytes": 3}, {"max_pixels": -1}):
        with pytest.raises(UserError, match="a server takes at least"):
            serve("reader", **wrong)
    with pytest.raises(UserError, match="cannot listen at 127.0.0.1 port 70000"):
        serve(f"{FAULTY}:Sound", port=70_000)
    with faulty.served(faulty.Sound()) as at, pytest.raises(UserError, match="cannot listen"):
        serve(f"{FAULTY}:Sound", port=int(at.rpartition(":")[2]))
    with pytest.raises(UserError, match="unknown scorer"):
        serve("no such scorer")


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Missing, match=r"pip install 'gpobench\[serve\]'"):
        serve("reader")


def test_a_wrong_request_is_exit_code_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(remote.TOKEN, raising=False)
    assert main(["reader", "--host", "0.0.0.0"]) == 2
    assert main(["raeder"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "did you mean 'reader'" in said[1]


FOUR = """
import os, signal, sys
from gpobench.bench.scoring.server import main
pids = []
for more in ([], ["--host", "::1"], ["--with-parent"], ["--max-images", "8"]):
    ours, theirs = os.pipe()
    pids.append(os.fork())
    if not pids[-1]:
        os.dup2(theirs, 1)
        if "8" in more:  # as a shell starts a script's background jobs
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        os._exit(main([sys.argv[1], *more]))
    print(pids[-1], os.fdopen(ours).readline().strip(), flush=True)
for pid in pids:
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""  # four servers for the price of one import


def test_signals_and_the_end_of_the_parent_close_the_window_in_good_order() -> None:
    pipe, environment = subprocess.PIPE, os.environ | {remote.TOKEN: "t"}
    command = [sys.executable, "-c", FOUR, f"{FAULTY}:Sound"]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
    assert process.stdout is not None
    lines = [process.stdout.readline().split() for _ in range(4)]
    for pid, ready, url, name in lines:
        assert int(pid) and ready == remote.READY.strip() and name == "sound-v1"
        assert connect(url, token="t").id == "sound-v1"
    os.kill(int(lines[0][0]), signal.SIGTERM)
    os.kill(int(lines[1][0]), signal.SIGINT)
    os.kill(int(lines[3][0]), signal.SIGINT)
    assert connect(lines[3][2], token="t").id == "sound-v1"
    os.kill(int(lines[3][0]), signal.SIGTERM)
    out, err = process.communicate(timeout=30)  # its standard input ends, and with it the third
    assert out.split() == ["0", "0", "0", "0"] and err == ""
    for _, _, url, _ in lines:
        with pytest.raises(UserError):
            connect(url, token="t")
