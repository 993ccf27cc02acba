"""The examination before a run: packages, device, disk, weights, prompts, every scorer on pictures with known answers, a verdict each.

Nothing is fetched and nothing is trained. Weights above a gigabyte are looked at and not loaded, unless `deep` says so.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from .. import registry
from ..assets import downloads, weight_store
from ..errors import Missing, UserError
from ..model_spec import ModelSpec, find_model_spec
from ..progress import Progress
from ..scoring.scorers import close_scorers, open_scorer
from ..spec import Task
from . import fetch

Verdict = Literal["ok", "warning", "broken", "missing"]
HEAVY = 2**30  # bytes of weights above which a scorer is not made without `deep`
ROOM = 200 * 2**20  # bytes of free disk below which a run does not begin
SCARCE = 5 * 2**30  # bytes of free disk that a few runs' checkpoints and pictures may take
BUILT_IN = ("rapidocr", "reader", "tesseract", "geneval:palette", "pickscore:tiny", "hpsv2:tiny")
BINDING = ("gated", "non-commercial", "agpl")  # words of a licence that a person should hear
_WIDTHS = {64: "F64 I64 U64", 32: "F32 I32 U32", 16: "F16 BF16 I16 U16", 8: "I8 U8 BOOL F8_E4M3 F8_E5M2"}
BITS = {name: bits for bits, names in _WIDTHS.items() for name in names.split()}  # of safetensors' types


@dataclass(frozen=True)
class Check:
    """One row of the examination."""

    name: str
    verdict: Verdict  # broken: a run fails on it; missing: something optional, or still to be fetched
    detail: str
    remedy: str = ""  # what to do about it


@runtime_checkable
class Tested(Protocol):
    """A scorer with known answers."""

    def self_test(self) -> None:
        """RuntimeError with what it saw where an answer is wrong."""
        ...


def broken(checks: Sequence[Check]) -> bool:
    """Whether a run would fail: the exit code."""
    return any(check.verdict == "broken" for check in checks)


def rows(checks: Sequence[Check]) -> list[tuple[str, str, str]]:
    """Name, verdict and detail, for a table of three columns."""
    return [(check.name, check.verdict, check.detail) for check in checks]


def remedies(checks: Sequence[Check]) -> list[str]:
    """What to do, the worst first, each once."""
    order = {"broken": 0, "missing": 1, "warning": 2, "ok": 3}
    told: dict[str, list[str]] = {}
    for check in sorted(checks, key=lambda check: order[check.verdict]):
        if check.remedy:
            told.setdefault(check.remedy, []).append(check.name)
    return [f"{', '.join(names)}: {remedy}" for remedy, names in told.items()]


def doctor(task: str | None = None, model: str | None = None, *, progress: Progress, deep: bool = False) -> list[Check]:
    """Examine what a run of this task and model needs; without either, the package, the embedded model and the built-in scorers.

    deep: load every scorer, however large. Raises UserError only for a name that does not exist.
    """
    alone = task is None and model is None
    model_spec = find_model_spec(model or "tiny") if model or alone else None
    domain = model_spec.domain if model_spec else "open"
    made: Any = registry.load("task", task)() if task else None
    offline = downloads.offline()
    parts: list[_Part] = [
        ("packages", packages),
        ("the device", lambda: device(model_spec)),
        ("disk and hub", lambda: surroundings(offline)),
    ]
    if model_spec is not None:
        parts += [("the model", lambda: weights(model_spec, offline)), ("memory", lambda: memory(model_spec))]
    needs = [fetch.Need("scorer", name, False) for name in BUILT_IN] if alone else fetch.needs(made, domain)
    if made is not None:
        parts.append(("prompts", lambda: prompts(made, domain, offline)))
    for need in needs:
        bring = f"gpobench fetch --task {task}" if task else f"gpobench fetch --scorer {need.name}"
        look = lambda need=need, bring=bring: part(need, deep, offline, bring)
        parts.append((f"{need.kind} {need.name}", look))
    progress.phase("examining", float(len(parts)))
    found: list[Check] = []
    with _nothing_fetched():
        for name, look in parts:
            try:
                found += look()
            except UserError as error:
                found.append(Check(name, "broken", str(error)))
            except Exception as error:  # foreign code: one patient's collapse must not end the round
                found.append(Check(name, "broken", f"{type(error).__name__}: {_line(error)}"))
            progress.advance(1.0)
    return found


_Part = tuple[str, Callable[[], Iterator[Check]]]


@contextmanager
def _nothing_fetched() -> Generator[None]:
    import_module("huggingface_hub.constants")  # reads the variable as it is imported: that must be the person's own

    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _gb(n: float) -> str:
    return f"{n / 2**30:.1f} GB"


# Python and packages


def packages() -> Iterator[Check]:
    """Python, what gpobench requires, and its extras, against the ranges in gpobench's own metadata."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    asked = SpecifierSet(metadata.metadata("gpobench")["Requires-Python"] or "")
    mine = platform.python_version()
    fine = asked.contains(mine, prereleases=True)
    yield Check("python", "ok" if fine else "broken", f"{mine} ({asked})", "" if fine else f"install Python {asked}")
    core: list[Requirement] = []
    extras: dict[str, list[Requirement]] = {}
    for text in metadata.requires("gpobench") or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            core.append(requirement)
            continue
        for extra in metadata.metadata("gpobench").get_all("Provides-Extra") or []:
            if extra not in ("dev", "all") and marker.evaluate({"extra": extra}):
                extras.setdefault(extra, []).append(requirement)
    wrong = [(r, said) for r in core if (said := _unfit(r))]
    for requirement, said in wrong:
        yield Check(requirement.name, "broken", said, f"pip install '{requirement.name}{requirement.specifier}'")
    if not wrong:
        yield Check("packages", "ok", f"all {len(core)} that gpobench requires are here, in range")
    for extra, members in sorted(extras.items()):
        faults = [said for r in members if (said := _unfit(r))]
        absent = any("not installed" in fault for fault in faults)
        there = ", ".join(f"{r.name} {metadata.version(r.name)}{_licence(r.name)}" for r in members if not _unfit(r))
        verdict: Verdict = "missing" if absent else "warning" if faults else "ok"
        yield Check(
            f"extra {extra}", verdict, "; ".join(faults) or there, f"pip install 'gpobench[{extra}]'" if faults else ""
        )


