"""A user's own prompts: every format is read as it was written, and an error names the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpobench.bench import spec
from gpobench.bench.assets.prompts import PromptRow, own_prompt_notes, parse_option, read_prompts, with_own_prompts
from gpobench.bench.errors import UserError
from gpobench.bench.evaluation.splits import prompts_hash, refuse_overlap
from gpobench.bench.registry import load
from gpobench.bench.spec import Prompt, SupportsColumns, SupportsOwnPrompts, SupportsSummary
from gpobench.tasks.hpsv2 import HPSv2
from gpobench.tasks.ocr import OCR

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
NASTY = [
    'a, "b"',
    "two\nlines",
    "a\r\nb\rc",
    "\u2028 and \x0b",
    "# not a comment",
    "naïve 猫 🐈",
    "'",
    '"',
    "a\tb",
    " edges ",
]
LISTS = st.lists(st.one_of(TEXTS, st.sampled_from(NASTY)), min_size=1, max_size=8)


def bare(rows: Sequence[PromptRow]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(row.text, row.facts) for row in rows]


def table(rows: Sequence[Sequence[str]], delimiter: str) -> str:
    sheet = io.StringIO(newline="")
    csv.writer(sheet, delimiter=delimiter).writerows(rows)
    return sheet.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


# Formats


@given(texts=LISTS, facts=LISTS, name=st.sampled_from(["prompt", "text", "caption"]), bom=st.booleans())
def test_a_table_comes_back(folder: Path, texts: list[str], facts: list[str], name: str, bom: bool) -> None:
    pairs = [(text, facts[i % len(facts)]) for i, text in enumerate(texts)]
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        path = folder / f"table{suffix}"
        path.write_bytes(
            table([("target", name), *((f, t) for t, f in pairs)], delimiter).encode("utf-8-sig" if bom else "utf-8")
        )
        rows = read_prompts(path, unique=False)
        assert bare(rows) == [(text, {"target": fact}) for text, fact in pairs]
        assert sorted(row.line for row in rows) == [row.line for row in rows] and rows[0].line == 2


@given(texts=LISTS, fact=st.one_of(st.integers(), st.booleans(), st.none(), TEXTS, st.lists(st.integers(), max_size=2)))
def test_json_lines_come_back(folder: Path, texts: list[str], fact: Any) -> None:
    path = folder / "lines.jsonl"
    for ascii_only in (True, False):
        lines = [json.dumps({"prompt": text, "fact": fact}, ensure_ascii=ascii_only) for text in texts]
        path.write_text("\n".join(lines) + "\n\n", "utf-8", newline="")
        rows = read_prompts(path, unique=False)
        assert bare(rows) == [(text, {"fact": fact}) for text in texts]
        assert [row.line for row in rows] == list(range(1, len(texts) + 1))


@given(texts=LISTS)
def test_parquet_comes_back(folder: Path, texts: list[str]) -> None:
    path = folder / "table.parquet"
    pd.DataFrame({"caption": texts, "count": range(len(texts)), "none": None}).to_parquet(path)
    assert bare(read_prompts(path, unique=False)) == [(text, {"count": i}) for i, text in enumerate(texts)]


def test_plain_lines(folder: Path) -> None:
    path = folder / "plain.txt"
    path.write_bytes("\ufeff# a hash sign\r\n\r\n  a cat \n\n\u2028 a\u2028dog".encode())
    assert [(row.text, row.line) for row in read_prompts(path)] == [
        ("# a hash sign", 1),
        ("a cat", 3),
        ("a\u2028dog", 5),
    ]


def test_the_first_name_wins_and_an_empty_cell_is_no_fact(folder: Path) -> None:
    path = folder / "names.csv"
    path.write_text("text,prompt,target\nthe fact,the prompt,\n", "utf-8")
    assert bare(read_prompts(path)) == [("the prompt", {"text": "the fact"})]


BROKEN = {
    "empty.txt": (b"\n \n", "holds no prompts"),
    "empty.csv": (b"", "holds no prompts"),
    "headed.csv": (b"prompt\n", "holds no prompts"),
    "latin.txt": ("ok\nnaïve".encode("latin-1"), "line 2: this is not UTF-8"),
    "broken.jsonl": (b'{"prompt": "a"}\n{"prompt": ', "line 2: this is not JSON"),
    "list.jsonl": (b'["a"]', "line 1: this is no JSON object"),
    "none.jsonl": (b'{"prompt": "a"}\n\n{"caption2": "b"}', "line 3: there is no prompt"),
    "number.jsonl": (b'{"prompt": 7}', "line 1: the prompt is 7"),
    "half.jsonl": (b'{"prompt": "a\\ud800"}', "line 1: the prompt holds half a character"),
    "blank.csv": (b'prompt,target\na,b\n"",c\n', "line 3: the prompt is empty"),
    "column.csv": (b"words,target\na,b\n", "line 2: there is no prompt"),
    "ragged.csv": (b'prompt,target\n"two\nlines",b\na,b,c\n', "line 4: 3 cells under 2 columns"),
    "twins.csv": (b"prompt,x,x\na,b,c\n", "two columns have one name"),
    "quotes.csv": (b'prompt\n"a" b\n', "line 2"),
    "not.parquet": (b"hello", "is not a parquet file"),
    "list.docx": (b"hello", r"ends in \.txt, \.jsonl, \.csv, \.tsv, \.parquet"),
    "again.txt": (b"A cat!\na dog\n\na  CAT\nA Dog.", "2 prompts twice: lines 1 and 4: 'a  CAT'; lines 2 and 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_an_error_names_the_file_and_the_line(folder: Path, name: str) -> None:
    raw, said = BROKEN[name]
    (folder / name).write_bytes(raw)
    with pytest.raises(UserError, match=said) as error:
        read_prompts(folder / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there(folder: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_prompts(folder / "none.csv")


# Tasks


@pytest.fixture
def mine(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.txt"
        path.write_text(text, "utf-8")
        return path

    return write


def test_a_task_asks_the_files_prompts_and_does_the_rest_as_ever(mine: Callable[[str], Path]) -> None:
    task = OCR()
    mixed = with_own_prompts(task, {"train": mine('a sign that says "QUIZ"\na card that says "JAZZ" in red')}, "glyphs")
    assert [(p.text, p.meta) for p in mixed.prompts("train", "glyphs")] == [
        ('a sign that says "QUIZ"', {"target": "QUIZ"}),
        ('a card that says "JAZZ" in red', {"target": "JAZZ"}),
    ]
    assert prompts_hash(mixed.prompts("test", "glyphs")) == prompts_hash(task.prompts("test", "glyphs"))
    assert (mixed.name, mixed.version) == ("ocr", "1+own")
    assert with_own_prompts(task, {}, "glyphs").version == "1"
    for ask in ("reward", "scorers", "held_out", "evaluation", "key"):
        assert getattr(mixed, ask)("glyphs") == getattr(task, ask)("glyphs")
    assert isinstance(mixed, SupportsColumns) and mixed.columns("glyphs") == task.columns("glyphs")
    assert isinstance(mixed, SupportsOwnPrompts) and mixed.read('a "BUS"', {}, "glyphs").meta == {"target": "BUS"}
    with pytest.raises(UserError, match="of the domain 'glyphs', not of 'open'"):
        mixed.prompts("train", "open")


def test_what_the_task_misses_is_said_with_its_line(mine: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"0\.txt, line 3: an OCR prompt needs the text to write.*'a cat'"):
        with_own_prompts(OCR(), {"train": mine('a "BUS"\n\na cat')}, "glyphs")


def test_a_task_that_neither_reads_nor_has_columns_nor_sums_up(redness: str, tmp_path: Path) -> None:
    task = load("task", f"{redness}:Paint")()
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "a red sky", "mood": "calm", "stratum": "sky"}', "utf-8")
    mixed = with_own_prompts(task, {"test": path}, "glyphs")
    assert list(mixed.prompts("test", "glyphs")) == [
        Prompt("a red sky", {"mood": "calm", "stratum": "sky"}, stratum="sky")
    ]
    assert isinstance(mixed, SupportsColumns) and mixed.columns("glyphs") == spec.Columns()
    assert isinstance(mixed, spec.SupportsKey) and mixed.key("glyphs") == ""
    assert isinstance(mixed, SupportsSummary) and mixed.summary(pd.DataFrame()) == {}


def test_the_publications_numbers_stay(mine: Callable[[str], Path]) -> None:
    task = HPSv2()
    rows = [(i, "s", "hpsv2", "hps", float(i)) for i in range(20)]
    look = pd.DataFrame(rows, columns=["prompt", "stratum", "scorer", "metric", "value"])
    mixed = with_own_prompts(task, {"test": mine("a cat")}, "glyphs")
    assert isinstance(mixed, SupportsSummary) and mixed.summary(look) == task.summary(look) != {}


def test_a_training_list_may_weigh_its_prompts_by_repeating_them(mine: Callable[[str], Path]) -> None:
    twice = 'a sign that says "QUIZ"\n' * 2
    weighted = with_own_prompts(OCR(), {"train": mine(twice)}, "glyphs")
    assert len(weighted.prompts("train", "glyphs")) == 2 and not own_prompt_notes(weighted)


def test_an_evaluation_list_that_repeats_prompts_is_evaluated_on_each_once(mine: Callable[[str], Path]) -> None:
    path = mine('a sign that says "QUIZ"\na sign that says "JAZZ"\na sign that says "QUIZ" \n')
    task = with_own_prompts(OCR(), {"test": path}, "glyphs")
    assert [prompt.meta["target"] for prompt in task.prompts("test", "glyphs")] == ["QUIZ", "JAZZ"]
    (note,) = own_prompt_notes(task)
    assert "1 row" in note and str(path) in note
    assert own_prompt_notes(OCR()) == ()


def test_evaluation_prompts_that_differ_only_in_case_are_refused(mine: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="twice"):
        with_own_prompts(OCR(), {"test": mine('a sign that says "QUIZ"\nA sign that says "QUIZ"\n')}, "glyphs")


def test_the_same_prompt_with_two_targets_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.csv"
    path.write_text("prompt,target\na sign,QUIZ\na sign,JAZZ\n", "utf-8")
    with pytest.raises(UserError, match="twice"):
        with_own_prompts(OCR(), {"test": path}, "open")


def test_own_prompts_that_are_also_judged_are_refused(mine: Callable[[str], Path]) -> None:
    stolen = OCR().prompts("test", "glyphs")[5].text
    with pytest.raises(UserError, match="a test prompt stands in the train split"):
        refuse_overlap(with_own_prompts(OCR(), {"train": mine(stolen.replace(" ", "  "))}, "glyphs"), "glyphs")


# The option


def test_the_option(tmp_path: Path) -> None:
    assert parse_option([]) == {}
    assert parse_option(["a.txt"]) == {"train": Path("a.txt")}
    assert parse_option(["test=b=c.csv", "validation=v.txt", "t.txt"]) == {
        "test": Path("b=c.csv"), "validation": Path("v.txt"), "train": Path("t.txt"),
    }  # fmt: skip
    odd = tmp_path / "a=b.txt"
    odd.write_text("a cat", "utf-8")
    assert parse_option([str(odd)]) == {"train": odd}
    for wrong, said in (
        (["tset=a.txt"], "did you mean 'test'"),
        (["a.txt", "train=b.txt"], "two files for the train split"),
        (["test="], "no file is named"),
    ):
        with pytest.raises(UserError, match=said):
            parse_option(wrong)
