"""Files that people bring: published lists as they are, every table by its own quoting, and one line for what cannot be read."""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpobench.bench.assets.prompts import read_prompts, understood
from gpobench.bench.assets.record_files import READERS, column, finite, plain, records, records_by_id
from gpobench.bench.errors import UserError

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def prompts(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(row.text, dict(row.facts)) for row in read_prompts(path, unique=False)]


# Published lists, as they are


PUBLISHED: dict[str, tuple[str, list[tuple[str, dict[str, Any]]]]] = {
    "parti.tsv": (
        'Prompt\tCategory\tChallenge\tNote\n"STOP" on a sign\tWorld Knowledge\tBasic\t\na "cat"\tAnimals\tBasic\tby hand\n',
        [
            ('"STOP" on a sign', {"Category": "World Knowledge", "Challenge": "Basic"}),
            ('a "cat"', {"Category": "Animals", "Challenge": "Basic", "Note": "by hand"}),
        ],
    ),
    "drawbench.csv": ("Prompts,Category\nA red car.,Colors\n", [("A red car.", {"Category": "Colors"})]),
    "hpdv2.json": ('["a cat", "a dog"]', [("a cat", {}), ("a dog", {})]),
    "objects.json": (
        '[{"prompt": "a cat", "tag": "x"}, {"prompt": "a dog"}]', [("a cat", {"tag": "x"}), ("a dog", {})],
    ),
    "mjhq.json": (
        '{"b1": {"category": "art", "prompt": "a cat"}, "7": {"prompt": "a dog"}}',
        [("a cat", {"id": "b1", "category": "art"}), ("a dog", {"id": "7"})],
    ),
    "texts.json": ('{"b1": "a cat", "b2": "a dog"}', [("a cat", {"id": "b1"}), ("a dog", {"id": "b2"})]),
    "wrapped.json": (
        '{"version": "1", "prompts": [{"text": "a cat"}, {"text": "a dog"}]}', [("a cat", {}), ("a dog", {})],
    ),
    "named.json": ('{"prompts": {"b1": {"prompt": "a cat"}}}', [("a cat", {"id": "b1"})]),
    "data.json": ('{"data": ["a cat"], "licence": "CC0"}', [("a cat", {})]),
    "frame.json": (
        '{"prompt": {"0": "a cat", "1": "a dog"}, "n": {"0": 1, "1": 2}}', [("a cat", {"n": 1}), ("a dog", {"n": 2})],
    ),
    "columns.json": ('{"prompt": ["a cat", "a dog"], "n": [1, 2]}', [("a cat", {"n": 1}), ("a dog", {"n": 2})]),
    "one.json": ('{"prompt": "a cat", "include": []}', [("a cat", {"include": []})]),
    "metadata.jsonl": (
        '{"file_name": "0001.png", "text": "a cat"}\n', [("a cat", {"file_name": "0001.png"})],
    ),
    "lines.ndjson": ('{"caption": "a cat"}\n', [("a cat", {})]),
    "european.csv": ('File;Prompt\na.png;"a cat; a dog"\n', [("a cat; a dog", {"File": "a.png"})]),
    "tabs.csv": ("file\tprompt\na.png\ta cat, a dog\n", [("a cat, a dog", {"file": "a.png"})]),
    "commas.tsv": ('file,PROMPT\na.png,"a cat, a dog"\n', [("a cat, a dog", {"file": "a.png"})]),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_list_is_read_as_it_is_published(write: Write, name: str) -> None:
    content, expected = PUBLISHED[name]
    for text in (content, "\ufeff" + content, content.replace("\n", "\r\n")):
        assert prompts(write(name, text)) == expected


def test_text_of_a_spreadsheet_is_read(write: Write) -> None:
    content = "File\tPrompt\na.png\ta naïve 猫\n".encode("utf-16")
    assert prompts(write("a.tsv", content)) == [("a naïve 猫", {"File": "a.png"})]
    with pytest.raises(UserError, match=r"this is not UTF-16"):
        read_prompts(write("b.tsv", content[:-1]))


def test_a_folder_of_texts_is_a_list_in_the_order_of_the_names(write: Write, tmp_path: Path) -> None:
    for name, text in (("10.txt", "a dog\n"), ("9.caption", " a cat"), (".hidden.txt", "x"), ("notes.md", "y")):
        write(f"list/{name}", text)
    assert prompts(tmp_path / "list") == [("a cat", {"id": "9"}), ("a dog", {"id": "10"})]
    assert list(records_by_id(tmp_path / "list")) == ["9", "10"]
    write("list/9.txt", "again")
    with pytest.raises(UserError, match="two prompts called 9"):
        read_prompts(tmp_path / "list")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no STYLE.json, and no ID.txt"):
        read_prompts(tmp_path / "empty")


def test_a_folder_of_styles_is_a_list_with_the_style_as_a_fact(write: Write, tmp_path: Path) -> None:
    write("lists/photo.json", '["a dog"]')
    write("lists/anime.json", '["a cat"]')
    assert prompts(tmp_path / "lists") == [("a cat", {"style": "anime"}), ("a dog", {"style": "photo"})]
    assert records_by_id(tmp_path / "lists") == {}


def test_the_same_spelling_of_a_column_comes_first() -> None:
    assert column(["Prompt", "prompt", "text"], ("prompt",)) == "prompt"
    assert column(["Text", " Image Path "], ("imagepath", "text")) == " Image Path "
    assert column(["title"], ("prompt", "text")) is None


# Quoting


def test_a_table_of_tabs_without_quoting_keeps_its_quotation_marks(write: Write) -> None:
    for line, text in (
        ('"CAT" on a sign', '"CAT" on a sign'),
        ('"CAT"', '"CAT"'),
        ('a "CAT" and a "DOG"', 'a "CAT" and a "DOG"'),
        ('"CAT" and "DOG"', '"CAT" and "DOG"'),
    ):
        path = write("a.tsv", f"file\tprompt\nb.png\ta red sign\na.png\t{line}\n")
        assert [row.text for row in read_prompts(path)] == ["a red sign", text], line


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_table_of_tabs_that_a_program_quoted_is_unquoted(write: Write, quoting: Any) -> None:
    texts = ['"CAT" on a sign', "a\ttab", "two\nlines", 'a "cat"', "plain"]
    sheet = io.StringIO(newline="")
    csv.writer(sheet, delimiter="\t", quoting=quoting).writerows(
        [("file", "prompt"), *((f"{i}", t) for i, t in enumerate(texts))]
    )
    assert [row.text for row in read_prompts(write("a.tsv", sheet.getvalue()))] == texts
    excel = 'file\tprompt\r\na\t"a cat, a dog"\r\nb\tplain\r\nc\t"a ""cat"""\r\n'
    assert [row.text for row in read_prompts(write("b.tsv", excel))] == ["a cat, a dog", "plain", 'a "cat"']


# Facts


def test_facts_are_what_json_holds() -> None:
    moment = datetime.datetime(2024, 1, 2, 3, 4, 5)
    value = {
        "at": moment,
        "on": moment.date(),
        "price": Decimal("1.50"),
        "n": Decimal(3),
        "raw": b"x",
        "more": (1, {2: None}),
    }
    assert plain(value) == {
        "at": "2024-01-02T03:04:05", "on": "2024-01-02", "price": 1.5, "n": 3, "raw": None, "more": [1, {"2": None}],
    }  # fmt: skip
    assert finite({"a": [1.5, float("nan")], "b": float("inf")}) == {"a": [1.5, None], "b": None}


def test_a_scorer_elsewhere_can_be_sent_every_fact_of_a_table(tmp_path: Path) -> None:
    moments = pd.to_datetime(["2024-01-01", None])
    frame = pd.DataFrame({"prompt": ["a cat", "a dog"], "w": [1.5, None], "when": moments, "picture": [b"x", b"y"]})
    frame.to_parquet(tmp_path / "a.parquet")
    path = tmp_path / "a.parquet"
    read = understood(None, path, read_prompts(path), "open")
    assert [dict(prompt.meta) for prompt in read] == [{"w": 1.5, "when": "2024-01-01T00:00:00"}, {}]
    json.dumps([dict(prompt.meta) for prompt in read], allow_nan=False)


# What cannot be read


BROKEN: dict[str, tuple[str | bytes, str]] = {
    "deep.jsonl": ('{"prompt": "a", "x": ' + "[" * 100_000, "line 1: this JSON is nested too deeply"),
    "nested.jsonl": ('{"prompt": "a", "x": ' + "[" * 80 + "]" * 80 + "}", "line 1: the 'x' is nested deeper than 64"),
    "deep.json": ("[" * 100_000, "this JSON is nested too deeply"),
    "twice.jsonl": ('{"prompt": "a", "prompt": "b"}', "line 1: .*two values are called 'prompt'"),
    "half.jsonl": ('{"prompt": "a", "tag": "\\udce9"}', "line 1: the 'tag' holds half a character"),
    "half_name.jsonl": ('{"prompt": "a", "\\udce9": "b"}', r"line 1: the '\\udce9' holds half a character"),
    "number.json": ("7", "is no list of prompts"),
    "numbers.json": ("[7]", "entry 1: this is neither a text nor a record but int"),
    "empty.json": ("{}", "is no list of prompts"),
    "rows.json": ('{"prompt": ["a", "b"], "n": [1]}', "the columns prompt, n have not the same rows"),
    "half_named.json": ('{"a": "a cat", "b": 7}', "is no list of prompts"),
    "sheet.xlsx": (b"PK", r"ends in \.txt.*: save the sheet as \.csv"),
    "list.txt.gz": (b"\x1f\x8b", "unpack it"),
    "list.yaml": ("- a cat", r"save the list as \.json"),
    "lines.jsonl": ('{"a\\nb": 1}', r"there is no prompt .* only a\\nb"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_one_line(write: Write, name: str) -> None:
    content, message = BROKEN[name]
    with pytest.raises(UserError, match=message) as error:
        read_prompts(write(name, content))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], ["prompt", "prompt"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="two columns have one name: prompt, prompt"):
        read_prompts(tmp_path / "a.parquet")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "Prompts", "text", "id", "x"]) | st.text(max_size=3), inner, max_size=3
        )
    ),
    max_leaves=8,
)
CELLS = st.text(st.sampled_from('a"\t,;\n\r \u2028é\x00') | st.characters(codec="utf-8"), max_size=6)


