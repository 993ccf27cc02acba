"""Scorers: references and locations are parsed, blends weighed, and every answer is checked."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpobench.bench import registry
from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.evaluator import embed
from gpobench.bench.scoring.references import (
    TOKEN,
    ScorerLocation,
    ScorerReference,
    blend_name,
    check_locations,
    scorer_locations,
)
from gpobench.bench.scoring.remote import RemoteScorer
from gpobench.bench.scoring.scorers import (
    Blend,
    InProcessEmbedder,
    InProcessScorer,
    ask,
    close_scorers,
    open_scorer,
)
from gpobench.bench.spec import Images, Prompt, Scores

FAULTY = str(Path(__file__).parents[2] / "faulty.py")
faulty: Any = sys.modules[registry.load("scorer", f"{FAULTY}:Sound").__module__]


@dataclass(frozen=True)
class Channel:
    """The mean of one colour; it fails where that colour is absent, and on all where told to."""

    channel: int
    name: str
    metrics: tuple[str, ...] = ("mean", "least")
    broken: str = ""

    @property
    def id(self) -> str:
        return f"channel-{self.channel}-v1"

    def __call__(self, images: Images, prompts: Any) -> Scores:
        if self.broken:
            raise RuntimeError(self.broken)
        each = images[..., self.channel].reshape(len(images), -1).astype(np.float64) / 255
        mean, dark = each.mean(1), each.max(1) == 0
        mean[dark] = np.nan
        return Scores(
            {"mean": mean, "least": each.min(1)},
            {int(row): "no colour" for row in np.flatnonzero(dark)},
            ["saw"] * len(each),
        )


RED, GREEN, BLUE = Channel(0, "red"), Channel(1, "green"), Channel(2, "blue")
PROMPTS = [Prompt("x")] * 6


@pytest.fixture
def images() -> Images:
    drawn = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    drawn[2, ..., 0] = 0
    drawn[4, ..., :2] = 0
    return drawn


# References


def weights(text: str) -> list[tuple[str, float]]:
    """The scorers of a reference and their weights."""
    return [(scorer.text, weight) for scorer, weight in ScorerReference.parse(text).weighted]


NAMES = st.from_regex(r"[a-z0-9][a-z0-9_.:-]{0,12}[a-z0-9]", fullmatch=True)
WEIGHTS = st.floats(allow_nan=False, allow_infinity=False).filter(bool)


@settings(max_examples=25)  # each looks names up among the installed packages
@given(st.dictionaries(NAMES, WEIGHTS, min_size=1, max_size=3), st.sampled_from(["", " ", "  \t"]))
def test_what_is_written_is_read(terms: dict[str, float], space: str) -> None:
    written = blend_name(terms.items())
    assert weights(written) == sorted(terms.items())
    spaced = f"{space}+{space}".join(f"{space}{name}{space}*{space}{weight!r}{space}" for name, weight in terms.items())
    assert dict(weights(spaced)) == terms and blend_name(weights(spaced)) == written


@pytest.mark.parametrize(
    ("reference", "read"),
    [
        ("rapidocr", [("rapidocr", 1)]),
        ("rapidocr:page", [("rapidocr:page", 1)]),
        (" pickscore*0.5 + rapidocr * 1 ", [("pickscore", 0.5), ("rapidocr", 1)]),
        ("a-b.c:d-e*1e-3+f", [("a-b.c:d-e", 0.001), ("f", 1)]),
        ("a*1e+3+b*.5+c*2.", [("a", 1000), ("b", 0.5), ("c", 2)]),
        ("a*-0.5+b*+2E2", [("a", -0.5), ("b", 200)]),
        ("my dir/mine.py:Mine*2+rapidocr", [("my dir/mine.py:Mine", 2), ("rapidocr", 1)]),
    ],
)
def test_references(reference: str, read: list[tuple[str, float]]) -> None:
    assert weights(reference) == read


@pytest.mark.parametrize(
    "reference",
    [
        "",
        " ",
        "+",
        "a+",
        "+a",
        "a++b",
        "a*",
        "a*b",
        "a*0.5*2",
        "*2",
        "0.5*a",
        "a*1e",
        "a*1_0",
        "a*0x1",
        "a*2 b",
        "a*1e+",
    ],
)
def test_what_is_no_blend_is_said_in_one_line(reference: str) -> None:
    with pytest.raises(UserError, match="write NAME.WEIGHT") as caught:
        ScorerReference.parse(reference)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weight", ["0", "-0", "0.0e5", "nan", "NaN", "inf", "-inf", "Inf", "1e999"])
def test_a_weight_is_finite_and_not_0(weight: str) -> None:
    with pytest.raises(UserError, match="has the weight"):
        ScorerReference.parse(f"a+b*{weight}")


def test_nobody_counts_twice() -> None:
    with pytest.raises(UserError, match="names 'a' twice; add the two weights"):
        ScorerReference.parse("a*0.5+b+a")


def test_a_path_alone_may_hold_anything(tmp_path: Path) -> None:
    file = tmp_path / "one+two*3" / "mine.py"
    file.parent.mkdir()
    file.write_text(Path(FAULTY).read_text("utf-8"))
    reference = ScorerReference.parse(f"{file}:Sound")
    assert reference == ScorerReference(f"{file}:Sound", f"{file}:Sound", file) and not reference.terms
    assert open_scorer(f"{file}:Sound").name == "sound"


@pytest.mark.parametrize(
    ("text", "base", "file"),
    [
        ("rapidocr", "rapidocr", None),
        (" rapidocr:page ", "rapidocr", None),
        ("mine.py:Mine", "mine.py:Mine", "mine.py"),
    ],
)
def test_one_scorer_has_a_base_name_or_a_file(text: str, base: str, file: str | None) -> None:
    reference = ScorerReference.parse(text)
    assert (reference.text, reference.base) == (text.strip(), base)
    assert reference.file == (Path(file) if file else None) and reference.scorers == (reference,)


def test_a_location_in_place_of_a_scorer_names_the_option() -> None:
    with pytest.raises(
        UserError, match="--scorer-at rapidocr:page=http://a:1, and 'rapidocr:page' as the scorer"
    ) as caught:
        ScorerReference.parse("rapidocr:page=http://a:1")
    assert "\n" not in str(caught.value)


def test_a_location_is_of_a_scorer_that_is_named() -> None:
    references = [ScorerReference.parse(text) for text in ("rapidocr:page", "reader*0.5+pickscore:tiny")]
    check_locations(references, ["rapidocr", "pickscore:tiny", "reader"])
    with pytest.raises(UserError, match="no --scorer names it: add --scorer rapidocr:line"):
        check_locations(references, ["rapidocr:line"])


def test_the_location_of_a_part_is_not_that_of_the_blend() -> None:
    """The text of this blend begins with `rapidocr:`, which is no reason to look for the blend at rapidocr's location."""
    with faulty.served(faulty.Sound(), reference="rapidocr:page") as url:
        blend = open_scorer("rapidocr:page+reader", {"rapidocr": ScorerLocation(url=url)})
    assert isinstance(blend, Blend) and blend.name == "reader+sound"


