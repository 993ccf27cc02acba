"""The task hpsv2: four styles, splits without overlap, and the publication's numbers against plain numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.splits import prompts_hash, refuse_overlap
from gpobench.bench.spec import Prompt, Split, SupportsColumns, SupportsOwnPrompts, SupportsSummary, fold_text
from gpobench.tasks import hpsv2, pickscore, scenes
from gpobench.tasks.base import SPLITS
from gpobench.tasks.hpsv2 import PUBLISHED, HPSv2

COMPOSED = {
    "train": "e50c1bd6b483b30d3069b33e897829721b2c47a30401e7a2363418c2fe1eca13",
    "validation": "d1cd3162dd4095e004d4071dcfdd6143f686700375648c6886f9ccb9edafe3d5",
}


# Prompts


def test_glyphs_are_the_prompts_of_pickscore_in_two_styles() -> None:
    task = HPSv2()
    refuse_overlap(task, "glyphs")
    for split in SPLITS:
        prompts, others = task.prompts(split, "glyphs"), pickscore.PickScore().prompts(split, "glyphs")
        if split == "train":  # the styles in equal parts: a prompt of the shorter one comes again
            assert {p.text for p in prompts} == {p.text for p in others}
            styles = [p.stratum for p in prompts]
            assert styles.count("word") == styles.count("shape") == sum("target" in p.meta for p in others)
        else:
            assert prompts_hash(prompts) == prompts_hash(others)
        assert [p.stratum for p in prompts] == ["word" if "target" in p.meta else "shape" for p in prompts]


def test_composed_scenes_are_version_1() -> None:
    splits = scenes.styled_scenes(set())
    assert {split: prompts_hash(prompts) for split, prompts in splits.items()} == COMPOSED
    for split, count in (("train", 2000), ("validation", 128)):
        texts = [prompt.text for prompt in splits[split]]  # type: ignore[index]
        assert len({fold_text(text) for text in texts}) == count
        styles = [prompt.stratum for prompt in splits[split]]  # type: ignore[index]
        assert [styles.count(style) for style in scenes.STYLES] == [count // 4] * 4


def test_a_subject_in_a_place_is_in_one_split_only() -> None:
    splits = scenes.styled_scenes(set())
    pairs = {
        split: {
            (s, p) for s in scenes.SUBJECTS for p in scenes.PLACES for prompt in prompts if f"{s} {p}" in prompt.text
        }
        for split, prompts in ((split, prompts[:100]) for split, prompts in splits.items())
    }
    assert pairs["train"] and not pairs["train"] & pairs["validation"]


def test_composed_scenes_leave_out_what_the_test_set_asks_for() -> None:
    free = scenes.styled_scenes(set())
    taken = {fold_text(p.text) for split in free.values() for p in split[::50]}
    splits = scenes.styled_scenes(taken)
    assert not taken & {fold_text(p.text) for split in splits.values() for p in split}
    assert len(splits["train"]) == scenes.TRAIN  # others moved up


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder GPOBENCH_DATA names; nothing is cached and nothing may be fetched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("GPOBENCH_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def lay(data: Path, style: str, content: object) -> None:
    path = data / PUBLISHED[style].path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")


def test_the_benchmark_is_read_and_counted(data: Path) -> None:
    """Stand-ins of the published length: the lists themselves are not here."""
    with pytest.raises(UserError, match="task hpsv2, domain 'open': .*anime.json is not below GPOBENCH_DATA"):
        HPSv2().prompts("test", "open")
    for style in PUBLISHED:
        lay(data, style, [f"{style} {i}" for i in range(800)])
    test = HPSv2().prompts("test", "open")
    assert len(test) == 3200 and test[1600] == Prompt("paintings 0", stratum="paintings")
    refuse_overlap(HPSv2(), "open")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (["a"] * 799, "has 799 prompts, expected 800"),
        ({"a": 1}, "not a JSON list"),
        (["a", 7], "not a JSON list"),
        ([""], "not a JSON"),
    ],
)
def test_another_list_is_refused(data: Path, content: object, said: str) -> None:
    lay(data, "anime", content)
    with pytest.raises(UserError, match=said):
        HPSv2().prompts("test", "open")


def test_a_broken_list_is_refused(data: Path) -> None:
    lay(data, "anime", [])
    (data / PUBLISHED["anime"].path).write_bytes(b"\xff[")
    with pytest.raises(UserError, match="is not the published list"):
        HPSv2().prompts("train", "open")


def test_scorers_by_domain() -> None:
    task = HPSv2()
    assert (task.reward("open"), HPSv2(weights="v2").reward("open")) == ("hpsv2:v2.1", "hpsv2:v2")
    assert (task.reward("glyphs"), list(task.held_out("glyphs"))) == ("hpsv2:tiny", ["pickscore:tiny"])
    assert list(task.scorers("open")) == ["hpsv2:v2.1", "pickscore"]
    assert (task.evaluation("open").test_images, task.evaluation("open").validation_images) == (1, 1)
    assert (
        isinstance(task, SupportsColumns) and isinstance(task, SupportsOwnPrompts) and isinstance(task, SupportsSummary)
    )
    with pytest.raises(UserError, match="did you mean 'v2.1'"):
        HPSv2(weights="2.1")  # type: ignore[arg-type]
    for ask in (task.reward, task.held_out, task.scorers, task.evaluation, task.columns):
        with pytest.raises(UserError, match="did you mean 'glyphs'"):
            ask("glyph")
    bad: Split = "valid"  # type: ignore[assignment]
    with pytest.raises(UserError, match="did you mean 'validation'"):
        task.prompts(bad, "glyphs")


def test_own_prompts_may_have_a_style() -> None:
    task = HPSv2()
    assert task.read("a cat", {"style": "photo"}, "open").stratum == "photo"
    assert task.read("a cat", {"stratum": "mine"}, "open").stratum == "mine"
    assert task.read("a cat", {}, "open") == Prompt("a cat")


# The publication's numbers


def look(values: dict[str, np.ndarray], scorer: str = "hpsv2", images: int = 1) -> pd.DataFrame:
    """Style -> (prompts,) or (prompts, images), as a look's table."""
    rows: list[tuple[object, ...]] = []
    number = 0
    for style, column in values.items():
        for each in column.reshape(len(column), -1):
            rows += [(number, o, style, scorer, "hps", value) for o, value in enumerate(each)]
            number += 1
    return pd.DataFrame(rows, columns=["prompt", "ordinal", "stratum", "scorer", "metric", "value"])