def refused_or_read(path: Path) -> None:
    """A file is read or refused in one line; what is read can be sent as JSON."""
    try:
        read = understood(None, path, read_prompts(path, unique=False), "open")
        records_by_id(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert read and all(prompt.text.strip() for prompt in read)
        json.dumps([[prompt.text, dict(prompt.meta), prompt.stratum] for prompt in read], allow_nan=False).encode()


SHORT = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@given(
    suffix=st.sampled_from(list(READERS)),
    content=st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")),
)
@SHORT
def test_any_bytes_are_prompts_or_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"any{suffix}"
    path.write_bytes(content)
    refused_or_read(path)


@given(value=JSON, suffix=st.sampled_from([".json", ".jsonl"]))
@SHORT
def test_any_json_is_prompts_or_refused(tmp_path: Path, value: Any, suffix: str) -> None:
    path = tmp_path / f"any{suffix}"
    path.write_text(json.dumps(value), "utf-8")
    refused_or_read(path)


@given(
    rows=st.lists(st.lists(CELLS, min_size=1, max_size=3), max_size=4),
    delimiter=st.sampled_from(",;\t"),
    suffix=st.sampled_from([".csv", ".tsv"]),
)
@SHORT
def test_any_table_is_prompts_or_refused(
    tmp_path: Path, rows: Sequence[Sequence[str]], delimiter: str, suffix: str
) -> None:
    path = tmp_path / f"any{suffix}"
    path.write_bytes("\n".join(map(delimiter.join, [["prompt", "x"], *rows])).encode("utf-8", "replace"))
    refused_or_read(path)


@given(
    values=st.lists(
        st.none()
        | st.floats()
        | st.datetimes()
        | st.dates()
        | st.decimals(allow_nan=False, places=2, min_value=-9, max_value=9)
        | st.binary(max_size=3),
        max_size=1,
    ),
    texts=st.lists(st.none() | st.text(st.characters(codec="utf-8"), max_size=4), min_size=1, max_size=2),
)
@SHORT
def test_any_parquet_is_prompts_or_refused(tmp_path: Path, values: Sequence[Any], texts: Sequence[str | None]) -> None:
    path = tmp_path / "any.parquet"
    pq.write_table(
        pa.table({"prompt": pa.array(texts, pa.string()), **{f"x{i}": [v] * len(texts) for i, v in enumerate(values)}}),
        path,
    )
    refused_or_read(path)


@given(raw=st.binary(max_size=30))
@SHORT
def test_any_caption_is_a_prompt_or_refused(tmp_path: Path, raw: bytes) -> None:
    folder = tmp_path / "captions"
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_bytes(raw)
    refused_or_read(folder)


def test_a_file_that_vanishes_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to("nowhere")
    for name in ("none.txt", "link.txt", "a\0b.txt"):
        with pytest.raises(UserError, match="cannot read"):
            list(records(tmp_path / name))