# Blends


def test_a_blend_is_the_weighted_sum(images: Images) -> None:
    blend = Blend([(RED, 0.5), (GREEN, -2.0), (BLUE, 1.0)])
    assert blend.name == "blue+green*-2+red*0.5"
    assert list(blend.metrics) == [
        "blend",
        "blue.mean",
        "blue.least",
        "green.mean",
        "green.least",
        "red.mean",
        "red.least",
    ]
    assert blend.id == "blend(0.5 * channel-0-v1, -2.0 * channel-1-v1, 1.0 * channel-2-v1)"
    scores, red, green, blue = (scorer(images, PROMPTS) for scorer in (blend, RED, GREEN, BLUE))
    wanted = blue.value["mean"] - 2 * green.value["mean"] + 0.5 * red.value["mean"]
    np.testing.assert_array_equal(scores.value["blend"], wanted)
    np.testing.assert_array_equal(scores.value["green.least"], green.value["least"])
    assert np.flatnonzero(np.isnan(scores.value["blend"])).tolist() == [2, 4]
    assert scores.reasons == {2: "red: no colour", 4: "green: no colour; red: no colour"}
    assert scores.notes == ["blue: saw | green: saw | red: saw"] * 6
    assert np.isfinite(scores.value["blue.mean"]).all()  # the parts that could are shown


