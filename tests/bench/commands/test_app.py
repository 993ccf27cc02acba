"""Command line: JSON on stdout, errors of one line on stderr, exit codes, and imports that stay light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gpobench.bench.errors import NO_RESULT

ISSUE = {"method", "task", "model", "seed", "stop", "before", "after", "delta", "spent", "run_dir"}
HEAVY = ("torch", "diffusers", "transformers", "pandas", "matplotlib", "scipy")


def words(*, method: str = "gpo", task: str, model: Any, **more: Any) -> list[str]:
    argv = ["run", "--method", method, "--task", task, "--model", str(model)]
    for key, value in more.items():
        argv += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return argv


@pytest.fixture
def argv(redness: str, tiny_pipe: Path, tmp_path: Path) -> Any:
    def make(**more: Any) -> list[str]:
        return words(**{"task": f"{redness}:Paint", "model": tiny_pipe, "out": tmp_path, "budget": "nfe=600", **more})

    return make


def fresh(*argv: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, which tells on stderr which heavy modules it came to load."""
    code = (
        f"import sys; from gpobench.bench.commands.app import main; sys.argv = ['gpobench', *{list(argv)!r}]\n"
        f"try: main()\nfinally: print('loaded', [m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_console_script_answers() -> None:
    script = Path(sys.executable).with_name("gpobench")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("gpobench ") and done.stderr == ""


@pytest.mark.parametrize("argv", [["--help"], ["list"], ["run", "--help"]])
def test_a_quick_answer_loads_nothing_heavy(argv: list[str]) -> None:
    done = fresh(*argv)
    assert done.returncode == 0 and done.stdout and done.stderr.strip() == "loaded []"


def test_help_shows_every_command_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = fresh("--help").stdout.partition("Train and compare")[2].splitlines()[1:]
    rows = [row for row in rows if row.startswith("│")]
    assert len(rows) > 15 and not [
        row for row in rows if row.startswith("│  ")
    ]  # where the name is empty, a line goes on


def test_a_typo_is_refused_without_importing_torch() -> None:
    done = fresh(*words(method="gppo", task="ocr", model="tiny"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [done.stderr.splitlines()[0], "loaded []"]


def test_list_names_every_built_in_part() -> None:
    listed = fresh("list").stdout
    for name in ("gpo", "ocr", "tiny", "sd35m", "rapidocr", "reader"):
        assert name in listed
    parts = json.loads(fresh("list", "--json").stdout)["parts"]
    for part in parts:
        assert part["name"] in listed and part["summary"] and set(part) >= {"kind", "aliases", "variants"}
    assert "dpo" in next(part for part in parts if part["name"] == "diffusion-dpo")["aliases"]


def test_show_says_fields_defaults_preset_and_source(gpobench: Any, redness: str) -> None:
    ended = gpobench("show", "gpo")
    assert ended.code == 0
    for text in ("Group Preference Optimization", "optim.minibatches", "logsigmoid", "[tiny]", "gpo.py"):
        assert text in ended.out
    (part,) = json.loads(gpobench("show", "gpo", "--json").out)["parts"]
    assert part["preset"]["tiny"] and Path(part["source"]).name == "gpo.py" and Path(part["preset_file"]).is_file()
    assert {"optim.lr", "group"} <= {field["name"] for field in part["fields"]}
    assert "Redness" in gpobench("show", f"{redness}:Redness").out
    (part,) = json.loads(gpobench("show", f"{redness}:Redness", "--json").out)["parts"]
    assert part["kind"] == "scorer" and part["preset"] is None
    for name, kind in (("Redness", "scorer"), ("Paint", "task")):
        assert f":{name} ({kind})" in gpobench("show", f"{redness}:{name}").out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "gppo"}, "unknown method 'gppo'; did you mean 'gpo'?"),
        ({"task": "orc"}, "unknown task 'orc'; did you mean 'ocr'?"),
        ({"model": "tinny"}, "unknown model 'tinny'; did you mean 'tiny'?"),
        ({"model": "./tinny"}, "--model ./tinny: no such folder"),
        ({"model": "nobody/nothing"}, "no registered model has this source; registered: flux1-dev, "),
        ({"reward": "raeder"}, "unknown scorer 'raeder'; did you mean 'reader'?"),
        ({"budget": "tinny"}, "unknown budget 'tinny'; did you mean 'tiny'?"),
        ({"budget": "nfes=4"}, "unknown currency 'nfes'; did you mean 'nfe'?"),
        ({"budget": "nfe=0"}, "nfe must be a finite number above zero, got 0"),
        ({"budget": "nfe=-3"}, "nfe must be a finite number above zero, got -3"),
        ({"budget": "gone.toml"}, "gone.toml"),
        ({"set": "gruop=4"}, "unknown setting 'gruop'; did you mean 'group'?"),
        ({"set": "lr=1e-4"}, "unknown setting 'lr'; did you mean 'optim.lr'?"),
        ({"set": "group=1"}, "a group needs at least two images to compare, got group=1"),
        ({"set": "group"}, "--set needs key=value, got 'group'"),
        # names of earlier versions
        ({"set": "judging.split=validation"}, "unknown setting 'judging.split'; did you mean 'evaluation.split'?"),
        ({"set": "judging.seed=1"}, "did you mean 'evaluation.seed'?"),
        ({"set": "evaluation.marks=4"}, "evaluation.eval_points"),
        ({"set": "zzz=1"}, "unknown setting 'zzz'; valid: adapter, beta"),
        ({"method": "best-of-n", "set": "link=pairwise"}, "unknown setting 'link'"),
        ({"set": "optim.lr=fast"}, "setting optim.lr"),
        ({"config": "gone.toml"}, "cannot read config gone.toml"),
        ({"seed": "-1"}, "--seed must not be negative"),
        ({"model": "/"}, "no model_index.json"),
        ({"method": "gone.py:Method"}, "no such file: gone.py"),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_two(
    gpobench: Any, argv: Any, change: dict[str, str], said: str
) -> None:
    for more in ({}, {"json": True}):
        ended = gpobench(*argv(**change, **more))
        assert ended.code == 2 and ended.out == ""
        assert said in ended.err and len(ended.err.strip().splitlines()) == 1 and ended.err.startswith("gpobench: ")


@pytest.mark.parametrize(
    ("task", "said"),
    [("Overlapping", "test prompt stands in the train split"), ("Pain", "did you mean 'Paint'")],
)
def test_a_wrong_task_is_one_line(gpobench: Any, argv: Any, redness: str, task: str, said: str) -> None:
    ended = gpobench(*argv(task=f"{redness}:{task}"))
    assert ended.code == 2 and said in ended.err and ended.out == "" and len(ended.err.strip().splitlines()) == 1


def test_other_commands_refuse_as_well(gpobench: Any, redness: str, tiny_pipe: Path, tmp_path: Path) -> None:
    paint, model = f"{redness}:Paint", str(tiny_pipe)
    for command, said in (
        (["show", "gppo"], "did you mean 'gpo'"),
        (["pretrain", "tinny", "--out", "x"], "did you mean 'tiny'"),
        (["eval", "--task", "orc", "--model", model], "did you mean 'ocr'"),
        (["eval", "--task", paint, "--model", model, "--adapter", "gone"], "--adapter gone: no such file or folder"),
        (["eval", "--task", paint, "--model", model, "--split", "tset"], "did you mean 'test'"),
        (["eval", "--task", paint, "--model", model, "--adapter", str(tmp_path)], "no adapter at"),
    ):
        ended = gpobench(*command)
        assert ended.code == 2 and said in ended.err and ended.out == "", command
        assert len(ended.err.strip().splitlines()) == 1, ended.err


def test_numbers_of_images_that_could_not_be_scored_are_printed_and_are_exit_code_three(
    gpobench: Any, redness: str, tiny_pipe: Path, tmp_path: Path
) -> None:
    evaluated = gpobench("eval", "--task", f"{redness}:Unread", "--model", str(tiny_pipe), "--json")
    assert evaluated.code == 3 and json.loads(evaluated.out)["invalid"] and "no result" in evaluated.err
    (tmp_path / "pictures").mkdir()
    for name, content in (("a", None), ("b", b"this is no picture")):
        path = tmp_path / "pictures" / f"{name}.png"
        Image.new("RGB", (8, 8)).save(path) if content is None else path.write_bytes(content)
        path.with_suffix(".txt").write_text("a prompt", "utf-8")
    out = tmp_path / "s.csv"
    scored = gpobench("score", tmp_path / "pictures", "--scorer", f"{redness}:Redness", "--out", out)
    assert scored.code == 3 and "INVALID" in scored.out and "no result" in scored.err and out.is_file()


# Room for what a command prints, and none for its tables.
FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
"""


def test_numbers_whose_table_cannot_be_written_are_printed(
    gpobench: Any, redness: str, tiny_pipe: Path, tmp_path: Path
) -> None:
    words = ["eval", "--task", f"{redness}:Paint", "--model", str(tiny_pipe), "--out", str(tmp_path / "look")]
    evaluated = gpobench(*words, before=FULL_DISK)
    assert evaluated.code == 2 and "redness/mean" in evaluated.out, evaluated.err
    assert f"cannot write {tmp_path / 'look'}: " in evaluated.err and "too large" in evaluated.err
    assert "Traceback" not in evaluated.err
    assert not (tmp_path / "look" / "scores.parquet").exists()
    folder, out = tmp_path / "pictures", tmp_path / "s.csv"
    folder.mkdir()
    for k in range(40):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(folder / f"{k:02}.png")
        (folder / f"{k:02}.txt").write_text(f"prompt {k} " + "x" * 100, "utf-8")
    scored = gpobench("score", folder, "--scorer", f"{redness}:Redness", "--out", out, before=FULL_DISK)
    assert scored.code == 2 and "redness/mean" in scored.out and not out.exists(), scored.err
    assert f"cannot write {out}: File too large" in scored.err
    again = gpobench("score", folder, "--scorer", f"{redness}:Redness", "--out", out)
    assert again.code == 0 and out.is_file()


def test_text_is_printed_as_it_stands_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    """A stratum `[/]`, a metric `[/bold]`, a folder `o [/] x`: to rich they are markup that it cannot close, after all the work."""
    from rich.table import Table

    from gpobench.bench.commands.console import open_console, terminal_progress
    from gpobench.bench.commands.score import print_scores

    console = open_console()
    table = Table("[/] :cat:", box=None)
    table.add_row("[bold]x[/bold] [/i]")
    console.print("o [/] x")
    console.print(table)
    number = {"mean": 1.0, "ci": [0.5, 1.5], "n": 2, "images": 2, "failed": 0}
    notes = ["1 images of [/x]"]
    print_scores(
        {
            "scores": {"s/[/bold]": number},
            "summary": {"[/]": 1.0},
            "notes": notes,
            "invalid": True,
            "path": "o [/] x.csv",
            "not_written": "",
        }
    )
    with terminal_progress() as progress:
        progress.phase("scoring with [/]", 1)
        progress.about("[/bold]")
    printed = capsys.readouterr()
    for text in ("o [/] x", "[/] :cat:", "[bold]x[/bold] [/i]", "s/[/bold]", "[/] 1", notes[0], "see o [/] x.csv"):
        assert text in printed.out
    assert "scoring with [/]" in printed.err


def test_an_option_nobody_knows_is_exit_code_two(gpobench: Any) -> None:
    ended = gpobench("run", "--mehtod", "gpo")
    assert ended.code == 2 and ended.out == "" and "Traceback" not in ended.err


def test_dry_run_shows_everything_and_does_nothing(gpobench: Any, argv: Any, tmp_path: Path) -> None:
    ended = gpobench(*argv(**{"dry-run": True, "set": "optim.lr=0.125"}))
    assert ended.code == 0 and "optim.lr = 0.125" in ended.out and "would run in" in ended.out
    assert list(tmp_path.iterdir()) == []
    ended = gpobench(*argv(**{"dry-run": True, "json": True, "set": "optim.lr=0.125"}))
    assert json.loads(ended.out)["settings"]["optim"]["lr"] == 0.125 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("a.txt", b"", "a.txt holds no prompts"), ("a.txt", b"a \xff\n", "a.txt, line 1: this is not UTF-8"),
     ("a.doc", b"a sign", "a file of prompts ends in"), ("a.txt", b"a red triangle\n", "stands in the train split")],
)  # fmt: skip
def test_a_dry_run_refuses_prompts_that_a_run_would_refuse(
    gpobench: Any, argv: Any, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    ended = gpobench(*argv(**{"dry-run": True, "prompts": tmp_path / name}))
    assert ended.code == 2 and ended.out == "" and said in ended.err and len(ended.err.strip().splitlines()) == 1


def test_a_dry_run_refuses_pairs_that_cannot_be_read(gpobench: Any, argv: Any) -> None:
    ended = gpobench(*argv(**{"dry-run": True, "method": "dpo", "set": "pairs=nowhere"}))
    assert ended.code == 2 and "nowhere" in ended.err and len(ended.err.strip().splitlines()) == 1


def test_json_is_one_object_and_all_else_is_on_stderr(gpobench: Any, argv: Any, tmp_path: Path) -> None:
    ended = gpobench(*argv(json=True))
    assert ended.code == 0, ended.err
    answer = json.loads(ended.out)
    assert answer.keys() >= ISSUE and ended.err
    assert answer["spent"].keys() >= {"nfe", "images", "reward_calls", "updates", "seconds"}
    for key in ("before", "after", "delta"):
        assert set(answer[key]) == {"redness/mean", "warmth/mean"}
    assert answer["delta"]["warmth/mean"].keys() >= {"mean", "ci", "p"}
    assert Path(answer["run_dir"]).parent == tmp_path
    table = gpobench(*argv())  # the same run, for a person
    assert (
        table.code == 0
        and "redness/mean" in table.out
        and "warmth/mean *" in table.out
        and f"nfe {answer['spent']['nfe']:.0f}" in table.out
    )


def test_an_invalid_run_is_not_exit_code_zero(gpobench: Any, argv: Any, redness: str) -> None:
    command = argv(task=f"{redness}:Shaky", budget="nfe=100")
    for _ in range(2):  # just made, and read from disk
        ended = gpobench(*command)
        assert ended.code == NO_RESULT, ended.err
        assert "INVALID" in ended.out and "it is too dark" in ended.out and "images not scored: 0" not in ended.out


def test_a_scorer_that_reads_nothing_is_one_line(gpobench: Any, argv: Any, redness: str) -> None:
    ended = gpobench(*argv(task=f"{redness}:Unread", budget="nfe=100"))
    assert ended.code == 2 and ended.out == "" and "warmth gave none of the 12 images" in ended.err.splitlines()[-1]


def test_eval_evaluates_a_base_and_an_adapter(
    gpobench: Any, argv: Any, redness: str, tiny_pipe: Path, tmp_path: Path
) -> None:
    done = json.loads(gpobench(*argv(json=True)).out)
    look = ["eval", "--task", f"{redness}:Paint", "--model", str(tiny_pipe)]
    base = json.loads(gpobench(*look, "--json").out)
    assert base["scores"]["redness/mean"]["mean"] == done["before"]["redness/mean"]["mean"]
    ended = gpobench(*look, "--adapter", f"{done['run_dir']}/adapter", "--out", tmp_path / "eval")
    assert ended.code == 0 and "redness/mean" in ended.out
    assert {p.name for p in (tmp_path / "eval").iterdir()} == {"scores.parquet", "samples.png"}
    broken = ["eval", "--task", f"{redness}:Broken", "--model", str(tiny_pipe)]
    answer = json.loads(gpobench(*broken, "--json").out, parse_constant=pytest.fail)
    assert answer["invalid"] and answer["scores"]["redness/mean"]["mean"] is None
    assert "not scored" in gpobench(*broken).out
    rich = gpobench("eval", "--task", f"{redness}:Rich", "--model", str(tiny_pipe))
    assert rich.code == 0 and "diversity" in rich.out and "quality" in rich.out, rich.err


def test_where_nothing_may_be_written_is_one_line(gpobench: Any, argv: Any) -> None:
    ended = gpobench(*argv(out="/proc/nowhere"))
    assert ended.code == 2 and "Traceback" not in ended.err and ended.out == ""
    assert len(ended.err.strip().splitlines()) == 1


# Scorers and prompts from elsewhere


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three drawn words with what was asked for; the last one is not what it should be."""
    from PIL import Image

    from gpobench.bench.assets.glyphs import draw_word

    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, (word, _) in enumerate(WORDS):
        Image.fromarray(draw_word(word)).save(folder / f"{i}.png")
    rows = [f'{i}.png,"a sign that says ""{asked}"""' for i, (_, asked) in enumerate(WORDS)]
    (folder / "prompts.csv").write_text("\n".join(["file,prompt", *rows]) + "\n")
    return folder


WORDS = (("JUDGE", "JUDGE"), ("SILK", "SILK"), ("FROWN", "CHALK"))


def test_score_writes_a_table_and_reports_failures(gpobench: Any, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    (pictures / "1.png").write_bytes((pictures / "1.png").read_bytes()[:60])  # cut off
    ended = gpobench("score", pictures, "--scorer", "reader", "--task", "ocr", "--out", out, "--json")
    assert ended.code == 3, ended.err
    answer = json.loads(ended.out)
    assert answer["failed"] >= 1 and answer["invalid"]
    rows = [line for line in out.read_text().splitlines() if ",exact," in line]
    assert len(rows) == 3 and rows[0].split(",exact,")[1].startswith("1.0")
    assert not rows[1].split(",exact,")[1].startswith(("0", "1"))  # no number for a picture that cannot be read
    table = gpobench("score", pictures, "--scorer", "reader", "--task", "ocr", "--out", out)
    assert table.code == 3 and "reader/exact" in table.out and "INVALID" in table.out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["score", "DIR", "--scorer", "reader=http://127.0.0.1:1"], "give --scorer-at reader=http://127.0.0.1:1"),
        (["score", "DIR", "--scorer", "reader", "--scorer-at", "rapidocr=http://a"], "add --scorer rapidocr"),
        (["score", "DIR", "--scorer", "raeder"], "unknown scorer 'raeder'; did you mean 'reader'?"),
        (["score", "nowhere", "--scorer", "reader"], "nowhere"),
        (["serve-scorer", "raeder"], "did you mean 'reader'?"),
        (["serve-scorer", "reader", "--host", "0.0.0.0", "--port", "0"], "token"),
        (["fetch", "--task", "orc"], "did you mean 'ocr'?"),
        (["doctor", "--model", "sd35x"], "did you mean 'sd35m'?"),
        (["compare", "--methods", "gpo,gppo", "--task", "ocr", "--model", "tiny"], "did you mean 'gpo'?"),
        (["leaderboard", "DIR"], "DIR"),
        (["report", "DIR"], "DIR"),
        (["regress", "DIR", "--against", "none.toml"], "none.toml"),
        (["export", "DIR", "--to", "x"], "DIR"),
        (["run", "--method", "gpo", "--task", "ocr", "--model", "tiny", "--scorer-at", "reader=8500"], "NAME=URL"),
        (["run", "--method", "gpo", "--task", "ocr", "--model", "tiny", "--prompts", "none.txt"], "none.txt"),
        (["run", "--method", "gpo", "--task", "ocr", "--model", "tiny", "--reward", "reader*0"], "weight"),
        (["eval", "--task", "ocr", "--model", "tiny", "--prompts", "PLAIN"], "quote"),
    ],
)
def test_new_commands_refuse_in_one_line(gpobench: Any, tmp_path: Path, argv: list[str], said: str) -> None:
    (tmp_path / "DIR").mkdir()
    plain = tmp_path / "plain.txt"
    plain.write_text("a sign without a word\n")
    places = {"DIR": tmp_path / "DIR", "PLAIN": plain}
    out = ["--out", tmp_path / "runs"] if argv[0] in ("run", "compare") else []
    ended = gpobench(*(places.get(word, word) for word in argv), *out)
    assert ended.code == 2, ended.err
    lines = [line for line in ended.err.splitlines() if line.startswith("gpobench: ")]
    assert len(lines) == 1 and said in ended.err and "Traceback" not in ended.err


