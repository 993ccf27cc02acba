"""Doctor: checks everything that a run needs before it starts; fetches nothing and trains nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module

from .. import registry
from ..assets import downloads
from ..errors import UserError
from ..model_spec import find_model_spec
from ..progress import Progress
from ..spec import Task
from .check_result import Check, first_line
from .machine_checks import check_device, check_disk_and_hub, check_packages
from .model_checks import check_memory, check_weights
from .needs import Need, needs_of_run
from .part_checks import check_part, check_prompts

CheckGroup = tuple[str, Callable[[], Iterator[Check]]]  # name, function that yields checks
BUILT_IN_SCORERS = ("rapidocr", "reader", "tesseract", "geneval:palette", "pickscore:tiny", "hpsv2:tiny")


def doctor(task: str | None = None, model: str | None = None, *, progress: Progress, deep: bool = False) -> list[Check]:
    """Check what a run of this task and model needs; without either, the package, the embedded model and the built-in scorers.

    deep: load every scorer, however large. Raises UserError only for a name that does not exist.
    """
    general = task is None and model is None
    model_spec = find_model_spec(model or "tiny") if model or general else None
    domain = model_spec.domain if model_spec else "open"
    task_object: Task | None = registry.task(task) if task else None
    offline = downloads.offline()
    groups: list[CheckGroup] = [
        ("packages", check_packages),
        ("the device", lambda: check_device(model_spec)),
        ("disk and hub", lambda: check_disk_and_hub(offline)),
    ]
    if model_spec is not None:
        groups.append(("the model", lambda: check_weights(model_spec, offline)))
        groups.append(("memory", lambda: check_memory(model_spec)))
    needs = [Need("scorer", name, False) for name in BUILT_IN_SCORERS] if general else needs_of_run(task_object, domain)
    if task_object is not None:
        groups.append(("prompts", lambda: check_prompts(task_object, domain, offline)))
    for need in needs:
        fetch_command = f"gpobench fetch --task {task}" if task else f"gpobench fetch --scorer {need.name}"
        group = partial(check_part, need, deep, offline, fetch_command)
        groups.append((f"{need.kind} {need.name}", group))
    progress.phase("examining", float(len(groups)))
    checks: list[Check] = []
    with _offline():
        for name, group in groups:
            try:
                checks += group()
            except UserError as error:
                checks.append(Check(name, "broken", str(error)))
            except Exception as error:  # foreign code may raise anything; the other checks go on
                checks.append(Check(name, "broken", f"{type(error).__name__}: {first_line(error)}"))
            progress.advance(1.0)
    return checks


@contextmanager
def _offline() -> Generator[None]:
    """Within the context nothing is fetched, in this process and in those it starts."""
    # huggingface_hub reads the variable when it is imported and must see the person's own value.
    import_module("huggingface_hub.constants")

    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
