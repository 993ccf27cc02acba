"""The hub of gpobench: contract, budget, training, models, evaluation, statistics, records and the command line.

The public names are imported on first use, so that `import gpobench.bench` imports nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .budget import Budget, Meter, Spent
    from .errors import Missing, UserError
    from .spec import (
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

_MODULE_OF = {
    "Budget": "budget",
    "Meter": "budget",
    "Spent": "budget",
    "Missing": "errors",
    "UserError": "errors",
    **dict.fromkeys(
        "Choice EvaluationSettings Groups InitialNoise LogUniform Method Model Optim Pairs Prompt Rig Scorer Scores Search Task "
        "Transitions Uniform".split(),
        "spec",
    ),
}

__all__ = [
    "Budget",
    "Choice",
    "Uniform",
    "Groups",
    "EvaluationSettings",
    "LogUniform",
    "Meter",
    "Method",
    "Missing",
    "Model",
    "Transitions",
    "Optim",
    "Pairs",
    "Prompt",
    "Rig",
    "Scorer",
    "Scores",
    "Search",
    "Spent",
    "InitialNoise",
    "Task",
    "UserError",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
