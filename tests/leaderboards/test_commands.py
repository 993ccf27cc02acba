"""The leaderboard command reads folders, writes the table to --out, and names the user's error."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gpobench.bench.errors import UserError
from gpobench.leaderboards.commands.leaderboard import leaderboard

Make = Callable[..., Path]
app = typer.Typer()
app.command()(leaderboard)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_it_prints_a_table(make: Make, tmp_path: Path) -> None:
    make("a", "gpo", 0, 0.2)
    make("b", "awm", 0, 0.1)
    assert run(tmp_path).splitlines()[3].startswith("1  gpo") or "gpo" in run(tmp_path)
    output = json.loads(
        run(tmp_path / "a", tmp_path / "b", "--format", "json", "--baseline", "awm", "--key", "engine/exact")
    )
    assert output["baseline"] == "awm" and output["key"] == "engine/exact"


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("t.md", "**ocr"),
        ("t.csv", "provenance,"),
        ("t.json", "{"),
        ("t.tex", "\\begin"),
        ("t.html", "<!doctype"),
        ("t", "ocr"),
    ],
)
def test_the_suffix_chooses_the_format(make: Make, tmp_path: Path, name: str, begins: str) -> None:
    folder = make("a")
    assert run(folder, "--out", tmp_path / name) == ""
    assert (tmp_path / name).read_text("utf-8").startswith(begins)


def test_user_errors_are_named(make: Make, tmp_path: Path) -> None:
    folder = make("a")
    for arguments, message in (
        ((folder, "--format", "docx"), "unknown format 'docx'"),
        ((tmp_path / "gone",), "is no folder of runs"),
        ((folder, "--baseline", "gpoo"), "did you mean 'gpo'"),
        ((folder, "--out", tmp_path / "gone" / "t.md"), "cannot write"),
        ((folder, "--out", tmp_path / "t.pdf"), r"t.pdf: name it \*.md"),
        ((folder, "--across", "--task", "ocr"), "leave --task and --key out"),
        ((folder, "--across"), "several tasks; these runs are of ocr"),
    ):
        with pytest.raises(UserError, match=message):
            run(*arguments)


def test_several_tasks_are_summed_up(make: Make, tmp_path: Path) -> None:
    for task in ("ocr", "counting"):
        for seed in range(2):
            make(f"runs/{task}{seed}", "gpo", seed, 0.2, task=task)
    assert "gpo" in run(tmp_path / "runs", "--across") and "IQM" in run(tmp_path / "runs", "--across", "--format", "md")
    assert run(tmp_path / "runs", "--across", "--out", tmp_path / "t.json") == ""
    assert json.loads((tmp_path / "t.json").read_text())["rows"][0]["label"] == "gpo"


def test_help_has_examples() -> None:
    assert "gpobench leaderboard runs" in " ".join(run("--help").split())


def test_the_module_is_light() -> None:
    names = ", ".join(f"gpobench.leaderboards.commands.{c}" for c in ("leaderboard", "report", "regress", "export"))
    code = f"import sys, {names}; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "typer" in loaded and not loaded & {"torch", "pandas", "pyarrow", "scipy", "numpy", "pydantic"}