def test_the_order_of_a_sum_changes_no_bit(images: Images) -> None:
    weighted = [(RED, 0.1), (GREEN, 1 / 3), (BLUE, 1e-3)]
    blends = [Blend(order) for order in permutations(weighted)]
    assert len({(b.id, b.name, tuple(b.metrics), b(images, PROMPTS).value["blend"].tobytes()) for b in blends}) == 1


def test_batched_is_looped_and_a_permuted_batch_permutes(images: Images) -> None:
    blend = Blend([(RED, 0.5), (GREEN, 2.0)])
    whole = blend(images, PROMPTS)
    for metric in blend.metrics:
        each = [blend(images[i : i + 1], PROMPTS[:1]).value[metric][0] for i in range(6)]
        np.testing.assert_array_equal(whole.value[metric], each)
        np.testing.assert_array_equal(blend(images[::-1], PROMPTS).value[metric], whole.value[metric][::-1])


def test_a_part_that_fails_takes_the_blend_with_it_and_says_so(images: Images) -> None:
    fails = [replace(RED, broken="on fire"), *(faulty.Spoilt(spoil, ()) for spoil in faulty.WHOLE.values())]
    for part in fails:
        scores = ask(Blend([(part, 1.0), (BLUE, 1.0)]), images, PROMPTS)
        assert np.isnan(scores.value["blend"]).all() and np.isfinite(scores.value["blue.mean"]).all()
        assert all(part.name in scores.reasons[row] for row in range(6))


def test_a_blend_may_be_a_part(images: Images) -> None:
    inner = Blend([(RED, 0.5), (GREEN, 1.0)])
    outer = Blend([(inner, 2.0), (BLUE, 1.0)])
    assert outer.name == "(green+red*0.5)*2+blue" and "green+red*0.5.blend" in outer.metrics
    wanted = 2 * inner(images, PROMPTS).value["blend"] + BLUE(images, PROMPTS).value["mean"]
    np.testing.assert_allclose(outer(images, PROMPTS).value["blend"], wanted, rtol=1e-15)


def test_a_blend_refuses_what_it_cannot_tell_apart() -> None:
    for wrong in (
        [],
        [(RED, 1.0), (Channel(1, "red"), 1.0)],
        [(RED, 0.0)],
        [(RED, float("nan"))],
        [(RED, float("inf"))],
    ):
        with pytest.raises(UserError, match="a blend"):
            Blend(wrong)


def test_real_ones_blend() -> None:
    blend = open_scorer("reader * 0.25 + rapidocr")
    assert blend.name == "rapidocr+reader*0.25" and "0.25 * reader-1/" in blend.id and "1.0 * rapidocr-3" in blend.id
    assert open_scorer("rapidocr+reader*.25").id == blend.id
    assert open_scorer("reader*1").name == "reader"
    assert open_scorer("reader*2").name == "reader*2"
    with pytest.raises(UserError, match="different names"):
        open_scorer("rapidocr+rapidocr:page")
    with pytest.raises(UserError, match="unknown scorer 'raeder'; did you mean 'reader'"):
        open_scorer("rapidocr+raeder")


# Asking


@pytest.mark.parametrize(
    ("values", "why"),
    [(["0.5", "1"], "returned <U3 for mean, not numbers"), ([1 + 2j, 0], "returned complex128 for mean, not numbers"),
     ([0.5, "1"], "for mean, not numbers"), (np.array(["0.5", 1], object), "returned object for mean"),
     (np.array([0, 1], "datetime64[s]"), "not numbers"), (None, "shape ()"), ([[0.5], [1.0]], "shape (2, 1)")],
)  # fmt: skip
def test_what_merely_looks_like_numbers_is_none(values: Any, why: str) -> None:
    scores = ask(faulty.Spoilt(faulty.column(lambda v: values), ()), np.zeros((2, 4, 4, 3), np.uint8), PROMPTS[:2])
    assert np.isnan(scores.value["mean"]).all() and all(why in scores.reasons[row] for row in range(2)), scores


@pytest.mark.parametrize("value", [1e39, -1e39, 1e308, 3.5e38])
def test_a_score_that_is_infinite_in_float32_is_no_score(value: float) -> None:
    """Rewards are trained on in float32; the largest number there is 3.4e38."""
    scores = ask(
        faulty.Spoilt(faulty.column(lambda v: [value, 3.4e38]), ()), np.zeros((2, 4, 4, 3), np.uint8), PROMPTS[:2]
    )
    assert np.isnan(scores.value["mean"][0]) and scores.value["mean"][1] == 3.4e38
    assert scores.reasons == {0: f"sound: returned {value} for mean"}


