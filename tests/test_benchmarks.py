"""The files of benchmarks/, each run in miniature."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpobench.bench.evaluation import record
from gpobench.bench.models import network_costs
from gpobench.leaderboards.runs import load_runs

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def script(name: str) -> Any:
    """The module of a file of benchmarks/."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two methods with two seeds each, of 24 prompts x 2 images."""
    script("board").make(tmp_path, 4, 24, 2, 2)
    folders = sorted(tmp_path.iterdir())
    for folder in folders:
        r = record.read(folder / "record.json")
        provenance = {"revision": "0123456789abcdef", "machine": "a machine", "versions": {"torch": "2.0"}}
        spent = {"nfe": 1000.0, "images": 100.0, "updates": 10.0, "seconds": 5.0}
        record.write(folder / "record.json", r.model_copy(update={"provenance": provenance, "spent": spent}))
    return folders


def run_board(folders: list[Path]) -> None:
    script("board").measure(folders[0].parent)


def run_overhead(_: list[Path]) -> None:
    overhead = script("overhead")
    seconds, total = overhead.profile("gpo", 1, ("prompts=2", "group=2", "steps=2", "t_min=0"))
    assert set(seconds) <= set(overhead.PARTS) and {"forward", "backward", "scorer", "decode", "optimiser"} <= set(
        seconds
    )
    assert all(part >= 0 for part in seconds.values()) and 0 < sum(seconds.values()) <= total
    print(f"{total:.2f} s")


def run_own_numbers(folders: list[Path]) -> None:
    own_numbers = script("own_numbers")
    loaded = load_runs(folders)
    print(own_numbers.page(own_numbers.tables(loaded), loaded))


def run_sampling(_: list[Path]) -> None:
    sampling = script("sampling")
    sampling.BATCH, sampling.STEPS = 2, 2
    sampling.measure("fp32", False, 2)


def run_seeds(folders: list[Path]) -> None:
    script("seeds").main(folders[:2])


def run_guards(_: list[Path]) -> None:
    guards = script("guards")
    guards.SETTINGS = ["prompts=2", "group=2", "steps=2", "t_min=0"]
    guards.main(2, "tiny")


def run_peers(_: list[Path]) -> None:
    peers = script("peers")
    peers.measure(1, peers.Sides(2, 2, 0))


def run_roofline(_: list[Path]) -> None:
    """A LoRA beside the weights takes more kernels and bytes, fusing takes fewer and changes no product."""
    roofline = script("roofline")
    passes, roof = roofline.trace_passes("tiny", 2), roofline.Roof.of("h200")
    merged, live, training, checkpointed = passes.values()
    assert len(merged) < len(live) < len(training) < len(checkpointed) == len(live) + len(training)
    for operations in passes.values():
        fused = roofline.fuse(operations)
        assert roof.matrix_milliseconds(fused) == pytest.approx(roof.matrix_milliseconds(operations))
        assert roof.matrix_milliseconds(fused) < roof.milliseconds(fused) < roof.milliseconds(operations)
    print(roofline.table("tiny", "h200", 2))


def run_network_costs(_: list[Path]) -> None:
    entries = script("network_costs").compute(["tiny"])
    shipped = network_costs._entries()  # pyright: ignore[reportPrivateUsage]
    assert all(shipped[name] == entry for name, entry in entries.items()), "run: python benchmarks/network_costs.py"


def run_tiny2(_: list[Path]) -> None:
    script("tiny2").main(2, 1)


def run_seed_library(_: list[Path]) -> None:
    entries = script("seed_library").of_board("tiny-counting")
    assert all(entry["sd"] >= 0 and entry["seeds"] > 1 for entry in entries)
    print(f"{len(entries)} entries")


def run_gate_calibration(_: list[Path]) -> None:
    """Other seeds are hardly ever worse, rows that do nothing always, in two shapes of baselines."""
    gate = script("gate_calibration")
    small = replace(gate.SHAPES["tiny-ocr"], prompts=60, gains=(0, 0, 5, 20), uneven=(1, 4, 1, 2))
    for shape in (gate.SHAPES["short"], small):
        measured = gate.measure(shape, "1", 60, np.random.default_rng(0))
        assert measured.false_worse <= 0.07 and measured.dead_rows == measured.dead_numbers == 1, measured
        assert measured.half_rows < measured.idle_rows, measured
    print(gate.HEAD[0])


