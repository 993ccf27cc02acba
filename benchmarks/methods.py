"""Runs every method on one task and one model under one budget with several seeds, and writes docs/methods.md from the runs.

    python benchmarks/methods.py run --jobs 2          # all rows, three seeds; resumes after an interruption
    python benchmarks/methods.py table                 # docs/methods.md, docs/methods.png, docs/near-ties.png
    python benchmarks/methods.py run --only gpo,sft --seeds 1 --budget nfe=20000

The runs evaluate on validation prompts: methods are compared while they are developed, and the test prompts stay unused.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import tokenize
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from gpobench.bench import registry
from gpobench.bench.evaluation import record
from gpobench.bench.experiments import config
from gpobench.bench.model_spec import find_model_spec
from gpobench.bench.spec import Search
from gpobench.bench.stats import intervals
from gpobench.leaderboards.method_colours import row_styles

TASK, MODEL, IMAGES = "ocr", "tiny", 2
REPO = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-c", "from gpobench.bench.commands.app import main; main()"]


@dataclass(frozen=True)
class Row:
    """One line of a table: a label, a method (with its variant) and the settings that differ from its preset."""

    label: str
    method: str
    sets: tuple[str, ...] = ()
    budget: str = ""  # replaces the one of the command line


METHODS = [
    Row("gpo", "gpo"),
    Row("dgpo", "dgpo"),
    Row("diffusion-dpo", "diffusion-dpo"),
    Row("diffusion-nft", "diffusion-nft"),
    Row("awm", "awm"),
    Row("flow-grpo", "flow-grpo"),
    Row("flow-grpo:fast", "flow-grpo:fast"),
    Row("mix-grpo", "mix-grpo"),
    Row("mix-grpo:flash", "mix-grpo:flash"),
    Row("grpo-guard", "grpo-guard"),
    Row("sft", "sft"),
    Row("rwr", "rwr"),
    Row("best-of-n", "best-of-n"),
]
# The claim of GPO's abstract: near-tie pairs hurt DPO; standardised groups need no selection of data. One learning rate, one
# noise range, one beta, one number of images for all of them.
SAME = ("optim.lr=3e-4", "t_min=0.6", "beta=100")
SHORT = "nfe=40000"
CLAIM = [
    Row("DPO, a random pair of the group", "diffusion-dpo", (*SAME, "choose=random"), SHORT),
    Row("DPO, a random pair above a margin", "diffusion-dpo", (*SAME, "choose=random", "margin=0.25"), SHORT),
    Row("GPO without standardisation", "gpo", (*SAME, "std=none"), SHORT),
    Row("GPO", "gpo", SAME, SHORT),
]


def arguments(row: Row, seed: int, budget: str, out: Path) -> list[str]:
    """The command line of one run."""
    sets = [*row.sets, "evaluation.split=validation", f"evaluation.validation_images={IMAGES}"]
    line = ["run", "--method", row.method, "--task", TASK, "--model", MODEL, "--seed", str(seed)]
    line += ["--budget", row.budget or budget]
    return [*line, "--out", str(out), *(part for s in sets for part in ("--set", s))]


def run_dir(row: Row, seed: int, budget: str, out: Path) -> Path:
    """The run directory of one run."""
    sets = [*row.sets, "evaluation.split=validation", f"evaluation.validation_images={IMAGES}"]
    return (
        out
        / config.resolve(
            config.RunRequest(row.method, TASK, MODEL, seed=seed, budget=row.budget or budget, sets=sets)
        ).slug()
    )


def run(rows: list[Row], seeds: int, budget: str, out: Path, jobs: int) -> int:
    """All runs, `jobs` at a time, each in a process of its own; returns how many failed."""
    out.mkdir(parents=True, exist_ok=True)
    todo = {run_dir(row, s, budget, out): arguments(row, s, budget, out) for s in range(seeds) for row in rows}

    def run_one(item: tuple[Path, list[str]]) -> int:
        folder, command = item
        with (out / f"{folder.name}.log").open("w") as log:
            code = subprocess.run([*COMMAND, *command], stdout=log, stderr=log, cwd=REPO).returncode
        print(f"{'done' if code == 0 else f'FAILED ({code})'}  {folder.name}", flush=True)
        return code

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // jobs)))
    with ThreadPoolExecutor(jobs) as pool:
        return sum(code != 0 for code in pool.map(run_one, todo.items()))


# Reading runs


@dataclass(frozen=True)
class RowRuns:
    """The finished seeds of one row."""

    row: Row
    folders: list[Path]
    records: list[record.Record]

    @property
    def label(self) -> str:
        """The row's label, marked where there is one seed: its interval does not contain the spread between seeds."""
        return self.row.label + (" (one seed)" if len(self.records) == 1 else "")

    def gains(self, key: str) -> list[np.ndarray]:
        """For each seed (prompts,): after minus before of one `scorer/metric`."""
        paths = [record.verified(f, r, "scores.parquet") for f, r in zip(self.folders, self.records, strict=True)]
        return [_gain(pd.read_parquet(path), key, "phase", "after", "before") for path in paths]

    def gains_at(self, key: str, currency: str, spend: float) -> list[np.ndarray]:
        """For each seed (prompts,): the gain at an equal spend, between the two eval points around it."""
        return [_between(f, r, key, currency, spend) for f, r in zip(self.folders, self.records, strict=True)]

    def spent(self, currency: str) -> float:
        """The mean over seeds."""
        return float(np.mean([r.spent[currency] for r in self.records]))