def _unfit(requirement: Any) -> str:
    """What is wrong with an installed package; empty where nothing is."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed (supported: {requirement.specifier or 'any'})"
    fits = requirement.specifier.contains(version, prereleases=True)
    return "" if fits else f"{requirement.name} {version} is outside of {requirement.specifier}"


def _licence(package: str) -> str:
    """A package's licence where it binds whoever distributes what uses it."""
    facts = metadata.metadata(package)
    said = next((facts[key] for key in ("License-Expression", "License") if facts[key]), "")
    first = said.strip().partition("\n")[0][:40]
    return f" [licence {first}]" if any(word in first.lower() for word in BINDING) else ""


# Device, disk, hub


def device(model_spec: ModelSpec | None) -> Iterator[Check]:
    """What computes: its name, memory, bf16, threads; broken where it cannot compute in the model's precision."""
    import torch

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        bf16 = "bf16" if torch.cuda.is_bf16_supported(False) else "no bf16"
        name = f"{torch.cuda.get_device_name()}, {_gb(free)} of {_gb(total)} free, {bf16}"
        used = Check(
            "device", "ok" if free > total / 2 else "warning", f"{name}; torch {torch.__version__}",
            "" if free > total / 2 else "another process holds most of the GPU's memory: nvidia-smi shows which",
        )  # fmt: skip
    else:
        used = Check(
            "device", "ok", f"CPU ({platform.machine()}), {_gb(_memory())} of memory; torch {torch.__version__}"
        )
    yield used
    said = f"torch computes with {threads}, {cores} cores may be used"
    crowd = threads > cores
    yield Check("threads", "warning" if crowd else "ok", said, f"export OMP_NUM_THREADS={cores}" if crowd else "")
    if model_spec is not None:
        from ..models.common import dtype_of

        place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            dtype_of(model_spec.precision, place)
            yield Check("precision", "ok", f"{model_spec.name} computes in {model_spec.precision} on {place}")
        except UserError as error:
            yield Check("precision", "broken", str(error), "--set precision=fp32")


