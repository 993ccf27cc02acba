"""The command line: what a person types, and the tables and progress that answer."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import registry
from ..errors import Interrupted, UserError
from ..signals import AtOnce, asked_to_stop

if TYPE_CHECKING:
    from ..evaluation.record import Record
    from ..scoring.references import ScorerReference

# Nothing heavy above this line: `gpobench --help` and `gpobench list` answer without torch.

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="The referee of text-to-image post-training: any method, one budget, an interval on every number.",
    epilog="Start here: `gpobench run --method gpo --task ocr --model tiny`",
)

MethodName = Annotated[str, typer.Option("--method", help="A method's name, or path/to/file.py:Name.")]
TaskName = Annotated[str, typer.Option("--task", help="A task's name, or path/to/file.py:Name.")]
ModelName = Annotated[str, typer.Option("--model", help="A model's name, or a local folder in diffusers format.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; all else goes to stderr.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, e.g. beta=50, optim.lr=1e-4, adapter.rank=16; repeatable.")
]
ScorerLocations = Annotated[
    list[str] | None,
    typer.Option("--scorer-at", help="NAME=URL of a scorer that `gpobench serve-scorer` serves elsewhere; repeatable."),
]


@app.command(
    epilog="Examples: `gpobench run --method gpo --task ocr --model tiny --seed 1` · `gpobench run ... --set link=pairwise "
    "--budget nfe=50000` · `gpobench run ... --dry-run`"
)
def run(
    method: MethodName,
    task: TaskName,
    model: ModelName,
    seed: Annotated[int, typer.Option(help="Of the training; the evaluation noise has its own.")] = 0,
    budget: Annotated[
        str | None, typer.Option(help="A budget's name, a TOML file, or nfe=200000,seconds=600; default: the model's.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="The scorer to train on, or a blend: 'pickscore*0.5+rapidocr'; default: the task's, held out otherwise."
        ),
    ] = None,
    sets: Sets = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file of settings; --set wins over it.")] = None,
    scorer_at: ScorerLocations = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="Train on FILE's prompts (txt, jsonl, csv); SPLIT=FILE for another split; repeatable."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where run directories are made.")] = Path("runs"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier start of this run left.")] = False,
    track: Annotated[
        str | None, typer.Option(help="Also log to tensorboard, wandb ... (accelerate's trackers).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and what it will take, and stop.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="Of --dry-run: the GPU whose hours are estimated (h200, a100, rtx4090 ...).")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Train one method under a budget and judge the model before and after.

    The same command goes on where it was cut off, and shows the result when it is done.
    """
    _names(method=method, task=task, model=model)
    if reward:
        _scorer_reference(reward)
    with _clean_stdout() as answer, _view() as progress, asked_to_stop() as stopped:
        from ..experiments.config import resolve

        plan = resolve(
            method, task, model, seed=seed, budget=budget, reward=reward, config=config, sets=sets or (),
            scorer_locations=scorer_at or (), prompts=prompts or (),
        )  # fmt: skip
        if dry_run:
            from ..experiments.cost_estimate import estimate_cost

            told = estimate_cost(plan, device)
            whole = {**plan.mapping(), "forecast": {key: value for key, value in told.items() if key != "lines"}}
            answer(
                json.dumps(whole, indent=1) if as_json else _mapping(plan.mapping(), out / plan.slug(), told["lines"])
            )
            return
        from ..experiments.run import run as start

        done = start(plan, runs=out, progress=progress, fresh=fresh, track=track, interrupted=stopped)
        answer(done.model_dump_json(indent=1) if as_json else lambda: _result(done))