def _gain(table: pd.DataFrame, key: str, column: str, after: object, before: object) -> np.ndarray:
    scorer, _, metric = key.partition("/")
    mine = table[(table.scorer == scorer) & (table.metric == metric)]
    means = mine.groupby([column, "prompt"]).value.mean().unstack(column)
    return (means[after] - means[before]).to_numpy()


def _between(folder: Path, r: record.Record, key: str, currency: str, spend: float) -> np.ndarray:
    curve = pd.read_parquet(record.verified(folder, r, "curve.parquet"))
    at = np.array([point.spent[currency] for point in r.curve])
    right = int(np.searchsorted(at, spend).clip(1, len(at) - 1))
    share = float(np.clip((spend - at[right - 1]) / max(at[right] - at[right - 1], 1e-9), 0, 1))
    ends = [_gain(curve, key, "eval_point", k, 0) if k else 0.0 for k in (right - 1, right)]
    return np.asarray((1 - share) * ends[0] + share * ends[1])


def read(rows: list[Row], seeds: int, budget: str, out: Path) -> list[RowRuns]:
    """The rows that have finished runs; missing seeds are named on stderr."""
    read_rows: list[RowRuns] = []
    for row in rows:
        folders = [run_dir(row, s, budget, out) for s in range(seeds)]
        finished = [f for f in folders if (f / "record.json").is_file()]
        if len(finished) < len(folders):
            print(f"{row.label}: {len(folders) - len(finished)} of {len(folders)} seeds are missing", file=sys.stderr)
        if finished:
            read_rows.append(RowRuns(row, finished, [record.read(f / "record.json") for f in finished]))
    return read_rows


# Tables


def cell(gains: list[np.ndarray]) -> str:
    """+12.3 [+8.1, +16.5] in points, over seeds and prompts."""
    e = intervals.two_level([100 * g for g in gains])
    return f"{e.mean:+.1f} [{e.low:+.1f}, {e.high:+.1f}]"


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    numbers: set[int] = set()
    before = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING):
            continue
        doc = token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        if token.type not in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER) and not doc:
            numbers.update(range(token.start[0], token.end[0] + 1))
        before = token.type
    return len(numbers)


def facts(row: Row) -> tuple[str, int]:
    """The paper's arXiv link and the lines of code of a method's file."""
    value = registry.entries("method")[row.method.partition(":")[0]].value
    path = REPO / "methods" / f"{value.partition(':')[0].rpartition('.')[2]}.py"
    paper = re.search(r"arXiv[: ](\d{4}\.\d{4,5})", path.read_text("utf-8"))
    return (f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else "-"), code_lines(path)