def _memory() -> float:
    """Bytes of main memory."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):  # not a Unix
        return 0.0


def surroundings(offline: bool) -> Iterator[Check]:
    """Free disk where runs are written and where weights are kept, the folders of the environment, the hub."""
    from huggingface_hub import constants, get_token

    for name, place in (("disk for runs", Path.cwd()), ("disk for weights", Path(constants.HF_HUB_CACHE))):
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        verdict: Verdict = "broken" if free < ROOM else "warning" if free < SCARCE else "ok"
        yield Check(name, verdict, f"{_gb(free)} free at {place}", "make room" if verdict != "ok" else "")
    for name in ("GPOBENCH_WEIGHTS", "GPOBENCH_DATA"):
        if said := os.environ.get(name):
            there = Path(said).is_dir()
            yield Check(
                name, "ok" if there else "broken", said, "" if there else f"no such folder: correct or unset {name}"
            )
    if offline:
        yield Check("hub", "ok", "HF_HUB_OFFLINE is set: only what is here is used")
        return
    why = _reach(constants.ENDPOINT)
    logged = "logged in" if get_token() else "not logged in: gated models cannot be fetched"
    yield Check(
        "hub", "warning" if why else "ok", why or f"{constants.ENDPOINT} answers; {logged}",
        "what is not here cannot be fetched; set HF_HUB_OFFLINE=1 to ask nobody" if why else "",
    )  # fmt: skip


def _reach(address: str) -> str:
    """Why the hub does not answer within three seconds; empty where it does."""
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=3):
            return ""
    except urllib.error.HTTPError:
        return ""  # it answers
    except (OSError, ValueError) as error:
        return f"{address} cannot be reached: {_line(error)}"


# The model


def weights(model_spec: ModelSpec, offline: bool) -> Iterator[Check]:
    """Whether a model's files are here and whole, by their headers alone, and its licence."""
    whole = weight_store.local(model_spec.source, model_spec.revision)
    index = weight_store.cached(model_spec.source, "model_index.json", model_spec.revision) if whole is None else None
    folder = index.parent if index else whole  # what another program left in the hub's cache will do as well
    wrong = faults(folder) if folder else [f"{model_spec.source} is not here"]
    if folder and not wrong:
        wrong = _short(model_spec, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) if folder else 0
    detail = "; ".join(wrong[:3]) or f"{_size(size)} of weights in {folder}, headers and indexes agree"
    lost: Verdict = "missing" if whole is None and not offline else "broken"  # a run would fetch it by itself
    mend = f"restore {folder}" if Path(model_spec.source).is_dir() else f"gpobench fetch --model {model_spec.name}"
    yield Check(f"model {model_spec.name}", lost if wrong else "ok", detail, mend if wrong else "")
    bound = any(word in model_spec.licence.lower() for word in BINDING)
    yield Check(
        f"licence of {model_spec.name}", "warning" if bound else "ok", model_spec.licence,
        f"read it before use: https://huggingface.co/{model_spec.source}" if bound else "",
    )  # fmt: skip


def _size(n: float) -> str:
    return _gb(n) if n > 2**30 / 10 else f"{n / 2**20:.1f} MB"


def faults(folder: Path) -> list[str]:
    """What is wrong with a folder in diffusers format: files missing, cut off, or not what an index says. Nothing is loaded."""
    try:
        index = dict(json.loads((folder / "model_index.json").read_text("utf-8")))
    except (OSError, ValueError) as error:
        return [f"{folder / 'model_index.json'} cannot be read: {_line(error)}"]
    found: list[str] = []
    for name, entry in index.items():
        if not isinstance(entry, list) or not all(entry) or name in fetch.UNUSED:
            continue
        part = folder / name
        if not part.is_dir():
            found.append(f"{part} is missing")
            continue
        for path in sorted(part.glob("*.json")):
            try:
                json.loads(path.read_text("utf-8"))
            except (OSError, ValueError) as error:
                found.append(f"{path} cannot be read: {_line(error)}")
        if name.startswith(("text_encoder", "transformer", "unet", "vae")):
            found += _tensor_faults(part)
    return found