@app.command(epilog="Example: `gpobench eval --task ocr --model tiny --adapter runs/NAME/adapter --split test`")
def eval(
    task: TaskName,
    model: ModelName,
    adapter: Annotated[Path | None, typer.Option(help="A LoRA folder; without it the base is judged.")] = None,
    split: Annotated[str, typer.Option(help="test | validation | train")] = "test",
    images: Annotated[int | None, typer.Option(min=1, help="Images a prompt; default: the task's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write scores.parquet and samples.png there.")] = None,
    scorer_at: ScorerLocations = None,
    prompts: Annotated[Path | None, typer.Option(help="Your prompts (txt, jsonl, csv) instead of the split's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Judge a base, or a base with an adapter, on a task."""
    _names(task=task, model=model)
    if split not in ("test", "validation", "train"):
        raise registry.unknown("split", split, ("test", "validation", "train"))
    with _clean_stdout() as answer, _view() as progress:
        from ..experiments.run import evaluate_only
        from ..scoring.references import scorer_locations

        done = evaluate_only(
            task, model, adapter=adapter, images=images, split=split, progress=progress, out=out,
            locations=scorer_locations(scorer_at or (), {}), prompts_file=prompts,
        )  # fmt: skip
        answer(json.dumps(_plain(done), indent=1) if as_json else lambda: _scores(done))


@app.command(
    epilog="Examples: `gpobench score pictures --scorer pickscore --prompts prompts.csv` · `gpobench score geneval-images "
    "--scorer geneval:mask2former --task geneval --out scores.csv`"
)
def score(
    folder: Annotated[Path, typer.Argument(help="A folder of images; what layouts it may have: docs/scorers.md.")],
    scorers: Annotated[list[str], typer.Option("--scorer", help="A scorer to apply: a name, or a blend; repeatable.")],
    scorer_at: ScorerLocations = None,
    prompts: Annotated[
        Path | None, typer.Option(help="What was asked for: a table with columns file and prompt, or a line an image.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task whose facts the prompts hold (ocr, geneval ...).")] = None,
    out: Annotated[Path, typer.Option(help="The table to write: .parquet or .csv.")] = Path("scores.parquet"),
    rows: Annotated[int, typer.Option(min=1, help="Images scored at once.")] = 16,
    config: Annotated[Path | None, typer.Option(help="A TOML file whose [scorer.NAME] say where scorers run.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier start left.")] = False,
    as_json: AsJson = False,
) -> None:
    """Score any folder of images with any scorers; the same command goes on where it was cut off."""
    references = [_scorer_reference(text) for text in scorers]
    if task:
        _names(task=task)
    with _clean_stdout() as answer, _view() as progress, asked_to_stop() as stopped:
        from ..experiments.config import scorer_tables
        from ..experiments.score_folder import score_folder
        from ..scoring.references import check_locations, scorer_locations

        check_locations(references, scorer_locations(scorer_at or (), {}))
        locations = scorer_locations(scorer_at or (), scorer_tables(config))
        done = score_folder(
            folder, scorers, locations=locations, prompts=prompts, task=task, out=out, rows=rows, progress=progress, fresh=fresh,
            interrupted=stopped,
        )  # fmt: skip
        answer(json.dumps(_plain(done), indent=1) if as_json else lambda: _scored(done))


@app.command("serve-scorer", epilog="Example: `gpobench serve-scorer geneval:mmdet --port 8500`, then there `gpobench run "
    "... --scorer-at geneval:mmdet=http://127.0.0.1:8500`")  # fmt: skip
def serve_scorer(
    name: Annotated[str, typer.Argument(help="A scorer that `gpobench list` prints, or path/to/file.py:Name.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and prints it.")] = 8500,
    host: Annotated[str, typer.Option(help="Anything but this machine's own address needs a token.")] = "127.0.0.1",
    token: Annotated[
        str, typer.Option(envvar="GPOBENCH_SCORER_TOKEN", help="What callers must show; best given by the environment.")
    ] = "",
    max_images: Annotated[int, typer.Option(min=1, help="Images a request may hold.")] = 64,
    max_megabytes: Annotated[int, typer.Option(min=1, help="What a request may weigh.")] = 64,
) -> None:
    """Serve a scorer to runs in other environments or on other machines: PNG and JSON over HTTP, nothing pickled."""
    _scorer_reference(name)
    from ..scoring.server import serve

    serve(name, host=host, port=port, token=token, max_images=max_images, max_bytes=max_megabytes * 2**20)


@app.command("list")
def list_() -> None:
    """All methods, tasks, models, scorers, embedders and recipes, built-in and installed."""
    from rich.table import Table

    table = Table("kind", "name", "what it is", box=None, pad_edge=False, header_style="bold")
    for kind in ("method", "task", "model", "scorer", "embedder", "recipe"):
        for name in registry.entries(kind):
            if registry.canonical(kind, name) == name:
                said = _model_line(name) if kind == "model" else registry.caption(kind, name)
                table.add_row(kind, name, said + _also(kind, name))
    _console().print(table)
    _console().print("\nFields, defaults and source of one: [bold]gpobench show NAME[/]", highlight=False)


@app.command(epilog="Example: `gpobench show gpo`")
def show(
    name: Annotated[str, typer.Argument(help="A name that `gpobench list` prints, or path/to/file.py:Name.")],
) -> None:
    """What a part is: its description, fields, defaults, presets and source."""
    kinds = [kind for kind in registry.GROUPS if name in registry.entries(kind)]
    if ".py:" not in name and not kinds:
        raise registry.unknown("name", name, {n for kind in registry.GROUPS for n in registry.entries(kind)})
    for kind in kinds or [_kind(name)]:
        _show(kind, name)


@app.command(epilog="Example: `gpobench pretrain tiny --out my-tiny --seed 1`, then `gpobench run ... --model my-tiny`")
def pretrain(
    recipe: Annotated[str, typer.Argument(help="tiny | reader | tiny-clip | shapes, or path/to/file.py:Name.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    seed: Annotated[int, typer.Option()] = 0,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Make an embedded model again from its recipe; the same command goes on where it was cut off."""
    if ".py:" not in recipe and recipe not in registry.entries("recipe"):
        raise registry.unknown("recipe", recipe, registry.entries("recipe"))
    with _clean_stdout() as answer, _view() as progress:
        from ..experiments.config import build, pairs

        made = build(registry.load("recipe", recipe), pairs(sets or ()))
        facts = made(out, seed=seed, log=_lines(progress))
        answer(json.dumps(_plain(facts), indent=1, default=str))


@app.command(
    epilog="Example: `gpobench pairs --model tiny --task ocr --out pairs`, then `gpobench run --method dpo:offline "
    "--set pairs=pairs --model tiny --task ocr`"
)
def pairs(
    task: TaskName,
    model: ModelName,
    out: Annotated[Path, typer.Option(help="The folder to write pairs.parquet in.")],
    scorer: Annotated[str | None, typer.Option(help="Whose scores decide; default: the task's reward.")] = None,
    prompts: Annotated[int, typer.Option(help="Training prompts, a group of images for each.")] = 64,
    group: Annotated[int, typer.Option(help="Images a prompt.")] = 8,
    choose: Annotated[str, typer.Option(help="extremes | random | all: which pairs of a group.")] = "extremes",
    gap: Annotated[float, typer.Option(help="Scores of a pair differ by more than this.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of prompts, noise, random pairs and the winner's side.")] = 0,
    adapter: Annotated[Path | None, typer.Option(help="A LoRA folder; without it the base makes the images.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a set of preference pairs from a model's images and a scorer, in the columns of Pick-a-Pic."""
    _names(task=task, model=model)
    if scorer:
        _scorer_reference(scorer)
    if choose not in ("extremes", "random", "all"):
        raise registry.unknown("choice", choose, ("extremes", "random", "all"))
    with _clean_stdout() as answer, _view() as progress:
        from ..experiments.make_pairs import make_pairs

        done = make_pairs(
            model, task, out, progress=progress, scorer_name=scorer or "", prompts=prompts, group=group, choose=choose, gap=gap,
            seed=seed, adapter=adapter,
        )  # fmt: skip
        answer(json.dumps(_plain(done), indent=1) if as_json else lambda: _pairs(done))


@app.command(
    epilog="Example: `gpobench tune --method gpo --task ocr --model tiny --trials 8 --jobs 2`, then `gpobench run ... --config "
    "runs/tune/gpo-ocr-tiny/best.toml`"
)
def tune(
    method: MethodName,
    task: TaskName,
    model: ModelName,
    trials: Annotated[int, typer.Option(help="Draws from the method's search space, its preset as the first.")],
    budget: Annotated[str | None, typer.Option(help="Of each trial: a name, a file, or nfe=200000.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws and of every trial's training.")] = 0,
    reward: Annotated[str | None, typer.Option(help="The scorer to train on; default: the task's.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="key=value for every trial; such a key is not drawn; repeatable.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Trials at once, each in a process of its own.")] = 1,
    out: Annotated[Path, typer.Option(help="Where METHOD-TASK-MODEL/ is made.")] = Path("runs/tune"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the draws and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Choose a method's settings on validation prompts, by the same rule and at the same price for every method.

    The same command goes on where it was cut off.
    """
    _names(method=method, task=task, model=model)
    if reward:
        _scorer_reference(reward)
    with _clean_stdout() as answer, _view() as progress, asked_to_stop() as stopped:
        from ..experiments import tune as tuning

        what = tuning.Tuning(method, task, model, trials, seed, budget, reward, sets or ())
        if dry_run:
            drawn = [{"trial": t.number, "settings": t.settings, "loses": t.failed} for t in tuning.plan(what)]
            answer(json.dumps(drawn, indent=1) if as_json else lambda: _trials(drawn, None))
            return
        done = tuning.tune(what, out=out, progress=progress, jobs=jobs, interrupted=stopped)
        answer(json.dumps(done, indent=1) if as_json else lambda: _tuned(done))


@app.command(
    epilog="Examples: `gpobench compare --methods gpo,dpo,grpo --task ocr --model tiny` · `gpobench compare ... --set gpo/beta=50 "
    "--jobs 2` · on any scheduler: `gpobench compare ... --print | xargs -d '\\n' -P 4 -I{} sh -c '{}'`"
)
def compare(
    methods: Annotated[list[str], typer.Option("--methods", help="Methods, with commas between; repeatable.")],
    tasks: Annotated[list[str], typer.Option("--task", help="One task, or several with commas between; repeatable.")],
    model: ModelName,
    seeds: Annotated[str, typer.Option(help="So many training seeds, from 0 on; or these: 0,4,7.")] = "3",
    budget: Annotated[
        str | None, typer.Option(help="Of each run: a name, a TOML file, or nfe=200000; default: the model's.")
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="The scorer to train on, or a blend; default: each task's.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value for all; METHOD/key=value for one, e.g. gpo/beta=50; repeatable."),
    ] = None,
    configs: Annotated[
        list[str] | None,
        typer.Option(
            "--config", help="A TOML file of settings for all; METHOD=FILE instead of it for one; repeatable."
        ),
    ] = None,
    scorer_at: ScorerLocations = None,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="sft and best-of-n too, which any method must beat.")
    ] = True,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once; more than one in processes of their own.")] = 1,
    out: Annotated[Path, typer.Option(help="Where run directories are made.")] = Path("runs"),
    print_: Annotated[bool, typer.Option("--print", help="Print each run's command, one a line, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run several methods, tasks and seeds under one budget; exit code 1 when a run failed twice.

    The same command goes on where it was cut off, and does nothing twice.
    """
    from ..experiments import compare as comparing

    grid_methods, grid_tasks = comparing.split(methods), comparing.split(tasks)
    for name in grid_methods:
        _names(method=name)
    for name in grid_tasks:
        _names(task=name)
    _names(model=model)
    if reward:
        _scorer_reference(reward)
    with _clean_stdout() as answer, _view() as progress, asked_to_stop() as stopped:
        grid = comparing.Grid(
            grid_methods, grid_tasks, model, comparing.seeds(seeds), budget, reward, sets or (), configs or (),
            scorer_at or (), baselines,
        )  # fmt: skip
        if print_:
            answer("\n".join(comparing.commands(grid, out)))
            return
        done = comparing.compare(grid, out=out, progress=progress, jobs=jobs, interrupted=stopped)
        answer(json.dumps(done, indent=1) if as_json else lambda: _compared(done))
    if done["failed"]:
        raise typer.Exit(1)


@app.command(epilog="Examples: `gpobench check --method gpo` · `gpobench check --method mine.py:Mine --set group=8`")
def check(
    method: MethodName,
    sets: Sets = None,
    model: Annotated[
        str,
        typer.Option(
            help="The families to try: sd3 | sd15 | flux | sdxl | both (the first two) | all, which takes nearly twice as long."
        ),
    ] = "both",
    as_json: AsJson = False,
) -> None:
    """Try the laws that every method must keep, on two miniature models or four, offline; exit code 1 when one is broken."""
    _names(method=method)
    valid = ("sd3", "sd15", "flux", "sdxl", "both", "all")
    if model not in valid:
        raise registry.unknown("family", model, valid)
    with _clean_stdout() as answer, _view() as progress:
        from ..conformance.check import ALL, FAMILIES
        from ..conformance.check import check as laws

        progress.phase(f"the laws on {method}", 0)
        families = {"both": FAMILIES, "all": ALL}.get(model, (model,))
        verdicts = laws(method, sets=sets or (), families=families, say=progress.about)
        plain = [{**vars(verdict), "broken": verdict.broken} for verdict in verdicts]
        answer(json.dumps({"method": method, "laws": plain}, indent=1) if as_json else lambda: _verdicts(plain))
    if any(verdict.broken for verdict in verdicts):
        raise typer.Exit(1)


@app.command(
    epilog="Examples: `gpobench fetch --task ocr --model sd35m` · `gpobench fetch --task ocr --model sd35m --to usb-stick`, "
    "then on the machine without network `gpobench fetch --from usb-stick`"
)
def fetch(
    task: Annotated[str | None, typer.Option(help="A task: its prompts, and the weights of all its scorers.")] = None,
    model: Annotated[str | None, typer.Option(help="A model: the files that diffusers loads, no others.")] = None,
    scorers: Annotated[
        list[str] | None, typer.Option("--scorer", help="A further scorer, NAME or NAME:VARIANT; repeatable.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="Also copy everything into this folder, with its hashes.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="Check a folder that --to wrote, and install all of it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring all that a run needs, and check every file by its hash; then HF_HUB_OFFLINE=1 is enough.

    What stands on no hub comes from its publisher: AlexNet for lpips, the checkpoint of geneval:mmdet, and, where --scorer
    geneval:yolo asks for it, YOLO's pickle. What was fetched before is only checked; other bytes under the same commit, or at the
    same address, are refused.
    """
    _names(**{kind: name for kind, name in (("task", task), ("model", model)) if name})
    for name in scorers or ():
        _scorer_reference(name)
    with _clean_stdout() as answer, _view() as progress:
        from .fetch import fetch as bring

        done = bring(task, model, to=to, source=source, progress=progress, scorers=scorers or ())
        answer(json.dumps(_plain(done), indent=1) if as_json else lambda: _fetched(done))


@app.command(epilog="Examples: `gpobench doctor` · `gpobench doctor --task ocr --model sd35m --deep`")
def doctor(
    task: Annotated[str | None, typer.Option(help="A task: its prompts and scorers are examined.")] = None,
    model: Annotated[str | None, typer.Option(help="A model: its weights, licence and memory are examined.")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also load scorers of more than 1 GB and test them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Examine packages, device, disk, weights, prompts and scorers before a run; exit code 1 where one would fail.

    Nothing is fetched. Without a task or a model: the package, the embedded model and the built-in scorers.
    """
    _names(**{kind: name for kind, name in (("task", task), ("model", model)) if name})
    with _clean_stdout() as answer, _view() as progress:
        from dataclasses import asdict

        from .doctor import broken
        from .doctor import doctor as examine

        checks = examine(task, model, progress=progress, deep=deep)
        told = {"broken": broken(checks), "checks": [asdict(check) for check in checks]}
        answer(json.dumps(told, indent=1) if as_json else lambda: _examined(checks))
    if broken(checks):
        raise typer.Exit(1)


new = typer.Typer(no_args_is_help=True, help="Begin a part of your own from a template that works.")
app.add_typer(new, name="new")


@new.command("method", epilog="Example: `gpobench new method my-method --out methods`")
def new_method(
    name: Annotated[str, typer.Argument(help="Lower-case words with dashes between: my-method.")],
    out: Annotated[Path, typer.Option(help="The folder to write in.")] = Path("."),
) -> None:
    """Write a method that works, and its presets, to change from there."""
    from .scaffold import new_method as write

    file, kind = write(name, out)
    print(f"wrote {file} and {file.with_suffix('.toml')}; next:")
    print(f"  gpobench check --method {file}:{kind}")
    print(f"  gpobench run --method {file}:{kind} --task ocr --model tiny")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as of

        print(f"gpobench {of('gpobench')}")
        raise typer.Exit


def _further_commands() -> None:
    """Commands of the petals and of other packages, by entry points; one that cannot be loaded is said and left out."""
    for name in registry.entries("command"):
        try:
            app.command(name)(registry.load("command", name))
        except UserError as error:
            print(f"gpobench: {error}", file=sys.stderr)


def main() -> None:
    """The console script: user errors are one line on stderr and exit code 2, a stop asked for is 130."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow a shared machine tenfold
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # their notes on optional parts would bury ours
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="replace"
            )  # an ASCII terminal shows ? for what it does not know, and the run is told of
    try:
        _further_commands()
        app(standalone_mode=True)
    except UserError as error:
        _last_words(str(error))
        raise SystemExit(2) from None
    except (KeyboardInterrupt, AtOnce):
        _last_words("stopped; the same command goes on from the last checkpoint")
        raise SystemExit(130) from None
    except Interrupted as stop:
        _last_words(str(stop))
        raise SystemExit(130) from None


def _last_words(text: str) -> None:
    try:
        print(f"gpobench: {text}", file=sys.stderr, flush=True)
    except OSError:
        _into_nothing()


def _into_nothing() -> None:
    """What reads stderr is gone, as `| tee` at a Ctrl-C; work goes on and is saved."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)


def _names(**names: str) -> None:
    """Refuse a mistyped name before anything heavy is imported."""
    for kind, name in names.items():
        known = registry.entries(kind)
        name = registry.split_variant(name)[0] if kind == "method" else name
        if name not in known and ".py:" not in name and not (kind == "model" and Path(name).is_dir()):
            raise registry.unknown(kind, name, known)


def _scorer_reference(text: str) -> ScorerReference:
    """Parse a scorer's reference and refuse a mistyped name; the scorers of a blend are checked when it is opened."""
    from ..scoring.references import ScorerReference

    reference = ScorerReference.parse(text)
    if not reference.terms:
        reference.check_registered()
    return reference


@contextlib.contextmanager
def _clean_stdout() -> Generator[Callable[[Any], None]]:
    """stdout belongs to the answer: whatever a library prints meanwhile goes to stderr."""
    answers: list[Any] = []
    with contextlib.redirect_stdout(sys.stderr):
        yield (
            answers.append if os.environ.get("RANK", "0") == "0" else lambda _: None
        )  # of several processes one speaks
    for given in answers:
        if callable(given):
            given()
        else:
            print(given)


def _also(kind: str, name: str) -> str:
    """The other names of a part, and the variants of a method."""
    from ..experiments.config import variants

    parts = [f"alias {alias}" for alias in registry.aliases(kind, name)]
    parts += [f"{name}:{variant}" for variant in (variants(name) if kind == "method" else ())]
    return f" [{', '.join(parts)}]".replace("[", "\\[") if parts else ""


def _model_line(name: str) -> str:
    from ..model_spec import find_model_spec

    model_spec = find_model_spec(name)
    licence = model_spec.licence.replace("[", "\\[")  # no markup
    return f"{model_spec.pipeline}, {model_spec.width}x{model_spec.height}, prompts of the domain {model_spec.domain}; {licence}"


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    class Steady(Console):
        def on_broken_pipe(self) -> None:  # it would end the process
            _into_nothing()

    return Steady(stderr=True) if stderr else Console()


class _Terminal:
    """A view as one live line on stderr; plain lines where stderr is no terminal."""

    def __init__(self, progress: Any):
        self._progress, self._task, self._said = progress, None, -1
        self._live = progress.console.is_terminal

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def phase(self, name: str, total: float) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=total, note="")
        if not self._live:
            self.say(name)

    def advance(self, by: float) -> None:
        if self._task is not None:
            self._progress.advance(self._task, by)

    def about(self, text: str) -> None:
        """What the phase is busy with, of which nobody knows how long it takes."""
        if self._task is not None:
            self._progress.update(self._task, total=None, note=text)

    def status(self, fraction: float, numbers: Mapping[str, float]) -> None:
        reward = numbers.get("reward/mean", float("nan"))
        note = f"reward {reward:.3f} · {numbers['spent/updates']:.0f} updates · {numbers['spent/images']:,.0f} images"
        if numbers.get("reward/errors"):
            note += f" · {numbers['reward/errors']:.0f} not scored"
        self._progress.update(self._task, completed=fraction, note=note)
        if not self._live and int(fraction * 20) > self._said:
            self._said = int(fraction * 20)
            self.say(f"  {100 * fraction:3.0f} %  {note} · {numbers['spent/seconds']:.0f} s")


@contextlib.contextmanager
def _view() -> Generator[_Terminal]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = _console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Terminal(progress)


def _lines(progress: _Terminal) -> Callable[[Mapping[str, Any]], None]:
    def log(facts: Mapping[str, Any]) -> None:
        progress.say("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()))

    return log


def _mapping(mapping: Mapping[str, Any], run_dir: Path, forecast: Sequence[str]) -> Callable[[], None]:
    def show() -> None:
        console = _console()
        for line in _flat(mapping):
            console.print(line, highlight=False, markup=False)
        console.print()
        for line in forecast:
            console.print(line, highlight=False, markup=False)
        console.print(f"would run in {run_dir}", highlight=False, markup=False, soft_wrap=True)

    return show


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {json.dumps(value)}"


def _result(r: Record) -> None:
    console = _console()
    console.print(f"\n[bold]{r.method}[/] on {r.task}, {r.model}, seed {r.seed}: ended by {r.stop}", highlight=False)
    roomy = max(len(key + _mark(r, key)) for key in r.delta) <= 17
    table, above = _numbers("scorer"), ""
    for key, d in r.delta.items():
        scorer, _, metric = key.partition("/")
        if not roomy and scorer != above:  # a long name stands on a line of its own
            console.print(table)
            console.print(scorer + _mark(r, key), style="bold", highlight=False)
            table, above = _numbers(), scorer
        name = key + _mark(r, key) if roomy else f"  {metric}"
        table.add_row(name, _cell(r.before[key]), _cell(r.after[key]), _cell(d, sign=True), _p(d.p))
    console.print(table)
    n, split = max(d.n for d in r.delta.values()), r.config["evaluation"].get("split", "test")
    console.print(
        f"means over {n} {split} prompts with 95 % intervals; differences paired by\n"
        "prompt on the same noise; * held out, + a further one: never trained on;\n"
        "' quality, diversity and drift: what the rise has cost",
        style="dim",
        highlight=False,
    )
    if r.strata:
        console.print()
        console.print(_strata(r))
    for name, number in r.cmmd.items():
        console.print(f"drift from the base by CMMD ({name}): {_cell(number)}", highlight=False)
    if r.flags.hack:
        console.print(
            "HACK FLAG: the training scorer rose; the held-out ones did not, or a quality column fell", style="bold red"
        )
    if r.flags.invalid:
        console.print("INVALID: more than 0.5 % of the images could not be scored", style="bold red")
    spent = " · ".join(
        f"{key} {value:,.0f}" if key != "flops" else f"{key} {value:.2e}" for key, value in r.spent.items()
    )
    roles = ", ".join(f"{role} {nfe:,}" for role, nfe in r.nfe_by_role.items())
    errors = sum(s.errors for s in r.scorers.values())
    console.print(f"spent: {spent}\nnfe by role: {roles} · images not scored: {errors}", highlight=False)
    for failure in dict.fromkeys(r.failures[-3:]):
        console.print(f"  {failure}", highlight=False, markup=False)
    adapter = "adapter/, " if Path(r.run_dir, "adapter").is_dir() else ""  # a search trains none
    console.print(
        f"see {r.run_dir}/: samples/pairs.png, curve.png, {adapter}record.json", highlight=False, soft_wrap=True
    )


def _fetched(done: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table("repository", "commit", "files", "MB", box=None, pad_edge=False, header_style="bold")
    for one in done["repositories"]:
        size = f"{one['bytes'] / 2**20:,.1f}" if "bytes" in one else ""
        table.add_row(one["repository"], one["commit"][:8] or "your own", str(one["files"]), size)
    console = _console()
    if done["repositories"]:
        console.print(table)
    for one in done["prompts"]:
        console.print(f"prompts {one if isinstance(one, str) else one['path']}", highlight=False, markup=False)
    for one in done.get("left_out", ()):
        console.print(f"without {one['name']}: {one['why']}", highlight=False, markup=False)
    where = (
        f"installed in {done['store']}" if "store" in done else f"also copied to {done['to']}" if done["to"] else "here"
    )
    console.print(f"{done['bytes'] / 2**20:,.1f} MB, every hash checked, {where}", highlight=False, markup=False)


def _examined(checks: Sequence[Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from .doctor import remedies, rows

    colours = {"ok": "green", "warning": "yellow", "missing": "yellow", "broken": "red"}
    table = Table("what", "verdict", "detail", box=None, pad_edge=False, header_style="bold")
    for name, verdict, detail in rows(checks):
        table.add_row(Text(name), Text(verdict, colours[verdict]), Text(detail, overflow="fold"))
    console = _console()
    console.print(table)
    for line in remedies(checks):
        console.print(f"-> {line}", highlight=False, markup=False)


def _compared(done: Mapping[str, Any]) -> None:
    """A table a task, one line a run: what it changed by a held-out scorer and by its own; below, why some failed."""
    from rich.table import Table

    from ..evaluation.record import Difference

    console, rows = _console(), done["runs"]
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        keys = next(((r["key"], r["training_key"]) for r in mine if "key" in r), ("held out", "trained on"))
        heads = ["method", "seed", "state", f"{keys[0]} *", keys[1]]
        table = Table(*heads, box=None, pad_edge=False, header_style="bold")
        for row in mine:
            cells = [_cell(Difference(**row[k]), sign=True) if k in row else "" for k in ("delta", "training_delta")]
            flags = [flag for flag in ("hack", "invalid") if row.get("flags", {}).get(flag)]
            table.add_row(_leaf(row["method"]), str(row["seed"]), ", ".join([row["state"], *flags]), *cells)
        console.print(f"\n[bold]{_leaf(task)}[/], {done['model']}", highlight=False)
        console.print(table, markup=False)
    console.print(
        "after minus before with 95 % intervals, one training seed each; * held out: never trained on",
        style="dim",
        highlight=False,
    )
    for row in rows:
        if row["reason"]:
            text = f"FAILED {_leaf(row['method'])} on {_leaf(row['task'])}, seed {row['seed']}: {row['reason']}"
            console.print(text, style="bold red", markup=False, highlight=False)
    spent = " · ".join(f"{key} {value:,.0f}" for key, value in done["spent"].items() if key != "flops")
    told = [f"spent by all of them: {spent}", f"see {done['path']}"]
    tasks = list(dict.fromkeys(row["task"] for row in rows if row["state"] == "done"))
    told += [  # by this file: the folder may hold runs of other budgets
        f"to rank them: gpobench leaderboard {done['path']}"
        + (f" --task {shlex.quote(task)}" if len(tasks) > 1 else "")
        for task in tasks
    ]
    console.print("\n".join(told), highlight=False, markup=False, soft_wrap=True)


def _leaf(reference: str) -> str:
    """What a part behind path/to/file.py:Name is called in a table."""
    return Path(reference).name if ".py:" in reference else reference


def _numbers(title: str = "") -> Any:
    """A table of name, before, after, difference and p that fits into 80 columns, with a head where it has a title."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True, show_header=bool(title), header_style="bold")
    for name, width in ((title, 17), ("before", 18), ("after", 18), ("difference", 18), ("p", 5)):
        table.add_column(name, width=width, no_wrap=True)
    return table


def _mark(r: Record, key: str) -> str:
    """How a row of the table is marked: by the role of its scorer."""
    scorer = r.scorers.get(key.partition("/")[0])  # none: diversity and drift
    return {"training": "", "held-out": " *", "further": " +", "quality": " '"}[scorer.role if scorer else "quality"]


def _strata(r: Record) -> Any:
    """The training scorer's number by stratum."""
    name = next(name for name, scorer in r.scorers.items() if scorer.role == "training")
    keys = [key for key in r.delta if key.startswith(f"{name}/")]
    key = next((key for key in keys if key.endswith(("/exact", "/correct"))), keys[0])
    table = _numbers("by stratum")
    for stratum, numbers in r.strata.items():
        d = numbers.delta[key]
        table.add_row(stratum, _cell(numbers.before[key]), _cell(numbers.after[key]), _cell(d, sign=True), _p(d.p))
    return table


def _scored(done: Mapping[str, Any]) -> None:
    """What `gpobench score` found."""
    from rich.table import Table

    table = Table("scorer", "mean", "95 % interval", "images", "failed", box=None, pad_edge=False, header_style="bold")
    for key, number in done["scores"].items():
        mean = f"{number['mean']:.4g}" if _known(number["mean"]) else "not scored"
        ends = ", ".join(f"{end:.4g}" for end in number["ci"] if _known(end))
        table.add_row(key, mean, f"[{ends}]" if ends else "", f"{number['images']:,}", f"{number['failed']:,}")
    console = _console()
    console.print(table, markup=False)
    for name, value in done["summary"].items():
        console.print(f"{name} {value:.4g}", highlight=False, markup=False)
    for line in done["notes"]:
        console.print(line, highlight=False, markup=False)
    if done["invalid"]:
        console.print("INVALID: more than 0.5 % of the images could not be scored", style="bold red")
    console.print(f"see {done['path']}", highlight=False, markup=False, soft_wrap=True)


def _cell(n: Any, sign: bool = False) -> str:
    """.450 [.41, .49] or 21.45 [21.4, 21.5]: five columns of these fit into 80 characters."""
    if not _known(n.mean):
        return "not scored"
    plus, digits = "+" if sign else "", 3 if abs(n.mean) < 1 else 2
    mean = _short(f"{n.mean:{plus}.{digits}f}")
    if not all(_known(end) for end in n.ci):
        return f"{mean} [too few]"
    low, high = (_short(f"{end:{plus}.{digits - 1}f}") for end in n.ci)
    return f"{mean} [{low}, {high}]"


def _short(number: str) -> str:
    """-.450 for -0.450; 20.5 stays."""
    sign, digits = (number[0], number[1:]) if number[:1] in "+-" else ("", number)
    return sign + (digits[1:] if digits.startswith("0.") else digits)


def _known(x: float | None) -> bool:
    """A number: null in a record that was read, NaN in one just made, stand for none."""
    return x is not None and math.isfinite(x)


def _plain(value: Any) -> Any:
    """NaN and infinity as null: JSON knows neither."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _p(p: float | None) -> str:
    return "" if p is None or not _known(p) else "<.001" if p < 0.001 else _short(f"{p:.3f}")


def _scores(done: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table("scorer", "mean", "95 % interval", "prompts", "role", box=None, pad_edge=False, header_style="bold")
    for key, number in done["scores"].items():
        scorer = key.partition("/")[0]  # or the embedder whose distances they are
        role = done["scorers"].get(scorer, {"role": scorer.partition("-")[0]})["role"]
        mean = f"{number['mean']:.3f}" if _known(number["mean"]) else "not scored"
        ends = ", ".join(f"{end:.3f}" for end in number["ci"] if _known(end))
        table.add_row(key, mean, f"[{ends}]" if ends else "", str(number["n"]), role)
    _console().print(table, markup=False)


def _pairs(done: Mapping[str, Any]) -> None:
    spent = " · ".join(f"{key} {value:,}" for key, value in done["spent"].items())
    _console().print(
        f"{done['pairs']:,} pairs from {done['groups']:,} groups; {done['flat_groups']:,} groups had no spread, "
        f"{done['not_scored']:,} images were not scored\nspent: {spent}\nsee {done['path']}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    for failure in done["failures"][-3:]:
        _console().print(f"  {failure}", highlight=False, markup=False)


def _trials(trials: Sequence[Mapping[str, Any]], best: int | None) -> None:
    """One line a trial; the chosen one is marked."""
    from rich.table import Table

    keys = list(dict.fromkeys(key for t in trials for key in t["settings"]))
    judged = ["difference", "nfe", "ended by"] if any("gain" in t for t in trials) else []
    table = Table("", "trial", *keys, *judged, "", box=None, pad_edge=False, header_style="bold")
    for t in trials:
        values = [f"{t['settings'][key]}" if key in t["settings"] else "preset" for key in keys]
        if judged and "gain" in t:
            gain = t["gain"]
            ends = [end for end in gain["ci"] if _known(end)]
            low_high = f" [{', '.join(f'{end:+.2f}' for end in ends)}]" if ends else ""
            cell = f"{gain['mean']:+.3f}{low_high}" if _known(gain["mean"]) else "not scored"
            values += [cell, f"{t['spent']['nfe']:,.0f}", t["stop"]]
        elif judged:
            values += ["", "", ""]
        mark = ">" if t["trial"] == best else ""
        table.add_row(mark, str(t["trial"]), *values, t["loses"], style="bold" if mark else None)
    _console().print(table, markup=False)


def _tuned(done: Mapping[str, Any]) -> None:
    _trials(done["trials"], done["best"])
    spent = " · ".join(f"{key} {value:,.0f}" for key, value in done["spent"].items() if key != "flops")
    _console().print(
        f"{done['objective']}, 95 % intervals, one seed\nspent on tuning: {spent}\n"
        f"to use it: --config {done['run_dir']}/best.toml",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> None:
    """One line a law and family; what was broken, and why a law was skipped, below it."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("law", "model", "verdict", "seconds", box=None, pad_edge=False, header_style="bold")
    for v in verdicts:
        word, style = (
            ("BROKEN", "bold red") if v["broken"] else ("warning", "yellow") if not v["ok"] else ("holds", "green")
        )
        word, style = ("skipped", "dim") if v["skipped"] else (word, style)
        table.add_row(v["law"], v["family"], f"[{style}]{word}[/]", f"{v['seconds']:.1f}")
        for line in (v["detail"], v["skipped"]):
            if line:
                table.add_row(f"[dim]  {escape(line)}[/]")
    console = _console()
    console.print(table)
    broken, warned = sum(v["broken"] for v in verdicts), sum(not v["ok"] and not v["broken"] for v in verdicts)
    tail = f", {warned} warning{'s' if warned > 1 else ''}" if warned else ""
    console.print(
        f"\n{len(verdicts)} verdicts, {broken} broken{tail}", highlight=False, style="bold red" if broken else "bold"
    )


def _kind(reference: str) -> str:
    """What `path/to/file.py:Name` is, by what only such a part has."""
    from ..model_spec import ModelSpec

    made = registry.load("method", reference)
    marks = {"method": ("collect", "answer"), "task": ("held_out",), "scorer": ("metrics",), "embedder": ("distance",)}
    known = next((kind for kind, names in marks.items() if any(hasattr(made, name) for name in names)), "part")
    return "model" if isinstance(made, ModelSpec) else known


def _show(kind: str, name: str) -> None:
    import dataclasses
    import inspect

    from rich.table import Table

    from ..experiments.config import preset_path

    console = _console()
    made = registry.load(kind, name)
    source = made if inspect.isclass(made) or inspect.isfunction(made) else type(made)
    module = inspect.getmodule(source)
    console.print(f"[bold]{name}[/] ({kind})", highlight=False)
    if kind != "model" and module:
        console.print(_reflow(inspect.cleandoc(module.__doc__ or "")), highlight=False, markup=False)
    if dataclasses.is_dataclass(made):
        table = Table("field", "default", "meaning", box=None, pad_edge=False, header_style="bold")
        for row in _fields(made() if isinstance(made, type) else made):
            table.add_row(*row)
        console.print()
        console.print(table, markup=False)
    if kind == "method" and (preset := preset_path(name)):
        console.print(f"\npreset {preset}", highlight=False, soft_wrap=True, style="dim")
        console.print(preset.read_text("utf-8").strip(), highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nsource {inspect.getsourcefile(source)}\n", highlight=False, soft_wrap=True, style="dim")


def _reflow(text: str) -> str:
    """Paragraphs as one line each, for the terminal to wrap at its own width; indented lines stay."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and line and lines[-1] and not line.startswith(" ") and not lines[-1].startswith(" "):
            lines[-1] += " " + line
        else:
            lines.append(line)
    return "\n".join(lines)


def _fields(value: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Name, default and the comment behind it, of a dataclass and those inside it."""
    import dataclasses
    import inspect
    import re

    said = dict(re.findall(r"^    (\w+):[^#\n]*?  # (.*)$", inspect.getsource(type(value)), re.MULTILINE))
    for f in dataclasses.fields(value):
        own = getattr(value, f.name)
        if dataclasses.is_dataclass(own):
            yield from _fields(own, f"{prefix}{f.name}.")
        else:
            literal = re.match(r"Literal\[(.*)\]", str(f.type))
            choices = literal[1].replace("'", "").replace('"', "").replace(", ", " | ") if literal else ""
            meaning = ": ".join(part for part in (choices, said.get(f.name, "")) if part)
            yield f"{prefix}{f.name}", str(own), meaning


if __name__ == "__main__":  # what `accelerate launch -m gpobench.bench.commands.app` starts
    main()
