"""A run in this process whose failure is a line: the others of its grid go on."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

from ..errors import Interrupted, UserError
from ..evaluation.record import Record
from ..progress import Progress
from .config import Config
from .run import run as run_one


def run_in_process(
    plan: Config, *, runs: Path, log: Path, progress: Progress, interrupted: Callable[[], bool] = lambda: False
) -> tuple[Record | None, str]:
    """Do a run in this process, or read what an earlier start made of it: its record, or why there is none.

    log: takes the traceback of what nobody foresaw. Raises Interrupted when asked to stop.
    """
    try:
        return run_one(plan, runs=runs, progress=progress, interrupted=interrupted), ""
    except Interrupted:
        raise
    except UserError as error:
        return None, str(error)
    except Exception as error:  # one run may ask for more memory than there is; the others go on
        log.write_text(traceback.format_exc(), "utf-8")
        return None, f"{type(error).__name__}: {error}".partition("\n")[0]