def _tensor_faults(part: Path) -> list[str]:
    found: list[str] = []
    files = [path for path in sorted(part.glob("*.safetensors")) if fetch.PLAIN.fullmatch(path.name)]
    named: dict[str, set[str]] = {}
    for path in sorted(part.glob("*.safetensors.index.json")):
        if fetch.PLAIN.fullmatch(path.name):
            try:
                for key, shard in dict(json.loads(path.read_text("utf-8"))["weight_map"]).items():
                    named.setdefault(str(shard), set()).add(str(key))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                found.append(f"{path} is no index: {_line(error)}")
    found += [
        f"{part / shard} is missing, the index names it" for shard in sorted(named) if not (part / shard).is_file()
    ]
    if not files and not found:
        found.append(f"{part} holds no weights (*.safetensors)")
    for path in files:
        try:
            keys = set(header(path))
        except UserError as error:
            found.append(str(error))
            continue
        lacking = sorted(named.get(path.name, set()) - keys)
        if lacking:
            found.append(f"{path} lacks {len(lacking)} tensors that the index places there, {lacking[0]} first")
    return found


def header(path: Path) -> dict[str, Any]:
    """Tensor -> dtype, shape and place of a safetensors file, read from its head alone; UserError where the file is cut off or damaged.

    The head is JSON behind its length, 8 bytes little-endian; places count from its end.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, 100 * 2**20):
                raise UserError(f"{path} is cut off or no safetensors file: {size:,} bytes")
            told = dict(json.loads(file.read(length)))
        told.pop("__metadata__", None)
        end = 0
        for name, one in told.items():
            start, stop = one["data_offsets"]
            bits = BITS.get(one["dtype"], 0) * math.prod(one["shape"])
            if one["dtype"] in BITS and bits != 8 * (stop - start):
                raise UserError(f"{path} is damaged: {name} of shape {one['shape']} has {stop - start:,} bytes")
            end = max(end, stop)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: its head cannot be read ({_line(error)})") from None
    if size != 8 + length + end:
        what = "cut off" if size < 8 + length + end else "too long"
        raise UserError(f"{path} is {what}: {size:,} bytes, its head promises {8 + length + end:,}")
    return told


def _short(model_spec: ModelSpec, folder: Path) -> list[str]:
    """Networks whose files hold fewer numbers than their config asks for."""
    from ..models.memory import estimate

    try:
        asked = estimate(replace(model_spec, source=str(folder))).parameters
    except Missing:
        return []
    found: list[str] = []
    for name, n in asked.items():
        files = [path for path in (folder / name).glob("*.safetensors") if fetch.PLAIN.fullmatch(path.name)]
        try:
            held = sum(math.prod(one["shape"]) for path in files for one in header(path).values())
        except UserError:  # told already
            continue
        if files and held < n:
            found.append(f"{folder / name} holds {held:,} numbers, its config asks for {n:,}")
    return found


def memory(model_spec: ModelSpec) -> Iterator[Check]:
    """What a run will take, against what there is: an estimate of bench/models/memory.py for GPUs, taken as it is for a CPU."""
    import torch

    from ..models.memory import GB, MARGIN, estimate

    folder = weight_store.local(model_spec.source, model_spec.revision)
    try:
        told = estimate(replace(model_spec, source=str(folder or model_spec.source)))
    except Missing as error:
        yield Check("memory", "missing", str(error), f"gpobench fetch --model {model_spec.name}")
        return
    gpu = torch.cuda.is_available()
    total = float(torch.cuda.get_device_properties(0).total_memory) if gpu else _memory()
    peak = told.peak + (0 if gpu else told.encoders)
    fits = not total or peak + (MARGIN if gpu else 0) <= total
    where = "the GPU" if gpu else "main memory"
    detail = f"about {peak / GB:.1f} GB with one row a backward pass; {where} has {_gb(total)}"
    remedy = "" if fits else "a GPU with more memory, or less of it: precision bf16, fewer rows, a smaller image"
    yield Check("memory", "ok" if fits else "broken" if gpu else "warning", detail, remedy)


# Prompts and scorers


def prompts(task: Task, domain: str, offline: bool) -> Iterator[Check]:
    """The three splits, their hashes, and that no prompt stands in two."""
    from ..evaluation.evaluator import prompts_hash, refuse_overlap

    told: list[str] = []
    for split in fetch.SPLITS:
        try:
            these = task.prompts(split, domain)
        except UserError as error:
            lost: Verdict = "missing" if _fetchable(error) and not offline else "broken"
            remedy = f"gpobench fetch --task {task.name}, or put the published file below GPOBENCH_DATA"
            yield Check(f"prompts of {task.name}", lost, _told(error), remedy)
            return
        told.append(f"{split} {len(these):,} ({prompts_hash(these)[:8]})")
    yield Check(f"prompts of {task.name}", "ok", ", ".join(told))
    try:
        refuse_overlap(task, domain)
        yield Check("splits", "ok", "no prompt stands in two of them")
    except UserError as error:
        yield Check("splits", "broken", str(error), "change the task's lists: a score on trained prompts says nothing")


def _fetchable(error: UserError) -> bool:
    """Whether only our own refusal to fetch stands behind it: a run would fetch it."""
    return "HF_HUB_OFFLINE" in str(error)


def _told(error: UserError) -> str:
    """What is not here, without what we ourselves forbade."""
    text = str(error)
    for tail in (", and HF_HUB_OFFLINE forbids", " and HF_HUB_OFFLINE forbids", " and the hub does not give"):
        text = text.partition(tail)[0] if _fetchable(error) else text
    return text


def part(need: fetch.Need, deep: bool, offline: bool, bring: str) -> Iterator[Check]:
    """A scorer or an embedder, made and asked for known answers; a heavy one is only looked at. bring: the command that fetches it."""
    name, start = f"{need.kind} {need.name}", time.monotonic()
    with (
        warnings.catch_warnings(record=True) as heard,
        downloads.log_downloads(float("inf") if deep else HEAVY) as asked,
    ):
        warnings.simplefilter("always")
        try:
            said = _embeds(need.name) if need.kind == "embedder" else _scores(need.name)
            check = Check(name, "ok", f"{said} ({time.monotonic() - start:.1f} s)")
        except downloads.DownloadLimitExceeded:
            damaged = _damaged(asked)
            size = _gb(sum(asked.files().values()))
            check = Check(
                name, "broken" if damaged else "ok", damaged or f"{size} of weights are here; --deep loads and tests them",
                f"remove that file, then: {bring}" if damaged else "",
            )  # fmt: skip
        except Missing as error:
            lost: Verdict = "broken" if need.needed and (offline or not _fetchable(error)) else "missing"
            check = Check(name, lost, _told(error), bring if _fetchable(error) else "")
        except RuntimeError as error:
            check = Check(
                name, "broken", f"self-test failed: {_line(error)}", "its numbers mean nothing until this passes"
            )
        except Exception as error:  # foreign code
            check = Check(name, "broken" if need.needed else "warning", f"{type(error).__name__}: {_line(error)}")
    gc.collect()
    yield check
    for text in dict.fromkeys(str(one.message) for one in heard):
        if any(word in text.lower() for word in BINDING):
            yield Check(f"licence of {need.name}", "warning", text, "read it before you distribute what uses it")


def _scores(name: str) -> str:
    scorer = open_scorer(name)
    try:
        if not isinstance(scorer, Tested):
            return f"{scorer.id}: opens; it has no self-test"
        scorer.self_test()
        return f"{scorer.id}: self-test passed"
    finally:
        close_scorers([scorer])


def _embeds(name: str) -> str:
    """Two pictures must have two vectors; RuntimeError where they have not."""
    from ..assets.glyphs import draw_word

    embedder = registry.embedder(name)
    pictures = np.stack([draw_word("BOX"), draw_word("FISH")])
    vectors = np.asarray(embedder(pictures))
    if vectors.ndim != 2 or len(vectors) != 2 or not np.isfinite(vectors).all() or np.array_equal(*vectors):
        raise RuntimeError(f"{embedder.id} gives {vectors.shape} for two pictures, equal or not finite")
    return f"{embedder.id}: two pictures, two vectors of {vectors.shape[1]}"


def _damaged(asked: downloads.DownloadLog) -> str:
    for path in asked.files():
        if path.suffix == ".safetensors":
            try:
                header(path)
            except UserError as error:
                return str(error)
    return ""
