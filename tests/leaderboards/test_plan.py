"""The plan command: a frontier from the library, a baseline or runs, its command, and one line for every bad request."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from gpobench.bench.errors import UserError
from gpobench.leaderboards.commands.plan import plan

Make = Callable[..., Path]
app = typer.Typer()
app.command()(plan)
ASKED = ("--methods", "gpo,nft", "--task", "ocr", "--model", "tiny", "--difference", "3", "--key", "reader/exact")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def planned(*arguments: object) -> dict[str, Any]:
    return json.loads(run(*arguments, "--json"), parse_constant=pytest.fail)


@pytest.fixture
def runs(tmp_path: Path, make_at: Any) -> Path:
    """Two methods and sft with two seeds each, 60 prompts x 4 images, whose seconds are known."""
    base = np.random.default_rng(0).random((60, 4)) / 2
    for k, method in enumerate(("gpo", "diffusion-nft", "sft")):
        prompt = 0.05 * np.random.default_rng(k + 10).standard_normal((60, 1))
        for seed in range(2):
            rng = np.random.default_rng([k, seed])
            after = base + 0.1 / (k + 1) + 0.01 * rng.standard_normal() + prompt + 0.1 * rng.standard_normal((60, 4))
            scores = {"engine/exact": (base, after), "other/exact": (base, np.clip(after, 0, 1))}
            more = {"spent": {"nfe": 1000.0, "seconds": 30.0}, "wall": {"evaluate": 6.0}}
            make_at(tmp_path / "runs" / f"{method}-{seed}", method, seed, scores_by_key=scores, **more)
    return tmp_path / "runs"


def test_the_library_alone_gives_a_frontier_without_gains() -> None:
    table = planned(*ASKED, "--seeds", "3,10", "--family", "asked")
    few, many = table["designs"]
    assert (few["seeds"], many["seeds"]) == (3, 10) and few["told"] is None
    assert many["mde"] < few["mde"] and many["power"] > few["power"] and few["runs"] == 12
    assert few["nfe"] == 12 * 30_000 and many["hours"] == pytest.approx(few["hours"] * 10 / 3)
    assert "library" in table["source"] and "EPYC" in table["device"]
    assert [row["row"] for row in table["components"]] == ["gpo", "diffusion-nft", "sft", "best-of-n"]
    assert table["chosen"]["power"] >= 0.8
    words = shlex.split(table["command"])
    assert words[:2] == ["gpobench", "compare"] and "gpo,diffusion-nft" in words
    assert words[words.index("--seeds") + 1] == str(table["chosen"]["seeds"])


def test_the_shipped_board_is_a_pilot_with_gains() -> None:
    table = planned(*ASKED, "--pilot", "tiny-ocr", "--seeds", "3", "--jobs", "2")
    (design,) = table["designs"]
    # The table of these four rows and the base, by its own seeds.
    assert (
        design["told"]["pairs"] == 10 and design["told"]["low"] <= design["told"]["expected"] <= design["told"]["high"]
    )
    assert table["components"][0]["gain"] == pytest.approx(0.0564, abs=1e-3)
    assert table["chosen"] is None and table["command"] is None and table["mde_of_endless_seeds"] > 0.015
    index = planned(*ASKED, "--pilot", "tiny", "--seeds", "3")  # a list of baselines, of which one is of this task
    assert index["designs"][0]["mde"] == design["mde"]
    assert design["hours"] == pytest.approx(index["designs"][0]["hours"] / 2)


def test_the_text_fits_into_80_columns_and_says_what_it_rests_on() -> None:
    text = run(*ASKED, "--pilot", "tiny-ocr", "--seeds", "3,10", "--family", "asked")
    table, _, command = text.partition("\n    gpobench compare")
    assert max(map(len, table.splitlines())) <= 80 and command
    for said in (
        "from tiny-ocr.toml",
        "the 1 asked pair",
        "3.00 points",
        "95 %: half the interval",
        "hours as measured",
    ):
        assert said in text
    assert "no design here reaches" in run(*ASKED, "--seeds", "2").replace("\n", " ")


def test_runs_show_the_images_part_and_what_an_evaluation_takes(runs: Path) -> None:
    asked = ("--methods", "gpo,nft", "--task", "ocr", "--model", "tiny", "--difference", "2", "--pilot", runs)
    table = planned(*asked, "--seeds", "2,4", "--key", "other/exact")
    by_design = {(d["seeds"], d["images"]): d for d in table["designs"]}
    assert set(by_design) == {(s, i) for s in (2, 4) for i in (4, 8, 16)}
    assert by_design[2, 16]["mde"] < by_design[2, 4]["mde"]
    assert by_design[2, 4]["hours"] == pytest.approx(2 * 3 * 36 / 3600)
    assert by_design[4, 8]["hours"] == pytest.approx(4 * 3 * 42 / 3600)
    assert table["device"] == "m" and any("best-of-n" in note for note in table["notes"])
    h100 = planned(*asked, "--seeds", "2", "--device", "h100")
    assert h100["hours_from"] == "data sheet" and 0 < h100["designs"][0]["hours"] < 0.1
    single = planned("--methods", "gpo", *asked[2:], "--seeds", "2", "--key", "engine/exact")
    assert single["pairs"] == [["gpo", "base"]]


def test_other_prompts_are_planned_but_compare_does_not_make_them() -> None:
    table = planned(*ASKED, "--seeds", "10", "--prompts", "5000", "--family", "asked", "--power", ".9")
    assert table["chosen"]["prompts"] == 5000 and table["command"] is None
    assert any("5,000 prompts need a file" in note for note in table["notes"])
    text = run(*ASKED, "--seeds", "10", "--prompts", "5000", "--family", "asked")
    assert "each with --prompts test=FILE" in text.replace("\n", " ")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--difference", "0"), "--difference must be above 0, got 0"),
        (("--difference", "nan"), "--difference must be above 0"),
        (("--difference", "100"), "--difference is in points where the score lies between 0 and 1"),
        (("--power", "1"), "--power is a probability between 0 and 1, got 1: no design is sure"),
        (("--power", "0"), "--power is a probability"),
        (("--seeds", "1"), "one seed shows no spread between seeds"),
        (("--seeds", "many"), "--seeds takes whole numbers"),
        (("--prompts", "2"), "below 5 prompts there is no test, got 2"),
        (("--images", "8"), "8 images a prompt cannot be planned"),
        (("--methods", "gppo"), "did you mean 'gpo'"),
        (("--task", "ocrr"), "did you mean 'ocr'"),
        (("--task", "pickscore"), "library has no components of variance for pickscore on tiny"),
        (("--task", "counting", "--pilot", "tiny-ocr", "--key", "geneval-shapes/correct"),
         "the pilot is of the task ocr, the plan of counting"),
        (("--model", "sd35m", "--pilot", "tiny-ocr"), "the pilot is of the model tiny, the plan of sd35m"),
        (("--budget", "nfe=1000", "--pilot", "tiny-ocr"), "a pilot says nothing of another budget"),
        (("--budget", "nfe=1000"), "the shipped library knows no spread at nfe=1000, only at nfe=30000"),
        (("--pilot", "tiny-oc.toml"), "no baseline at tiny-oc.toml"),
        (("--pilot", "gone"), "gone is no folder of runs"),
        (("--key", "reader/exat"), "did you mean 'reader/exact'"),
        (("--pairs", "gpo:sftt"), "did you mean 'sft'"),
        (("--family", "bases"), "did you mean 'base'"),
        (("--family", "base"), "gpo:diffusion-nft is another pair"),
        (("--device", "h1000"), "did you mean 'h100'"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_line(more: tuple[str, ...], said: str) -> None:
    changed = dict(zip(ASKED[::2], ASKED[1::2], strict=True)) | dict(zip(more[::2], more[1::2], strict=True))
    with pytest.raises(UserError, match=said) as error:
        run(*(word for pair in changed.items() for word in pair))
    assert "\n" not in str(error.value)


def test_pilots_that_show_nothing_are_refused(tmp_path: Path, make_at: Any) -> None:
    asked = ("--methods", "gpo", "--task", "ocr", "--model", "tiny", "--difference", "2", "--pilot")
    base = np.random.default_rng(0).random((40, 2))
    for name, prompts, after, seeds, said in (
        ("two", 2, base + 0.1, 2, "2 prompts with a score in every row: below 5"),
        ("equal", 40, base, 2, "all scores of the pilot are equal to the base's"),
        ("nan", 40, np.full(base.shape, math.nan), 2, "row gpo has a seed without any score"),
        ("one", 40, base + 0.1 * np.random.default_rng(1).random((40, 2)), 1, "one seed of gpo, which shows no spread"),
    ):
        for seed in range(seeds):
            scores = {"other/exact": (base[:prompts], after[:prompts])}
            make_at(tmp_path / name / str(seed), "gpo", seed, scores_by_key=scores)
        with pytest.raises(UserError, match=said):
            run(*asked, tmp_path / name)