def painting_numpy(images: Images) -> None:
    images[:] = 0


def painting_torch(images: Images) -> None:
    torch.from_numpy(images).zero_()  # torch does not know that an array is read-only


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize(
    ("paint", "why"),
    [(painting_numpy, "vandal: ValueError: assignment destination is read-only"), (painting_torch, "")],
)
def test_a_scorer_that_writes_on_its_input_changes_no_other(paint: Any, why: str) -> None:
    """Neither its pixels nor the facts of its prompts are what the next scorer gets."""

    class Vandal(faulty.Sound):
        def __call__(self, images: Images, prompts: Any) -> Scores:
            for prompt in prompts:
                prompt.meta["target"] = "changed"
                prompt.meta["boxes"][0].append(9)
            paint(images)
            return super().__call__(images, prompts)

    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    prompts = [Prompt(str(row), {"target": "X", "boxes": [[1, 2]]}) for row in range(4)]
    whole, vandal = images.copy(), replace(Vandal(), name="vandal", id="vandal-v1")
    scores = ask(Blend([(vandal, 1.0), (faulty.Sound(), 1.0)]), images, prompts)
    assert np.array_equal(images, whole) and all(p.meta == {"target": "X", "boxes": [[1, 2]]} for p in prompts)
    np.testing.assert_array_equal(scores.value["sound.mean"], faulty.Sound()(whole, prompts).value["mean"])
    assert scores.reasons == (dict.fromkeys(range(4), why) if why else {})
    assert np.isnan(scores.value["blend"]).all() == bool(why)


def test_a_scorer_whose_id_changes_gives_no_more_scores() -> None:
    """As one behind a URL: numbers of two scorers never stand in one column."""

    class Restless:
        id, name, metrics = "restless-v1", "sound", ("mean", "spread")

        def __call__(self, images: Images, prompts: Any) -> Scores:
            return faulty.Sound()(images, prompts)

    images, part = np.zeros((2, 4, 4, 3), np.uint8), Restless()
    scorer = InProcessScorer(part)
    blend = Blend([(scorer, 1.0)])
    assert np.isfinite(ask(scorer, images, PROMPTS[:2]).value["mean"]).all()
    part.id = "restless-v2"
    for _ in range(2):
        scores = ask(scorer, images, PROMPTS[:2])
        assert scorer.id == "restless-v1" and all(np.isnan(column).all() for column in scores.value.values())
        why = "sound: ScorerChanged: its id is restless-v2 now, was restless-v1"
        assert scores.reasons == dict.fromkeys((0, 1), why)
        assert np.isnan(ask(blend, images, PROMPTS[:2]).value["blend"]).all()
    assert isinstance(open_scorer(f"{FAULTY}:Sound"), InProcessScorer)


def test_an_embedder_whose_id_changes_gives_no_more_vectors() -> None:
    class Restless:
        id, name, distance = "restless-v1", "restless", "squared"

        def __call__(self, images: Images) -> Any:
            return images.reshape(len(images), -1).astype(np.float32)

    images, part = np.zeros((2, 4, 4, 3), np.uint8), Restless()
    embedder = InProcessEmbedder(part)  # type: ignore[arg-type]
    assert np.isfinite(embed(embedder, images)[0]).all()
    part.id = "restless-v2"
    vectors, reasons = embed(embedder, images)
    assert np.isnan(vectors).all() and embedder.id == "restless-v1"
    assert set(reasons.values()) == {"restless: ScorerChanged: its id is restless-v2 now, was restless-v1"}


@pytest.mark.parametrize(
    "values", [[1, 2], [True, False], np.float32([0.5, 1]), np.array([1, None], object), np.uint8([1, 2])]
)
def test_what_is_a_number_stays_one(values: Any) -> None:
    scores = ask(faulty.Spoilt(faulty.column(lambda v: values), ()), np.zeros((2, 4, 4, 3), np.uint8), PROMPTS[:2])
    np.testing.assert_array_equal(scores.value["mean"], np.array([np.nan if v is None else float(v) for v in values]))
    assert scores.value["mean"].dtype == np.float64


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even that")


