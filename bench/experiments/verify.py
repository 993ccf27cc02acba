"""Verification of a finished run: its adapter judged again, the run made again, or base and result judged on secret prompts and noise."""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors.torch import load_file

from .. import registry
from ..assets.prompts import with_own_prompts
from ..errors import UserError
from ..evaluation import agreement, record
from ..evaluation.agreement import ImageAgreement
from ..evaluation.estimates import Evaluation, add_drift
from ..evaluation.evaluator import evaluate, images_per_prompt
from ..evaluation.ranking import record_key
from ..evaluation.request import EvaluationRequest
from ..evaluation.scorer_set import ScorerSet, open_scorer_set
from ..evaluation.seed_library import find_entry
from ..evaluation.splits import fold, prompts_hash, refuse_overlap
from ..evaluation.verification import Compared, Level, Statement, Verdict, read_statements, write_statement
from ..files import make_folder, write_atomically
from ..models.lora import POLICY
from ..models.open import open_model
from ..progress import Progress
from ..scoring.scorers import ScorerLocation
from ..spec import Model, Prompt, Split, SupportsFreshPrompts, Task
from ..stats import intervals, law
from ..stats.intervals import Estimate
from ..stats.law import SeedVariance
from .claim import ADAPTER, RunClaim, open_claim, read_scores
from .context import open_accelerator
from .run import run
from .run_readme import run_readme

Work = Literal["rejudge", "rerun", "audit"]
LEVEL_OF: Mapping[str, Level] = {"rejudge": "rejudged", "rerun": "rerun", "audit": "audited"}
OUT = ".verify"  # in the folder of runs: what verifications made


@dataclass(frozen=True)
class Verification:
    """What to verify, and how."""

    run_dir: Path
    work: Work | None = None  # None: rejudge, of a search rerun
    prompts: Path | None = None  # of an audit; None draws fresh ones where the task can
    evaluation_seed: int | None = None  # of an audit's noise; None draws one
    out: Path | None = None  # where a second run and the new scores are written
    scorer_locations: Mapping[str, ScorerLocation] = field(default_factory=dict[str, ScorerLocation])


@dataclass(frozen=True)
class _Finding:
    """What one level of verification found, before it is written down."""

    verdict: Verdict
    reason: str
    gain: Mapping[str, Compared]
    scores: Mapping[str, Compared] = field(default_factory=dict[str, Compared])
    notes: Sequence[str] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict[str, Any])
    other_record: str = ""


def verify(
    request: Verification, progress: Progress, interrupted: Callable[[], bool] = lambda: False
) -> tuple[Statement, str]:
    """Verify a finished run and write the statement beside its record.

    Returns:
        The statement, and why it could not be written, "" where it was.

    Raises:
        UserError: where the run is no claim that can be tried here, or an option does not fit.
        Interrupted: when asked to stop while the run is made again; the same call goes on.
    """
    if request.work not in (None, *get_args(Work)):
        raise registry.unknown("level", str(request.work), get_args(Work))
    claim = open_claim(request.run_dir)
    work: Work = request.work or ("rerun" if claim.searched else "rejudge")
    if claim.searched and work != "rerun":
        raise UserError(f"{request.run_dir} searched at inference and has no adapter to judge: --level rerun")
    if work != "audit" and (request.prompts is not None or request.evaluation_seed is not None):
        raise UserError("--prompts and --evaluation-seed are of an audit: --level audit")
    out = request.out or request.run_dir.absolute().parent / OUT / request.run_dir.absolute().name
    make_folder(out)
    if wrong := claim.misstatements():
        gain = _gains(claim, claim.before, claim.after, paired=True)
        finding = _Finding("does not hold", f"The record's numbers are not those of its scores: {wrong[0]}.", gain)
    elif work == "rejudge":
        finding = _rejudge(claim, request, out, progress)
    elif work == "rerun":
        finding = _rerun(claim, request, out, progress, interrupted)
    else:
        finding = _audit(claim, request, out, progress)
    statement = _statement(claim, LEVEL_OF[work], finding)
    try:
        write_statement(request.run_dir, statement)
    except UserError as error:
        return statement, str(error)
    readme = run_readme(claim.record, claim.model_spec, not claim.searched, read_statements(request.run_dir))
    with contextlib.suppress(OSError):  # the statement is written; the README only repeats it
        write_atomically(request.run_dir / "README.md", lambda path: path.write_text(readme, "utf-8"))
    return statement, ""


