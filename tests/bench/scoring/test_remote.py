"""Client of a scorer server: scores arrive to the last bit, and a server that fails or lies gives NaN with a reason."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gpobench.bench import registry
from gpobench.bench.errors import UserError
from gpobench.bench.scoring import remote
from gpobench.bench.scoring.remote import Limits, RemoteScorer, ScoreResponse, connect, start
from gpobench.bench.scoring.scorers import ask
from gpobench.bench.spec import Prompt, Scores

FAULTY = str(Path(__file__).parents[2] / "faulty.py")
faulty: Any = sys.modules[registry.load("scorer", f"{FAULTY}:Sound").__module__]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.002)


@pytest.fixture(scope="module")
def liar() -> Iterator[Any]:
    made = faulty.Liar()
    yield made
    made.close()


def pictures(n: int, height: int = 16, width: int = 16) -> tuple[np.ndarray, list[Prompt]]:
    rng = np.random.default_rng(n)
    return rng.integers(0, 256, (n, height, width, 3), np.uint8), [Prompt(f"№ {i} ☃", {"i": i}, "s") for i in range(n)]


def same(a: Scores, b: Scores) -> None:
    assert list(a.value) == list(b.value) and all(a.value[m].tobytes() == b.value[m].tobytes() for m in a.value)
    assert dict(a.reasons) == dict(b.reasons) and list(a.notes or ()) == list(b.notes or ())


# What goes out


class Recorder:
    """Remembers what reached it, and marks what it cannot judge."""

    id, name, metrics = "recorder-v1", "recorder", ("mean", "other")

    def __init__(self) -> None:
        self.seen: list[tuple[np.ndarray, list[Prompt]]] = []

    def __call__(self, images: Any, prompts: Any) -> Scores:
        self.seen.append((images.copy(), list(prompts)))
        mean = images.reshape(len(images), -1).mean(1)
        other = np.where(mean > 127.5, np.nan, -mean / 3)
        return Scores({"mean": mean, "other": other}, {int(i): "too bright" for i in np.flatnonzero(np.isnan(other))})


@pytest.mark.parametrize(
    ("limits", "requests"),
    [
        (Limits(), 1),
        (Limits(images=4), 3),
        (Limits(images=1), 10),
        (Limits(pixels=3 * 256), 4),
        (Limits(bytes=4000), 4),
    ],
)
def test_pictures_and_prompts_arrive_as_they_are_in_requests_within_the_limits(limits: Limits, requests: int) -> None:
    images, prompts = pictures(10)
    recorder = Recorder()
    with faulty.served(recorder, limits) as url:
        scores = connect(url)(images, prompts)
    assert len(recorder.seen) >= requests
    assert np.array_equal(np.concatenate([seen for seen, _ in recorder.seen]), images)
    assert [prompt for _, seen in recorder.seen for prompt in seen] == prompts
    same(scores, ask(Recorder(), images, prompts))
    assert scores.notes is None and set(scores.reasons.values()) == {"too bright"}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_a_png_is_read_by_others_as_it_was_written(height: int, width: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    for progress in (image, image[::-1, ::-1], np.asfortranarray(image)):
        with Image.open(io.BytesIO(remote.encode_png(progress)), formats=["PNG"]) as opened:
            assert opened.mode == "RGB" and np.array_equal(np.asarray(opened), progress)


def test_requests_fill_the_limit_of_bytes() -> None:
    images, prompts = pictures(12)
    sent: list[int] = []
    with faulty.served(faulty.Sound(), Limits(bytes=5000)) as url:
        opened = connect(url)
        bodies = list(opened._requests(images, prompts, remote._Call()))  # pyright: ignore[reportPrivateUsage]
        for (rows, body), after in zip(bodies, [*bodies[1:], None]):
            assert len(body) <= 5000
            first = (
                len(remote._encode_body([remote._encode_row(images[after[0][0]], prompts[after[0][0]])]))
                if after
                else 5000
            )  # pyright: ignore
            assert len(body) + first > 5000
            sent += rows
    assert sent == list(range(12))


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(
    st.characters(exclude_categories=["Cs"])), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(
        exclude_categories=["Cs"]), max_size=5), inner, max_size=3), max_leaves=8))  # fmt: skip
def test_facts_survive_the_wire(fact: Any) -> None:
    prompt = Prompt('a "sign"\n', {"fact": fact, "pair": (1, 2)}, "tag")
    row = remote._encode_row(np.zeros((2, 2, 3), np.uint8), prompt)  # pyright: ignore[reportPrivateUsage]
    asked = remote.ScoreRequest.model_validate_json(remote._encode_body([row])).prompts[0]  # pyright: ignore[reportPrivateUsage]
    assert (asked.text, asked.meta, asked.stratum) == (prompt.text, {"fact": fact, "pair": [1, 2]}, "tag")


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5))
def test_numbers_survive_the_wire(numbers: list[float]) -> None:
    answer = ScoreResponse(id="x", value={"m": [*numbers, None]}, reasons={3: "why"})
    back = ScoreResponse.model_validate_json(answer.model_dump_json())
    assert np.array(back.value["m"][:-1], float).tobytes() == np.array(numbers, float).tobytes() and back == answer


def test_no_pictures_are_no_request() -> None:
    with faulty.served(faulty.Sound()) as url:
        opened = connect(url)
    scores = opened(*pictures(0))  # nobody is there any more
    assert {m: v.shape for m, v in scores.value.items()} == {"mean": (0,), "spread": (0,)} and not scores.reasons


def test_the_callers_own_mistakes_are_raised(liar: Any) -> None:
    opened = connect(liar.url("honest"))
    images, prompts = pictures(3)
    for wrong in (images[0], images[..., :1], images.astype(np.float32)):
        with pytest.raises(ValueError, match="uint8"):
            opened(wrong, prompts)
    with pytest.raises(ValueError, match="3 images but 2 prompts"):
        opened(images, prompts[:2])


# What comes back (each lie of a server, mixed with a thousand others: tests/rewards/test_faults.py)


REASONS = {
    "garbage": "sent no answer of this protocol: Invalid JSON",
    "too-many": "sent 4 numbers of mean for 3 images",
    "nan-token": "sent no answer of this protocol: value.mean.0",
    "no-metric": "sent no 'mean'",
    "another-id": "answers as sound-v2, was sound-v1",
    "announces-too-much": "announced an answer of 10000000000000 bytes",
    "endless": "sent an answer of more than",
    "400": "answered 400: no",
    "500": "answered 500: out of memory (3 tries)",
    "redirect": "answered with a redirect (302), which is not followed",
    "hangs-up": "RemoteDisconnected",
    "truncated-where-it-parses": "IncompleteRead",
    "nulls-without-reason": "gave no number and no reason",
}


@pytest.mark.parametrize("kind", REASONS)
def test_the_reason_says_what_was_wrong(liar: Any, kind: str) -> None:
    opened = connect(liar.url(kind))
    before = liar.seen[kind]
    scores = opened(*pictures(3))
    assert np.isnan(scores.value["mean"]).all() and set(scores.reasons) == {0, 1, 2}
    for why in scores.reasons.values():
        assert why.startswith(f"sound at {liar.url(kind)}: ") and REASONS[kind] in why and "\n" not in why
    again = kind in ("500", "hangs-up", "truncated-where-it-parses")
    assert liar.seen[kind] - before == (3 if again else 1)


@pytest.mark.parametrize("kind", faulty.SLOW)
def test_the_time_limit_is_for_the_whole_answer(liar: Any, kind: str) -> None:
    opened = connect(liar.url(kind))
    opened.timeout = 0.2
    began = time.perf_counter()
    scores = opened(*pictures(2))
    assert time.perf_counter() - began < 3
    assert scores.reasons[1].endswith("no answer within 0.2 s (3 tries)")


def test_after_three_tries_the_rest_of_a_call_is_not_tried(liar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = connect(liar.url("503"))
    opened.limits = Limits(images=1)
    before = liar.seen["503"]
    scores = opened(*pictures(5))
    assert liar.seen["503"] - before == 3 and set(scores.reasons) == set(range(5))
    healed = connect(liar.url("503-then-well"))
    healed.limits = Limits(images=1)
    images, prompts = pictures(4)
    same(healed(images, prompts), faulty.Sound()(images, prompts))


# Who is there


@pytest.mark.parametrize("kind", faulty.ABOUTS)
def test_a_server_that_is_none_is_refused_in_one_line(liar: Any, kind: str) -> None:
    with pytest.raises(UserError) as caught:
        connect(liar.url(kind), timeout=10)
    said = str(caught.value)
    assert said.startswith(f"the scorer server at {liar.url(kind)}: ") and "\n" not in said and len(said) < 500


@pytest.mark.parametrize(
    "url", ["", "x", "127.0.0.1:80", "ftp://a", "http://", "http://a:b", "http://a:99999", "http://u:p@a", "http://a?q=1", "http://a b",
            "http://a#f", "file:///etc/passwd", "http://a\r\nX: y", "http://[::1"]
)  # fmt: skip
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(UserError, match="is no URL of a scorer server") as caught:
        connect(url)
    assert "\n" not in str(caught.value)


def test_settings_that_are_none(liar: Any) -> None:
    for token in ("a b", "é", "a\r\nX-Evil: 1"):
        with pytest.raises(UserError, match="printable"):
            connect(liar.url("honest"), token=token)
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="above 0"):
            connect(liar.url("honest"), timeout=timeout)


def test_the_address_may_have_a_path_and_a_slash(liar: Any) -> None:
    images, prompts = pictures(2)
    same(connect(liar.url("honest") + "/")(images, prompts), faulty.Sound()(images, prompts))


def test_a_server_that_was_replaced_is_noticed() -> None:
    images, prompts = pictures(2)
    with faulty.served(faulty.Sound()) as url, faulty.served(Recorder()) as other:
        opened = connect(url)
        opened._url = other  # as if another one now answered there  # pyright: ignore[reportPrivateUsage]
        assert "answers as recorder-v1, was sound-v1" in opened(images, prompts).reasons[0]


# Another Python


@pytest.mark.parametrize(
    ("python", "said"),
    [("/nowhere/python", "cannot be started: No such file"), ("/", "cannot be started: Permission denied"), ("/bin/false", "exit code 1"),
     ("/bin/true", "exit code 0")],
)  # fmt: skip
def test_a_python_that_is_none(python: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        start(python, "reader")
    assert f"the scorer 'reader' in {python}" in str(caught.value) and "\n" not in str(caught.value)


def script(folder: Path, code: str) -> str:
    """Something that is started like a Python."""
    file = folder / "python"
    file.write_text(f"#!{sys.executable}\n{code}")
    file.chmod(0o755)
    return str(file)


def test_its_last_words_are_told(tmp_path: Path) -> None:
    code = "import sys; sys.stderr.write('one\\n' * 50_000 + 'no such engine\\n'); sys.exit(3)"
    with pytest.raises(UserError, match="did not start: one .* no such engine$"):
        start(script(tmp_path, code), "reader")
    bare = "import sys; sys.exit(f'{sys.executable}: No module named gpobench')"
    with pytest.raises(UserError, match="python -m pip install 'gpobench\\[serve\\]'"):
        start(script(tmp_path, bare), "reader")


def test_one_that_never_gets_ready_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "START_TIMEOUT", 0.5)
    with pytest.raises(UserError, match="was not ready after 0.5 s"):
        start(script(tmp_path, "import sys; print('hello', flush=True); sys.stdin.read()"), "reader")


def test_the_token_is_in_no_command_line(tmp_path: Path, liar: Any) -> None:
    """A started process gets its token by the environment; what it prints before it is ready does not matter."""
    code = (
        f"import os, sys; open({str(tmp_path / 'told')!r}, 'w').write(repr((sys.argv, os.environ[{remote.TOKEN!r}])))\n"
    )
    code += f"print('loading ...\\nready: {liar.url('honest')} sound-v1', flush=True); sys.stdin.read()"
    opened = start(script(tmp_path, code), "reader:big")
    argv, token = eval((tmp_path / "told").read_text())
    assert argv[1:] == ["-P", "-m", "gpobench.bench.scoring.server", "--port", "0", "--with-parent", "--", "reader:big"]
    assert len(token) >= 24 and token not in str(argv)
    opened.close()
    opened.close()
    assert isinstance(opened, RemoteScorer) and opened.pid


def test_it_ends_with_who_started_it(tmp_path: Path, liar: Any) -> None:
    """However that one ends: here by a kill that no one can catch."""
    python = script(tmp_path, f"import sys; print('ready: {liar.url('honest')}', flush=True); sys.stdin.read()")
    code = "import sys\n"
    code += f"from gpobench.bench.scoring.remote import start\nr = start({python!r}, 'x')\nprint(r.pid, flush=True)\nsys.stdin.read()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    for _ in range(100):
        if (
            not Path(f"/proc/{pid}").exists()
            or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]
        ):
            break
        time.sleep(0.05)
    else:
        raise AssertionError(f"{pid} is still there")
