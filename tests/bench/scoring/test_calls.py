"""Scorers in this process: whatever they raise is a reason, one that hangs is given up, and Ctrl-C ends it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from gpobench.bench import signals
from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.evaluator import embed
from gpobench.bench.scoring import calls
from gpobench.bench.scoring.scorers import ask
from gpobench.bench.signals import AtOnce, asked_to_stop
from gpobench.bench.spec import Prompt, Scores

IMAGES, PROMPTS = np.zeros((2, 4, 4, 3), np.uint8), [Prompt("a"), Prompt("b")]


class Acting:
    """A scorer that does something first."""

    id, name, metrics = "acting-v1", "acting", ("mean",)

    def __init__(self, act: Any = lambda: None) -> None:
        self.act = act

    def __call__(self, images: Any, prompts: Any = None) -> Scores:
        self.act()
        return Scores({"mean": np.ones(len(images))})


class Hanging(Acting):
    """A scorer that does not return before it is released."""

    def __init__(self) -> None:
        self.released = threading.Event()
        super().__init__(self.released.wait)


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    scorer = Hanging()
    yield scorer
    scorer.released.set()


def raising(error: BaseException) -> Any:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    "error",
    [SystemExit(0), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), BaseException("x"), MemoryError()],
)
def test_whatever_a_scorer_raises_is_a_reason(error: BaseException) -> None:
    scores = ask(Acting(raising(error)), IMAGES, PROMPTS)
    assert np.isnan(scores.value["mean"]).all() and type(error).__name__ in scores.reasons[0]
    vectors, reasons = embed(Acting(raising(error)), IMAGES)  # type: ignore[arg-type]
    assert np.isnan(vectors).all() and type(error).__name__ in reasons[1]


def test_a_scorer_that_hangs_is_given_up_and_asked_again_when_it_returned(
    hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(calls.SECONDS, "0.1")
    assert "no answer within 0.1 s" in ask(hanging, IMAGES, PROMPTS).reasons[1]
    began = time.monotonic()
    assert "an earlier call has not returned" in ask(hanging, IMAGES, PROMPTS).reasons[0]
    assert time.monotonic() - began < 0.1  # at once: the rest of a run does not wait the limit for every batch
    assert (ask(Acting(), IMAGES, PROMPTS).value["mean"] == 1).all()  # others are not held up
    hanging.released.set()
    for _ in range(100):
        if (ask(hanging, IMAGES, PROMPTS).value["mean"] == 1).all():
            return
        time.sleep(0.01)
    raise AssertionError("it was not asked again")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon", "1e300"])
def test_a_time_limit_is_a_number_of_seconds(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(calls.SECONDS, value)
    with pytest.raises(UserError, match="GPOBENCH_SCORER_SECONDS is a number of seconds above 0"):
        calls.time_limit()


def test_one_ctrl_c_ends_a_scorer_that_hangs(hanging: Hanging, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "PATIENCE", 0.2)
    began = time.monotonic()
    with pytest.raises(AtOnce), asked_to_stop(), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, hanging, IMAGES, PROMPTS)
        os.kill(os.getpid(), signal.SIGINT)
        answer.result()
    assert time.monotonic() - began < 5 and not signals.give_up()
    hanging.released.set()


def test_a_scorer_keeps_its_thread() -> None:
    """Engines may be bound to a thread, and a thread of its own for each call would start their pools anew."""
    names: list[int] = []
    scorer = Acting(lambda: names.append(threading.get_ident()))
    for _ in range(3):
        ask(scorer, IMAGES, PROMPTS)
    assert len(set(names)) == 1 and names[0] != threading.get_ident()


def test_a_forked_process_calls_scorers_in_a_thread_of_its_own() -> None:
    assert calls.call_in_time(lambda: 1) == 1  # this process has its worker
    pid = os.fork()
    if pid == 0:
        os._exit(calls.call_in_time(lambda: 7))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