def _statement(claim: RunClaim, level: Level, finding: _Finding) -> Statement:
    return Statement(
        level=level,
        verdict=finding.verdict,
        reason=finding.reason,
        record=claim.record_hash,
        other_record=finding.other_record,
        key=record_key(claim.record) or "",
        gain=dict(finding.gain),
        scores=dict(finding.scores),
        notes=list(finding.notes),
        conditions=dict(finding.conditions),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        provenance=record.provenance(),
    )


# Judged again


def _rejudge(claim: RunClaim, request: Verification, out: Path, progress: Progress) -> _Finding:
    """Evaluate base and adapter on the record's prompts and noise, and compare image by image."""
    settings = claim.config.evaluation
    judged = _judge(claim, request, _prompts(claim), settings.seed, progress)
    judged.write(out / "rejudge")
    pairs = [("before", claim.before, judged.before), ("after", claim.after, judged.after)]
    agreements = {
        f"{phase} {key}": agreement.compare_images(*matrices, old.strata())
        for phase, old, new in pairs
        for key, matrices in agreement.shared_matrices(old, new).items()
        if key.partition("/")[0] not in judged.other_ids
    }
    verdict, reason = _verdict_on_images(claim, agreements)
    if missing := [key for key in _tested_keys(claim) if f"after {key}" not in agreements]:
        verdict, reason = (
            "cannot tell",
            f"{missing[0]} is not the record's here: {'; '.join(judged.notes) or 'it was not scored'}.",
        )
    return _Finding(
        verdict,
        reason,
        _gains(claim, judged.before, judged.after, paired=True),
        {name: _compared(found) for name, found in agreements.items()},
        judged.notes,
        {"evaluation_seed": settings.seed, "prompts": prompts_hash(_prompts(claim)), "split": settings.split},
    )


def _verdict_on_images(claim: RunClaim, agreements: Mapping[str, ImageAgreement]) -> tuple[Verdict, str]:
    """Tell whether scores made again are those of the record."""
    if all(found.equal == 1 for found in agreements.values()):
        return "holds", "Every score repeats to the last digit."
    if all(found.within_rounding for found in agreements.values()):
        return "holds", "Scores repeat but for rounding."
    off = {name: found for name, found in agreements.items() if not found.within_rounding}
    told = agreement.told_different({name: found.p for name, found in agreements.items()})
    worst = next((name for name in told if name in off), None)
    if worst is not None:
        found = agreements[worst]
        return (
            "does not hold",
            f"{_capital(worst)} is {found.found.mean:.4g} here and {found.claimed.mean:.4g} in the record.",
        )
    name, found = next(iter(off.items()))
    share = f"{_capital(name)}: {100 * found.close:.0f} % of the images have the record's score"
    if _same_conditions(claim):
        return "does not hold", f"{share}, and all repeat with this code on this kind of processor."
    return "cannot tell", f"{share}; the means do not differ significantly, and code, versions or processor are others."


