"""The birth certificate of a number: one form, published, filled in whole, and refused when anything is added."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpobench.bench.errors import UserError
from gpobench.bench.evaluation import record
from gpobench.bench.evaluation.record import Difference, Flags, Number, Record, ScorerUse
from gpobench.bench.files import digest

PUBLISHED = Path(record.__file__).with_name("record.schema.json")
CLEAN = {key: value for key, value in os.environ.items() if key not in ("ATEN_CPU_CAPABILITY", *record.LIMITS)}
ISSUE = {"method", "task", "model", "seed", "stop", "before", "after", "delta", "spent", "run_dir"}


def example(**more: Any) -> Record:
    number = Number(mean=0.5, ci=(0.4, 0.6), n=10)
    facts: dict[str, Any] = {
        "method": "gpo", "task": "ocr", "model": "tiny", "seed": 0, "stop": "budget: nfe",
        "before": {"s/m": number}, "after": {"s/m": number},
        "delta": {"s/m": Difference(mean=0.0, ci=(-0.1, 0.1), n=10, p=1.0, mde=0.2)},
        "spent": {"nfe": 1.0}, "run_dir": "runs/x", "flags": Flags(hack=False, invalid=False),
        "scorers": {"s": ScorerUse(id="s-v1", role="training", calls=1, seconds=0.1, errors=0)},
        "config": {}, "task_version": "1", "prompts": {}, "wall": {}, "provenance": {},
    }  # fmt: skip
    return Record(**{**facts, **more})


def test_the_published_schema_is_the_codes() -> None:
    assert PUBLISHED.read_text("utf-8") == json.dumps(record.schema(), indent=1) + "\n", (
        "write it again: python -c 'import json; from gpobench.bench.evaluation import record; "
        "print(json.dumps(record.schema(), indent=1))' > bench/evaluation/record.schema.json"
    )
    assert set(record.schema()["required"]) >= ISSUE


def test_a_record_comes_back_as_it_went(tmp_path: Path) -> None:
    record.write(tmp_path / "record.json", example())
    assert record.read(tmp_path / "record.json") == example()


def test_what_could_not_be_scored_is_null_and_stays_valid(tmp_path: Path) -> None:
    """JSON has no NaN: strict readers must take the file."""
    nothing = Difference(mean=math.nan, ci=(math.nan, math.nan), n=0, p=math.nan, mde=math.inf)
    record.write(tmp_path / "record.json", example(delta={"s/m": nothing}, provenance={"x": math.nan}))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    table = json.loads((tmp_path / "record.json").read_text(), parse_constant=refuse)
    assert table["delta"]["s/m"] == {"mean": None, "ci": [None, None], "n": 0, "p": None, "mde": None}
    assert record.read(tmp_path / "record.json").delta["s/m"].mean is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 3}, "has schema version 3; this gpobench reads version 4: do the run again"),
        ({"schema_version": 5}, "has schema version 5; this gpobench reads version 4: update gpobench"),
        ({"surprise": 1}, "is not a record"),
        ({"seed": "zero"}, "is not a record"),
        ({"flags": {"hack": False}}, "is not a record"),
    ],
)
def test_another_schema_version_or_form_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = tmp_path / "record.json"
    file.write_text(json.dumps(json.loads(example().model_dump_json()) | change))
    with pytest.raises(UserError) as caught:
        record.read(file)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"method": "gpo"}'])
def test_what_is_no_record_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "record.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match="is not a record"):
        record.read(file)
    with pytest.raises(UserError, match="is not a record"):
        record.read(tmp_path / "gone.json")


@pytest.mark.parametrize(
    "edit",
    [("\"seed\": 0", "\"seed\": 1"), ("\"invalid\": false", "\"invalid\": true"), ("\"mean\": 0.5", "\"mean\": 0.6"),
     ("\"fault\": \"the loss is nan\"", "\"fault\": \"\"")],
)  # fmt: skip
def test_a_record_that_was_edited_is_not_believed(tmp_path: Path, edit: tuple[str, str]) -> None:
    file = tmp_path / "record.json"
    record.write(file, example(fault="the loss is nan"))
    text = file.read_text()
    assert edit[0] in text
    file.write_text(text.replace(*edit, 1))
    with pytest.raises(UserError, match="record.json was changed or cut after the run wrote it") as caught:
        record.read(file)
    assert "\n" not in str(caught.value)
    table = json.loads(text)
    file.write_text(json.dumps(dict(sorted(table.items()))))  # the same content
    assert record.read(file) == example(fault="the loss is nan")
    del table["checksums"]["record.json"]
    file.write_text(json.dumps(table))
    with pytest.raises(UserError, match="was changed or cut"):
        record.read(file)


def test_a_file_of_a_run_is_believed_only_as_the_run_wrote_it(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "scores.parquet"
    file.parent.mkdir()
    file.write_bytes(b"scores")
    of_run = example(checksums={"deep/scores.parquet": digest(file)})
    assert record.verified(tmp_path, of_run, "deep/scores.parquet") == file
    for content, said in (
        (b"score", "was changed or cut"),
        (b"scorez", "was changed or cut"),
        (b"", "was changed or cut"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"deep/scores.parquet {said} after the run wrote it.*--fresh"):
            record.verified(tmp_path, of_run, "deep/scores.parquet")
    with pytest.raises(UserError, match="is not of this run"):
        record.verified(tmp_path, example(), "deep/scores.parquet")
    file.unlink()
    with pytest.raises(UserError, match="cannot read .*deep/scores.parquet"):
        record.verified(tmp_path, of_run, "deep/scores.parquet")


@pytest.mark.parametrize("key", sorted(ISSUE))
def test_nothing_may_be_left_out(key: str) -> None:
    table = json.loads(example().model_dump_json())
    del table[key]
    with pytest.raises(ValueError, match=key):
        Record.model_validate(table)


def test_provenance_names_code_versions_and_machine() -> None:
    facts = record.provenance(device="cpu")
    assert facts["device"] == "cpu" and facts["machine"] and facts["threads"] >= 1
    assert {"python", "torch", "diffusers", "gpobench"} <= facts["versions"].keys()
    json.dumps(facts)


def test_the_kind_of_processor_names_the_instruction_set() -> None:
    """Two machines of one name, or one machine told to use less of itself, do not repeat one another's last digits."""

    def processor(**environment: str) -> str:
        code = "from gpobench.bench.evaluation import record; print(record.provenance()['processor'])"
        return subprocess.run(
            [sys.executable, "-c", code], env=CLEAN | environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    own, less = processor(), processor(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41")
    assert own and "core" not in own  # how many there are changes no digit
    assert less.endswith("DEFAULT, ONEDNN_MAX_CPU_ISA=SSE41") and own != less
    assert own.rpartition(", ")[0] == less.split(", DEFAULT")[0]


def test_the_environment_names_the_revision_of_a_copy_without_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPOBENCH_REVISION", "abc123")
    assert record.revision() == "abc123" and record.provenance()["revision"] == "abc123"
    monkeypatch.delenv("GPOBENCH_REVISION")
    assert record.revision() != "abc123"


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize("content", [b'{"hello": 1}', b"[]", b"null", b"1", b'"text"', b"{}", DEEP, b"\xff", b""])
def test_a_file_of_another_program_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        record.read(path)
    text = str(caught.value)
    assert text.startswith(f"{path} is not a record") and "\n" not in text and "validation errors" not in text


def test_a_folder_in_the_place_of_a_record_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "record.json").mkdir()
    with pytest.raises(UserError, match="is not a record"):
        record.read(tmp_path / "record.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(Record.model_fields)), JSON)
def test_any_value_in_a_record_is_read_or_refused_in_one_line(field: str, value: Any) -> None:
    table = {**json.loads(example().model_dump_json()), field: value}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "record.json")
        path.write_text(json.dumps(table))
        try:
            assert isinstance(record.read(path), Record)
        except UserError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
