"""The table of computed sizes and costs: an entry is what would be computed, and is used for that case and those versions alone."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gpobench.bench import registry
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models import memory, network_costs
from gpobench.bench.models.memory import estimate


@pytest.fixture
def forgotten() -> None:
    """Nothing that an earlier test looked up is remembered."""
    for cached in (memory._parameters, memory._forward, network_costs._entries):  # pyright: ignore[reportPrivateUsage]
        cached.cache_clear()


def test_an_estimate_from_the_table_is_the_computed_one(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = find_model_spec("tiny")
    from_table = estimate(tiny)
    for cached in (memory._parameters, memory._forward):  # pyright: ignore[reportPrivateUsage]
        cached.cache_clear()
    monkeypatch.setattr(memory, "find_entry", lambda name: None)
    assert estimate(tiny) == from_table


@pytest.mark.parametrize("name", sorted(registry.entries("model")))
def test_every_named_model_is_in_the_table(forgotten: None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise AssertionError("a network was built: run python benchmarks/network_costs.py")

    monkeypatch.setattr(memory, "_build", build)
    for precision in memory.BYTES:
        assert estimate(find_model_spec(name), precision=precision).flops > 0


def test_another_case_is_computed(forgotten: None) -> None:
    tiny = find_model_spec("tiny")
    small, large = (estimate(replace(tiny, adapter=Adapter(rank=rank))) for rank in (2, tiny.adapter.rank))
    assert small.trained * tiny.adapter.rank == large.trained * 2


def test_a_table_of_other_versions_is_not_used(
    forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = json.loads(network_costs.TABLE.read_text("utf-8"))
    name = next(iter(table["entries"]))
    assert network_costs.find_entry(name) == table["entries"][name]
    table["versions"]["torch"] = "0.1"
    (tmp_path / "table.json").write_text(json.dumps(table), "utf-8")
    monkeypatch.setattr(network_costs, "TABLE", tmp_path / "table.json")
    network_costs._entries.cache_clear()  # pyright: ignore[reportPrivateUsage]
    assert network_costs.find_entry(name) is None
    network_costs._entries.cache_clear()  # pyright: ignore[reportPrivateUsage]


def test_a_dry_run_imports_no_library_of_models() -> None:
    heavy = ("diffusers", "transformers", "peft", "accelerate", "pandas", "scipy")
    code = (
        "import sys; from gpobench.bench.commands.app import main\n"
        "sys.argv = 'gpobench run --method gpo --task ocr --model sd35m --dry-run'.split()\n"
        f"try: main()\nfinally: print('loaded', [m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "peak of training" in done.stdout and done.stderr.strip() == "loaded []"