@dataclass(frozen=True)
class _Judged:
    """Base and adapter, evaluated here."""

    before: Evaluation
    after: Evaluation
    other_ids: frozenset[str]  # names of scorers and embedders whose id is not the record's
    notes: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Write the scores."""
        make_folder(folder)
        for name, evaluation in (("before", self.before), ("after", self.after)):
            write_atomically(
                folder / f"{name}.parquet", lambda path, table=evaluation.table: table.to_parquet(path, index=False)
            )


def _judge(claim: RunClaim, request: Verification, prompts: Sequence[Prompt], seed: int, progress: Progress) -> _Judged:
    """Evaluate base and adapter on these prompts and this noise, under the record's protocol."""
    config, model_spec, settings = claim.config, claim.model_spec, claim.config.evaluation
    locations = {**config.scorer_locations, **request.scorer_locations}
    scorers = open_scorer_set(
        claim.task, model_spec.domain, progress.message, config.reward, locations, config.scorer_workers
    )
    try:
        accelerator = open_accelerator(config.precision)
        model = open_model(
            model_spec, device=accelerator.device, precision=config.precision, adapter=config.adapter, seed=config.seed
        )
        _restore_adapter(claim, model)
        images = images_per_prompt(settings, settings.split)
        wanted = EvaluationRequest(
            prompts,
            scorers.all,
            images=images,
            seed=seed,
            rows=model_spec.rows,
            diversity=scorers.diversity,
            drift=scorers.drift,
        )
        progress.phase("judging the base", len(prompts) * images)
        before = evaluate(model, replace(wanted, weights="ref"), advance=progress.advance)
        progress.phase("judging the result", len(prompts) * images)
        after = evaluate(model, wanted, advance=progress.advance)
    finally:
        scorers.close()
    others, notes = _other_ids(claim, scorers)
    return _Judged(*add_drift(before, after, scorers.drift), others, notes)


def _restore_adapter(claim: RunClaim, model: Model) -> None:
    """Set the model's LoRA to the run's, so that it is computed with as in the run. Raises UserError where they do not fit.

    The file has a prefix before peft's names of the tensors and no name of the adapter in them.
    """
    path = claim.run_dir / ADAPTER
    tensors = {name.partition(".")[2]: tensor for name, tensor in load_file(path).items()}
    own = {key: key.partition("/")[2].replace(f".{POLICY}.", ".") for key in model.weight_state()}
    misfit = [name for name in own.values() if name not in tensors] or [n for n in tensors if n not in own.values()]
    if misfit:
        raise UserError(f"{path} is no adapter of these settings: {misfit[0]} is in one of them only")
    try:
        model.restore_weights({key: tensors[name] for key, name in own.items()})
    except RuntimeError as error:  # another rank
        raise UserError(f"{path} is no adapter of these settings: {str(error).splitlines()[0]}") from None


def _other_ids(claim: RunClaim, scorers: ScorerSet) -> tuple[frozenset[str], tuple[str, ...]]:
    """Names of the scorers whose id is not the record's, and a note on each."""
    there = {name: use.id for name, use in claim.record.scorers.items()}
    there |= {
        f"{kind}-{name}": text for kind in ("diversity", "drift") for name, text in claim.record.embedders.items()
    }
    here = {scorer.name: scorer.id for scorer in scorers.all}
    here |= {f"{kind}-{name}": text for kind in ("diversity", "drift") for name, text in scorers.embedders.items()}
    others = [name for name, text in here.items() if name in there and there[name] != text]
    return frozenset(others), tuple(f"{name} is {here[name]} here and {there[name]} in the record" for name in others)


# Made again


