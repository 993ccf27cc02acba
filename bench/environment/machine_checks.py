"""Checks of the machine: Python, packages, device, disk, folders and hub."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import MIN_FREE_DISK, free_disk
from ..model_spec import ModelSpec
from .check_result import BINDING_LICENCE_WORDS, Check, CheckVerdict, first_line, format_gb

# Free disk in bytes below which the doctor warns: checkpoints and images of a few runs may take it.
SCARCE_DISK = 5 * 2**30


def check_packages() -> Iterator[Check]:
    """Check Python, the required packages and the extras against the version ranges in gpobench's metadata."""
    from packaging.specifiers import SpecifierSet

    supported = SpecifierSet(metadata.metadata("gpobench")["Requires-Python"] or "")
    python = platform.python_version()
    fits = supported.contains(python, prereleases=True)
    remedy = "" if fits else f"install Python {supported}"
    yield Check("python", "ok" if fits else "broken", f"{python} ({supported})", remedy)
    core, extras = _requirements()
    wrong = [(requirement, fault) for requirement in core if (fault := _version_fault(requirement))]
    for requirement, fault in wrong:
        yield Check(requirement.name, "broken", fault, f"pip install '{requirement.name}{requirement.specifier}'")
    if not wrong:
        yield Check("packages", "ok", f"all {len(core)} that gpobench requires are here, in range")
    for extra, members in sorted(extras.items()):
        faults = [fault for member in members if (fault := _version_fault(member))]
        absent = any("not installed" in fault for fault in faults)
        versions = ", ".join(
            f"{member.name} {metadata.version(member.name)}{_binding_licence(member.name)}"
            for member in members
            if not _version_fault(member)
        )
        verdict: CheckVerdict = "missing" if absent else "warning" if faults else "ok"
        remedy = f"pip install 'gpobench[{extra}]'" if faults else ""
        yield Check(f"extra {extra}", verdict, "; ".join(faults) or versions, remedy)


def _requirements() -> tuple[list[Any], dict[str, list[Any]]]:
    """Return the packages that gpobench always requires, and those of each extra, as packaging's Requirement."""
    from packaging.requirements import Requirement

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
    return core, extras


def _version_fault(requirement: Any) -> str:
    """Return why an installed package does not meet a requirement; "" where it does."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed (supported: {requirement.specifier or 'any'})"
    fits = requirement.specifier.contains(version, prereleases=True)
    return "" if fits else f"{requirement.name} {version} is outside of {requirement.specifier}"


def _binding_licence(package: str) -> str:
    """Return a package's licence in brackets where it restricts the distribution of what uses it; else ""."""
    package_metadata = metadata.metadata(package)
    licence = next((package_metadata[key] for key in ("License-Expression", "License") if package_metadata[key]), "")
    first = licence.strip().partition("\n")[0][:40]
    return f" [licence {first}]" if any(word in first.lower() for word in BINDING_LICENCE_WORDS) else ""


def check_device(model_spec: ModelSpec | None) -> Iterator[Check]:
    """Check the device's memory, the number of threads, and that the device computes in the model's precision."""
    import torch

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        bf16 = "bf16" if torch.cuda.is_bf16_supported(False) else "no bf16"
        name = f"{torch.cuda.get_device_name()}, {format_gb(free)} of {format_gb(total)} free, {bf16}"
        yield Check(
            "device", "ok" if free > total / 2 else "warning", f"{name}; torch {torch.__version__}",
            "" if free > total / 2 else "another process holds most of the GPU's memory: nvidia-smi shows which",
        )  # fmt: skip
    else:
        yield Check(
            "device",
            "ok",
            f"CPU ({platform.machine()}), {format_gb(main_memory())} of memory; torch {torch.__version__}",
        )
    detail = f"torch computes with {threads}, {cores} cores may be used"
    too_many = threads > cores
    remedy = f"export OMP_NUM_THREADS={cores}" if too_many else ""
    yield Check("threads", "warning" if too_many else "ok", detail, remedy)
    if model_spec is not None:
        from ..models.loading import dtype_of

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            dtype_of(model_spec.precision, device)
            yield Check("precision", "ok", f"{model_spec.name} computes in {model_spec.precision} on {device}")
        except UserError as error:
            yield Check("precision", "broken", str(error), "--set precision=fp32")


def main_memory() -> float:
    """Return the bytes of main memory; 0 where the system does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):  # not a Unix
        return 0.0


def check_disk_and_hub(offline: bool) -> Iterator[Check]:
    """Check free disk for runs and for weights, the folders that environment variables name, and that the hub answers."""
    from huggingface_hub import constants, get_token

    for name, path in (("disk for runs", Path.cwd()), ("disk for weights", Path(constants.HF_HUB_CACHE))):
        path, free = free_disk(path)
        verdict: CheckVerdict = "broken" if free < MIN_FREE_DISK else "warning" if free < SCARCE_DISK else "ok"
        yield Check(
            name, verdict, f"{format_gb(free)} free at {path}", "free some disk space" if verdict != "ok" else ""
        )
    for name in ("GPOBENCH_WEIGHTS", "GPOBENCH_DATA"):
        if folder := os.environ.get(name):
            exists = Path(folder).is_dir()
            remedy = "" if exists else f"no such folder: correct or unset {name}"
            yield Check(name, "ok" if exists else "broken", folder, remedy)
    if offline:
        yield Check("hub", "ok", "HF_HUB_OFFLINE is set: only local files are used")
        return
    fault = _unreachable(constants.ENDPOINT)
    login = "logged in" if get_token() else "not logged in: gated models cannot be fetched"
    yield Check(
        "hub", "warning" if fault else "ok", fault or f"{constants.ENDPOINT} answers; {login}",
        "missing files cannot be fetched; set HF_HUB_OFFLINE=1 to use local files only" if fault else "",
    )  # fmt: skip


def _unreachable(address: str) -> str:
    """Return why an address does not answer within three seconds; "" where it does."""
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=3):
            return ""
    except urllib.error.HTTPError:
        return ""  # an error status is an answer
    except (OSError, ValueError) as error:
        return f"{address} cannot be reached: {first_line(error)}"
