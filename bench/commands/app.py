"""The command line: registers every command and turns errors into exit codes."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from .. import registry
from ..errors import STOPPED, USER_ERROR, Interrupted, UserError
from ..signals import AtOnce, raise_at_once
from ..text import printable

# Nothing heavy is imported here or at the top of a command's file: `gpobench --help` and `gpobench list` answer without torch.
from . import (
    check,
    compare,
    describe,
    doctor,
    eval,
    fetch,
    new,
    pairs,
    pretrain,
    run,
    score,
    serve_scorer,
    tune,
    verify,
)
from .console import discard_stderr

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="The referee of text-to-image post-training: any method, one budget, an interval on every number.",
    epilog="Start here: `gpobench run --method gpo --task ocr --model tiny`",
)
TRAIN, JUDGE, TABLES, PARTS, DATA = (
    "Train and compare",
    "Score and verify",
    "Tables and reports",
    "Parts and machine",
    "Data and weights",
)
app.command("run", epilog=run.EPILOG, rich_help_panel=TRAIN)(run.run)
app.command("compare", epilog=compare.EPILOG, rich_help_panel=TRAIN)(compare.compare)
app.command("tune", epilog=tune.EPILOG, rich_help_panel=TRAIN)(tune.tune)
app.command("eval", epilog=eval.EPILOG, rich_help_panel=JUDGE)(eval.eval)
app.command("score", epilog=score.EPILOG, rich_help_panel=JUDGE)(score.score)
app.command("verify", epilog=verify.EPILOG, rich_help_panel=JUDGE)(verify.verify)
app.command("serve-scorer", epilog=serve_scorer.EPILOG, rich_help_panel=JUDGE)(serve_scorer.serve_scorer)
app.command("list", rich_help_panel=PARTS)(describe.list_)
app.command("show", epilog=describe.SHOW_EPILOG, rich_help_panel=PARTS)(describe.show)
app.add_typer(new.new, name="new", rich_help_panel=PARTS)
app.command("check", epilog=check.EPILOG, rich_help_panel=PARTS)(check.check)
app.command("doctor", epilog=doctor.EPILOG, rich_help_panel=PARTS)(doctor.doctor)
app.command("fetch", epilog=fetch.EPILOG, rich_help_panel=DATA)(fetch.fetch)
app.command("pairs", epilog=pairs.EPILOG, rich_help_panel=DATA)(pairs.pairs)
app.command("pretrain", epilog=pretrain.EPILOG, rich_help_panel=DATA)(pretrain.pretrain)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed_version

        print(f"gpobench {installed_version('gpobench')}")
        raise typer.Exit


def _add_plugin_commands() -> None:
    """Add the commands of the petals and of other packages from entry points; one that cannot be loaded is reported and left out."""
    for name in registry.entries("command"):
        try:
            app.command(name, rich_help_panel=TABLES)(registry.load("command", name))
        except UserError as error:
            _print_error(str(error))


def main() -> None:
    """Run the console script; a user error is one line on stderr and exit code 2, an interrupt exit code 130."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make a shared machine ten times slower
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # their notes on optional parts would hide ours
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # An ASCII terminal shows ? for other characters instead of ending the run.
            stream.reconfigure(errors="replace")
    try:
        raise_at_once()
        _add_plugin_commands()
        app(standalone_mode=True)
    except UserError as error:
        _print_error(str(error))
        raise SystemExit(USER_ERROR) from None
    except (KeyboardInterrupt, AtOnce):
        _print_error("stopped; the same command goes on from the last checkpoint")
        raise SystemExit(STOPPED) from None
    except Interrupted as stop:
        _print_error(str(stop))
        raise SystemExit(STOPPED) from None


def _print_error(text: str) -> None:
    """Print one line on stderr, also where its reader is gone."""
    try:
        print(f"gpobench: {printable(text)}", file=sys.stderr, flush=True)
    except OSError:
        discard_stderr()


if __name__ == "__main__":  # what `accelerate launch -m gpobench.bench.commands.app` starts
    main()