def _rerun(
    claim: RunClaim, request: Verification, out: Path, progress: Progress, interrupted: Callable[[], bool]
) -> _Finding:
    """Make the run again in a fresh folder, and compare the gains."""
    config = replace(claim.config, scorer_locations={**claim.config.scorer_locations, **request.scorer_locations})
    folder = out / "rerun"
    finished = (folder / config.slug() / record.RECORD).is_file()  # an earlier verification, perhaps by other code
    again = run(config, runs=folder, progress=progress, fresh=finished, interrupted=interrupted)
    made = open_claim(Path(again.run_dir)) if not record.disqualification(again) else None
    conditions = {"spent": dict(again.spent), "claimed_spent": dict(claim.record.spent), "seed": config.seed}
    if made is None:
        reason = f"Made again, the run {record.disqualification(again)}."
        return _Finding("does not hold", reason, _claimed_gains(claim), conditions=conditions)
    pairs = [("before", claim.before, made.before), ("after", claim.after, made.after)]
    agreements = {
        f"{phase} {key}": agreement.compare_images(*matrices, old.strata())
        for phase, old, new in pairs
        for key, matrices in agreement.shared_matrices(old, new).items()
    }
    by_prompts = {key: _change(claim, made, key, None) for key in _tested_keys(claim)}
    variances = _seed_variances(claim)
    with_seeds = {key: _change(claim, made, key, variances[key]) for key in by_prompts}
    known = all(variance is not None for variance in variances.values())
    verdict, reason = _verdict_on_rerun(claim, agreements, by_prompts, with_seeds if known else None)
    gains = _gains(claim, made.before, made.after, paired=True)
    shown = with_seeds if known else by_prompts
    gains |= {key: gains[key].model_copy(update={"se": _finite(e.se), "p": e.p}) for key, e in shown.items()}
    return _Finding(
        verdict, reason, gains, {n: _compared(a) for n, a in agreements.items()}, (), conditions, made.record_hash
    )


def _verdict_on_rerun(
    claim: RunClaim,
    agreements: Mapping[str, ImageAgreement],
    by_prompts: Mapping[str, Estimate],
    with_seeds: Mapping[str, Estimate] | None,
) -> tuple[Verdict, str]:
    """Tell whether a run that was made again agrees with the record.

    agreements: of the images. by_prompts, with_seeds: how the gain changed, tested by the prompts alone, and with the variance between
    trainings where it is known.
    """
    if all(found.equal == 1 for found in agreements.values()):
        return "holds", "Every score repeats to the last digit."
    if any(e.p is None for e in by_prompts.values()):
        return "cannot tell", f"Scores do not repeat, and fewer than {law.MIN_PROMPTS} prompts allow no test."
    of = lambda changes: agreement.told_different({key: e.p for key, e in changes.items()})
    told = of(with_seeds or by_prompts)
    name = (told or of(by_prompts) or list(by_prompts))[0]
    change = f"The gain in {name} is {by_prompts[name].mean:+.3f} from the record's"
    if with_seeds is not None and told:
        return "does not hold", f"{change}, more than prompts and training seeds explain."
    if of(by_prompts) and _same_conditions(claim):
        return (
            "does not hold",
            f"{change}, more than prompts explain; the same code on the same kind of processor repeats.",
        )
    if of(by_prompts) and with_seeds is None:
        return (
            "cannot tell",
            f"{change}, more than prompts explain; how far training seeds lie apart here is not known.",
        )
    key = record_key(claim.record)
    if key is not None and key in by_prompts and _told_up(claim.record.delta[key].p, claim.record.delta[key].mean):
        found = by_prompts[key].mean + (claim.record.delta[key].mean or 0.0)
        if found <= 0:
            return (
                "cannot tell",
                f"The gain in {key} was told and is {found:+.3f} here, but the two do not differ significantly.",
            )
    return "holds", f"{change}, which prompts{' and training seeds' if with_seeds else ''} explain."


def _change(claim: RunClaim, made: RunClaim, key: str, seeds: SeedVariance | None) -> Estimate:
    """How the gain changed from the record to the run that was made again."""
    gains = [run.after.matrix(key) - run.before.matrix(key) for run in (claim, made)]
    return agreement.change_of_gain(gains[0], gains[1], claim.after.strata(), seeds)


