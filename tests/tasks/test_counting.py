"""The task counting: balanced splits without overlap, and prompts that parse back."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from gpobench.bench.assets.glyphs import COUNTS, SHAPE_COLOURS, SHAPES, VOCABULARY
from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.splits import prompts_hash, refuse_overlap
from gpobench.bench.registry import DOMAINS
from gpobench.bench.spec import SupportsColumns, SupportsOwnPrompts
from gpobench.tasks import counting, geneval_open
from gpobench.tasks.base import SPLITS

HASHES = {
    "train": "83f1b84fd00397f1afc1bfae6ad54c067a30822aa19ad161d12048826f8667d9",
    "validation": "ed5116a19d9290af50edf6d312c8a5a18a30d761aa753fcba3feffc7b79bb293",
    "test": "f08790298a3b3c318c38e11d72f6a80399a95cf6009aa804ccc0a2e64be20d94",
}


@pytest.fixture
def data() -> Path:
    """The folder of published lists, GPOBENCH_DATA; the tests that need it are skipped where it is not there."""
    folder = Path(os.environ.get("GPOBENCH_DATA", ""))
    if not (folder / geneval_open.METADATA.path).is_file():
        pytest.skip("GPOBENCH_DATA names no folder with GenEval's lists")
    return folder


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_has_every_number_with_every_kind_and_colour_once(split: str) -> None:
    """A change of the hash is another task: raise the version."""
    prompts = counting.Counting().prompts(split, "glyphs")  # type: ignore[arg-type]
    pairs = Counter(
        key
        for p in prompts
        for key in (
            (p.meta["include"][0]["count"], p.meta["include"][0]["class"]),
            (p.meta["include"][0]["count"], p.meta["colour"]),
            (p.meta["include"][0]["class"], p.meta["colour"]),
        )
    )
    numbers = [pairs[n, what] for n in COUNTS for what in (*SHAPES, *SHAPE_COLOURS)]
    assert numbers == [1] * 30 and len(prompts) == 15
    assert {pairs[kind, colour] for kind in SHAPES for colour in SHAPE_COLOURS} <= {1, 2}
    assert counting.Counting().version == "1" and prompts_hash(prompts) == HASHES[split]
    assert all(set(p.text.split()) <= set(VOCABULARY) for p in prompts)


def test_the_three_splits_are_all_forty_five() -> None:
    task = counting.Counting()
    texts = [p.text for split in SPLITS for p in task.prompts(split, "glyphs")]
    assert len(set(texts)) == len(texts) == 45
    refuse_overlap(task, "glyphs")


def test_facts_are_those_of_the_published_tag() -> None:
    for prompt in counting.Counting().prompts("test", "glyphs"):
        (clause,) = prompt.meta["include"]
        assert set(clause) == {"class", "count"} and prompt.meta["tag"] == prompt.stratum == "counting"
        assert prompt.meta["exclude"] == [{"class": clause["class"], "count": clause["count"] + 1}]
        assert prompt.meta["colour"] in prompt.text


def test_reading_is_the_inverse_of_writing() -> None:
    task = counting.Counting()
    assert isinstance(task, SupportsOwnPrompts) and isinstance(task, SupportsColumns)
    for split in SPLITS:
        for prompt in task.prompts(split, "glyphs"):
            assert task.read(prompt.text, {}, "glyphs") == prompt
    shouted = task.read("A photo of Three red Circles.", {}, "glyphs")
    assert shouted.meta["include"] == [{"class": "circle", "count": 3}] and shouted.text.startswith("A photo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("three circles", "reads like 'a photo of three red circles'"),
        ("a photo of six red circles", "unknown number .*'six'"),
        ("a photo of three read circles", "did you mean 'red'"),
        ("a photo of three red circels", "did you mean 'circles'"),
        ("a photo of three red circle", "did you mean 'circles'"),
        ("a photo of one red circles", "did you mean 'circle'"),
    ],
)
def test_a_word_that_is_none_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        counting.Counting().read(text, {}, "glyphs")


def test_scorers_by_domain() -> None:
    task = counting.Counting()
    for domain in DOMAINS:
        assert task.scorers(domain) == [task.reward(domain), *task.held_out(domain)]
    assert (task.reward("glyphs"), list(task.held_out("glyphs"))) == ("geneval:palette", ["geneval:shapes"])
    evaluation = task.evaluation("glyphs")
    assert (evaluation.test_images, evaluation.validation_images, evaluation.curve_images) == (24, 8, 8)
    assert task.evaluation("open").test_images == 4
    assert list(task.columns("glyphs").quality) == ["pickscore:tiny"] and "hpsv2" in task.columns("open").quality


def test_unknown_names_get_the_nearest_valid_one() -> None:
    task = counting.Counting()
    for ask in (task.reward, task.held_out, task.scorers, task.evaluation, task.columns):
        with pytest.raises(UserError, match="did you mean 'glyphs'"):
            ask("glyph")
    with pytest.raises(UserError, match="did you mean 'validation'"):
        task.prompts("valid", "glyphs")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"1 \.\. 159"):
        counting.Counting(validation=160)


# Domain open


def test_open_is_the_published_tag_and_the_rest_of_its_combinations(data: Path) -> None:
    task = counting.Counting()
    splits = {split: list(task.prompts(split, "open")) for split in SPLITS}
    assert {split: len(prompts) for split, prompts in splits.items()} == {"train": 136, "validation": 24, "test": 80}
    asked = {
        split: {(p.meta["include"][0]["class"], p.meta["include"][0]["count"]) for p in prompts}
        for split, prompts in splits.items()
    }
    everything = {(name, n) for name in geneval_open.objects(str(data)) for n in (2, 3, 4)}
    assert asked["train"] | asked["validation"] | asked["test"] == everything
    assert sum(map(len, asked.values())) == len(everything) == 240
    refuse_overlap(task, "open")
    counts = Counter(p.meta["include"][0]["count"] for p in splits["test"])
    assert counts == {2: 26, 3: 28, 4: 26} and len({name for name, _ in asked["test"]}) == 62


def test_open_validation_of_another_size_is_a_prefix(data: Path) -> None:
    few, many = (counting.Counting(validation=n).prompts("validation", "open") for n in (5, 24))
    assert list(few) == list(many)[:5]


def test_open_reads_counting_prompts_alone(data: Path) -> None:
    task = counting.Counting()
    for split in SPLITS:
        for prompt in task.prompts(split, "open"):
            assert task.read(prompt.text, {}, "open") == prompt
    with pytest.raises(UserError, match="this is single_object"):
        task.read("a photo of a dog", {}, "open")
    with pytest.raises(UserError, match="did you mean 'knifes'"):
        task.read("a photo of two knives", {}, "open")
