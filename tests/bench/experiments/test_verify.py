"""Verification: an honest run holds at every level, and what is forged or damaged does not; every verdict is bound to its record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from gpobench.bench.errors import UserError
from gpobench.bench.evaluation import record
from gpobench.bench.evaluation.agreement import compare_images
from gpobench.bench.evaluation.estimates import Evaluation, differences, estimates
from gpobench.bench.evaluation.verification import VERIFICATION, lowest_level, read_statements
from gpobench.bench.experiments import run as running
from gpobench.bench.experiments import verify as verifying
from gpobench.bench.experiments.config import RunRequest, resolve
from gpobench.bench.experiments.verify import Verification, verify
from gpobench.bench.files import digest
from gpobench.bench.progress import NullProgress
from gpobench.bench.stats.intervals import Estimate

SETTINGS = """optim.epochs=1 optim.minibatches=2 optim.weight_decay=0 optim.ema=0.5 optim.warmup=0 optim.lr=3e-3
prompts=4 group=6 beta=30 t_min=0 evaluation.eval_points=1""".split()
KEY = "redness/mean"


@pytest.fixture(scope="module", autouse=True)
def revision() -> Iterator[None]:
    """A checkout without changes: then the same processor must repeat every digit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPOBENCH_REVISION", "0123456789abcdef")
        yield