def _seed_variances(claim: RunClaim) -> dict[str, SeedVariance | None]:
    """The variance between trainings by scorer/metric: of runs with other seeds beside this one, else from the library."""
    siblings = _siblings(claim)
    variances: dict[str, SeedVariance | None] = {}
    for key in _tested_keys(claim):
        after = [run.matrix(key) for run in (claim.after, *siblings) if key in run.keys()]
        bounds = {name: x for name, x in claim.record.config.get("budget", {}).items() if name != "name"}
        entry = find_entry(claim.record.method, claim.record.task, claim.record.model, key, bounds)
        variances[key] = entry.variance() if entry else None
        if len(after) > 1:
            spread = intervals.table_spreads({"": after}, claim.after.strata())[""]
            variances[key] = spread if math.isfinite(float(spread.variance)) else variances[key]
    return variances


def _siblings(claim: RunClaim) -> list[Evaluation]:
    """The results of runs with the same settings and other seeds in the folder of runs; damaged ones are left out."""
    settings = lambda r: {name: value for name, value in r.config.items() if name != "seed"}
    found: list[Evaluation] = []
    for path in sorted(claim.run_dir.absolute().parent.glob(f"*/{record.RECORD}")):
        try:
            other = record.read(path)
            if other.seed == claim.record.seed or settings(other) != settings(claim.record):
                continue
            if not record.disqualification(other) and other.prompts == claim.record.prompts:
                found.append(read_scores(record.verified(path.parent, other, "scores.parquet"))[1])
        except UserError:
            continue
    return found


# Judged on what the author did not know


def _audit(claim: RunClaim, request: Verification, out: Path, progress: Progress) -> _Finding:
    """Evaluate base and adapter on other prompts and other noise, and compare the gain with the one that is claimed."""
    prompts, source = _secret_prompts(claim, request)
    seed = secrets.randbelow(2**32) if request.evaluation_seed is None else request.evaluation_seed
    judged = _judge(claim, request, prompts, seed, progress)
    judged.write(out / "audit")
    key = record_key(claim.record) or ""
    gains = _gains(claim, judged.before, judged.after, paired=False)
    verdict, reason = _verdict_on_gain(
        key, _estimate(claim.before, claim.after, key), _estimate(judged.before, judged.after, key)
    )
    if key.partition("/")[0] in judged.other_ids:
        verdict, reason = "cannot tell", f"{key} is by another scorer here: {'; '.join(judged.notes)}"
    conditions = {"evaluation_seed": seed, "prompts": prompts_hash(prompts), "count": len(prompts), "source": source}
    return _Finding(verdict, reason, gains, {}, judged.notes, conditions)


def _verdict_on_gain(key: str, claimed: Estimate | None, found: Estimate | None) -> tuple[Verdict, str]:
    """Tell whether a gain holds on other prompts: told again, and not significantly smaller than it is claimed to be."""
    if claimed is None or found is None or found.p is None or claimed.p is None:
        return "cannot tell", f"Fewer than {law.MIN_PROMPTS} prompts with scores allow no test of {key}."
    _, p = agreement.independent_difference(claimed, found)
    numbers = f"The gain in {key} is {found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}] here and {claimed.mean:+.3f} in the record"
    if found.mean < claimed.mean and p < agreement.SIGNIFICANCE:
        return "does not hold", f"{numbers}: significantly smaller."
    if _told_up(claimed.p, claimed.mean) and not _told_up(found.p, found.mean):
        return (
            "cannot tell",
            f"{numbers}: not told again, and not significantly smaller either; more prompts would tell.",
        )
    return "holds", f"{numbers}: {'told again and ' if _told_up(found.p, found.mean) else ''}not significantly smaller."


def _secret_prompts(claim: RunClaim, request: Verification) -> tuple[list[Prompt], str]:
    """The prompts of an audit and where they come from. Raises UserError where the author knew one of them, or there are none."""
    domain, task = claim.model_spec.domain, claim.task
    if request.prompts is not None:
        own = with_own_prompts(task, {"test": request.prompts}, domain)
        prompts = list(own.prompts("test", domain))
        refuse_overlap(own, domain)
        source = f"{request.prompts}"
    else:
        inner = _task_behind(task)
        if not isinstance(inner, SupportsFreshPrompts):
            raise UserError(
                f"the task {task.name} draws no fresh prompts: give prompts that the author did not know, --prompts FILE"
            )
        count = len(task.prompts("test", domain))
        prompts, source = list(inner.fresh(count, secrets.randbelow(2**63), domain)), "drawn by the task"
    known = {fold(prompt) for split in get_args(Split) for prompt in task.prompts(split, domain)}
    if shared := [prompt.text for prompt in prompts if fold(prompt) in known]:
        raise UserError(f"{len(shared)} of these prompts are the task's own, which the author knew: {shared[0]!r}")
    return prompts, source