def test_a_scorer_ends_nothing_but_its_own_answer() -> None:
    one = np.zeros((1, 4, 4, 3), np.uint8)
    for error, said in (
        (SystemExit(3), "sound: SystemExit: 3"),
        (Speechless(), "sound: Speechless"),
        (KeyError(), "sound: KeyError"),
        (KeyboardInterrupt(), "sound: KeyboardInterrupt"),  # the person at the keyboard interrupts the thread that asks
    ):
        scores = ask(faulty.Spoilt(faulty.raising(error), ()), one, PROMPTS[:1])
        assert np.isnan(scores.value["mean"][0]) and scores.reasons == {0: said}


def test_a_prompt_that_is_refused_costs_the_others_nothing(images: Images) -> None:
    class Picky(faulty.Sound):
        def __call__(self, images: Images, prompts: Any) -> Scores:
            if refused := [prompt.text for prompt in prompts if prompt.text == "unicorn"]:
                raise UserError(f"no {refused[0]} here")
            return super().__call__(images, prompts)

    prompts = [Prompt("unicorn" if row in (1, 4) else str(row)) for row in range(6)]
    scores, sound = ask(Picky(), images, prompts), ask(faulty.Sound(), images, prompts)
    assert scores.reasons == dict.fromkeys((1, 4), "sound: UserError: no unicorn here")
    for metric, column in scores.value.items():
        assert np.array_equal(np.isnan(column), [row in (1, 4) for row in range(6)])
        assert np.array_equal(np.delete(column, [1, 4]), np.delete(sound.value[metric], [1, 4]))
    assert scores.notes and sound.notes and scores.notes[2] == sound.notes[2] and scores.notes[1] == ""


def test_every_gap_has_a_reason_whatever_the_scorer_says() -> None:
    def spoil(scores: Scores, bad: list[int]) -> Scores:
        return Scores(
            {"mean": np.array([np.nan, 1.0]), "spread": np.array([1.0, np.inf])},
            {0: "", 7: "of nobody", -1: "nor this"},
        )

    scores = ask(faulty.Spoilt(spoil, ()), np.zeros((2, 4, 4, 3), np.uint8), PROMPTS[:2])
    assert scores.reasons == {0: "sound: returned nan for mean", 1: "sound: returned inf for spread"}


def test_what_is_said_beside_numbers_ends_no_run() -> None:
    """A table of text takes text: not arrays, numbers or half characters."""

    def spoil(scores: Scores, bad: list[int]) -> Scores:
        notes: Any = [np.arange(3), 7, {"a": 1}, "half \ud800"]
        return Scores({"mean": np.full(4, np.nan), "spread": np.ones(4)}, {0: notes[0], 1: 3, 2: "half \ud800"}, notes)  # type: ignore[dict-item]

    scores = ask(faulty.Spoilt(spoil, ()), np.zeros((4, 4, 4, 3), np.uint8), PROMPTS[:4])
    said = [*scores.reasons.values(), *(scores.notes or ())]
    assert len(said) == 8 and all(isinstance(text, str) and text.encode() for text in said)
    pd.DataFrame({"note": list(scores.notes or ())}).to_parquet(io.BytesIO())


# Locations


def test_locations_from_options_and_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    tables = {"ocr": {"url": "http://a:1", "token": "t", "timeout": 5}, "geneval": {"python": "/envs/mm/bin/python"}}
    found = scorer_locations(["ocr=http://127.0.0.1:8100", "my file.py:Mine = https://b/x?=y"], tables)
    assert found == {
        "ocr": ScorerLocation(url="http://127.0.0.1:8100"),  # an option wins
        "geneval": ScorerLocation(python="/envs/mm/bin/python"),
        "my file.py:Mine": ScorerLocation(url="https://b/x?=y"),
    }
    assert (
        scorer_locations([], tables)["ocr"] == ScorerLocation("http://a:1", "", "t", 5)
        and scorer_locations([], {}) == {}
    )
    monkeypatch.setenv(TOKEN, "from the environment")
    assert scorer_locations(["x=http://a"], {})["x"].token == "from the environment"
    assert scorer_locations([], {"x": {"url": "http://a", "token": "own"}})["x"].token == "own"
    assert scorer_locations([], {"x": {"python": "p"}})["x"].token == ""


