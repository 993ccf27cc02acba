"""Checks of a task's prompts, and of scorers and embedders, which are made and tested on images with known answers."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np

from .. import registry
from ..assets import downloads
from ..errors import DownloadLimitExceeded, Missing, UserError
from ..scoring.scorers import close_scorers, open_scorer, part_behind
from ..spec import Task
from .check_result import BINDING_LICENCE_WORDS, Check, CheckVerdict, first_line, format_gb
from .model_checks import read_safetensors_header
from .needs import SPLITS, Need

# Bytes of weights above which a scorer is made only with `deep`.
HEAVY_BYTES = 2**30


@runtime_checkable
class SupportsSelfTest(Protocol):
    """A scorer that can test itself on images with known answers."""

    def self_test(self) -> None:
        """Raise RuntimeError, with the wrong answer, where the scorer fails its test."""
        ...


def check_prompts(task: Task, domain: str, offline: bool) -> Iterator[Check]:
    """Check that the three splits can be read and share no prompt."""
    from ..evaluation.splits import prompts_hash, refuse_overlap

    sizes: list[str] = []
    for split in SPLITS:
        try:
            prompts = task.prompts(split, domain)
        except UserError as error:
            verdict: CheckVerdict = "missing" if _is_fetchable(error) and not offline else "broken"
            remedy = f"gpobench fetch --task {task.name}, or put the published file below GPOBENCH_DATA"
            yield Check(f"prompts of {task.name}", verdict, _without_offline_note(error), remedy)
            return
        sizes.append(f"{split} {len(prompts):,} ({prompts_hash(prompts)[:8]})")
    yield Check(f"prompts of {task.name}", "ok", ", ".join(sizes))
    try:
        refuse_overlap(task, domain)
        yield Check("splits", "ok", "no prompt is in two of them")
    except UserError as error:
        yield Check(
            "splits", "broken", str(error), "change the task's lists: a score on training prompts is no evaluation"
        )


def _is_fetchable(error: UserError) -> bool:
    """Whether the file is missing only because the doctor fetches nothing: a run would fetch it."""
    return "HF_HUB_OFFLINE" in str(error)


def _without_offline_note(error: UserError) -> str:
    """Return the error's message without the part about HF_HUB_OFFLINE, which the doctor itself has set."""
    text = str(error)
    for tail in (", and HF_HUB_OFFLINE forbids", " and HF_HUB_OFFLINE forbids", " and the hub does not give"):
        text = text.partition(tail)[0] if _is_fetchable(error) else text
    return text


def check_part(need: Need, deep: bool, offline: bool, fetch_command: str) -> Iterator[Check]:
    """Check a scorer or an embedder by making and testing it; of a heavy one, unless `deep`, only the file headers.

    fetch_command: the command that fetches it, for the remedy.
    """
    name, start = f"{need.kind} {need.name}", time.monotonic()
    with (
        warnings.catch_warnings(record=True) as raised_warnings,
        downloads.log_downloads(float("inf") if deep else HEAVY_BYTES) as requests,
    ):
        warnings.simplefilter("always")
        try:
            result = _test_embedder(need.name) if need.kind == "embedder" else _test_scorer(need.name)
            check = Check(name, "ok", f"{result} ({time.monotonic() - start:.1f} s)")
        except DownloadLimitExceeded:
            damage = _damaged_file(requests)
            size = format_gb(sum(requests.files().values()))
            check = Check(
                name, "broken" if damage else "ok", damage or f"{size} of weights are here; --deep loads and tests them",
                f"remove that file, then: {fetch_command}" if damage else "",
            )  # fmt: skip
        except Missing as error:
            verdict: CheckVerdict = "broken" if need.needed and (offline or not _is_fetchable(error)) else "missing"
            check = Check(name, verdict, _without_offline_note(error), fetch_command if _is_fetchable(error) else "")
        except RuntimeError as error:
            check = Check(
                name, "broken", f"self-test failed: {first_line(error)}", "its scores are wrong until this passes"
            )
        except Exception as error:  # foreign code may raise anything
            check = Check(name, "broken" if need.needed else "warning", f"{type(error).__name__}: {first_line(error)}")
    gc.collect()
    yield check
    for text in dict.fromkeys(str(warning.message) for warning in raised_warnings):
        if any(word in text.lower() for word in BINDING_LICENCE_WORDS):
            yield Check(f"licence of {need.name}", "warning", text, "read it before you distribute what uses it")


def _test_scorer(name: str) -> str:
    """Make a scorer and run its self-test; returns the result in words."""
    scorer = open_scorer(name)
    part = part_behind(scorer)
    try:
        if not isinstance(part, SupportsSelfTest):
            return f"{scorer.id}: opens; it has no self-test"
        part.self_test()
        return f"{scorer.id}: self-test passed"
    finally:
        close_scorers([scorer])


def _test_embedder(name: str) -> str:
    """Make an embedder and embed two images; returns the result in words. Raises RuntimeError unless the vectors differ."""
    from ..assets.glyphs import draw_word

    embedder = registry.embedder(name)
    images = np.stack([draw_word("BOX"), draw_word("FISH")])
    vectors = np.asarray(embedder(images))
    if vectors.ndim != 2 or len(vectors) != 2 or not np.isfinite(vectors).all() or np.array_equal(*vectors):
        raise RuntimeError(f"{embedder.id} gives {vectors.shape} for two images, equal or not finite")
    return f"{embedder.id}: two images, two vectors of {vectors.shape[1]}"


def _damaged_file(requests: downloads.DownloadLog) -> str:
    """Return what is wrong with the first damaged safetensors file that was asked for; "" where none is."""
    for path in requests.files():
        if path.suffix == ".safetensors":
            try:
                read_safetensors_header(path)
            except UserError as error:
                return str(error)
    return ""
