"""Checks a method: applies every law, on two or four miniature models and a toy scorer, in seconds."""

from __future__ import annotations

import inspect
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from .. import registry
from ..experiments import config
from ..model_spec import SMALL, Adapter, find_model_spec
from ..models import mini
from ..models.open import open_model
from ..spec import Search
from . import gradient_laws, run_laws, search_laws, source_laws
from .harness import Harness, MethodSource, no_library_progress, open_harness, write_pairs
from .law import Law, LawBroken, LawResult, LawSkipped, Subject

# The default: one family that predicts a velocity, one that predicts noise. The other two take nearly as long again.
DEFAULT_FAMILIES: dict[str, Callable[[Path], Path]] = {"sd3": mini.write_sd3, "sd15": mini.write_sd15}


ALL_FAMILIES = {**DEFAULT_FAMILIES, "flux": mini.write_flux, "sdxl": mini.write_sdxl}


LAWS: list[Law] = [
    source_laws.is_frozen_dataclass,
    source_laws.constructs,
    source_laws.declares_space_and_cost,
    source_laws.source_is_restricted,
    gradient_laws.loss_is_row_mean,
    gradient_laws.equal_rewards_teach_nothing,
    gradient_laws.ratio_starts_at_one,
    gradient_laws.reference_is_neutral,
    gradient_laws.unscored_images_leave_no_trace,
    run_laws.seed_decides,
    run_laws.leaves_nothing_behind,
    run_laws.resumes_exactly,
    run_laws.cost_matches_meter,
    run_laws.spends_through_rig,
    run_laws.same_in_a_real_run,
    run_laws.keeps_budget,
    run_laws.learns,
    search_laws.answers_are_latents,
    search_laws.last_answer_is_the_answer,
    search_laws.search_spends_through_rig,
    search_laws.shares_budget,
    search_laws.finds_better_images,
]
# Settings that every method of few images has, small enough to be checked in seconds.
SMALL_FIELDS = {"prompts": 3, "seeds": 1, "group": 4, "branches": 4, "steps": 0}


def check(
    reference: str,
    *,
    sets: Iterable[str] = (),
    families: Iterable[str] = tuple(DEFAULT_FAMILIES),
    soft: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> list[LawResult]:
    """Apply every law to the method behind a name or `path/to/file.py:Name`.

    Args:
        reference: the method's name, or its file and class.
        sets: settings as `--set` takes them; they override the method's preset for tiny models.
        families: keys of ALL_FAMILIES.
        soft: also apply the laws that only warn.
        say: called with the name of the law that is applied next.

    Returns:
        One result for each law and family. Without an instance of the method, the results about its source only.

    Raises:
        UserError: on an unknown name or family.
    """
    kind = registry.load("method", reference)
    families = tuple(families)
    for family in families:
        if family not in ALL_FAMILIES:
            raise registry.unknown("family", family, ALL_FAMILIES)
    own_settings = config.parse_settings(sets)
    make = partial(_build_method, reference, kind, own_settings)
    results: list[LawResult] = []

    def apply(law: Law, subject: MethodSource | Harness, family: str) -> None:
        say(f"{law.name}{f' ({family})' if family else ''}")
        results.append(_apply(law, subject, family))

    for law in LAWS:
        if law.on == "source":
            apply(law, MethodSource(kind, make), "")
    if results[0].broken or results[1].broken:  # no instance can be made, so no other law can be checked
        return results
    subject: Subject = "search" if isinstance(make(), Search) else "training"
    with tempfile.TemporaryDirectory() as folder:
        if _field_values(make()).get("pairs") and "pairs" not in own_settings:  # it trains on a data set
            make = partial(make, pairs=str(write_pairs(Path(folder))))
        for family in families:
            with no_library_progress():
                model_spec = find_model_spec(str(ALL_FAMILIES[family](Path(folder) / family)))
                model = open_model(
                    model_spec, device="cpu", precision="fp32", adapter=_small_adapter(model_spec.adapter)
                )
            with open_harness(kind, make, model) as harness:
                apply(gradient_laws.fits_model, harness, family)
                for law in LAWS if results[-1].ok else ():
                    if law.on == subject and family in (law.families or families) and (soft or law.hard):
                        apply(law, harness, family)
    return results


def _field_values(method: Any) -> dict[str, Any]:
    """Return the fields of a method instance with their values."""
    return {f.name: getattr(method, f.name) for f in fields(method)}


def _small_adapter(adapter: Adapter) -> Adapter:
    """Return an adapter of rank 8 on the same modules."""
    return Adapter(rank=8, alpha=16, targets=adapter.targets)


def _build_method(reference: str, kind: Any, overrides: Mapping[str, Any], **changes: Any) -> Any:
    """Build a fresh instance from the method's preset for tiny models, SMALL_FIELDS, `changes` and `overrides`, later ones winning.

    overrides: what --set says. changes: values by field; `optim` as a mapping.
    """
    table = config.preset(registry.canonical("method", reference), str(SMALL["preset"]), "")
    for key in ("adapter", "evaluation", "precision", "tuned", *config.EXECUTION):
        table.pop(key, None)
    names = {f.name for f in fields(kind)}
    for layer in ({**SMALL_FIELDS, **changes}, overrides):
        for key, value in layer.items():
            if key not in names and layer is not overrides:
                continue
            before = table.get(key)
            table[key] = {**before, **value} if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return config.build(kind, table)


def _apply(law: Law, subject: MethodSource | Harness, family: str) -> LawResult:
    """Apply one law; an exception of the method's own code breaks it."""
    began = time.perf_counter()
    ok, detail, skipped = True, "", ""
    try:
        law.check(subject)
    except LawSkipped as skip:
        skipped = str(skip)
    except LawBroken as broken:
        ok, detail = False, str(broken)
    except Exception as error:  # a method is foreign code and may raise anything
        ok, detail = False, f"{type(error).__name__}: {error}{_error_line(error, subject.kind)}"
    return LawResult(law.name, family, ok, time.perf_counter() - began, detail, skipped, law.hard)


def _error_line(error: Exception, kind: Any) -> str:
    """Return the line of the method's own file that an error came from, as text."""
    file = inspect.getsourcefile(kind)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" (line {lines[-1]} of {Path(str(file)).name})" if lines else ""