def _task_behind(task: Task) -> Task:
    """The task without the wrapper of a user's own prompts."""
    inner: Any = getattr(task, "task", None)
    return task if inner is None else inner


# What the levels share


def _prompts(claim: RunClaim) -> list[Prompt]:
    """The prompts of the record's evaluation."""
    return list(claim.task.prompts(claim.config.evaluation.split, claim.model_spec.domain))


def _tested_keys(claim: RunClaim) -> list[str]:
    """The metrics that a verdict rests on: those of the training and of the held-out scorers."""
    roles = {name: use.role for name, use in claim.record.scorers.items()}
    return [key for key in claim.record.delta if roles.get(key.partition("/")[0]) in ("training", "held-out")]


def _same_conditions(claim: RunClaim) -> bool:
    """Return whether code, versions, threads and kind of processor are those of the record, so that every digit must repeat."""
    here, there = record.provenance(), claim.record.provenance
    revision = str(here["revision"])
    clean = bool(revision) and not revision.endswith("-dirty")
    return clean and all(here[name] == there.get(name) for name in ("revision", "versions", "threads", "processor"))


def _estimate(before: Evaluation, after: Evaluation, key: str) -> Estimate | None:
    """The gain of an evaluation; None where it lacks this scorer/metric."""
    if key not in before.keys() or key not in after.keys():
        return None
    return agreement.gain_of(before.matrix(key), after.matrix(key), after.strata())


def _gains(claim: RunClaim, before: Evaluation, after: Evaluation, *, paired: bool) -> dict[str, Compared]:
    """Claimed and found gains. paired: of the same prompts and noise, whose difference is tested elsewhere."""
    gains: dict[str, Compared] = {}
    for key, claimed in claim.record.delta.items():
        found = _estimate(before, after, key)
        if found is None:
            continue
        old = _estimate(claim.before, claim.after, key)
        se, p = agreement.independent_difference(old, found) if old is not None and not paired else (math.nan, math.nan)
        difference = found.mean - claimed.mean if claimed.mean is not None else math.nan
        gains[key] = Compared(
            claimed=_number(claimed), found=_number(found), difference=_finite(difference), se=_finite(se), p=_finite(p)
        )
    return gains


def _claimed_gains(claim: RunClaim) -> dict[str, Compared]:
    """The claimed gains where nothing was found."""
    nothing = record.Number(mean=None, ci=(None, None), n=0)
    return {
        key: Compared(claimed=_number(number), found=nothing, difference=None)
        for key, number in claim.record.delta.items()
    }


def _compared(found: ImageAgreement) -> Compared:
    return Compared(
        claimed=_number(found.claimed),
        found=_number(found.found),
        difference=_finite(found.difference),
        p=_finite(found.p),
        equal_images=found.equal,
        close_images=found.close,
    )


def _number(x: Any) -> record.Number:
    """A number of a record, from one or from an estimate; missing values are null."""
    ends = x.ci if isinstance(x, record.Number) else (x.low, x.high)
    return record.Number(mean=_finite(x.mean), ci=(_finite(ends[0]), _finite(ends[1])), n=x.n)


def _finite(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else float(x)


def _told_up(p: float | None, mean: float | None) -> bool:
    """Return whether a gain is significantly above 0."""
    return p is not None and mean is not None and p < agreement.SIGNIFICANCE and mean > 0


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
