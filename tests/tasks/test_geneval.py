"""The task geneval: the published prompts written and parsed, splits without overlap, and its numbers."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.splits import prompts_hash, refuse_overlap
from gpobench.bench.registry import DOMAINS
from gpobench.bench.spec import Prompt, SupportsColumns, SupportsOwnPrompts, SupportsSummary
from gpobench.rewards.geneval_rules import target_of
from gpobench.tasks import counting, geneval, geneval_open
from gpobench.tasks.base import SPLITS

# Names of the detectors' classes, enough for the grammar without the published list.
NAMES = ("person", "bicycle", "bus", "wine glass", "orange", "computer mouse", "skis", "scissors", "umbrella", "dog")
HASHES = {
    "train": "21e3ee86b1dc679e25249528229168b3eb5c289f864f734c315c9f4a5532d084",
    "validation": "9a310088df499c1fa0427c7bfe7cd6c3bb20312e9c4b7928e98f2aabd35183fc",
    "test": "ce18b0c355df32e2ab5876e85db352e739779a00d43390083c6e466b84428607",
}
HASHES_OPEN = {
    "train": "f9ba621f6589c29b5c518be68af297e8bcb4a2947be040546d2b86201382b3f3",
    "validation": "d93b0642dab7c2e945db33910c13b02777398b708586eab953b5ba46a0dd90e9",
    "test": "4de60dfc3c29f9d3db69ec45cf03a964627c2d82f2c224c3f75645e137f7126b",
}


@pytest.fixture
def data() -> Path:
    """The folder of published lists, GPOBENCH_DATA; the tests that need it are skipped where it is not there."""
    folder = Path(os.environ.get("GPOBENCH_DATA", ""))
    if not (folder / geneval_open.METADATA.path).is_file():
        pytest.skip("GPOBENCH_DATA names no folder with GenEval's lists")
    return folder


# Grammar


@pytest.mark.parametrize("tag", geneval_open.TAGS)
def test_every_sentence_is_parsed_back(tag: str) -> None:
    names = NAMES if tag != "color_attr" else NAMES[1:6]
    prompts = list(geneval_open.sentences(tag, names))
    n, k = len(names), len(names) - ("person" in names)
    sizes = {"single_object": n, "two_object": n * (n - 1), "counting": 3 * n, "colors": 10 * k}
    sizes |= {"position": 4 * n * (n - 1), "color_attr": 90 * k * (k - 1)}
    assert len({p.text for p in prompts}) == len(prompts) == sizes[tag]
    for prompt in prompts:
        assert geneval_open.parse(prompt.text, names) == (tag, prompt.meta["include"])
        assert geneval_open.from_row(json.loads(json.dumps(geneval_open.to_row(prompt)))) == prompt


def test_published_strings_with_their_faults() -> None:
    texts = {p.text for tag in geneval_open.TAGS[:4] for p in geneval_open.sentences(tag, NAMES)}
    for text in (
        "two skises",
        "three scissorses",
        "four buses",
        "two wine glasses",
        "two persons",
        "two computer mouses",
    ):
        assert f"a photo of {text}" in texts
    for text in ("an orange", "an orange orange", "a bicycle and an umbrella", "a green skis"):
        assert f"a photo of {text}" in texts
    assert not any(colour in text and "person" in text for text in texts for colour in ("red", "blue"))


def test_the_placed_object_comes_second_in_the_facts() -> None:
    tag, include = geneval_open.parse("A photo of a dog  right of an umbrella.", NAMES)
    assert tag == "position"
    assert include == [
        {"class": "umbrella", "count": 1},
        {"class": "dog", "count": 1, "position": ["right of", 0]},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a dog", "begins with 'a photo of'"),
        ("a photo of a dgo", "unknown object .*'dgo'; did you mean 'dog'"),
        ("a photo of a rde dog", "unknown colour .*'rde'; did you mean 'red'"),
        ("a photo of a red dgo", "unknown object .*'dgo'; did you mean 'dog'"),
        ("a photo of five dogs", "unknown number .*'five'"),
        ("a photo of two dog", "did you mean 'dogs'"),
        ("a photo of a dog and bus", "an article and an object"),
        ("a photo of a red dog and a bus", "a colour for each or for none"),
        ("a photo of a dog and a bus and a bicycle", "one object or two"),
        ("a photo of a red dog above a bus", "no colours in a prompt about places"),
        ("a photo of", "begins with 'a photo of'"),
    ],
)
def test_a_word_that_is_none_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        geneval_open.parse(text, NAMES)
    assert "\n" not in str(error.value)


WORDS = [
    "a",
    "an",
    "and",
    "red",
    "orange",
    "dog",
    "dogs",
    "two",
    "left of",
    "above",
    "wine glass",
    "skises",
    "A",
    ".",
    "x",
]


@given(st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join) | st.text(max_size=30))
def test_any_text_is_parsed_or_refused_in_one_line(text: str) -> None:
    for words in (text, f"a photo of {text}", f"a photo of a {text}"):
        try:
            found = geneval_open.parse(words, NAMES)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert geneval_open.parse(geneval_open.write(*found), NAMES) == found


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a photo of a dog and a bus", "a photo of a bus and a dog", True),
        ("a photo of a red dog and a blue bus", "a photo of a blue bus and a red dog", True),
        ("a photo of a red dog and a blue bus", "a photo of a blue dog and a red bus", False),
        ("a photo of a dog left of a bus", "a photo of a bus right of a dog", True),
        ("a photo of a dog above a bus", "a photo of a bus below a dog", True),
        ("a photo of a dog left of a bus", "a photo of a bus left of a dog", False),
        ("a photo of a dog left of a bus", "a photo of a dog right of a bus", False),
        ("a photo of two dogs", "a photo of three dogs", False),
    ],
)
def test_the_order_of_objects_makes_no_other_prompt(one: str, other: str, same: bool) -> None:
    a, b = (geneval_open.read(text, {}, lambda: NAMES) for text in (one, other))
    assert (geneval_open.asks_for(a) == geneval_open.asks_for(b)) is same
    assert geneval_open.beside([a]).free(b) is not same


def test_own_prompts_may_bring_their_facts() -> None:
    facts = {
        "tag": "two_object",
        "include": [{"class": "dog", "count": 1}, {"class": "bus", "count": 1}],
        "mood": "sad",
    }
    prompt = geneval.GenEval().read("Rex waits for line 12", facts, "open")
    assert prompt.meta == {"tag": "two_object", "include": facts["include"]} and prompt.stratum == "two_object"
    with pytest.raises(UserError, match="unknown GenEval tag"):
        geneval.GenEval().read("Rex", {"include": facts["include"]}, "open")


def test_facts_without_include_are_not_dropped() -> None:
    """The text of a row that also states facts is read by the grammar only where they agree."""
    read: Callable[[dict[str, Any]], Prompt] = lambda facts: geneval_open.read("a photo of a dog", facts, lambda: NAMES)
    for facts in (
        {"tag": "single_object", "exclude": [{"class": "bus", "count": 1}]},
        {"exclude": '[{"class": "bus", "count": 1}]'},
    ):
        with pytest.raises(UserError, match="have an `exclude` but no `include`"):
            read(facts)
    with pytest.raises(
        UserError, match="the fact `tag` of 'a photo of a dog' is 'counting', but the text is one of 'single_object'"
    ):
        read({"tag": "counting"})
    assert read({"tag": "single_object"}) == read({"Tag": ""}) == read({})
    dogs = [{"class": "dog", "count": 1}, {"class": "dog", "count": 2, "position": ["above", 0]}]
    with pytest.raises(UserError, match="the fact `exclude` of .* places an object, which only `include` may"):
        read({"tag": "position", "include": dogs, "exclude": dogs})
    with pytest.raises(UserError, match="is no JSON"):
        read({"tag": "counting", "include": "[" * 100_000})


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.floats()
    | st.sampled_from(["dog", "red", "left of", "counting", "[", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["class", "count", "color", "position"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["tag", "include", "exclude"]), VALUES),
    st.sampled_from(["a photo of a dog", "two dogs"]),
)
@settings(max_examples=60)
def test_any_facts_are_a_prompt_of_the_rule_or_refused(facts: dict[str, Any], text: str) -> None:
    try:
        prompt = geneval_open.read(text, facts, lambda: NAMES)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert target_of(prompt).include and prompt.stratum in geneval_open.TAGS


def test_own_facts_come_from_a_table_too() -> None:
    include = [{"class": "dog", "count": 2}]
    prompt = geneval.GenEval().read("two dogs", {"tag": "counting", "include": json.dumps(include)}, "open")
    assert prompt.meta["include"] == include and prompt.meta["exclude"] == [{"class": "dog", "count": 3}]


@pytest.mark.parametrize(
    ("include", "said"),
    [
        ("two dogs", "is no JSON"),
        ("{}", "is a list of clauses"),
        ([1], "is a list of clauses"),
        ([{"count": 1}], "names no class in its clause 1"),
        ([{"class": "dog"}], "counts None dog"),
        ([{"class": "dog", "count": "two"}], "counts 'two' dog"),
        ([{"class": "dog", "count": True}], "counts True dog"),
        ([{"class": "dog", "count": 0}], "counts 0 dog"),
        (
            [{"class": "dog", "count": 1, "color": "violet"}],
            "unknown colour in the fact `include` of 'x'.*valid: black",
        ),
        ([{"class": "dog", "count": 1, "position": "left of"}], "places an object as"),
        ([{"class": "dog", "count": 1, "position": ["inside", 0]}], "unknown relation in the fact"),
        (
            [{"class": "dog", "count": 1, "position": ["above", 0]}],
            "places its clause 1 by the clause 0, which is none before it",
        ),
    ],
)
def test_facts_that_the_rule_could_not_read_are_one_line(include: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        geneval.GenEval().read("x", {"tag": "counting", "include": include}, "open")


def test_shares_are_the_weights_of_the_published_list() -> None:
    assert geneval_open.shares(50_000) == {
        "position": 20_590,
        "counting": 14_705,
        "color_attr": 8_823,
        "colors": 2_941,
        "two_object": 2_941,
    }
    assert all(sum(geneval_open.shares(n).values()) == n for n in range(100, 140))


# Domain open


def test_the_published_prompts_go_through_the_grammar_and_back(data: Path) -> None:
    rows = [json.loads(line) for line in (data / geneval_open.METADATA.path).read_text("utf-8").splitlines()]
    prompts = geneval.GenEval().prompts("test", "open")
    names = geneval_open.objects(str(data))
    assert len(prompts) == 553 and len(names) == 80 and len({p.text for p in prompts}) == 553
    for row, prompt in zip(rows, prompts, strict=True):
        assert geneval_open.to_row(prompt) == row
        assert geneval_open.compose(row["tag"], row["include"]) == prompt
        assert geneval_open.parse(row["prompt"], names) == (row["tag"], row["include"])
    tags = Counter(p.stratum for p in prompts)
    assert tags == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    sides = Counter(p.meta["include"][1]["position"][0] for p in prompts if p.stratum == "position")
    assert sides == {"left of": 19, "right of": 27, "above": 26, "below": 28}


def test_flow_grpos_test_rows_are_the_published_ones_four_times(data: Path) -> None:
    path = data / "flow_grpo/dataset/geneval/test_metadata.jsonl"
    if not path.is_file():
        pytest.skip("Flow-GRPO's test rows are not there")
    assert sha256(path.read_bytes()).hexdigest().startswith("cec4b24b9fee7bac")
    rows = Counter(json.dumps(json.loads(line), sort_keys=True) for line in path.read_text("utf-8").splitlines())
    ours = [json.dumps(geneval_open.to_row(p), sort_keys=True) for p in geneval.GenEval().prompts("test", "open")]
    assert rows == {row: 4 for row in ours} and sum(rows.values()) == 2212


@pytest.mark.timeout(120)
def test_open_splits_ask_for_nothing_twice(data: Path) -> None:
    task = geneval.GenEval()
    splits = {split: list(task.prompts(split, "open")) for split in SPLITS}
    assert {split: len(prompts) for split, prompts in splits.items()} == {
        "train": 50_000,
        "validation": 80,
        "test": 553,
    }
    refuse_overlap(task, "open")
    asked = {split: {geneval_open.asks_for(p) for p in prompts} for split, prompts in splits.items()}
    assert not asked["train"] & asked["test"] and not asked["train"] & asked["validation"]
    assert not asked["validation"] & asked["test"]
    trained = Counter(p.stratum for p in splits["train"])
    assert trained == geneval_open.shares(50_000)
    assert Counter(p.stratum for p in splits["validation"]) == dict.fromkeys(geneval_open.WEIGHTS, 16)
    repeats = Counter(p.text for p in splits["train"] if p.stratum == "counting")
    assert len(repeats) == 160 - 16 and max(repeats.values()) - min(repeats.values()) <= 1
    names = geneval_open.objects(str(data))
    for prompt in splits["train"][::97]:
        assert geneval_open.parse(prompt.text, names) == (prompt.stratum, prompt.meta["include"])
    assert {split: prompts_hash(prompts) for split, prompts in splits.items()} == HASHES_OPEN


def test_another_seed_draws_others(data: Path) -> None:
    a, b = (geneval.GenEval(train=200, validation=2, seed=seed) for seed in (0, 1))
    assert set(p.text for p in a.prompts("train", "open")) != set(p.text for p in b.prompts("train", "open"))
    refuse_overlap(b, "open")


def test_without_the_published_list_it_says_where_it_belongs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPOBENCH_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"evaluation_metadata\.jsonl is not below GPOBENCH_DATA"):
        geneval.GenEval().prompts("train", "open")
    path = tmp_path / geneval_open.METADATA.path
    path.parent.mkdir(parents=True)
    path.write_text("{}\n", "utf-8")
    with pytest.raises(UserError, match="is not the published file"):
        geneval.GenEval(seed=5).prompts("test", "open")


def test_settings_that_make_no_task_are_refused() -> None:
    for wrong in ({"train": 10}, {"validation": 0}):
        with pytest.raises(UserError, match="geneval needs"):
            geneval.GenEval(**wrong)


# Domain glyphs


@pytest.mark.parametrize("split", SPLITS)
def test_glyph_splits_are_version_1(split: str) -> None:
    prompts = geneval.GenEval().prompts(split, "glyphs")  # type: ignore[arg-type]
    assert Counter(p.stratum for p in prompts) == {"single_object": 3, "colors": 3, "counting": 12}
    for prompt in prompts:
        (clause,) = prompt.meta["include"]
        assert ("color" in clause) == (prompt.stratum == "colors") and prompt.meta["tag"] == prompt.stratum
        assert (clause["count"] == 1) == (prompt.stratum != "counting") == ("exclude" not in prompt.meta)
    assert {p.text for p in prompts} == {p.text for p in counting.Counting().prompts(split, "glyphs")}  # type: ignore[arg-type]
    assert prompts_hash(prompts) == HASHES[split]


def test_glyph_splits_share_nothing_and_are_read_back() -> None:
    task = geneval.GenEval()
    assert (
        isinstance(task, SupportsOwnPrompts) and isinstance(task, SupportsColumns) and isinstance(task, SupportsSummary)
    )
    refuse_overlap(task, "glyphs")
    for prompt in task.prompts("test", "glyphs"):
        if prompt.stratum != "single_object":  # its text asks for a colour, and so it is read
            assert task.read(prompt.text, {}, "glyphs") == prompt


def test_scorers_by_domain() -> None:
    task = geneval.GenEval()
    for domain in DOMAINS:
        assert task.scorers(domain) == [task.reward(domain), *task.held_out(domain)]
        assert list(task.columns(domain).drift) == {"glyphs": ["clip:tiny"], "open": ["clip"]}[domain]
    assert task.reward("open") == "geneval:mask2former" and task.evaluation("open").test_images == 4
    with pytest.raises(UserError, match="did you mean 'open'"):
        task.reward("opne")


# Summary


def table(rows: list[tuple[int, str, str, str, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["prompt", "stratum", "scorer", "metric", "value"])


def test_summary_by_hand() -> None:
    """Four images of one colors prompt, all right; two of two counting prompts, one right in all."""
    name, nan = "geneval-palette", float("nan")
    rows = [(0, "colors", name, "correct", 1.0)] * 4
    rows += [(1, "counting", name, "correct", v) for v in (1.0, 0.0)]
    rows += [(2, "counting", name, "correct", v) for v in (0.0, 0.0, nan)]
    rows += [(3, "position", name, "correct", nan), (0, "colors", name, "partial", 0.25)]
    rows += [(0, "colors", "clip", "cosine", 0.3)]
    found = geneval.GenEval().summary(table(rows))
    assert found == {
        f"{name}/colors": 1.0,
        f"{name}/counting": 0.25,
        f"{name}/overall": 0.625,
        f"{name}/images": 5 / 8,
        f"{name}/any": pytest.approx(2 / 3),
    }


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_summary_laws(images: list[tuple[int, bool]]) -> None:
    """Prompts 0-2 are of one tag, 3-5 of another; the order of rows says nothing; one tag alone has overall = images."""
    rows = [(i, "colors" if i < 3 else "counting", "s", "correct", float(right)) for i, right in images]
    found = geneval.GenEval().summary(table(rows))
    assert found == pytest.approx(geneval.GenEval().summary(table(rows[::-1])))
    assert 0 <= found["s/overall"] <= 1 and found["s/any"] >= min(1.0, found["s/images"] / len(rows))
    (same,) = {geneval.GenEval().summary(table([(i, "x", *rest) for i, _, *rest in rows]))["s/overall"]}
    assert same == pytest.approx(found["s/images"])
    once = [(k, *rest) for k, (_, *rest) in enumerate(rows)]
    assert geneval.GenEval().summary(table(once))["s/any"] == pytest.approx(found["s/images"])


def test_a_prompt_keeps_its_stratum() -> None:
    prompt = geneval_open.compose("two_object", [{"class": "dog", "count": 1}, {"class": "bus", "count": 1}])
    assert prompt == Prompt("a photo of a dog and a bus", prompt.meta, "two_object")