def passes(row: Row, runs: RowRuns) -> str:
    """F and B an image: what the method declares, and what the runs spent (groups without spread are not learnt from)."""
    model_spec = find_model_spec(MODEL)
    settings = config.resolve(config.RunRequest(row.method, TASK, MODEL, sets=row.sets)).settings
    roles, images = runs.records[0].nfe_by_role, runs.records[0].spent["images"]
    static = settings.cost(model_spec.sampler_steps, model_spec.guidance)
    declared, spent = (
        (sum(v for k, v in r.items() if k != "policy") + r.get("policy", 0) / 3, r.get("policy", 0) / 3)
        for r in (dict(static), {k: v / images for k, v in roles.items()})
    )
    if isinstance(settings, Search):
        return f"{declared[0]:g}F / {spent[0]:.1f}F"
    return f"{declared[0]:g}F + {declared[1]:g}B / {spent[0]:.1f}F + {spent[1]:.1f}B"


def training_table(rows: list[RowRuns], reward: str, training: str, held_out: str) -> list[str]:
    lines = [
        "| method | paper | lines | passes per image: declared / spent | reward | training scorer | held-out scorer "
        "| images | updates | seconds | stop |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for runs in sorted(rows, key=lambda s: -np.mean(s.gains(training))):
        paper, lines_of_code = facts(runs.row)
        stops = {r.stop for r in runs.records}
        flags = "".join(" **hack**" for r in runs.records if r.flags.hack)
        lines.append(
            f"| {runs.label} | {paper} | {lines_of_code} | {passes(runs.row, runs)} | {cell(runs.gains(reward))} "
            f"| {cell(runs.gains(training))} | {cell(runs.gains(held_out))}{flags} "
            f"| {runs.spent('images'):,.0f} | {runs.spent('updates'):,.0f} "
            f"| {runs.spent('seconds'):,.0f} | {'; '.join(sorted(stops))} |"
        )
    return lines


def equal_table(rows: list[RowRuns], training: str) -> list[str]:
    """The training scorer's gain at an equal spend in each currency: the least that any of these methods spent."""
    trained = [s for s in rows if (s.folders[0] / "curve.parquet").is_file() and s.records[0].spent["updates"]]
    currencies = ("nfe", "images", "updates", "seconds")
    least = {c: min(r.spent[c] for s in trained for r in s.records) for c in currencies}
    heads = " | ".join(f"{least[c]:,.0f} {c}" for c in currencies)
    lines = [f"| method | {heads} |", "|---" * (len(currencies) + 1) + "|"]
    for runs in sorted(trained, key=lambda s: -np.mean(s.gains(training))):
        gains = " | ".join(cell(runs.gains_at(training, c, least[c])) for c in currencies)
        lines.append(f"| {runs.label} | {gains} |")
    return lines


def claim_table(rows: list[RowRuns], training: str, held_out: str) -> list[str]:
    base = next(s for s in rows if s.row.label == "GPO")
    lines = ["| what learns | training scorer | held-out scorer | against GPO |", "|---|---|---|---|"]
    for runs in rows:
        against = [a - b for a, b in zip(runs.gains(training), base.gains(training), strict=False)]
        lines.append(
            f"| {runs.label} | {cell(runs.gains(training))} | {cell(runs.gains(held_out))} "
            f"| {'' if runs is base else cell(against)} |"
        )
    return lines


def plot_gains(path: Path, rows: list[RowRuns], training: str, held_out: str) -> None:
    """Plot the gain on the training and on the held-out scorer against nfe: the mean of the seeds and their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), dpi=120, sharey=True)
    trained = [runs for runs in rows if runs.records[0].spent["updates"]]
    styles = row_styles({runs.row.label: runs.row.method for runs in rows})
    for axis, key, title in zip(axes, (training, held_out), ("trained on", "held out"), strict=True):
        for runs in trained:
            style = styles[runs.row.label]
            grid = np.linspace(0, min(r.spent["nfe"] for r in runs.records), 21)
            gains = np.array([[100 * g.mean() for g in runs.gains_at(key, "nfe", x)] for x in grid])
            line = {"color": style.light, "linestyle": style.dash, "linewidth": 1.6}
            axis.plot(grid / 1000, gains.mean(1), label=runs.row.label, **line)
            axis.fill_between(grid / 1000, gains.min(1), gains.max(1), color=style.light, alpha=0.12, linewidth=0)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_title(f"{key}, {title}", fontsize=10)
        axis.set_xlabel("spent, thousand nfe")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("points above the base, validation")
    axes[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def _words(budget: dict[str, object]) -> str:
    bounds = ", ".join(f"{value:,.0f} {key}" for key, value in budget.items() if key != "name")
    return f"`{budget['name']}` ({bounds})" if budget["name"] and "=" not in str(budget["name"]) else bounds


def table(seeds: int, budget: str, out: Path, docs: Path, metric: str) -> None:
    methods, claim = read(METHODS, seeds, budget, out), read(CLAIM, seeds, budget, out)
    first = methods[0].records[0]
    names = {use.role: name for name, use in reversed(first.scorers.items())}
    training, held_out = f"{names['training']}/{metric}", f"{names['held-out']}/{metric}"
    reward = f"{names['training']}/{registry.scorer(first.config['reward']).metrics[0]}"
    plot_gains(docs / "methods.png", methods, training, held_out)
    if claim:
        plot_gains(docs / "near-ties.png", claim, training, held_out)
    p, prompts = first.provenance, first.delta[training].n
    notes = docs / "methods.notes.md"
    parts = [
        "# The methods, compared",
        "",
        f"Made by `python benchmarks/methods.py run` and `python benchmarks/methods.py table`: task {TASK}, model {MODEL}, "
        f"{max(len(s.folders) for s in methods)} seeds, budget {_words(first.config['budget'])}, commit "
        f"{(p['revision'] or 'unknown')[:12]}, {p['machine']}, torch {p['versions']['torch']}.",
        "",
        f"Points are hundredths of `{metric}`, the share of images whose text is the word asked for, gained over the base on {prompts} "
        f"validation prompts x {IMAGES} images, paired on the same noise; 95 % intervals over seeds and prompts together (two-level "
        f"bootstrap). `reward` is {reward}, what the methods train on, in hundredths too; {held_out} is of a held-out scorer that no "
        f"method trains on. Base: {100 * first.before[reward].mean:.1f}, {100 * first.before[training].mean:.1f} and "
        f"{100 * first.before[held_out].mean:.1f}.",
        "",
        "## At equal nfe",
        "",
        *training_table(methods, reward, training, held_out),
        "",
        "Passes: forwards F and backwards B of one latent per generated image, as `cost()` declares them when every group is "
        "informative, and as metered: groups of equal rewards are not trained on. Seconds are of runs that shared the "
        "machine with others. best-of-n is chosen by the training scorer itself, so only its held-out column tells what it gains.",
        "",
        "![gain against spend](methods.png)",
        "",
        "## At equal spend in every currency",
        "",
        f"The gain of {training}, interpolated between eval points, where each method had spent as much as the method "
        "with the lowest final spend.",
        "",
        *equal_table(methods, training),
        "",
    ]
    if claim:
        parts += [
            "## Do near-tie pairs hurt?",
            "",
            f"What GPO's abstract says (arXiv 2505.11070), with one learning rate, t_min and beta for all rows, and one spend: "
            f"{_words(claim[0].records[0].config['budget'])} each, {max(len(s.folders) for s in claim)} seeds, "
            f"{claim[0].records[0].provenance['machine']}.",
            "",
            *claim_table(claim, training, held_out),
            "",
            "![near ties](near-ties.png)",
            "",
        ]
    if notes.is_file():
        parts += [notes.read_text("utf-8").strip(), ""]
    (docs / "methods.md").write_text("\n".join(parts), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", default="tiny")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--docs", type=Path, default=REPO / "docs")
    parser.add_argument("--metric", default="exact")
    parser.add_argument("--rows", default="all", choices=("all", "methods", "claim"))
    parser.add_argument("--only", default="", help="labels or methods, by comma")
    options = parser.parse_args()
    if options.what == "table":
        table(options.seeds, options.budget, options.out, options.docs, options.metric)
        return
    wanted = set(filter(None, options.only.split(",")))
    rows = {"all": [*METHODS, *CLAIM], "methods": METHODS, "claim": CLAIM}[options.rows]
    rows = [r for r in rows if not wanted or {r.label, r.method} & wanted]
    sys.exit(1 if run(rows, options.seeds, options.budget, options.out, options.jobs) else 0)


if __name__ == "__main__":
    main()
