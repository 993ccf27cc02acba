"""Every paper number has a paper, a table and a unit, and is shown only beside boards of its task and model."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpobench.bench import registry
from gpobench.bench.errors import UserError
from gpobench.leaderboards.paper_numbers import MODELS, load_paper_numbers, matching

HEAD = "method,base_model,task,metric,value,unit,setting,arxiv,table,provenance\n"
GOOD = "gpo,SD3.5-M,ocr,gain over base,20,percentage points,,2505.11070,abstract,abstract"


def test_every_row_is_one() -> None:
    rows = load_paper_numbers()
    assert len(rows) > 50 and len(set(rows)) == len(rows)
    assert {r.task for r in rows} <= set(registry.entries("task"))
    assert {r.method for r in rows} - {"base"} <= set(registry.entries("method"))
    assert set(MODELS.values()) <= set(registry.entries("model"))
    for r in rows:
        low, high = {"fraction": (0, 1), "percent": (0, 100), "100*cosine": (10, 40)}.get(r.unit, (0, 40))
        assert low <= r.value <= high, r


def test_the_headline_numbers() -> None:
    """As the papers' abstracts and first tables have them."""
    values = {(r.method, r.base_model, r.task, r.metric, r.arxiv, r.table): r.value for r in load_paper_numbers()}
    assert values["flow-grpo", "SD3.5-M", "geneval", "overall", "2505.05470", "Table 1"] == 0.95
    assert values["base", "SD3.5-M", "geneval", "overall", "2505.05470", "Table 1"] == 0.63
    assert values["dgpo", "SD3.5-M", "geneval", "overall", "2510.08425", "Table 1"] == 0.97
    assert values["gpo", "SD3.5-M", "counting", "gain over base", "2505.11070", "abstract"] == 20


def test_only_the_same_task_and_model_stand_beside() -> None:
    assert {r.base_model for r in matching("geneval", "sd35m")} == {"SD3.5-M"}
    assert matching("geneval", "sd15") and not matching("ocr", "tiny") and not matching("hpsv2", "sd15")
    assert {r.task for r in matching("ocr", "sd35m")} == {"ocr"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2505.11070", "2505.1107", "arxiv"), ("20,", "many,", "value"), ("20,", "nan,", "value"), (",ocr,", ",poems,", "task"),
        ("gpo,", "gpoo,", "method"), (",abstract,abstract", ",abstract,hearsay", "provenance"), ("percentage points", "%", "unit"),
        ("20,percentage points,,", "20,percentage points,,,", "line 2"),
    ],
)  # fmt: skip
def test_a_row_that_is_none_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "reported.csv"
    file.write_text(HEAD + GOOD + "\n")
    assert len(load_paper_numbers(file)) == 1
    file.write_text(HEAD + GOOD.replace(old, new, 1) + "\n")
    with pytest.raises(UserError, match=message) as caught:
        load_paper_numbers(file)
    assert "line 2" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read"):
        load_paper_numbers(tmp_path / "gone.csv")
