"""Several servers of one scorer: which one answers, dies or comes back changes no score and no order."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpobench.bench import registry
from gpobench.bench.errors import UserError
from gpobench.bench.scoring import remote, replicas
from gpobench.bench.scoring.references import ScorerLocation
from gpobench.bench.scoring.remote import RemoteScorer, connect
from gpobench.bench.scoring.replicas import ReplicatedScorer, connect_replicas
from gpobench.bench.scoring.scorers import ask, calls_at_once, open_scorer
from gpobench.bench.spec import Prompt, Scores

FAULTY = str(Path(__file__).parents[2] / "faulty.py")
faulty: Any = sys.modules[registry.load("scorer", f"{FAULTY}:Sound").__module__]
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.002)


@pytest.fixture(scope="module")
def liar() -> Iterator[Any]:
    made = faulty.Liar()
    yield made
    made.close()


def batches(count: int) -> list[tuple[np.ndarray, list[Prompt]]]:
    rng = np.random.default_rng(count)
    return [
        (rng.integers(0, 256, (3, 8, 8, 3), np.uint8), [Prompt(f"{k} {i}") for i in range(3)]) for k in range(count)
    ]


def same(a: Scores, b: Scores) -> None:
    assert list(a.value) == list(b.value) and all(a.value[m].tobytes() == b.value[m].tobytes() for m in a.value)
    assert dict(a.reasons) == dict(b.reasons) and list(a.notes or ()) == list(b.notes or ())


def at_once(scorer: Any, calls: list[tuple[np.ndarray, list[Prompt]]]) -> list[Scores]:
    """The results of calls from as many threads as the scorer takes, in the order of the calls."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(calls_at_once(scorer)) as threads:
        return list(threads.map(lambda call: ask(scorer, *call), calls))


def test_several_servers_score_as_one(liar: Any) -> None:
    lines: list[str] = []
    with ExitStack() as stack:
        urls = [stack.enter_context(faulty.served(faulty.Sound())) for _ in range(3)]
        scorer = connect_replicas(urls, say=lines.append)
        assert calls_at_once(scorer) == 3 and (scorer.id, scorer.name) == ("sound-v1", "sound")
        calls, one = batches(8), connect(urls[0])
        for got, call in zip(at_once(scorer, calls), calls, strict=True):
            same(got, ask(one, *call))
    assert not lines


class Meeting:
    """A scorer that answers when two calls of it are under way, or after a while."""

    id, name, metrics = "meeting-v1", "meeting", ("together",)

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2)

    def __call__(self, images: Any, prompts: Any) -> Scores:
        try:
            self.barrier.wait(30)
        except threading.BrokenBarrierError:
            return Scores({"together": np.zeros(len(images))})
        return Scores({"together": np.ones(len(images))})


def test_the_servers_work_at_the_same_time() -> None:
    with ExitStack() as stack:
        meeting = Meeting()
        scorer = connect_replicas([stack.enter_context(faulty.served(meeting)) for _ in range(2)])
        for scores in at_once(scorer, batches(2)):
            assert scores.value["together"].tolist() == [1, 1, 1]


def test_a_server_that_fails_is_left_out_and_comes_back(liar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "RETRY", 0.2)
    lines: list[str] = []
    honest, failing = liar.url("honest"), liar.url("503")
    scorer = connect_replicas([failing, honest], say=lines.append)
    calls, one = batches(5), connect(honest)
    before = Counter(liar.seen)
    for got, call in zip(at_once(scorer, calls), calls, strict=True):
        same(got, ask(one, *call))
    assert f"the server at {failing} is left out" in lines[0] and "answered 503" in lines[0]
    assert liar.seen["503"] - before["503"] == remote.TRIES or len(lines) > 1  # one call, then it is left out
    time.sleep(0.25)
    lines.clear()
    monkeypatch.setitem(faulty.LIES, "503", faulty.LIES["honest"])
    for call in calls[:2]:
        same(ask(scorer, *call), ask(one, *call))
    assert lines == [f"sound: the server at {failing} scores again"]


@pytest.mark.parametrize("lie", ["hangs-up", "500", "another-id", "garbage", "too-few", "404"])
def test_every_way_of_failing_costs_no_score(liar: Any, lie: str) -> None:
    lines: list[str] = []
    honest = liar.url("honest")
    scorer = connect_replicas([liar.url(lie), honest], say=lines.append)
    calls, one = batches(4), connect(honest)
    for got, call in zip(at_once(scorer, calls), calls, strict=True):
        same(got, ask(one, *call))
    assert len(lines) == 1


def test_a_server_that_is_dead_from_the_start_is_a_line(liar: Any) -> None:
    lines: list[str] = []
    honest = liar.url("honest")
    scorer = connect_replicas([NOBODY, honest], say=lines.append)
    (call,) = batches(1)
    same(ask(scorer, *call), ask(connect(honest), *call))
    assert len(lines) == 1 and NOBODY in lines[0] and "\n" not in lines[0] and "score without it" in lines[0]


def test_where_all_fail_the_images_have_a_reason_and_each_call_tries_again(liar: Any) -> None:
    lines: list[str] = []
    scorer = connect_replicas([liar.url("500"), liar.url("hangs-up")], say=lines.append)
    for _ in range(2):
        scores = ask(scorer, *batches(1)[0])
        assert np.isnan(scores.value["mean"]).all() and set(scores.reasons) == {0, 1, 2}
        assert all("sound at http" in why for why in scores.reasons.values())
    assert len([line for line in lines if "left out" in line]) == 4


def test_none_that_answers_and_servers_of_two_scorers_are_refused(liar: Any) -> None:
    with pytest.raises(UserError, match=f"the scorer server at {NOBODY}"):
        connect_replicas([NOBODY, "http://127.0.0.1:10"])
    with (
        faulty.served(faulty.Sound(id="sound-v9")) as other,
        pytest.raises(UserError, match="serves sound-v9, another one"),
    ):
        connect_replicas([liar.url("honest"), other])
    with pytest.raises(UserError, match="is no URL of a scorer server"):
        connect_replicas([liar.url("honest"), "http://:x"])


def test_a_location_may_name_several_urls(liar: Any) -> None:
    urls = [liar.url("honest"), liar.url("no-id")]
    name, location = ScorerLocation.from_option(f"reader={urls[0]},{urls[1]}")
    assert (name, location.urls) == ("reader", tuple(urls))
    assert ScorerLocation.from_table("reader", {"url": f"{urls[0]}, {urls[1]}"})[1].urls == tuple(urls)
    assert isinstance(open_scorer("reader", {"reader": location}), ReplicatedScorer)
    assert isinstance(open_scorer("reader", {"reader": ScorerLocation(url=urls[0])}), RemoteScorer)
    with pytest.raises(UserError, match="names one server twice"):
        open_scorer("reader", {"reader": ScorerLocation(url=f"{urls[0]},{urls[0]}")})
