"""Evaluation: noise that depends on prompt, ordinal and seed only, the table of scores, and disjoint splits."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch

from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.estimates import (
    Evaluation,
    add_drift,
    by_stratum,
    cmmd_by_embedder,
    differences,
    estimates,
    invalid,
)
from gpobench.bench.evaluation.evaluator import embed, evaluate, noise, sample_protocol
from gpobench.bench.evaluation.request import EvaluationRequest
from gpobench.bench.evaluation.splits import fold, prompts_hash, refuse_overlap
from gpobench.bench.flow import ode
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models.open import open_model
from gpobench.bench.registry import load, scorer
from gpobench.bench.rendering import IMAGE_FAULT
from gpobench.bench.spec import Prompt, Scores
from gpobench.bench.training.rig import BATCHES_AHEAD

SHAPE = (16, 4, 4)
PROMPTS = [Prompt(t) for t in ("a red circle", "two blue squares", "a sign", "a card", "a photo")]


@pytest.fixture(scope="module")
def model(tiny_pipe: Path) -> Any:
    return open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4))


@pytest.fixture(scope="module")
def scorers(redness: str) -> list[Any]:
    return [scorer(f"{redness}:Redness"), scorer(f"{redness}:Warmth")]


def evaluated(
    model: Any, scorers: list[Any], prompts: list[Prompt] = PROMPTS, advance: Any = lambda images: None, **more: Any
) -> Evaluation:
    request = EvaluationRequest(prompts, scorers, **{"images": 2, "seed": 7, **more})
    return evaluate(model, request, advance=advance)


class Held:
    """A scorer that answers when it is released."""

    id, name, metrics = "held-v1", "held", ("mean",)

    def __init__(self) -> None:
        self.released = threading.Event()

    def __call__(self, images: Any, prompts: Any) -> Scores:
        self.released.wait(300)
        return Scores({"mean": images.mean((1, 2, 3)) / 255})


def test_the_sampler_waits_where_a_scorer_is_four_batches_behind(model: Any, scorers: list[Any]) -> None:
    held, sampled = Held(), list[int]()
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(evaluated, model, [*scorers, held], advance=sampled.append, rows=1)
        while len(sampled) < BATCHES_AHEAD:
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(sampled) == BATCHES_AHEAD and not done.done()
        held.released.set()
        table = done.result().table
    assert len(sampled) == 10
    pd.testing.assert_frame_equal(
        table[table.scorer != "held"].reset_index(drop=True), evaluated(model, scorers, rows=1).table
    )


# Noise


def test_noise_depends_on_prompt_ordinal_and_seed_and_on_nothing_else() -> None:
    first = noise([("a", 0)], 7, SHAPE)
    torch.manual_seed(99)
    torch.rand(3)
    assert torch.equal(noise([("a", 0)], 7, SHAPE), first)
    assert torch.equal(noise([("b", 0), ("a", 1), ("a", 0)], 7, SHAPE)[2:], first)
    others = [
        noise([("b", 0)], 7, SHAPE),
        noise([("a", 1)], 7, SHAPE),
        noise([("a", 0)], 8, SHAPE),
        noise([("1\na", 0)], 7, SHAPE),
    ]
    assert not any(torch.equal(first, other) for other in others)
    many = noise([(f"p{i}", 0) for i in range(40)], 7, SHAPE)
    assert abs(float(many.mean())) < 0.03 and abs(float(many.std()) - 1) < 0.03


def starts(model: Any, monkeypatch: pytest.MonkeyPatch, scorers: list[Any], **more: Any) -> torch.Tensor:
    """The latents that the first step of each image began with, in order."""
    seen: list[torch.Tensor] = []
    velocity = model.velocity

    def spying(x: torch.Tensor, t: torch.Tensor, cond: Any, **kwargs: Any) -> torch.Tensor:
        if float(t[0]) == 1:
            seen.append(x.clone())
        return velocity(x, t, cond, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model, "velocity", spying)
        evaluated(model, scorers, **more)
    return torch.cat(seen)


def test_neither_batch_size_nor_weights_change_the_noise(
    model: Any, scorers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = starts(model, monkeypatch, scorers, rows=64)
    assert len(whole) == 10
    for more in ({"rows": 1}, {"rows": 3}, {"rows": 64, "weights": "ref"}):
        assert torch.equal(starts(model, monkeypatch, scorers, **more), whole)
    alone = starts(model, monkeypatch, scorers, rows=64, prompts=[PROMPTS[3]])
    assert torch.equal(alone, whole[6:8])  # the company a prompt keeps does not matter
    assert not torch.equal(starts(model, monkeypatch, scorers, seed=8), whole)


def test_batch_size_changes_no_score_worth_mentioning(model: Any, scorers: list[Any]) -> None:
    a, b = evaluated(model, scorers, rows=64), evaluated(model, scorers, rows=3)
    assert a.table.drop(columns=["value", "note"]).equals(b.table.drop(columns=["value", "note"]))
    assert np.allclose(a.table.value, b.table.value, atol=0.01)
    assert np.abs(a.images.astype(int) - b.images.astype(int)).max() <= 1


def test_the_same_evaluation_twice_is_the_same_to_the_last_bit(model: Any, scorers: list[Any]) -> None:
    a, b = evaluated(model, scorers), evaluated(model, scorers)
    assert a.table.equals(b.table) and np.array_equal(a.images, b.images)


@pytest.mark.parametrize("weights", ["policy", "ref"])
def test_the_sampler_is_the_protocols_loop_to_the_last_bit(model: Any, weights: str) -> None:
    """The rig's walk, which evaluation uses, against the protocol's ODE written out: each text embedded by itself."""
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[0]]
    start = noise([(p.text, k) for k, p in enumerate(prompts)], 7, model.shape)
    embedded = [model.encode([p.text]) for p in prompts]
    cond = {key: torch.cat([one[key] for one in embedded]) for key in embedded[0]}
    times, x = model.times(model.steps), start
    with torch.no_grad():
        for t, s in zip(times[:-1], times[1:], strict=True):
            v = model.velocity(x, t.expand(3), cond, guidance=model.guidance, weights=weights)
            x = ode(model.path, x, v, t.expand(3), s.expand(3)).mean
    assert torch.equal(sample_protocol(model, start, prompts, weights), x)


# The table


def test_every_image_is_in_the_table_once(model: Any, scorers: list[Any]) -> None:
    done: list[int] = []
    seen = evaluated(model, scorers, rows=4, shown=3, advance=done.append)
    assert sum(done) == 10 and len(seen.table) == 20 and len(seen.images) == 3
    assert not seen.table.duplicated(["prompt", "ordinal", "scorer", "metric"]).any()
    assert seen.keys() == ["redness/mean", "warmth/mean"] and seen.matrix("redness/mean").shape == (5, 2)
    for i, o in ((0, 0), (2, 1)):
        row = seen.table[(seen.table.prompt == i) & (seen.table.ordinal == o) & (seen.table.scorer == "redness")]
        assert row.text.item() == PROMPTS[i].text and row.value.item() == seen.matrix("redness/mean")[i, o]


@pytest.mark.parametrize("keep", [3, 5, 7, 10, 99])
def test_the_returned_images_cover_as_many_prompts_as_possible(model: Any, scorers: list[Any], keep: int) -> None:
    seen = evaluated(model, scorers, rows=4, shown=keep)
    places = [(i, o) for i in range(5) for o in range(2) if o * 5 + i < keep]  # every prompt's first, then the second
    assert list(zip(seen.shown().prompt, seen.shown().ordinal, strict=True)) == places
    assert seen.texts() == [PROMPTS[i].text for i, _ in places] and len(seen.images) == min(keep, 10)
    direct = scorers[0](seen.images, [PROMPTS[i] for i, _ in places]).value["mean"]
    assert np.allclose([seen.matrix("redness/mean")[place] for place in places], direct)
    assert seen.notes("redness") == [f"{v:.3f}" for v in direct]


@pytest.mark.parametrize("name", ["Raises", "ReturnsNone", "WrongCount"])
def test_a_failing_scorer_fails_alone(model: Any, scorers: list[Any], redness: str, name: str) -> None:
    broken = scorer(f"{redness}:{name}")
    seen = evaluated(model, [broken, scorers[1]])
    assert np.isnan(seen.matrix("redness/mean")).all() and np.isfinite(seen.matrix("warmth/mean")).all()
    assert (seen.table[seen.table.scorer == "redness"].reason != "").all()
    assert invalid(seen.table)
    number = estimates(seen)["redness/mean"]
    assert np.isnan(number["mean"]) and number["n"] == 0
    assert np.isfinite(estimates(seen)["warmth/mean"]["mean"])


def table(values: list[float], scorer_name: str = "s") -> pd.DataFrame:
    n = len(values)
    facts: dict[str, Any] = {"prompt": range(n), "ordinal": 0, "text": "", "stratum": ""}
    return pd.DataFrame({**facts, "scorer": scorer_name, "metric": "m", "value": values, "reason": "", "note": ""})


@pytest.mark.parametrize(("bad", "wrong"), [(0, False), (1, False), (2, True)])
def test_more_than_half_a_percent_of_failures_is_invalid(bad: int, wrong: bool) -> None:
    values = [np.nan] * bad + [1.0] * (200 - bad)
    assert invalid(table(values)) == wrong
    # one scorer is enough, however well the others do
    assert invalid(pd.concat([table([1.0] * 2000, "other"), table(values)])) == wrong


def test_differences_are_paired_by_prompt() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 40)
    before, after = (Evaluation(table(list(v)), np.zeros((0, 1, 1, 3), np.uint8)) for v in (base, base + 1))
    found = differences(before, after)["s/m"]
    assert found["mean"] == pytest.approx(1) and found["ci"] == pytest.approx([1, 1]) and found["p"] < 0.01
    assert found["n"] == 40
    wide = estimates(after)["s/m"]["ci"]
    assert wide[1] - wide[0] > 3


# Strata


def test_the_mean_is_the_mean_of_the_strata() -> None:
    facts = table([1.0] * 30 + [0.0] * 10)
    facts["stratum"] = ["many"] * 30 + ["few"] * 10
    seen = Evaluation(facts, np.zeros((0, 1, 1, 3), np.uint8))
    assert estimates(seen)["s/m"]["mean"] == 0.5
    parts = by_stratum(seen, seen)
    assert list(parts) == ["many", "few"]
    assert parts["many"]["before"]["s/m"]["mean"] == 1 and parts["few"]["after"]["s/m"]["n"] == 10
    assert parts["few"]["delta"]["s/m"]["mean"] == 0
    assert by_stratum(Evaluation(table([1.0, 0.0]), seen.images), Evaluation(table([1.0, 0.0]), seen.images)) == {}


# Diversity and drift


@dataclass(frozen=True)
class MeanColour:
    """Embeds an image as its mean colour; blind to images whose first pixel is pure white."""

    id: str = "colour-v1"
    name: str = "colour"
    distance: Literal["cosine", "squared"] = "squared"
    blind: bool = False

    def __call__(self, images: Any) -> Any:
        if self.blind and any((image[0, 0] == image[0, 0].max()).all() and image[0, 0, 0] > 250 for image in images):
            raise RuntimeError("too bright")
        return images.mean((1, 2)).astype(np.float32) / 255


def test_diversity_is_the_mean_distance_between_the_images_of_a_prompt(model: Any, scorers: list[Any]) -> None:
    seen = evaluated(model, scorers[:1], images=3, shown=15, diversity=[MeanColour()], drift=[MeanColour()])
    spread = seen.matrix("diversity-colour/pairwise")
    v = seen.images.reshape(5, 3, *seen.images.shape[1:]).mean((2, 3)) / 255
    for prompt in range(5):
        pairs = [((v[prompt, a] - v[prompt, b]) ** 2).sum() for a, b in ((0, 1), (0, 2), (1, 2))]
        assert spread[prompt].mean() == pytest.approx(np.mean(pairs), rel=1e-4)
    assert np.allclose(seen.vectors["colour"], v.reshape(15, 3), atol=1e-6)
    smaller = evaluated(model, scorers[:1], images=3, rows=2, diversity=[MeanColour()])
    assert np.allclose(smaller.matrix("diversity-colour/pairwise"), spread, atol=1e-4)
    one = evaluated(model, scorers[:1], images=1, diversity=[MeanColour()])
    assert one.keys() == ["redness/mean"]  # there is nothing to compare


def test_drift_is_nothing_against_oneself_and_the_distance_against_another(model: Any, scorers: list[Any]) -> None:
    e = MeanColour()
    base, other = (evaluated(model, scorers[:1], seed=seed, drift=[e]) for seed in (7, 8))
    same = add_drift(base, base, [e])[1]
    assert (same.matrix("drift-colour/paired") == 0).all()
    before, after = add_drift(base, other, [e])
    gone = ((base.vectors["colour"].astype(float) - other.vectors["colour"]) ** 2).sum(1)
    assert np.allclose(after.matrix("drift-colour/paired").ravel(), gone)
    assert differences(before, after)["drift-colour/paired"]["mean"] == pytest.approx(gone.mean())
    assert cmmd_by_embedder(base, base, ["colour"])["colour"]["mean"] == pytest.approx(0, abs=1e-9)
    assert cmmd_by_embedder(base, other, ["colour"])["colour"]["mean"] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_is_judged_by_nobody(
    model: Any, scorers: list[Any], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """No scorer and no embedder gets it; it is missing with the reason, and every other number stands."""
    parts: Any = {"diversity": [MeanColour()], "drift": [MeanColour()]}
    sound = evaluated(model, scorers, rows=4, **parts)
    decode = model.decode

    def damaged(x0: torch.Tensor) -> torch.Tensor:
        images = decode(x0)
        images[3 if len(images) == 4 else slice(None), 1, 2, 3] = value  # the last batch, of two, as a whole
        return images

    monkeypatch.setattr(model, "decode", damaged)
    spoilt = evaluated(model, scorers, rows=4, **parts)
    lost = [(1, 1), (3, 1), (4, 0), (4, 1)]  # rows 3 and 7, and the last two
    for key in ("redness/mean", "warmth/mean"):
        before, after = sound.matrix(key), spoilt.matrix(key)
        assert [tuple(place) for place in np.argwhere(np.isnan(after))] == lost
        assert np.array_equal(before[~np.isnan(after)], after[~np.isnan(after)])
    assert np.isnan(spoilt.vectors["colour"]).all(1).nonzero()[0].tolist() == [3, 7, 8, 9]
    unscored = [f"{name}: {IMAGE_FAULT}" for name in ("redness", "warmth", "colour")]
    assert sorted(spoilt.reasons()) == sorted([*unscored, "the prompt's other images could not be embedded"])
    assert invalid(spoilt.table)


def test_an_embedder_gets_images_that_it_cannot_write_on() -> None:
    class Vandal(MeanColour):
        def __call__(self, images: Any) -> Any:
            images[:] = 0
            return super().__call__(images)

    images = np.full((2, 4, 4, 3), 9, np.uint8)
    vectors, reasons = embed(Vandal(), images)
    assert np.isnan(vectors).all() and (images == 9).all()
    assert reasons == dict.fromkeys((0, 1), "colour: ValueError: assignment destination is read-only")


def test_an_embedder_that_fails_costs_its_own_rows(model: Any, scorers: list[Any]) -> None:
    images = np.zeros((3, 4, 4, 3), np.uint8)
    images[1] = 255
    vectors, reasons = embed(MeanColour(blind=True), images)
    assert vectors.shape == (3, 3) and np.isnan(vectors[1]).all() and np.isfinite(vectors[[0, 2]]).all()
    assert reasons == {1: "colour: RuntimeError: too bright"}


# Splits


def test_what_makes_two_prompts_the_same() -> None:
    same = [Prompt('A sign that says "CAT"'), Prompt("a sign, that says: cat!"), Prompt("  A SIGN THAT  says CAT")]
    assert len({fold(p) for p in same}) == 1
    assert fold(Prompt("one thing", {"target": "CAT"})) == fold(Prompt("another", {"target": "cat"}))
    different = [Prompt("猫の絵"), Prompt("犬の絵"), Prompt("кот"), Prompt("a cat"), Prompt("!"), Prompt("?")]
    assert len({fold(p) for p in different}) == 6


def test_overlapping_splits_are_refused(redness: str) -> None:
    paint = load("task", f"{redness}:Paint")
    refuse_overlap(paint(), "glyphs")
    texts: dict[str, list[str]] = {"train": ["a cat"], "validation": ["a dog"], "test": ["a cow"]}
    for split, text, said in (
        ("test", "A cat.", "test prompt stands in the train split (1 in all): 'A cat.'"),
        ("validation", "a CAT", "validation prompt stands in the train split (1 in all): 'a CAT'"),
        ("validation", "a, cow", "validation prompt stands in the test split (1 in all): 'a, cow'"),
    ):
        with pytest.raises(UserError) as caught:
            refuse_overlap(paint(texts={**texts, split: [text]}), "glyphs")
        assert said in str(caught.value)


def test_the_hash_of_prompts_knows_their_order() -> None:
    assert prompts_hash(PROMPTS) == prompts_hash(list(PROMPTS)) != prompts_hash(PROMPTS[::-1])
    assert prompts_hash(PROMPTS) != prompts_hash(PROMPTS[:-1])