def run_recompute(_: list[Path]) -> None:
    """The table by numpy alone is that of the product, to the last bits."""
    recompute, own_numbers = script("recompute"), script("own_numbers")
    for name in ("tiny-ocr", "tiny-counting", "short"):
        path = FOLDER.parent / "leaderboards" / f"{name}.toml"
        board = own_numbers.shipped_board(path)
        key = board.key
        base, se, rows = recompute.table(path, key)
        assert (base, se) == pytest.approx((board.base_row.cells[key].after.mean, board.base_row.cells[key].after.se))
        expected = {row.label: row.cells[key] for row in board.rows if row.kind != "base"}
        assert expected.keys() == {row.label for row in rows}
        for row in rows:
            after, delta = expected[row.label].after, expected[row.label].delta
            assert (row.mean, row.mean_se) == pytest.approx((after.mean, after.se), rel=1e-6)
            assert (row.gain, row.gain_se) == pytest.approx((delta.mean, delta.se), rel=1e-6, abs=1e-12)
        recompute.main([str(path), key])


def test_a_key_that_a_shipped_table_lacks_is_refused() -> None:
    with pytest.raises(SystemExit, match="has no 'x/y'; it has"):
        script("recompute").main([str(FOLDER.parent / "leaderboards" / "short.toml"), "x/y"])


def run_scorer_workers(_: list[Path]) -> None:
    workers = script("scorer_workers")
    print(workers.table(workers.measure(1, (0, 1), prompts=1, group=9)))
    assert workers.seconds_an_image("rapidocr", 64, 1, 8) > 0
    assert workers.keeping_up(8, 0.35, 0.12) == "| 8 | 350 | 3 | 5 |"


MINIATURES: dict[str, tuple[Callable[[list[Path]], None], str]] = {  # file -> what runs it, what it prints
    "board": (run_board, "estimate"),
    "gate_calibration": (run_gate_calibration, "baseline"),
    "guards": (run_guards, "counted / not counted, 2 pairs"),
    "network_costs": (run_network_costs, "tiny: 8 entries"),
    "overhead": (run_overhead, " s\n"),
    "own_numbers": (run_own_numbers, "| method-1 |"),
    "recompute": (run_recompute, "standard error"),
    "peers": (run_peers, "rewards that differ 0.00 %"),
    "roofline": (run_roofline, "| merged, or the base |"),
    "sampling": (run_sampling, "rig / bare: median"),
    "scorer_workers": (run_scorer_workers, "| 1 |"),
    "seed_library": (run_seed_library, " entries"),
    "tiny2": (run_tiny2, "| tiny 2 |"),
    "seeds": (run_seeds, "| all 2 | one/exact |"),
}
ELSEWHERE = {
    "marked_section": "below",
    "calibration": "tests/bench/stats/test_law.py",
    "flag_calibration": "tests/bench/evaluation/test_transfer.py",
    "plan_calibration": "tests/bench/stats/test_planning.py and tests/bench/experiments/test_until_told.py",
    "looks": "tests/bench/stats/test_selection.py",
    "hostile_server": "tests/bench/scoring/test_hostile_server.py",
    "presets": "tests/methods/test_presets.py",
    "full_size": "needs a GPU of 24 GB",
    "methods": "needs finished runs of every method",
}


def test_every_benchmark_is_run_or_says_why_not() -> None:
    assert MINIATURES.keys() | ELSEWHERE.keys() == {file.stem for file in FOLDER.glob("*.py")}


@pytest.mark.parametrize("name", MINIATURES)
def test_a_benchmark_runs_in_miniature(name: str, runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, printed = MINIATURES[name]
    run(runs)
    assert printed in capsys.readouterr().out


def test_a_section_is_replaced_between_its_markers_and_nothing_else_is(tmp_path: Path) -> None:
    MarkedSection = script("marked_section").MarkedSection
    page = tmp_path / "page.md"
    ours, other = MarkedSection(page, "ours", "<!-- end of ours -->"), MarkedSection(page, "other")
    page.write_text(f"a\n{ours.begin}\n\nold\n{ours.end}\nb\n{other.begin}\nc\n{other.end}\n", "utf-8")
    ours.check()
    ours.write("new")
    expected = f"a\n{ours.begin}\n\nnew\n{ours.end}\nb\n{other.begin}\nc\n{other.end}\n"
    assert page.read_text("utf-8") == expected
    with pytest.raises(SystemExit, match="lost: page.md has no place for the table"):
        MarkedSection(page, "lost").check()
