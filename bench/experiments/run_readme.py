"""The README of a run directory: what was trained, the numbers before and after, and how to load the adapter."""

from __future__ import annotations

from ..evaluation.look_ledger import look_note
from ..evaluation.record import Difference, Number, Record, disqualification
from ..evaluation.seed_library import seed_note
from ..evaluation.verification import Verified, verification_line
from ..model_spec import ModelSpec
from ..models.open import usage

SELF = Verified()  # nobody has obtained the numbers again


def run_readme(record: Record, model_spec: ModelSpec, has_adapter: bool, verified: Verified = SELF) -> str:
    """The text of README.md; a search leaves no adapter. verified: the statements on the record."""
    rows = [
        f"| {key} | {_estimate(record.before[key])} | {_estimate(record.after[key])} | {_estimate(delta)} | {_p(delta)} |"
        for key, delta in record.delta.items()
    ]
    spent = ", ".join(f"{currency} {amount:,.0f}" for currency, amount in record.spent.items())
    model = f"a LoRA for {record.model}" if has_adapter else f"{record.model} as it is"
    verb = "Trained" if has_adapter else "Searched for, without training,"
    selection = (
        "" if has_adapter else " The training scorer chose the images, so only the held-out ones say what was gained."
    )
    tuning = (
        f" Its settings were chosen in {record.tuning['trials']} trials, which are not in that."
        if record.tuning
        else ""
    )
    lines = [
        f"# {record.method} on {record.task}, {model}",
        "",
        *([f"> **No result.** This run {reason}.", ""] if (reason := disqualification(record)) else []),
        f"{verb} by gpobench with seed {record.seed}; ended by {record.stop}. Spent: {spent}.{tuning}",
        "",
        "| scorer/metric | before | after | difference | p |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"Means over {record.config['evaluation']['split']} prompts with 95 % intervals, images of a prompt clustered; "
        "differences are paired by prompt on the same noise.",
        f"{seed_note(record)}{selection}",
        *([note] if (note := look_note(record)) else []),
        verification_line(verified),
        "",
    ]
    if has_adapter:
        lines += ["```python", *usage(model_spec), "```", ""]
    return "\n".join(lines)


def _estimate(number: Number) -> str:
    if number.mean is None or number.ci[0] is None or number.ci[1] is None:
        return "not scored"
    return f"{number.mean:.3f} [{number.ci[0]:.3f}, {number.ci[1]:.3f}]"


def _p(delta: Difference) -> str:
    return "None" if delta.p is None else f"{delta.p:.4f}"