@pytest.mark.parametrize(
    "option", ["ocr", "ocr=", "=http://a", "ocr=127.0.0.1:8100", "ocr=/usr/bin/python", "", "ocr=ftp://a"]
)
def test_an_option_that_is_no_location(option: str) -> None:
    with pytest.raises(UserError, match="e.g. --scorer-at geneval=http://127.0.0.1:8100") as caught:
        scorer_locations([option], {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "said"),
    [({}, "either a url or a python"), ({"url": "http://a", "python": "b"}, "either a url or a python"),
     ({"url": 3}, "url = 3 is of the wrong type"), ({"ulr": "http://a"}, "did you mean 'url'"),
     ({"url": "http://a", "timeout": 0}, "above 0, got 0"), ({"url": "http://a", "timeout": True}, "wrong type"),
     ({"url": "http://a", "timeout": float("nan")}, "above 0"), ({"url": "http://a", "token": 5}, "wrong type")],
)  # fmt: skip
def test_a_table_that_is_no_location(table: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        scorer_locations([], {"ocr": table})
    assert "[scorer.ocr]" in str(caught.value) and "\n" not in str(caught.value)


def test_a_scorer_has_one_location() -> None:
    with pytest.raises(UserError, match="has a location already; name it once"):
        scorer_locations(["a=http://b", "a=http://c"], {})


EYES = "from importlib import import_module\ndef make(variant=None):\n    raise AssertionError('made here')\n"


def test_aliases_share_a_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "eyes.py").write_text(EYES)
    info = tmp_path / "eyes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: eyes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gpobench.rewards]\neyes = eyes:make\nlook = eyes:make\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert scorer_locations(["look=http://a"], {}) == {"eyes": ScorerLocation(url="http://a")}
    with pytest.raises(UserError, match="'eyes' has a location already"):
        scorer_locations([], {"eyes": {"url": "http://a"}, "look": {"url": "http://b"}})
    with pytest.raises(UserError, match="names 'eyes' twice"):
        ScorerReference.parse("eyes+look")
    with faulty.served(faulty.Sound(), reference="look") as url:
        for name in ("eyes", "look"):
            for asked in ("eyes", "look"):
                assert open_scorer(asked, {name: ScorerLocation(url=url)}).id == "sound-v1"
        with pytest.raises(UserError, match="serves 'eyes', not 'eyes:closely'"):
            open_scorer("look:closely", {"eyes": ScorerLocation(url=url)})


def test_a_scorer_is_opened_at_its_location() -> None:
    with faulty.served(faulty.Sound(), reference="rapidocr:page") as page, faulty.served(faulty.Sound()) as any_program:
        known = {
            "rapidocr": ScorerLocation(url="http://127.0.0.1:1"),
            "rapidocr:page": ScorerLocation(url=page),
            "nickname": ScorerLocation(url=any_program),
        }
        assert isinstance(open_scorer("rapidocr:page", known), RemoteScorer)  # the whole reference before the name
        assert open_scorer(" nickname ", known).id == open_scorer("nickname:fine", known).id == "sound-v1"
        assert open_scorer("reader", known).name == "reader"
        with pytest.raises(UserError, match="http://127.0.0.1:1: .*refused"):
            open_scorer("rapidocr", known)
        with pytest.raises(UserError, match="serves 'rapidocr:page', not 'rapidocr'"):
            open_scorer("rapidocr", {"rapidocr": ScorerLocation(url=page)})
        blend = open_scorer("nickname*3+reader", known)
        assert blend.name == "reader+sound*3"


def test_what_was_started_is_ended(images: Images) -> None:
    """One in another process, in a blend in another blend."""
    mine = f"{FAULTY}:Sound"
    blend = open_scorer(f"{mine}*0.5+reader", {mine: ScorerLocation(python=sys.executable)})
    assert isinstance(blend, Blend)
    (child,) = (part for part, _ in blend.parts if isinstance(part, RemoteScorer))
    os.kill(child.pid, 0)
    here, there = faulty.Sound()(images, PROMPTS), child(images, PROMPTS)
    assert all(np.array_equal(here.value[m], there.value[m]) for m in child.metrics) and here.notes == there.notes
    close_scorers([RED, Blend([(blend, 1.0), (RED, 1.0)])])
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)
    scores = ask(child, images, PROMPTS)
    assert np.isnan(scores.value["mean"]).all() and "was closed" in scores.reasons[5]
