"""The task pickscore: published prompts without those in two splits, and words and shapes of the embedded model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpobench.bench.assets.glyphs import COUNTS, NUMBERS, SHAPE_COLOURS, SHAPES, VOCABULARY
from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.splits import prompts_hash, refuse_overlap
from gpobench.bench.spec import Prompt, Split, SupportsColumns, SupportsOwnPrompts, fold_text
from gpobench.tasks import ocr, pickscore
from gpobench.tasks.base import SPLITS
from gpobench.tasks.pickscore import PickScore

HASHES: dict[Split, str] = {
    "train": "653c4ac3ff9af21e86bdab209162f7226bf68f21678c048d5fb278133a3f36b6",
    "validation": "d5e3a74b5c637528e6e6605358f24cd58b9094805d0078aa1d19e27676992add",
    "test": "a48a0c55c9b4f7b76b6c77687bb0d6f4e8134277a0eca33c2971fadbbc026aec",
}


# Domain glyphs


@pytest.mark.parametrize(("split", "count"), [("train", 893 + 15), ("validation", 60), ("test", 60)])
def test_the_shipped_splits_are_version_1(split: Split, count: int) -> None:
    """A change here is another task: raise the version."""
    prompts = PickScore().prompts(split, "glyphs")
    assert PickScore().version == "1" and len(prompts) == count and prompts_hash(prompts) == HASHES[split]


def test_splits_are_disjoint_and_words_lie_where_ocr_has_them() -> None:
    task = PickScore()
    refuse_overlap(task, "glyphs")
    for split in SPLITS:
        words = [prompt for prompt in task.prompts(split, "glyphs") if "target" in prompt.meta]
        theirs = ocr.OCR().prompts(split, "glyphs")
        assert words == list(theirs)[: len(words)]


def test_every_split_shows_every_kind_colour_and_count() -> None:
    everything: list[str] = []
    for split in SPLITS:
        shapes = [prompt.text for prompt in PickScore().prompts(split, "glyphs") if "target" not in prompt.meta]
        words = {word.rstrip("s") for text in shapes for word in text.split()}
        assert {*SHAPES, *SHAPE_COLOURS, *(NUMBERS[count] for count in COUNTS)} <= words
        everything += shapes
    assert len(everything) == len(set(everything)) == 45


def test_prompts_are_in_words_the_model_knows() -> None:
    for split in SPLITS:
        for prompt in PickScore().prompts(split, "glyphs"):
            text = prompt.text.replace(f'"{prompt.meta.get("target")}"', "")
            assert set(text.split()) <= set(VOCABULARY) and not prompt.stratum


# Both domains


def test_scorers_by_domain() -> None:
    task = PickScore()
    assert (task.reward("glyphs"), list(task.held_out("glyphs"))) == ("pickscore:tiny", ["hpsv2:tiny"])
    assert (task.reward("open"), list(task.held_out("open"))) == ("pickscore", ["hpsv2"])
    for domain in ("glyphs", "open"):
        judges = [task.reward(domain), *task.held_out(domain)]
        assert list(task.scorers(domain)) == judges and not set(judges) & set(task.columns(domain).quality)
    assert (task.evaluation("glyphs").test_images, task.evaluation("open").test_images) == (4, 1)
    assert isinstance(task, SupportsColumns) and isinstance(task, SupportsOwnPrompts)
    assert task.read("a cat", {"a": 1}, "open") == Prompt("a cat", {"a": 1})


def test_unknown_names_get_the_nearest_valid_one() -> None:
    task = PickScore()
    for ask in (task.reward, task.held_out, task.scorers, task.evaluation, task.columns):
        with pytest.raises(UserError, match="did you mean 'glyphs'"):
            ask("glyph")
    with pytest.raises(UserError, match="did you mean 'validation'"):
        task.prompts("valid", "glyphs")  # type: ignore[arg-type]


# Domain open

LISTS = st.lists(st.text("abAB .!é", max_size=6).map(lambda text: f"x{text}"), max_size=30)


@given(test=LISTS, train=LISTS, held=st.integers(0, 5))
def test_no_prompt_stands_in_two_splits(test: list[str], train: list[str], held: int) -> None:
    splits = pickscore.split(test, train, held)
    texts = {name: [prompt.text for prompt in prompts] for name, prompts in splits.items()}
    assert texts["test"] == test
    folds = {name: {fold_text(text) for text in each} for name, each in texts.items()}
    assert not folds["train"] & folds["test"] and not folds["validation"] & (folds["train"] | folds["test"])
    assert folds["train"] | folds["validation"] | folds["test"] == {fold_text(text) for text in [*test, *train]}
    left = len({fold_text(text) for text in train} - folds["test"])
    assert len(texts["validation"]) == min(held, left) and len(texts["train"]) == left - min(held, left)
    shuffled = pickscore.split(test, [t for t in train if t in {*texts["train"], *texts["validation"]}][::-1], held)
    assert {p.text for p in shuffled["validation"]} == set(texts["validation"])  # the order of the list decides nothing


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder GPOBENCH_DATA names; nothing is cached and nothing may be fetched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("GPOBENCH_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def lay(data: Path, path: str, lines: Sequence[str], end: str = "") -> None:
    (data / path).parent.mkdir(parents=True, exist_ok=True)
    (data / path).write_text("\n".join(lines) + end, "utf-8")


@pytest.mark.parametrize("safe", [True, False])
def test_the_published_lists_are_read_and_counted(data: Path, safe: bool) -> None:
    """Stand-ins of the published length: the lists themselves are not here."""
    task, lists = PickScore(safe=safe), pickscore.SAFE if safe else pickscore.WHOLE
    test = [f"prompt number {i} of the test list" for i in range(lists["test"].records)]
    train = [f"prompt number {i} of the train list" for i in range(lists["train"].records - 3)]
    train += [test[0].upper(), test[1] + "!", train[0]]  # two that stand in the test list, one said twice
    with pytest.raises(UserError, match="task pickscore, domain 'open': .*is not below GPOBENCH_DATA"):
        task.prompts("test", "open")
    lay(data, lists["test"].path, test, end="\n")
    lay(data, lists["train"].path, train[:-1])
    with pytest.raises(UserError, match=f"has {len(train) - 1:,} lines, expected {len(train):,}"):
        task.prompts("train", "open")
    lay(data, lists["train"].path, train)
    assert [prompt.text for prompt in task.prompts("test", "open")] == test
    assert len(task.prompts("validation", "open")) == 128
    assert len(task.prompts("train", "open")) == len(train) - 3 - 128
    refuse_overlap(task, "open")
    assert ("sfw" in lists["test"].path) == safe and PickScore().safe


def test_another_file_is_refused(data: Path) -> None:
    for path in (pickscore.SAFE["test"].path, pickscore.SAFE["train"].path):
        lay(data, path, ["a cat"])
    (data / pickscore.SAFE["test"].path).write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8"):
        PickScore().prompts("test", "open")


def test_the_whole_list_is_a_task_of_its_own() -> None:
    assert pickscore.full().name == "pickscore-full" and not pickscore.full().safe and pickscore.PickScore().safe
