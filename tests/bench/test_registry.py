"""The registry: built-in and third-party parts load alike, a wrong name gets the nearest one, aliases are resolved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpobench.bench import registry
from gpobench.bench.errors import Missing, UserError


def package(folder: Path, name: str, code: str, entries: str) -> Path:
    """An installed third-party package, as pip would have left it on the path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)
    return folder


METHOD = '''"""Patience: collect nothing, learn nothing."""
from dataclasses import dataclass, field
from gpobench.bench import Optim

@dataclass(frozen=True)
class Patience:
    optim: Optim = field(default_factory=Optim)
    calm: float = 1.0
'''


def test_built_in_parts_come_by_the_same_door() -> None:
    assert "gpo" in registry.entries("method")
    assert registry.load("method", "gpo").__name__ == "GPO"
    assert registry.summary_line("method", "gpo").startswith("Group Preference Optimization (GPO): ")


def test_a_third_party_package_is_found_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "patient", METHOD, "[gpobench.methods]\npatience = patient:Patience\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.load("method", "patience")().calm == 1.0
    assert registry.summary_line("method", "patience") == "Patience: collect nothing, learn nothing."
    code = "import sys; from gpobench.bench.commands.app import main; sys.argv = ['gpobench', 'list']; main()"
    listed = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert "patience" in listed.stdout and "Patience: collect nothing" in listed.stdout


def test_a_name_claimed_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "rival", METHOD, "[gpobench.methods]\ngpo = rival:Patience\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="two packages claim the method 'gpo'"):
        registry.entries("method")


@pytest.mark.parametrize(
    ("code", "said"),
    [("import nowhere_at_all", "nowhere_at_all"), ("x = (", "was never closed"), ("raise OSError('no disk')", "no disk"),
     ("", "Patience")],
)  # fmt: skip
def test_a_part_that_cannot_be_imported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    package(tmp_path, "ailing", code, "[gpobench.methods]\nailing = ailing:Patience\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ailing", raising=False)
    with pytest.raises(UserError, match="method 'ailing' cannot be loaded") as caught:
        registry.load("method", "ailing")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name", "nearest"),
    [("method", "gpoo", "gpo"), ("task", "orc", "ocr"), ("model", "tinny", "tiny"), ("scorer", "rapidorc", "rapidocr"),
     ("recipe", "raeder", "reader")],
)  # fmt: skip
def test_a_typo_names_the_nearest(kind: str, name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"unknown {kind} '{name}'; did you mean '{nearest}'"):
        registry.load(kind, name)


def test_a_name_like_no_other_lists_them_all() -> None:
    with pytest.raises(UserError, match="unknown method 'zzzz'; valid: .*gpo"):
        registry.load("method", "zzzz")


def test_parts_come_from_files(tmp_path: Path, redness: str) -> None:
    assert registry.load("task", f"{redness}:Paint")().name == "paint"
    assert registry.scorer(f"{redness}:Redness").name == "redness"
    with pytest.raises(UserError, match="unknown name in redness.py 'Pain'; did you mean 'Paint'"):
        registry.load("task", f"{redness}:Pain")
    with pytest.raises(UserError, match="no such file"):
        registry.load("task", f"{tmp_path}/gone.py:Paint")
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        registry.load("task", f"{broken}:Paint")
    with pytest.raises(Missing, match="pip install absent"):
        registry.scorer(f"{redness}:Absent")


def test_an_alias_is_the_same_part_under_its_own_name() -> None:
    assert registry.canonical("method", "dpo") == registry.canonical("method", "diffusion-dpo") == "diffusion-dpo"
    assert registry.canonical("method", "grpo:fast") == "flow-grpo:fast"
    assert registry.canonical("method", "gpo") == "gpo" and registry.canonical("model", "tiny") == "tiny"
    assert registry.canonical("method", "a/file.py:Name") == "a/file.py:Name"
    assert registry.canonical("method", "no-such-name") == "no-such-name"
    assert registry.aliases("method", "diffusion-nft") == ["nft"] and registry.aliases("method", "gpo") == []
    for name in registry.entries("method"):  # no chain of aliases
        assert registry.canonical("method", registry.canonical("method", name)) == registry.canonical("method", name)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit()", "SystemExit: it ends the program when it is imported"),
        ("raise SystemExit('bye')", "SystemExit: bye: it ends the program when it is imported"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("import asyncio; raise asyncio.CancelledError('a\\nb')", "CancelledError: a b"),
        ("raise BaseException(1)", "BaseException: 1"),
    ],
)
def test_a_file_that_ends_the_program_is_one_line(tmp_path: Path, code: str, reason: str) -> None:
    file = tmp_path / "ends.py"
    file.write_text(code + "\n")
    for kind in ("method", "task", "recipe"):
        with pytest.raises(UserError) as caught:
            registry.load(kind, f"{file}:Best")
        assert str(caught.value) == f"{file}: {reason}"
    with pytest.raises(UserError):
        registry.scorer(f"{file}:Best")


@pytest.mark.parametrize("code", ["Best = 3", "Best = None", "Best = 'text'", "def Best(): ..."])
def test_a_method_that_is_no_class_is_one_line(tmp_path: Path, code: str) -> None:
    file = tmp_path / "notclass.py"
    file.write_text(code + "\n")
    with pytest.raises(UserError, match="notclass.py:Best is a value of the type .*: a method is a class"):
        registry.load("method", f"{file}:Best")
    if not code.startswith("def"):
        for kind in ("task", "scorer", "embedder"):
            with pytest.raises(UserError, match="is a class or a function"):
                registry.load(kind, f"{file}:Best")


@pytest.mark.parametrize("code", ["raise SystemExit", "raise KeyError('x')", "raise KeyboardInterrupt"])
def test_a_part_that_cannot_be_made_is_one_line(tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "raised_by_user", lambda error: False)  # as where the command line handles Ctrl-C
    file = tmp_path / "unmade.py"
    file.write_text(f"class Best:\n    def __init__(self):\n        {code}\n")
    for make in (registry.task, registry.scorer, registry.embedder):
        with pytest.raises(UserError, match="cannot be made: "):
            make(f"{file}:Best")