def test_the_benchmarks_numbers() -> None:
    rng = np.random.default_rng(0)
    values = {style: rng.normal(27 + k, 2, 800) for k, style in enumerate(scenes.STYLES)}
    table = look(values)
    found = HPSv2().summary(table)
    expected = {"mean": float(np.mean(np.concatenate(list(values.values()))))}
    for style, column in values.items():
        groups = [np.mean(column[i * 80 : (i + 1) * 80]) for i in range(10)]
        expected |= {f"{style}/mean": float(np.mean(groups)), f"{style}/std10": float(np.std(groups))}
    assert found == pytest.approx(expected, abs=1e-12)
    assert HPSv2().summary(table.sample(frac=1, random_state=1)) == pytest.approx(expected, abs=1e-12)
    assert [key for key in found if key.endswith("/mean")] == [f"{style}/mean" for style in scenes.STYLES]


@given(n=st.integers(1, 45), images=st.integers(1, 3), lost=st.integers(0, 4))
def test_any_styles_of_any_size(n: int, images: int, lost: int) -> None:
    rng = np.random.default_rng(n)
    values = rng.normal(size=(n, images))
    table = look({"word": values, "shape": rng.normal(size=12)})
    table.loc[table.index[: min(lost, n * images - 1)], "value"] = np.nan
    values.flat[: min(lost, n * images - 1)] = np.nan
    found = HPSv2().summary(table)
    each = np.array([np.mean(row[np.isfinite(row)]) if np.isfinite(row).any() else np.nan for row in values])
    assert found["word/mean"] == pytest.approx(np.nanmean(each))
    assert ("word/std10" in found) == (n >= 10) and "shape/std10" in found


def test_which_scorers_are_summed_up() -> None:
    one, two = look({"a": np.arange(3.0)}), look({"a": np.arange(3.0) + 1}, "pickscore")
    assert HPSv2().summary(two) == {}
    both = HPSv2().summary(pd.concat([two, one]))
    assert both == {"a/mean": 1.0, "mean": 1.0}
    several = HPSv2().summary(pd.concat([one, look({"a": np.arange(3.0) + 5}, "hpsv2-v2")]))
    assert several["hpsv2/a/mean"] == 1 and several["hpsv2-v2/mean"] == 6
    lost = look({"a": np.full(3, np.nan)})
    assert np.isnan(HPSv2().summary(lost)["mean"])
    assert hpsv2.GROUPS == 10


def test_the_first_weights_are_a_task_of_their_own() -> None:
    first, later = hpsv2.v2(), HPSv2()
    assert first.name == "hpsv2-v2" and first.reward("open") == "hpsv2:v2" and later.reward("open") == "hpsv2:v2.1"