def test_a_served_scorer_makes_the_same_run(gpobench: Any, argv: Any, redness: str, tmp_path: Path) -> None:
    served = f"{redness}:Redness"
    here = json.loads(gpobench(*argv(json=True, out=tmp_path / "here")).out)
    server = subprocess.Popen(
        [Path(sys.executable).with_name("gpobench"), "serve-scorer", served, "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        ready = server.stdout.readline().split()
        assert ready[0] == "ready:" and ready[1].startswith("http://127.0.0.1:")
        ended = gpobench(*argv(json=True, out=tmp_path / "there", scorer_at=f"{served}={ready[1]}"))
    finally:
        server.terminate()
        assert server.wait(30) == 0
    assert ended.code == 0, ended.err
    there = json.loads(ended.out)
    for key in ("before", "after", "delta", "config"):
        assert here[key] == there[key], key
    assert Path(here["run_dir"]).name == Path(there["run_dir"]).name
    weights = [Path(r["run_dir"], "adapter", "pytorch_lora_weights.safetensors").read_bytes() for r in (here, there)]
    assert weights[0] == weights[1]


def test_ctrl_c_before_the_work_begins_ends_in_a_line(
    gpobench: Any, redness: str, tiny_pipe: Path, tmp_path: Path
) -> None:
    interrupt = (
        "import os, signal\nfrom gpobench.bench.commands import run\n"
        "run.check_names = lambda **names: os.kill(os.getpid(), signal.SIGINT)"
    )
    words = ["run", "--method", "gpo", "--task", f"{redness}:Paint", "--model", tiny_pipe, "--out", tmp_path]
    ended = gpobench(*words, before=interrupt)
    assert ended.code == 130 and ended.out == "" and "Traceback" not in ended.err
    assert ended.err.splitlines()[-1].startswith("gpobench: stopped; the same command goes on")
