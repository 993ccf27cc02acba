"""A thousand planted faults: no broken score becomes a number, every gap has a reason, and all are counted."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpobench.bench import registry
from gpobench.bench.assets.glyphs import draw_word
from gpobench.bench.budget import Budget, Meter
from gpobench.bench.errors import UserError
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.rendering import RenderedImages
from gpobench.bench.scoring import remote
from gpobench.bench.scoring.remote import Limits, RemoteScorer, connect, start
from gpobench.bench.spec import Prompt, Scorer, Scores
from gpobench.bench.training.rig import MeteredRig, timed_scores
from gpobench.rewards import reader

FAULTY = str(Path(__file__).parents[1] / "faulty.py")
faulty: Any = sys.modules[registry.load("scorer", f"{FAULTY}:Sound").__module__]
SMALL = Limits(images=5, bytes=50_000, pixels=4096)  # batches are cut, and 64x64 is the largest picture


@dataclass
class Bench:
    """The sound scorer, its real server, and all the broken ones."""

    liar: Any
    sound: RemoteScorer  # a real server
    dead: RemoteScorer
    lying: dict[str, RemoteScorer]
    monkeypatch: pytest.MonkeyPatch

    def scorer(self, fault: Any, bad: tuple[int, ...]) -> Scorer:
        """A scorer that will do it in these rows."""
        if fault.family == "scorer":
            return faulty.Spoilt({**faulty.WHOLE, **faulty.SOME}[fault.kind], bad)
        if fault.family == "server":
            if fault.kind not in self.lying:
                self.lying[fault.kind] = connect(self.liar.url(fault.kind), timeout=20)
                self.lying[fault.kind].timeout = 0.1 if fault.kind in faulty.SLOW else 20
            return self.lying[fault.kind]
        if fault.kind == "of a scorer":
            return faulty.Sound()
        return self.dead if fault.family == "dead" else self.sound

    def pictures(self, fault: Any, bad: tuple[int, ...]) -> None:
        """From now on the rows that are bad leave as no PNG; counted from the next picture on."""
        seen: list[int] = []

        def png(image: Any) -> bytes:
            seen.append(len(seen))
            broken = fault.family == "picture" and seen[-1] in bad
            return faulty.PICTURES[fault.kind](image) if broken else faulty.PNG(image)

        self.monkeypatch.setattr(remote, "encode_png", png)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(remote, "PAUSE", 0.002)
    liar, mortal = faulty.Liar(), faulty.Liar()
    dead = connect(mortal.url("honest"), timeout=20)
    mortal.close()
    with faulty.served(faulty.Sound(), SMALL) as url:
        yield Bench(liar, connect(url, timeout=20), dead, {}, monkeypatch)
    liar.close()


def lost(fault: Any, n: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Which rows of n the fault costs."""
    if fault.lost == "some":
        return tuple(sorted(rng.choice(n, int(rng.integers(1, n)), replace=False).tolist()))
    return tuple(range(n)) if fault.lost == "all" else ()


def check(scores: Scores, sound: Scores, bad: tuple[int, ...], n: int) -> None:
    """The three laws."""
    mean = np.asarray(scores.value["mean"])
    assert mean.shape == (n,) and mean.dtype == np.float64
    assert np.flatnonzero(np.isnan(mean)).tolist() == list(bad)  # no faulty row is a number, +-inf included ...
    good = [row for row in range(n) if row not in bad]
    assert np.isfinite(mean[good]).all() and np.array_equal(
        mean[good], sound.value["mean"][good]
    )  # ... and no other is lost
    for row in bad:
        assert isinstance(scores.reasons[row], str) and scores.reasons[row].strip(), row


def test_a_thousand_faults(bench: Bench) -> None:
    rng = np.random.default_rng(1)
    faults = faulty.drawn(1000, seed=0)
    assert len(faults) >= 1000
    meter = Meter(Budget(nfe=1.0))
    injected = 0
    for fault in faults:
        n = int(rng.integers(2, 8))
        side = 65 if fault.family == "too large" else 16
        images = rng.integers(0, 256, (n, side, side, 3), np.uint8)
        prompts = [Prompt(f"number {i}", {"target": "X", "boxes": [[1, 2]]}, "s") for i in range(n)]
        sound = faulty.Sound()(images, prompts)
        bad = lost(fault, n, rng)
        if fault.family == "prompt":
            prompts = [faulty.PROMPTS[fault.kind] if row in bad else prompt for row, prompt in enumerate(prompts)]
        if fault.family == "missing prompts":
            prompts = prompts[: int(rng.integers(0, n))]
        scorer = bench.scorer(fault, bad)
        bench.pictures(fault, bad if fault.family == "picture" else ())
        scores, seconds = timed_scores(scorer, RenderedImages(images), prompts)
        try:
            check(scores, sound, bad, n)
        except (AssertionError, KeyError) as error:
            raise AssertionError(f"{fault} lost {bad} of {n}, got {scores}") from error
        meter.charge_scorer(scorer.name, n)
        meter.note_scorer(scorer.name, seconds, int(np.isnan(scores.value["mean"]).sum()))
        injected += len(bad)
    assert meter.errors == injected > 2000


