"""The task ocr: splits without overlap, prompts with pinned hashes, and lists that are checked."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from gpobench.bench.assets.glyphs import VOCABULARY, split_of
from gpobench.bench.assets.prompts import blob_id, with_own_prompts
from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.splits import prompts_hash, refuse_overlap
from gpobench.bench.spec import Prompt, SupportsColumns, SupportsFreshPrompts, SupportsOwnPrompts
from gpobench.rewards.rules import target_of
from gpobench.tasks import ocr, ocr_open
from gpobench.tasks.base import SPLITS

HASHES = {
    "train": "515758dc4489fdeb436215bf6ceb2cdcb0d3790a0c6de7dd0ac6cf0a91525526",
    "validation": "09bce8b649e171037ae25a5e482687030714711d7d49a9cc7c00b6cff5153508",
    "test": "6753786068b4967caeb8387df4319a4326ed36d944020456ef5d03ea37822675",
}


def targets(prompts: object) -> list[str]:
    assert isinstance(prompts, list)
    return [str(prompt.meta["target"]) for prompt in prompts]


@pytest.mark.parametrize(("split", "count"), [("train", 893), ("validation", 130), ("test", 328)])
def test_the_shipped_splits_are_version_1(split: str, count: int) -> None:
    """A change here is another task: raise the version."""
    prompts = ocr.OCR().prompts(split, "glyphs")
    assert ocr.OCR().version == "1" and len(prompts) == count and prompts_hash(prompts) == HASHES[split]


def test_splits_are_disjoint_and_follow_the_rule() -> None:
    task = ocr.OCR()
    words = {split: targets(task.prompts(split, "glyphs")) for split in SPLITS}
    everything = [word for split in words.values() for word in split]
    assert len(set(everything)) == len(everything)
    assert all(split_of(word) == split for split, members in words.items() for word in members)
    refuse_overlap(task, "glyphs")


def test_fresh_prompts_are_in_no_split_and_follow_their_seed() -> None:
    task = ocr.OCR()
    assert isinstance(task, SupportsFreshPrompts)
    known = {word for split in SPLITS for word in targets(task.prompts(split, "glyphs"))}
    fresh, again, other = (targets(task.fresh(300, seed, "glyphs")) for seed in (5, 5, 6))
    assert fresh == again != other and len(set(fresh)) == 300 and not known & set(fresh)
    assert all(re.fullmatch(r"[A-Z]{3,5}", word) for word in fresh)
    splits = ocr_open.compose([])
    scenes = [prompt for split in splits.values() for prompt in split]
    drawn = ocr_open.fresh_scenes(400, 5, scenes)
    assert len(drawn) == 400 == len({prompt.meta["target"] for prompt in drawn})
    assert not {prompt.meta["target"] for prompt in drawn} & {prompt.meta["target"] for prompt in scenes}
    assert all(target_of(prompt.text) == prompt.meta["target"] for prompt in drawn)
    assert drawn == ocr_open.fresh_scenes(400, 5, scenes) != ocr_open.fresh_scenes(400, 6, scenes)
    assert len(ocr_open.fresh_scenes(10**6, 5, scenes)) == 30 * 40 * 8 - len(scenes)  # all that are left


def test_prompts_quote_their_target_in_words_the_model_knows() -> None:
    for split in SPLITS:
        for prompt in ocr.OCR().prompts(split, "glyphs"):
            assert target_of(prompt.text) == prompt.meta["target"]
            assert re.fullmatch(r"[A-Z]{3,5}", prompt.meta["target"])
            assert set(re.sub(r'"[A-Z]+"', "", prompt.text).split()) <= set(VOCABULARY)
    texts = " ".join(prompt.text for prompt in ocr.OCR().prompts("test", "glyphs"))
    assert all(part in texts for part in ("sign", "card", "label", "page", "in red", "in blue", "in black"))


def test_fewer_validation_words_are_the_first_of_them() -> None:
    whole, few = (ocr.OCR(validation_words=n).prompts("validation", "glyphs") for n in (130, 20))
    assert list(few) == list(whole)[:20]


def test_a_test_word_in_the_train_list_is_refused(tmp_path: Path) -> None:
    stolen = targets(ocr.OCR().prompts("test", "glyphs"))[7]
    (tmp_path / "mine.txt").write_text(f"ABLE\nZZZ\n{stolen}\n", "ascii")
    task = ocr.OCR(train_words=str(tmp_path / "mine.txt"))
    with pytest.raises(UserError, match=stolen):
        refuse_overlap(task, "glyphs")


@pytest.mark.parametrize("content", ["ok\n", "TOOLONG\n", "AB\n", "ÄRA\n", "A B C\n", "\n\n", "AB1\n"])
def test_a_list_that_holds_no_words_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "words.txt"
    path.write_text(content, "utf-8")
    with pytest.raises(UserError, match=r"words\.txt"):
        ocr.OCR(train_words=str(path)).prompts("train", "glyphs")


def test_an_unreadable_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        ocr.OCR(train_words=str(tmp_path / "none.txt")).prompts("train", "glyphs")


def test_scorers_by_domain() -> None:
    task = ocr.OCR()
    for domain in ("glyphs", "open"):
        assert task.scorers(domain)[0] == task.reward(domain)
        assert set(task.held_out(domain)) <= set(task.scorers(domain)) - {task.reward(domain)}
    assert (task.reward("glyphs"), list(task.held_out("glyphs"))) == ("rapidocr", ["reader"])
    assert task.evaluation("glyphs").test_images == 2 and task.evaluation("open").test_images == 1


def test_unknown_names_get_the_nearest_valid_one() -> None:
    task = ocr.OCR()
    for ask in (task.reward, task.held_out, task.scorers, task.evaluation, task.columns):
        with pytest.raises(UserError, match="did you mean 'glyphs'"):
            ask("glyph")
    with pytest.raises(UserError, match="did you mean 'validation'"):
        task.prompts("valid", "glyphs")  # type: ignore[arg-type]


# Prompts of one's own


def test_own_prompts_quote_their_target_or_name_it() -> None:
    task = ocr.OCR()
    for prompt in task.prompts("test", "glyphs"):
        assert task.read(prompt.text, {}, "glyphs") == prompt
    named = task.read("a mug", {"target": "Hello", "mood": 1}, "open")
    assert named == Prompt("a mug", {"target": "Hello", "mood": 1})
    assert task.read('a "B" and a "C"', {"target": ""}, "open").meta["target"] == "B"
    for text in ("a mug", 'a "mug', 'a " " mug'):
        with pytest.raises(UserError, match=f"a fact `target`: {re.escape(repr(text))}"):
            task.read(text, {}, "open")


@pytest.mark.parametrize(
    ("text", "facts", "target"),
    [
        ("a mug", {"target": 0}, "0"),
        ("a mug", {"Target": "TEA"}, "TEA"),
        ("a mug", {"target": 5.0}, "5"),
        ("a mug", {"target": 1.5}, "1.5"),
        ('a "mug"', {"target": None}, "mug"),
        ('a "mug"', {"target": ""}, "mug"),
        ('A 12" tall sign', {"target": "HELLO"}, "HELLO"),
        ('a sign "HELLO" and a sign "WORLD"', {}, "HELLO"),
        ('写着"你好"的牌子', {}, "你好"),
        ('a label "C:\\"', {}, "C:\\"),
    ],
)
def test_the_target_is_what_the_prompt_states(text: str, facts: dict[str, Any], target: str) -> None:
    prompt = ocr.OCR().read(text, facts, "open")
    assert prompt.meta["target"] == target and prompt.text == text


def test_escaped_quotation_marks_are_plain_ones() -> None:
    assert ocr.OCR().read('a sign that says \\"HELLO\\"', {}, "glyphs") == Prompt(
        'a sign that says "HELLO"', {"target": "HELLO"}
    )


@pytest.mark.parametrize(
    ("text", "facts", "reason"),
    [
        ('A 12" tall sign that says "HELLO"', {}, "3 quotation marks do not pair"),
        ('A 12" by 14" sign', {}, "the first quotation marks seem not to quote"),
        ('A 12"x14" sign that says "HI"', {}, "the first quotation marks seem not to quote"),
        ('a sign ""', {}, "the first quotation marks seem not to quote"),
        ('a sign "HI"', {"target": math.nan}, "is nan, which is neither text nor a number"),
        ('a sign "HI"', {"target": math.inf}, "neither text nor a number"),
        ('a sign "HI"', {"target": True}, "neither text nor a number"),
        ('a sign "HI"', {"target": ["HI"]}, "neither text nor a number"),
    ],
)
def test_an_unclear_target_is_refused(text: str, facts: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        ocr.OCR().read(text, facts, "open")


def test_a_published_list_keeps_its_rule_in_a_persons_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = 'a 12" ruler that says "HELLO'
    path = tmp_path / "train.txt"
    path.write_text(line, "utf-8")
    with pytest.raises(UserError, match="line 1: the first quotation marks"):
        with_own_prompts(ocr.OCR(), {"train": path}, "open")
    monkeypatch.setattr(ocr, "PUBLISHED_LISTS", (blob_id(path),))
    (prompt,) = with_own_prompts(ocr.OCR(), {"train": path}, "open").prompts("train", "open")
    assert prompt == Prompt(line, {"target": " ruler that says "})


def test_the_published_test_list_is_known_by_its_content(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    path = Path(os.environ.get("GPOBENCH_DATA", "")) / ocr.PUBLISHED.path
    if not path.is_file():
        pytest.skip("GPOBENCH_DATA does not name a folder with the published list")
    assert blob_id(path) in ocr.OCR().published_lists
    assert [ocr.OCR().read(p.text, {}, "open") for p in ocr.OCR().prompts("test", "open")] == ocr.OCR().prompts(
        "test", "open"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('a sign that says "hello"', "capitals A-Z, not 'hello'"),
        ('a sign that says "CAFÉS"', "capitals A-Z, not 'CAFÉS'"),
        ('a sign that says "PARADES"', "tiny writes 3 to 5 capitals"),
        ('a photograph of a "MUG"', "unknown word for tiny .* 'photograph'; did you mean 'photo'"),
    ],
)
def test_what_tiny_cannot_spell_is_refused(text: str, said: str) -> None:
    """Its tokenizer would make one unknown token of all of these."""
    with pytest.raises(UserError, match=said):
        ocr.OCR().read(text, {}, "glyphs")
    assert ocr.OCR().read(text, {}, "open").text == text


def test_columns_by_domain() -> None:
    glyphs, real = (ocr.OCR().columns(domain) for domain in ("glyphs", "open"))
    assert (glyphs.quality, glyphs.diversity, glyphs.drift) == (["pickscore:tiny"], ["clip:tiny"], ["clip:tiny"])
    assert list(real.quality) == ["pickscore", "aesthetic", "imagereward", "hpsv2"]
    assert isinstance(ocr.OCR(), SupportsColumns) and isinstance(ocr.OCR(), SupportsOwnPrompts)


# Domain open


@pytest.fixture
def nothing_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No published file is here, and none may be fetched; the folder GPOBENCH_DATA may name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("GPOBENCH_DATA", raising=False)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_open_needs_the_published_list(monkeypatch: pytest.MonkeyPatch, nothing_cached: Path) -> None:
    with pytest.raises(UserError, match="task ocr, domain 'open': .*GPOBENCH_DATA is not set.*HF_HUB_OFFLINE"):
        ocr.OCR().prompts("test", "open")
    monkeypatch.setenv("GPOBENCH_DATA", str(nothing_cached))
    with pytest.raises(UserError, match=r"ocr/test\.txt is not below GPOBENCH_DATA"):
        ocr.OCR().prompts("test", "open")
    path = nothing_cached / ocr.PUBLISHED.path
    path.parent.mkdir(parents=True)
    path.write_text('a wall that says "HELLO"', "utf-8")
    with pytest.raises(UserError, match="is not the published file"):
        ocr.OCR().prompts("train", "open")


def test_composed_prompts_leave_out_what_the_test_set_asks_for() -> None:
    free = ocr_open.compose([])
    taken = [
        Prompt("", {"target": str(p.meta["target"]).upper() + "!"})
        for p in (*free["train"][:3], *free["validation"][:3])
    ]
    splits = ocr_open.compose(taken)
    assert len(splits["train"]) == ocr_open.TRAIN and len(splits["validation"]) == ocr_open.VALIDATION
    asked = targets(splits["train"]) + targets(splits["validation"])
    assert len(set(asked)) == len(asked)
    assert not {text.lower() for text in asked} & {str(p.meta["target"]).lower().rstrip("!") for p in taken}
    assert all(target_of(p.text) == p.meta["target"] and p.text.count('"') == 2 for p in splits["train"])


def test_the_published_list_where_it_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    folder = os.environ.get("GPOBENCH_DATA", "")
    if not folder or not (Path(folder) / ocr.PUBLISHED.path).is_file():
        pytest.skip("GPOBENCH_DATA does not name a folder with the published list")
    task = ocr.OCR()
    test = task.prompts("test", "open")
    assert (
        len(test) == ocr.PUBLISHED.records and prompts_hash(test) == ocr.PUBLISHED.sha256
    )  # one prompt a line, no final newline
    refuse_overlap(task, "open")
