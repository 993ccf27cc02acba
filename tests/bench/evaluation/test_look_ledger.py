"""The ledger of test looks: every look once, whoever writes at the same time, and no line changed or removed unseen."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from gpobench.bench.evaluation import look_ledger
from gpobench.bench.evaluation.look_ledger import (
    LEDGER,
    Look,
    LookCount,
    count_looks,
    inflation_text,
    ledger_damage,
    read_ledger,
    record_look,
    setting_hash,
)

LOOK = Look("t0", "ocr", "1", "p" * 64, "tiny", "gpo", "a" * 12, 0, "gpo-ocr-tiny-s0-1234", "run")


def number(k: int, settings: int = 1) -> Look:
    return replace(LOOK, token=f"t{k}", seed=k, settings=f"{k % settings:012d}", run=f"run-{k}")


def append_many(folder: str, first: int, count: int) -> None:
    for k in range(first, first + count):
        assert record_look(Path(folder), number(k)).entry


def test_each_look_is_one_line_and_a_run_that_goes_on_is_none(tmp_path: Path) -> None:
    assert read_ledger(tmp_path).looks == ()
    first = record_look(tmp_path, LOOK)
    assert (first.looks, first.settings, first.not_recorded) == (1, 1, "")
    assert record_look(tmp_path, LOOK).entry == first.entry  # the same run, interrupted
    second = record_look(tmp_path, replace(LOOK, token="t1", seed=1))
    third = record_look(tmp_path, replace(LOOK, token="t2", settings="b" * 12))
    assert (second.looks, second.settings) == (2, 1) and (third.looks, third.settings) == (3, 2)
    ledger = read_ledger(tmp_path)
    assert ledger.damage == () and ledger.hashes == (first.entry, second.entry, third.entry)
    for other in (
        replace(LOOK, token="x", prompts="q"),
        replace(LOOK, token="y", method="nft"),
        replace(LOOK, token="z", model="m"),
    ):
        assert record_look(tmp_path, other).looks == 1
    assert read_ledger(tmp_path).count("p" * 64, "tiny", "gpo") == LookCount(3, 2)


def test_a_setting_in_two_folders_counts_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        record_look(tmp_path / name, replace(LOOK, token=name))
    ledgers = [read_ledger(tmp_path / name) for name in ("a", "b")]
    assert count_looks(ledgers, "p" * 64, "tiny", "gpo") == LookCount(2, 1)


def test_processes_that_write_at_once_lose_no_line(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=append_many, args=(str(tmp_path), 100 * k, 15)) for k in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert all(job.exitcode == 0 for job in jobs)
    ledger = read_ledger(tmp_path)
    assert len(ledger.looks) == 60 == len({look.token for look in ledger.looks}) and not ledger.damage


def test_a_line_cut_short_by_a_kill_is_written_again(tmp_path: Path) -> None:
    first, second = record_look(tmp_path, number(0)), record_look(tmp_path, number(1))
    file = tmp_path / LEDGER
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert record_look(tmp_path, number(1)).looks == 2 and not read_ledger(tmp_path).damage
    assert read_ledger(tmp_path).hashes[0] == first.entry and second.entry


def edited(lines: list[str]) -> list[str]:
    content = json.loads(lines[1])
    return [lines[0], json.dumps({**content, "settings": "f" * 12}), *lines[2:]]


def edited_and_hashed(lines: list[str]) -> list[str]:
    content = {**json.loads(lines[1]), "settings": "f" * 12}
    del content["sha256"]
    return [lines[0], json.dumps({**content, "sha256": look_ledger._line_hash(content)}), *lines[2:]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines[:1] + lines[2:], "line 2 does not follow the line before"),
        (lambda lines: lines[1:], "line 1 does not follow the line before"),
        (lambda lines: [lines[0], lines[2], lines[1], lines[3]], "line 2 does not follow the line before"),
        (edited, "line 2 is damaged or was edited"),
        (edited_and_hashed, "line 3 does not follow the line before"),
        (lambda lines: [lines[0], "{", *lines[2:]], "line 2 is damaged or was edited"),
        (lambda lines: [lines[0], "[1]", *lines[1:]], "line 2 is damaged or was edited"),
        (lambda lines: lines[:3], "lacks the looks of run-3: it was cut, or the runs were moved"),
        (lambda lines: [], "lacks the looks of run-0, run-1, run-2, run-3"),
    ],
)  # fmt: skip
def test_what_is_done_to_its_lines_shows(tmp_path: Path, change: object, said: str) -> None:
    entries = {f"run-{k}": record_look(tmp_path, number(k)).entry for k in range(4)}
    assert ledger_damage(read_ledger(tmp_path), entries) == []
    file = tmp_path / LEDGER
    file.write_text("".join(f"{line}\n" for line in change(file.read_text().splitlines())))  # type: ignore[operator]
    assert said in " ".join(ledger_damage(read_ledger(tmp_path), entries))
    assert record_look(tmp_path, number(9)).entry in read_ledger(tmp_path).hashes  # and counting goes on
    assert said in " ".join(ledger_damage(read_ledger(tmp_path), entries))


def test_a_ledger_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / LEDGER).mkdir()
    look = record_look(tmp_path, LOOK)
    assert look.entry == "" and look.not_recorded.startswith(f"cannot write {tmp_path / LEDGER}: ")
    assert record_look(tmp_path / "gone", LOOK).not_recorded.endswith("No such file or directory")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / LEDGER).symlink_to(tmp_path / "elsewhere")
    assert record_look(tmp_path / "b", LOOK).not_recorded and not (tmp_path / "elsewhere").exists()


def test_seeds_and_memory_make_no_setting() -> None:
    config = {
        "settings": {"lr": 1},
        "seed": 0,
        "budget": {"name": "tiny", "nfe": 10.0},
        "evaluation": {"seed": 7},
        "rows": 8,
    }
    same = {**config, "seed": 4, "rows": 2, "budget": {"name": "nfe=10", "nfe": 10.0}}
    assert setting_hash(config) == setting_hash(same)
    for change in ({"settings": {"lr": 2}}, {"evaluation": {"seed": 8}}, {"budget": {"name": "tiny", "nfe": 11.0}}):
        assert setting_hash({**config, **change}) != setting_hash(config)


def test_the_best_of_several_settings_is_said_in_units_of_the_score() -> None:
    assert inflation_text(LookCount(9, 1), 0.01, "reader/exact") == ""
    text = inflation_text(LookCount(9, 5), 0.01, "reader/exact")
    assert text == (
        " Of 5 settings without any gain the best shows a gain of .012 in reader/exact, and is told better than the base in 12 of 100 "
        "cases."
    )
    assert "shows" not in inflation_text(LookCount(9, 5), float("nan"), "k") and "12 of 100" in inflation_text(
        LookCount(9, 5), float("nan"), "k"
    )