def test_a_run_counts_every_fault_and_loses_no_sound_score(bench: Bench, tiny_pipe: Path) -> None:
    """Through the rig, one call of each kind: the meter shows as many errors as rows were spoilt."""
    model = open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4), seed=0)
    book = [Prompt(f"number {i}") for i in range(4)]
    rig = MeteredRig(model, book, faulty.Sound(), Meter(Budget(nfe=1e9)), seed=0)
    rng = np.random.default_rng(2)
    x0, who = rig.noise(4), rig.prompts(4)
    sound = rig.score(x0, who)
    assert rig.meter.errors == 0 and bool(sound.isfinite().all())
    injected = 0
    for fault in faulty.kinds():
        if fault.family in ("prompt", "missing prompts", "too large"):  # the rig has its own prompts and pictures
            continue
        bad = lost(fault, 4, rng)
        rig.scorer = bench.scorer(fault, bad)
        bench.pictures(fault, bad if fault.family == "picture" else ())
        reward = rig.score(x0, who)
        assert reward.isnan().nonzero().flatten().tolist() == list(bad), fault
        good = ~reward.isnan()
        assert torch.equal(reward[good], sound[good]), fault
        injected += len(bad)
        assert rig.meter.errors == injected, fault
        assert len(rig.failures) <= 20 and all(why.strip() for why in rig.failures)
    rig.close()


# The real thing: the held-out reader in a process of its own


@pytest.fixture(scope="module")
def local() -> Scorer:
    return reader.make()


@pytest.fixture(scope="module")
def words() -> tuple[np.ndarray, list[Prompt]]:
    """150 pictures of which some are noise: there are scores between 0 and 1, and more pictures than one request takes."""
    rng = np.random.default_rng(0)
    texts = ["ACT", "BOX", "JUDGE", "SILK", "FROWN"] * 30
    images = np.stack([draw_word(word) for word in texts])
    images[::3] = images[::3, :, ::-1]
    images[::7] = rng.integers(0, 256, images[::7].shape, np.uint8)
    return images, [Prompt(f'a sign that says "{word}"', {"target": word}) for word in texts]


@pytest.fixture(scope="module")
def child() -> Iterator[RemoteScorer]:
    opened = start(sys.executable, "reader", timeout=60)
    yield opened
    opened.close()


def same(a: Scores, b: Scores) -> None:
    assert list(a.value) == list(b.value)
    assert all(np.asarray(a.value[m]).tobytes() == np.asarray(b.value[m]).tobytes() for m in a.value)
    assert dict(a.reasons) == dict(b.reasons) and list(a.notes or ()) == list(b.notes or ())


def test_another_process_gives_the_same_bits(child: RemoteScorer, local: Scorer, words: Any) -> None:
    assert (child.id, child.name, tuple(child.metrics)) == (local.id, local.name, tuple(local.metrics))
    here, there = local(*words), child(*words)
    same(here, there)
    assert len(set(here.value["soft"])) > 3
    images, prompts = words
    same(
        timed_scores(local, RenderedImages(images[:, :16]), prompts)[0],
        timed_scores(child, RenderedImages(images[:, :16]), prompts)[0],
    )  # its own refusal, word for word


def test_four_threads_agree(child: RemoteScorer, local: Scorer, words: Any) -> None:
    images, prompts = words
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(child, images[i : i + 70], prompts[i : i + 70]) for i in (0, 20, 40, 60)]
        for i, answer in zip((0, 20, 40, 60), asked):
            same(local(images[i : i + 70], prompts[i : i + 70]), answer.result())


def test_only_who_has_the_token_is_answered(child: RemoteScorer) -> None:
    with pytest.raises(
        UserError, match=f"{child.url}: answered 401: the token is missing or wrong; its token is"
    ) as refused:
        connect(child.url, token="guess")
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="answered 401"):
        connect(child.url)


def test_a_killed_process_is_started_again(child: RemoteScorer, local: Scorer, words: Any) -> None:
    """Killed between two calls, and in the middle of one: numbers or reasons, and never a hang."""
    images, prompts = words
    began = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        before = child.pid
        asked = pool.submit(timed_scores, child, RenderedImages(images), prompts)
        time.sleep(0.05)
        os.kill(before, signal.SIGKILL)
        scores, _ = asked.result(timeout=120)
    for row in range(len(images)):
        finite = np.isfinite(scores.value["soft"][row])
        assert finite or scores.reasons[row].strip()
    same(local(images, prompts), child(images, prompts))
    assert child.pid != before and time.perf_counter() - began < 120


def test_a_closed_one_says_so(local: Scorer, words: Any) -> None:
    images, prompts = words
    with faulty.served(local) as url:
        opened = connect(url)
        same(local(images[:3], prompts[:3]), opened(images[:3], prompts[:3]))
    opened.timeout = 5
    scores, _ = timed_scores(opened, RenderedImages(images[:3]), prompts[:3])
    assert (
        np.isnan(scores.value["soft"]).all()
        and "ConnectionRefusedError" in scores.reasons[0]
        and "3 tries" in scores.reasons[2]
    )
