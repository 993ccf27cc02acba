"""The hub of gpobench: contract, budget, training, models, evaluation, statistics, records and the command line.

The public names are imported on first use, so that `import gpobench.bench` imports nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .budget import Budget, Meter, Spent
    from .errors import Missing, UserError
    from .experiments.config import RunRequest, resolve
    from .experiments.run import run
    from .spec import (
        Branchings,
        Choice,
        EvaluationSettings,
        Groups,
        InitialNoise,
        LogUniform,
        Method,
        Model,
        Optim,
        Pairs,
        Prompt,
        Rig,
        Scorer,
        Scores,
        Search,
        Task,
        Transitions,
        Uniform,
    )
    from .trees import Branches, TreePlan

_MODULE_OF = {
    "Budget": "budget",
    "Meter": "budget",
    "Spent": "budget",
    "Missing": "errors",
    "UserError": "errors",
    "RunRequest": "experiments.config",
    "resolve": "experiments.config",
    "run": "experiments.run",
    **dict.fromkeys(
        "Branchings Choice EvaluationSettings Groups InitialNoise LogUniform Method Model Optim Pairs Prompt Rig Scorer Scores "
        "Search Task Transitions Uniform".split(),
        "spec",
    ),
    "Branches": "trees",
    "TreePlan": "trees",
}

__all__ = [
    "Branches",
    "Branchings",
    "Budget",
    "Choice",
    "EvaluationSettings",
    "Groups",
    "InitialNoise",
    "LogUniform",
    "Meter",
    "Method",
    "Missing",
    "Model",
    "Optim",
    "Pairs",
    "Prompt",
    "Rig",
    "RunRequest",
    "Scorer",
    "Scores",
    "Search",
    "Spent",
    "Task",
    "Transitions",
    "TreePlan",
    "Uniform",
    "UserError",
    "resolve",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
