"""Files of a run directory: a run's own command makes the same run, and its settings read back whatever is in them."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from gpobench.bench.commands.app import app
from gpobench.bench.experiments import config as configs
from gpobench.bench.experiments.artifacts import _toml_key, _toml_value, config_toml  # pyright: ignore[reportPrivateUsage]
from gpobench.bench.experiments.config import Config, RunRequest, resolve


@pytest.fixture
def rerun(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Config]:
    """rerun(COMMAND): what the command line resolves to."""

    def parse(line: str) -> Config:
        resolved: list[Config] = []

        def stop(request: RunRequest) -> Config:
            resolved.append(resolve(request))
            raise SystemExit(0)

        with monkeypatch.context() as patch:
            patch.setattr(configs, "resolve", stop)
            CliRunner().invoke(app, shlex.split(line)[1:])
        return resolved[0]

    return parse


MINE = """
from dataclasses import dataclass, field
from gpobench.methods.gpo import GPO
@dataclass(frozen=True)
class Mine(GPO):
    note: str = "plain"
    table: dict = field(default_factory=lambda: {"a b": [1, 2.5], "deep": {"x": True}})
"""
METHODS = ["gpo", "flow-grpo:fast", "dpo", "best-of-n", "a folder/mine's.py:Mine"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"seed": 7, "budget": "nfe=3000,seconds=0.1"},
    {"reward": "reader*0.5+rapidocr", "budget": "tiny"},
    {"prompts": ["mine.csv"]},
    {"prompts": ["validation=other words.txt", "train=mine.csv"], "sets": ["rows=8", "evaluation.seed=3"]},
    {"sets": ["adapter.rank=4", "precision=bf16", "evaluation.split=validation"], "config": Path("settings.toml")},
]


@pytest.mark.parametrize(("method", "options"), list(product(METHODS, OPTIONS)))
def test_the_command_of_a_run_makes_the_same_run(
    method: str, options: dict[str, Any], rerun: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a folder").mkdir()
    Path("a folder/mine's.py").write_text(MINE)
    Path("mine.csv").write_text("prompt\na red house\n")
    Path("other words.txt").write_text("a blue house\n")
    Path("settings.toml").write_text("tuned = { trials = 4, nfe = 8000, command = 'gpobench tune' }\n")
    run = resolve(RunRequest(method, "ocr", "tiny", **options))
    again = rerun(config_toml(run).splitlines()[0].removeprefix("# "))
    assert again.slug() == run.slug() and again.tuned == run.tuned
    assert again.mapping() == {**run.mapping(), "budget": {**run.mapping()["budget"], "name": again.budget.name}}


def test_any_text_setting_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    for note in ("\U0001f600 \\ \" ' # = [x]", "a\x7fb\tc\n", "\u00e9\u4e2d"):
        Path("notes.toml").write_text(f"note = {_toml_value(note)}\n", "utf-8")
        run = resolve(RunRequest("mine.py:Mine", "ocr", "tiny", config=Path("notes.toml")))
        assert run.settings.note == note
        Path("config.toml").write_text(config_toml(run), "utf-8")
        assert resolve(RunRequest("mine.py:Mine", "ocr", "tiny", config=Path("config.toml"))).digest() == run.digest()


leaves = st.none().map(lambda _: True) | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(leaves | texts, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=8)


@given(texts, values)
def test_any_value_reads_back(key: str, value: Any) -> None:
    assert tomllib.loads(f"{_toml_key(key)} = {_toml_value(value)}") == {key: value}


def test_a_name_that_cannot_be_printed_leaves_the_file_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine\nbeta = 3.py").write_text(MINE)
    run = resolve(RunRequest("mine\nbeta = 3.py:Mine", "ocr", "tiny"))
    text = config_toml(run)
    assert (
        text.startswith("# a name in the command of this run cannot be printed\n") and tomllib.loads(text)["beta"] != 3
    )
