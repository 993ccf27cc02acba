"""A baseline is read as it was written, and an edited or damaged one is refused."""

from __future__ import annotations

import hashlib
import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpobench.bench.errors import UserError
from gpobench.leaderboards.baseline import (
    Baseline,
    BaselineNumber,
    BaselineScores,
    Claim,
    find_baseline,
    flat,
    literal,
    read_baseline,
    scores_path,
    write_baseline,
)


def example(n: int = 6, strata: list[str] | None = None, **change: Any) -> tuple[Baseline, BaselineScores]:
    rng = np.random.default_rng(0)
    drawn = lambda: rng.random((n, 3)).round(4)
    by = {("base", "a/b"): [drawn()], ("gpo", "a/b"): [drawn() for _ in range(2)]}
    by["gpo", "a/b"][1][2] = math.nan
    by["gpo", "a/b"][0][3, 1] = math.nan
    by["gpo", "a/b"][0][4, :2] = 0.0, 1.0
    weight = lambda v: (
        float(np.mean([np.nanmean(v[[s == label for s in strata]]) for label in set(strata)]))
        if strata
        else float(np.nanmean(v))
    )
    by_prompt = lambda x: np.array([np.nan if np.isnan(row).all() else np.nanmean(row) for row in x])
    mean = {label: weight(np.mean([by_prompt(x) for x in seeds], axis=0)) for (label, _), seeds in by.items()}
    claims = tuple(
        Claim(
            label=label,
            method=label,
            seeds=seeds,
            sets=("optim.clip=2.0",) * bool(seeds),
            settings={
                "settings.optim.lr": 1e-5,
                "settings.loss_type": 'a "quoted" \\ word',
                "adapter.targets": ["a", "b.0"],
            }
            if seeds
            else {},
            number=(
                BaselineNumber(
                    key="a/b",
                    mean=round(mean[label], 4),
                    ci=(0.1, 0.9),
                    n=n - bool(seeds),
                    margin=0.03,
                    **({"rule": "25%", "gain": 0.1, "gain_ci": (0.05, 0.15), "told": True} if seeds else {}),
                ),
            ),
        )
        for label, seeds in (("base", ()), ("gpo", (0, 7)))
    )
    facts: dict[str, Any] = {
        "command": "gpobench regress 'my runs'", "date": "2026-01-01", "commit": "abc", "runs_commits": ("abc",),
        "device": "a machine", "versions": {"torch": "2.6"}, "task": "ocr", "task_version": "1", "model": "tiny", "weights": "w",
        "training": "a", "digits": 4, "scores_sha256": "", "budget": {"nfe": 1000.0}, "evaluation": {"split": "test", "seed": 1},
        "prompts": {"test": "bb"}, "scorers": {"a": "a-1@é"}, "row": claims,
    }  # fmt: skip
    return Baseline(**(facts | change)), BaselineScores(by, strata)


@pytest.mark.parametrize("strata", [None, ["x", "x", "x", "y, z", "y, z", "y, z"]])
def test_round_trip(tmp_path: Path, strata: list[str] | None) -> None:
    path = tmp_path / "t.toml"
    baseline, scores = example(strata=strata)
    written = write_baseline(path, baseline, scores)
    back, same = read_baseline(path)
    assert back == written and back.model_copy(update={"scores_sha256": ""}) == baseline and same.strata == strata
    for key, vectors in scores.by.items():
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(vectors, same.by[key], strict=True))
    text = path.read_text(), scores_path(path).read_text()
    write_baseline(path, back, same)
    assert text == (path.read_text(), scores_path(path).read_text())


def test_a_person_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    write_baseline(path, *example())
    table = tomllib.loads(path.read_text())
    assert table["row"][1]["settings"]["settings.optim.lr"] == 1e-5 and table["row"][1]["number"][0]["margin"] == 0.03
    lines = scores_path(path).read_text().splitlines()
    assert lines[0] == "row,key,seed,0,1,2,3,4,5" and lines[2].startswith("gpo,a/b,0,0.") and len(lines) == 4
    assert lines[3].split(",")[5] == ""  # no score of any image
    cells = lines[2].split(",")
    assert cells[6].split()[1] == "-" and cells[7].split()[:2] == ["0", "1"] and len(cells[3].split()) == 3


def test_scores_of_single_images_must_be_as_many_for_each_prompt(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    write_baseline(path, *example())
    file = scores_path(path)
    head, base, *rest = file.read_text().splitlines()
    words = base.split(",")
    words[4] = "0.5"
    text = "\n".join([head, ",".join(words), *rest]) + "\n"
    file.write_text(text)
    old = tomllib.loads(path.read_text())["scores_sha256"]
    path.write_text(path.read_text().replace(old, hashlib.sha256(text.encode()).hexdigest()))
    with pytest.raises(UserError, match="prompts have 1 and 3 images in one line"):
        read_baseline(path)


def test_a_margin_may_be_edited(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    write_baseline(path, *example())
    path.write_text(path.read_text().replace("margin = 0.03", "margin = 0.05"))
    assert read_baseline(path)[0].row[0].number[0].margin == 0.05


def test_an_edited_baseline_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"

    def edit_file(old: str, new: str, scores: bool = False) -> None:
        write_baseline(path, *example())
        file = scores_path(path) if scores else path
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new, 1))

    for edit, message in (
        (("gpo,a/b,0,0.", "gpo,a/b,0,1.", True), "its sha256 differs"),
        (("margin = 0.03", "margin = -0.03"), "row.0.number.0.margin: Input should be greater than 0"),
        (("margin = 0.03", "margin = inf"), "row.0.number.0.margin"),
        (("margin = 0.03\n", ""), "row.0.number.0.margin: Field required"),
        (("margin = 0.03", "margin = 0.03\nmargins = 1"), "Extra inputs are not permitted"),
        (("mean = 0.", "mean = 1."), "its scores say"),
        (("seeds = [0, 7]", "seeds = [0, 8]"), "lacks the scores of gpo a/b 8"),
        (('method = "gpo"', 'method = "gpoo"'), "unknown method in .* 'gpoo'; did you mean 'gpo'"),
        (("format = 3", "format = 1"), "has format 1, this gpobench reads format 3"),
        (("[budget]", "[budget"), "cannot read"),
    ):
        edit_file(*edit)
        with pytest.raises(UserError, match=message) as caught:
            read_baseline(path)
        assert "\n" not in str(caught.value)
    write_baseline(path, *example())
    scores_path(path).unlink()
    with pytest.raises(UserError, match=r"cannot read .*t\.scores\.csv"):
        read_baseline(path)
    with pytest.raises(UserError, match="no baseline at"):
        read_baseline(tmp_path / "gone.toml")
    with pytest.raises(UserError, match="cannot write"):
        write_baseline(tmp_path / "gone" / "t.toml", *example())


leaves = st.one_of(
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.text("ab", max_size=2)),
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(value=leaves)
def test_any_value_is_written_as_toml(value: Any) -> None:
    assert tomllib.loads(f"x = {literal(value)}")["x"] == value


def test_flat_keys_have_points() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": None}, "e": (1, 2)}) == {"a.b.c": 1, "e": [1, 2]}
    assert tomllib.loads(f"x = {literal({'a b': [1, {'c': 'd'}]})}")["x"] == {"a b": [1, {"c": "d"}]}


def test_a_name_is_a_file_or_one_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_baseline("x/y.toml") == Path("x/y.toml") and find_baseline("nothing") == Path("nothing")
