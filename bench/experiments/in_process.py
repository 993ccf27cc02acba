"""Do a run in this process and return its failure as one line, so that the other runs of a grid go on.

Apart from jobs.py, which starts commands in processes of their own: leaderboards use jobs.py, and must not import runs.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

from ..errors import Interrupted, UserError
from ..evaluation.record import Record
from ..progress import Progress
from .config import Config
from .run import run as run_config


def run_in_process(
    config: Config, *, runs: Path, log: Path, progress: Progress, interrupted: Callable[[], bool] = lambda: False
) -> tuple[Record | None, str]:
    """Do a run, or read the record that an earlier start of it wrote; returns the record, or None and the error's first line.

    Args:
        config: the resolved settings.
        runs: the folder of run directories.
        log: the file that takes the traceback of an unexpected error.
        progress: where progress is shown.
        interrupted: asked whether to stop.

    Raises:
        Interrupted: when asked to stop.
    """
    try:
        return run_config(config, runs=runs, progress=progress, interrupted=interrupted), ""
    except Interrupted:
        raise
    except UserError as error:
        return None, str(error)
    except Exception as error:  # one run may need more memory than there is; the others go on
        log.write_text(traceback.format_exc(), "utf-8")
        return None, f"{type(error).__name__}: {error}".partition("\n")[0]