@pytest.fixture(scope="module")
def trained(tiny_pipe: Path, redness: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An honest run: its directory."""
    config = resolve(RunRequest("gpo", f"{redness}:Many", str(tiny_pipe), budget="nfe=8000", sets=SETTINGS))
    done = running.run(config, runs=tmp_path_factory.mktemp("runs"), progress=NullProgress())
    assert done.delta[KEY].p is not None and done.delta[KEY].p < 0.01
    return Path(done.run_dir)


@pytest.fixture
def honest(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "runs" / trained.name)


def seal(run_dir: Path, **change: Any) -> None:
    """What a forger does: change a record and compute every checksum anew."""
    r = record.read(run_dir / "record.json").model_copy(update=change)
    checksums = {name: digest(run_dir / name) for name in r.checksums}
    record.write(run_dir / "record.json", r.model_copy(update={"checksums": checksums}))


def outcome(run_dir: Path, work: Any = None, **more: Any) -> tuple[str, str]:
    statement, not_written = verify(Verification(run_dir, work, **more), NullProgress())
    assert not not_written
    return statement.verdict, statement.reason


def secret_prompts(folder: Path, count: int = 24) -> Path:
    file = folder / "secret.txt"
    file.write_text("".join(f"{k} violet hexagons\n" for k in range(count)))
    return file


# An honest run


def test_an_honest_run_holds_at_every_level(honest: Path, tmp_path: Path) -> None:
    assert read_statements(honest).level == "self" and "Verification: self" in (honest / "README.md").read_text()
    assert outcome(honest) == ("holds", "Every score repeats to the last digit.")
    assert (
        read_statements(honest).level == "rejudged" and "Verification: rejudged" in (honest / "README.md").read_text()
    )
    verdict, reason = outcome(honest, "audit", prompts=secret_prompts(tmp_path), evaluation_seed=11)
    assert verdict == "holds" and "told again and not significantly smaller" in reason
    assert outcome(honest, "rerun") == ("holds", "Every score repeats to the last digit.")
    verified = read_statements(honest)
    assert [s.level for s in verified.statements] == ["rejudged", "audited", "rerun"] and verified.level == "audited"
    for statement in verified.statements:
        assert statement.record == record.content_hash(honest / "record.json") and not verified.note
        assert set(statement.gain) >= {KEY, "warmth/mean"} and statement.provenance["revision"] == "0123456789abcdef"
    audit = verified.statements[1]
    assert (
        audit.conditions["count"] == 24 and audit.conditions["evaluation_seed"] == 11 and audit.gain[KEY].found.n == 24
    )
    rerun = verified.statements[2]
    again = next((honest.parent / ".verify" / honest.name / "rerun").glob("*/record.json"))
    assert rerun.other_record == record.content_hash(again)
    assert outcome(honest)[0] == "holds" and len(read_statements(honest).statements) == 3  # in the place of the first


def test_the_command_prints_the_verdict_and_ends_by_it(honest: Path, gpobench: Any) -> None:
    ended = gpobench("verify", honest, "--json")
    assert ended.code == 0 and json.loads(ended.out)["verdict"] == "holds", ended.err
    forge_scores(honest)
    ended = gpobench("verify", honest)
    assert ended.code == 1 and "rejudged: does not hold" in ended.out, ended.err


# What is forged


def forge_scores(run_dir: Path) -> None:
    """Raise every score of the result and all that follows from the scores, checksums among it."""
    table = pd.read_parquet(run_dir / "scores.parquet")
    table.loc[table.phase == "after", "value"] += 0.05
    table.to_parquet(run_dir / "scores.parquet", index=False)
    nothing = np.zeros((0, 1, 1, 3), np.uint8)
    before, after = (
        Evaluation(table[table.phase == phase].drop(columns="phase"), nothing) for phase in ("before", "after")
    )
    r = record.read(run_dir / "record.json")
    numbers = lambda kind, made: {key: kind(**number) for key, number in made.items()}
    seal(
        run_dir,
        after=numbers(type(r.after[KEY]), estimates(after)),
        delta=numbers(type(r.delta[KEY]), differences(before, after)),
    )


def test_a_record_forged_whole_does_not_hold_when_judged_again(honest: Path) -> None:
    forge_scores(honest)
    verdict, reason = outcome(honest)
    assert verdict == "does not hold" and reason.startswith("After ") and "in the record" in reason
    assert read_statements(honest).level == "does not hold"
    assert "Verification: does not hold (rejudged)" in (honest / "README.md").read_text()


def test_numbers_that_are_not_those_of_the_scores_do_not_hold(honest: Path) -> None:
    r = record.read(honest / "record.json")
    seal(honest, delta={**r.delta, KEY: r.delta[KEY].model_copy(update={"mean": 0.9})})
    verdict, reason = outcome(honest)
    assert verdict == "does not hold" and "difference of redness/mean is 0.9" in reason


def test_an_adapter_that_does_not_match_its_checksum_is_refused(honest: Path, gpobench: Any) -> None:
    file = honest / "adapter" / "pytorch_lora_weights.safetensors"
    save_file({key: tensor + 0.1 for key, tensor in load_file(file).items()}, file)
    ended = gpobench("verify", honest)
    assert ended.code == 2 and ended.err.count("\n") == 1 and "its checksum differs" in ended.err
    assert not (honest / VERIFICATION).exists()
    seal(honest)  # with the checksum computed anew the scores betray it
    assert outcome(honest)[0] == "does not hold"
    file.unlink()
    with pytest.raises(UserError, match="cannot read .*pytorch_lora_weights"):
        verify(Verification(honest), NullProgress())


def test_a_run_that_was_made_with_other_settings_does_not_hold_when_it_is_made_again(honest: Path) -> None:
    """The record says that a rate of 1e-12 gave these scores; the adapter is the one of 3e-3."""
    config = (honest / "config.toml").read_text()
    assert "lr = 0.003" in config
    (honest / "config.toml").write_text(config.replace("lr = 0.003", "lr = 1e-12"))
    r = record.read(honest / "record.json")
    settings = {**r.config["settings"], "optim": {**r.config["settings"]["optim"], "lr": 1e-12}}
    with pytest.raises(UserError, match="checksum"):
        verify(Verification(honest, "rerun"), NullProgress())
    seal(honest)
    with pytest.raises(UserError, match="the record's settings.optim.lr is 0.003"):
        verify(Verification(honest, "rerun"), NullProgress())
    seal(honest, config={**r.config, "settings": settings})
    verdict, reason = outcome(honest, "rerun")
    assert verdict == "does not hold" and "from the record's, more than prompts explain" in reason


# What cannot be verified


@pytest.mark.parametrize(
    ("make", "more", "said"),
    [
        (lambda run: shutil.rmtree(run / "adapter"), {}, "cannot read .*adapter"),
        (lambda run: (run / "record.json").unlink(), {}, "no finished run in"),
        (lambda run: (run / "record.json").write_text('{"schema_version": 3, "method": "gpo"}'), {}, "has schema version 3"),
        (lambda run: (run / "scores.parquet").write_bytes(b"PAR1"), {}, "changed or cut"),
        (lambda run: seal(run, fault="the loss is nan"), {}, "it claims nothing that could be verified"),
        (lambda run: seal(run, task_version="0"), {}, "the version of the task .*: 0 in the record and 1 on this machine"),
        (lambda run: seal(run, prompts={"train": "aa"}), {}, "the train prompts: aa in the record and "),
        (lambda run: None, {"work": "adit"}, "did you mean 'audit'"),
        (lambda run: None, {"work": "audit"}, "draws no fresh prompts: give prompts that the author did not know"),
        (lambda run: None, {"prompts": Path("x.txt")}, "are of an audit: --level audit"),
        (lambda run: None, {"work": "audit", "prompts": Path("gone.txt")}, "gone.txt"),
    ],
)  # fmt: skip
def test_what_is_no_claim_is_one_line(
    honest: Path, make: Callable[[Path], Any], more: dict[str, Any], said: str
) -> None:
    make(honest)
    with pytest.raises(UserError, match=said) as caught:
        verify(Verification(honest, **more), NullProgress())
    assert "\n" not in str(caught.value) and not (honest / VERIFICATION).exists()


def test_an_audit_refuses_prompts_that_the_author_knew(honest: Path, tmp_path: Path) -> None:
    for text, said in (
        ("six red circles\n", "are the task's own, which the author knew"),
        ("a red circle\n", "in the train split"),
    ):
        file = tmp_path / "known.txt"
        file.write_text(f"a violet square\n{text}")
        with pytest.raises(UserError, match=said):
            verify(Verification(honest, "audit", prompts=file), NullProgress())


def test_four_prompts_tell_nothing(honest: Path, tmp_path: Path) -> None:
    verdict, reason = outcome(honest, "audit", prompts=secret_prompts(tmp_path, 4))
    assert verdict == "cannot tell" and "Fewer than 5 prompts" in reason
    statement = read_statements(honest).statements[0]
    assert statement.gain[KEY].found.ci == (None, None) and statement.gain[KEY].p is None
    assert read_statements(honest).level == "self"


def test_a_search_is_verified_by_making_it_again(tiny_pipe: Path, redness: str, tmp_path: Path) -> None:
    config = resolve(RunRequest("best-of-n", f"{redness}:Paint", str(tiny_pipe), budget="nfe=300"))
    run_dir = Path(running.run(config, runs=tmp_path / "runs", progress=NullProgress()).run_dir)
    with pytest.raises(UserError, match="has no adapter to judge: --level rerun"):
        verify(Verification(run_dir, "rejudge"), NullProgress())
    assert outcome(run_dir) == ("holds", "Every score repeats to the last digit.")
    assert read_statements(run_dir).level == "rerun"


# Statements


def test_a_statement_is_bound_to_its_record(honest: Path) -> None:
    outcome(honest)
    file = honest / VERIFICATION
    whole = file.read_text()
    file.write_text(whole.replace('"holds"', '"does not hold"'))
    assert (
        read_statements(honest).level == "self" and "was changed after it was written" in read_statements(honest).note
    )
    file.write_text("[]")
    assert "is no statement of gpobench" in read_statements(honest).note
    file.write_text(whole)
    assert read_statements(honest).level == "rejudged"
    seal(honest, stop="another")
    verified = read_statements(honest)
    assert verified.level == "self" and "1 of 1 statements are about another record" in verified.note


def test_the_lowest_level_of_several_runs_counts() -> None:
    assert lowest_level(["audited", "rerun"]) == "rerun" and lowest_level(["self", "audited"]) == "self"
    assert lowest_level(["audited", "does not hold", "self"]) == "does not hold" and lowest_level([]) == "self"


# The laws of the verdicts


def test_scores_that_differ_by_rounding_are_the_same_and_missing_ones_agree() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(60, 2))
    scores[3, 1] = np.nan
    assert compare_images(scores, scores, None).equal == 1 and compare_images(scores, scores, None).within_rounding
    rounded = compare_images(scores, scores + 1e-4 * rng.normal(size=scores.shape), None)
    assert rounded.equal < 0.1 and rounded.close == 1 and rounded.within_rounding
    lost = scores.copy()
    lost[:2] = np.nan
    assert not compare_images(scores, lost, None).within_rounding  # 4 of 120 images
    shifted = compare_images(scores, scores + 0.05, None)
    assert not shifted.within_rounding and shifted.p < 1e-6


def gain(mean: float, se: float, n: int = 50) -> Estimate:
    p = 2 * float(np.exp(-0.5 * (mean / se) ** 2))  # small where the gain is several standard errors
    return Estimate(mean, mean - 2 * se, mean + 2 * se, n, se, p=p)


@pytest.mark.parametrize(
    ("claimed", "found", "verdict"),
    [
        (gain(0.10, 0.02), gain(0.09, 0.02), "holds"),
        (gain(0.10, 0.02), gain(0.16, 0.02), "holds"),  # larger is no objection
        (gain(0.10, 0.02), gain(0.00, 0.02), "does not hold"),
        (gain(0.20, 0.02), gain(0.10, 0.02), "does not hold"),  # told again, but half of what is claimed
        (gain(0.10, 0.02), gain(0.05, 0.04), "cannot tell"),
        (gain(0.01, 0.02), gain(-0.01, 0.02), "holds"),  # no gain was claimed
        (gain(0.10, 0.02), None, "cannot tell"),
    ],
)
def test_a_gain_holds_when_it_is_told_again_and_not_smaller(
    claimed: Estimate, found: Estimate | None, verdict: str
) -> None:
    assert verifying._verdict_on_gain(KEY, claimed, found)[0] == verdict
