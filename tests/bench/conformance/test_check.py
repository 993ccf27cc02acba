"""Laws: every built-in method keeps them, and each of them fails for a method that breaks it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gpobench.bench import registry
from gpobench.bench.conformance import gradient_laws, run_laws, search_laws, source_laws
from gpobench.bench.conformance.check import ALL_FAMILIES, DEFAULT_FAMILIES, LAWS, check
from gpobench.bench.conformance.harness import MethodSource
from gpobench.bench.conformance.law import Law, LawBroken, LawResult
from gpobench.bench.conformance.source_rules import local_files, rule_violations
from gpobench.bench.errors import UserError
from gpobench.bench.experiments import config

NAMES = sorted({registry.canonical("method", name) for name in registry.entries("method")})
VARIANTS = [f"{name}:{variant}" for name in NAMES for variant in config.variants(name)]
MEAN = "the loss is a mean over rows"
TIES = "where all rewards are equal nothing is learnt"
RATIO = "the policy ratio is 1 before the first update"
REFERENCE = "at the reference the accuracy is one half and the drift zero"
UNSCORED = "an image that could not be scored leaves no trace"
SEED = "the seed decides and nothing else"
LEAKS = "it leaves nothing behind for the next run"
RESUME = "a run that was cut off goes on to the same bytes"
COST = "its cost is what the meter shows"
OUTSIDE = "nothing is spent outside the rig"
REAL = "a bench as large as that of a real run changes nothing"
BUDGET = "no budget is passed, and the last complete update stays"
LEARNS = "it learns"
FROZEN = "it is a frozen dataclass with annotated fields"
CONSTRUCTS = "its defaults and its settings for tiny models construct"
DECLARED = "its search space and its cost are declared"
SOURCE = "its source touches no optimiser, device, file, other method or model family"


@pytest.fixture(scope="session")
def broken(repo: Path) -> str:
    return str(repo / "tests" / "broken.py")


def failed(verdicts: list[LawResult], *, soft: bool = False) -> dict[str, str]:
    return {v.law: f"{v.family}: {v.detail}" for v in verdicts if (not v.ok if soft else v.broken)}


def test_the_names_here_are_those_of_the_laws() -> None:
    named = {
        value for key, value in globals().items() if key.isupper() and isinstance(value, str) and key != "PREAMBLE"
    }
    assert {law.name for law in LAWS if law.on != "search"} == named


def test_every_law_is_in_the_list_of_laws() -> None:
    modules = (source_laws, gradient_laws, run_laws, search_laws)
    defined = [value for module in modules for value in vars(module).values() if isinstance(value, Law)]
    assert {law.name for law in defined} == {law.name for law in LAWS} | {gradient_laws.fits_model.name}


# On `tiny` these two are held back by a KL and a low rate, for its long run; on a miniature's short one they may learn.
BOLD = {name: ("kl=0", "t_min=0", "optim.lr=3e-4") for name in ("rwr", "sft")}


# Of three seeds at 24,000 nfe ddpo raised the miniature's reward on none by its untuned preset; why is open (methods/ddpo.toml).
MAY_NOT_LEARN = {"ddpo": {"it learns"}}


@pytest.mark.parametrize("name", NAMES)
def test_every_built_in_method_keeps_the_laws_and_learns(name: str) -> None:
    verdicts = check(name, sets=BOLD.get(name, ()))
    assert set(failed(verdicts, soft=True)) <= MAY_NOT_LEARN.get(name, set())
    assert {v.family for v in verdicts} == {"", "sd3", "sd15"}


@pytest.mark.parametrize("name", ["gpo", "dgpo", "diffusion-nft", "awm"])
def test_a_penalty_learns_nothing_from_what_could_not_be_scored(name: str) -> None:
    """The presets of tiny have no such penalty, those of real models do."""
    rule = "an image that could not be scored leaves no trace"
    verdicts = check(name, sets=["kl=0.5"], families=["sd3"], soft=False)
    assert rule in {v.law for v in verdicts} and rule not in failed(verdicts)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_built_in_method_keeps_the_laws_on_the_other_families_too(name: str) -> None:
    others = [family for family in ALL_FAMILIES if family not in DEFAULT_FAMILIES]
    verdicts = check(name, families=others)
    assert not failed(verdicts, soft=True)
    assert {v.family for v in verdicts} == {"", "flux", "sdxl"}


@pytest.mark.parametrize(
    ("family", "name", "laws"),
    [
        ("flux", "Sound", set()),
        ("flux", "Lies", set()),  # that guidance costs nothing is true of a model it was distilled into
        ("sdxl", "Lies", {COST}),
    ],
)
def test_the_laws_catch_the_same_faults_on_the_other_families(
    broken: str, family: str, name: str, laws: set[str]
) -> None:
    """A network that is shown tokens in a line and one that is shown pictures are counted alike."""
    assert set(failed(check(f"{broken}:{name}", families=[family], soft=False))) == laws


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_keeps_the_laws(name: str) -> None:
    assert not failed(check(name, families=["sd3"], soft=False))


@pytest.mark.parametrize(
    ("name", "laws"),
    [
        ("Sound", set()),
        ("Sums", {MEAN}),
        ("Compares", {MEAN}),
        ("LearnsTies", {TIES}),
        ("TakesNaNForZero", {UNSCORED}),
        ("KeepsNaN", {UNSCORED}),
        ("Ratio", {RATIO}),
        ("Accuracy", {REFERENCE}),
        ("Drift", {REFERENCE}),
        ("Remembers", {LEAKS}),
        ("Counts", {LEAKS, RESUME}),
        ("Chance", {SEED, LEAKS, RESUME, UNSCORED}),  # nothing that is done twice comes out the same
        ("Lies", {COST}),
        ("GoesOn", {BUDGET, REAL}),
        ("Wide", {DECLARED}),
        ("Loose", {FROZEN}),
        ("Soft", {FROZEN, DECLARED}),
        ("First", set()),
        ("Forgets", {"the last answer that a search states is its answer"}),
        ("Overwrites", {"its answers are latents, and the seed decides them"}),
    ],
)
def test_each_law_fails_for_a_method_that_breaks_it(broken: str, name: str, laws: set[str]) -> None:
    found = failed(check(f"{broken}:{name}", families=["sd3"], soft=False))
    if name == "Overwrites":  # it spoils the noise of whatever law asks it
        assert laws < set(found)
    else:
        assert set(found) == laws, found
    assert all(re.fullmatch(r"\w*: \S.{10,400}", said, re.DOTALL) for said in found.values()), found


def test_a_method_that_lowers_the_reward_gets_a_warning(broken: str) -> None:
    verdicts = check(f"{broken}:Backwards", families=["sd3"])
    assert not failed(verdicts) and list(failed(verdicts, soft=True)) == [LEARNS]
    (detail,) = failed(verdicts, soft=True).values()
    assert re.search(r"rose by -0\.\d+", detail)


PREAMBLE = "import torch\nfrom dataclasses import dataclass\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("from torch.optim import AdamW", "torch.optim.AdamW"),
        ("adam = torch.optim.SGD", "torch.optim"),
        ("x.cuda()", ".cuda"),
        ("x.to('cuda')", "a device by name"),
        ("torch.zeros(3, device='cuda')", "a device by name"),
        ("open('notes.txt')", "open"),
        ("from pathlib import Path", "pathlib.Path"),
        ("loss.backward()", ".backward"),
        ("torch.randn(3)", "torch.randn draws"),
        ("from torch import randn as r\nr(3)", "torch.randn draws"),
        ("import numpy as np\nnp.random.normal()", "numpy.random"),
        ("import random", "random"),
        ("x.normal_()", ".normal_"),
        ("from gpobench.methods.gpo import GPO", "gpobench.methods.gpo"),
        ("from .gpo import GPO", "gpobench.methods.gpo"),
        ("from ..bench.models.sd3 import SD3", "gpobench.bench.models"),
        ("isinstance(rig.model, Foo)", "isinstance of a model"),
        ("rig.model.transformer(x)", "tells one family"),
        ("rig.model.prediction == 'epsilon'", "tells one family"),
        ("rig.meter.charge(nfe=-5)", ".charge"),
        ("from torch import randperm\nrandperm(5, generator=rig.rng)", "draws randomness"),
        ("rig.meter", "rig.meter is not in the contract"),
        ("rig.train_prompts", "rig.train_prompts is not in the contract"),
        ("def collect(self, bench):\n    bench.scorer", "bench.scorer is not in the contract"),
        ("def helper(tools: Rig):\n    tools.meter", "tools.meter is not in the contract"),
        ("import importlib", "importlib"),
        ("from importlib import import_module", "importlib.import_module"),
        ("__import__('os')", "__import__"),
        ("__builtins__", "__builtins__"),
        ("from gpobench.bench import registry", "gpobench.bench.registry"),
        ("from gpobench.bench.registry import scorer", "gpobench.bench.registry"),
        ("from gpobench.bench import Meter", "gpobench.bench.Meter"),
        ("from gpobench.bench.training.rig import MeteredRig", "gpobench.bench.training.rig"),
        ("from gpobench import bench", "gpobench.bench is not in the contract"),
        ("import time", "time"),
        ("from time import perf_counter", "time.perf_counter"),
        ("import sys", "sys"),
        ("import gc", "gc"),
        ("import inspect", "inspect"),
        ("import ctypes", "ctypes"),
        ("import urllib.request", "urllib.request"),
        ("getattr(rig, 'meter')", "getattr of something else than self"),
        ("reach = getattr", "getattr of something else than self"),
        ("setattr(rig, 'meter', None)", "setattr"),
        ("vars(rig)", "vars"),
        ("rig.__dict__", "rig.__dict__"),
        ("rig.velocity.__closure__", "__closure__"),
        ("object.__setattr__(rig, 'meter', None)", "object.__setattr__"),
        ("rig.note = print", "rig.note is assigned"),
        ("x.requires_grad = True", "x.requires_grad is assigned"),
        ("del rig.note", "rig.note is assigned"),
        ("rig._cache", "rig._cache is"),
        ("v.grad_fn.next_functions", ".grad_fn"),
        ("walk.gi_frame.f_locals", ".f_locals"),
        ("type(rig)", "type of the rig"),
        ("match rig:\n    case object(meter=m): pass", "a pattern that reads attributes"),
        ("from operator import attrgetter", "operator.attrgetter"),
        ("import torch.utils.cpp_extension", "torch.utils.cpp_extension"),
        ("from torch._C import _functions", "torch._C"),
    ],
)
def test_a_violation_of_the_source_rules_is_found(line: str, said: str) -> None:
    found = list(rule_violations(PREAMBLE + line, "gpobench.methods.mine"))
    assert any(said in each and re.match(r"line [34]: ", each) for each in found), found


def test_a_file_beside_the_methods_own_is_under_the_same_rules(broken: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(Path(broken).read_text("utf-8").replace("import torch\n", "import torch\nimport helper\n", 1))
    (tmp_path / "helper.py").write_text("from dataclasses import dataclass\nimport deeper.inside\n")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "inside.py").write_text("import math\nimport gc\n")
    source = file.read_text("utf-8")
    assert local_files(source, "mine", file) == {"helper": tmp_path / "helper.py"}
    kind = type("Mine", (), {"__module__": "gpobench_test_mine"})
    module = sys.modules.setdefault("gpobench_test_mine", ModuleType("gpobench_test_mine"))
    module.__file__ = str(file)
    with pytest.raises(LawBroken, match=r"inside\.py line 2: gc"):
        source_laws.source_is_restricted.check(MethodSource(kind, kind))


@pytest.mark.parametrize(
    "line",
    [
        "getattr(self, 'lr'), hasattr(self, 'lr')",
        "object.__setattr__(self, 'lr', 1.0)",
        "self.lr = 1.0",
        "from gpobench.bench import Groups, Rig, losses, flow",
        "from gpobench.bench.training.pairs import compare",
        "import math, itertools, functools, numpy",
        "from ..bench.losses import gpo",
        "from ..bench.budget import Spent",
        "rig.model.steps, rig.model.guidance, rig.model.times(4), rig.model.update_copy('old', 0.9)",
        "rig.step(ode, x, t, s, who)",
        "rig.state['old'] = torch.zeros(3)",
    ],
)
def test_allowed_source_has_no_violation(line: str) -> None:
    assert not list(rule_violations(PREAMBLE + line, "gpobench.methods.mine"))


def test_an_optimiser_in_a_file_is_caught_by_the_law(broken: str, tmp_path: Path) -> None:
    file = tmp_path / "greedy.py"
    file.write_text(Path(broken).read_text("utf-8").replace("import torch\n", "import torch\nimport torch.optim\n", 1))
    assert set(failed(check(f"{file}:Sound", families=["sd3"], soft=False))) == {SOURCE}


def test_impossible_settings_break_the_laws() -> None:
    verdicts = check("gpo", sets=["group=1"])
    assert set(failed(verdicts)) == {CONSTRUCTS, DECLARED, "its settings fit the model"} or CONSTRUCTS in failed(
        verdicts
    )
    assert "group" in failed(verdicts)[CONSTRUCTS]


def test_an_unknown_name_is_a_user_error() -> None:
    with pytest.raises(UserError, match="did you mean 'gpo'"):
        check("gppo")
    with pytest.raises(UserError, match="unknown family"):
        check("gpo", families=["sd2"])


def test_the_page_on_extending_shows_a_method_that_keeps_the_laws(repo: Path, tmp_path: Path) -> None:
    page = (repo / "docs" / "extending.md").read_text("utf-8")
    example = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Best" in block)
    (tmp_path / "best.py").write_text(example, "utf-8")
    assert not failed(check(f"{tmp_path / 'best.py'}:Best", families=["sd3"]), soft=True)


# The two commands


def test_a_method_from_the_template_keeps_the_laws(gpobench: Any, tmp_path: Path) -> None:
    done = gpobench("new", "method", "my-method", "--out", tmp_path / "mine")
    file = tmp_path / "mine" / "my_method.py"
    assert done.code == 0 and f"gpobench check --method {file}:MyMethod" in done.out
    assert len(file.read_text("utf-8").splitlines()) < 60 and "{{" not in file.read_text("utf-8")
    done = gpobench("check", "--method", f"{file}:MyMethod", "--json")
    assert done.code == 0, done.out
    verdicts = json.loads(done.out)["laws"]
    assert all(v["ok"] for v in verdicts) and {v["family"] for v in verdicts} == {"", "sd3", "sd15"}
    dry = gpobench("run", "--method", f"{file}:MyMethod", "--task", "ocr", "--model", "tiny", "--dry-run")
    assert dry.code == 0 and "optim.lr = 0.001" in dry.out  # its preset is found
    again = gpobench("new", "method", "my-method", "--out", tmp_path / "mine")
    assert again.code == 2 and "exists already" in again.err and again.out == ""


@pytest.mark.parametrize("name", ["My-Method", "a b", "1st", "../x", "-x", "class", "x-"])
def test_an_invalid_method_name_is_refused(gpobench: Any, tmp_path: Path, name: str) -> None:
    done = gpobench("new", "method", "--out", tmp_path, "--", name)
    assert done.code == 2 and "lower-case words" in done.err and not list(tmp_path.iterdir())


def test_a_broken_law_is_exit_code_one_with_numbers(gpobench: Any, broken: str) -> None:
    done = gpobench("check", "--method", f"{broken}:Lies", "--model", "sd3")
    assert done.code == 1 and "BROKEN" in done.out and "1 broken" in done.out
    assert "declared" in done.out and "rollout" in done.out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--method", "gppo"], "did you mean 'gpo'"),
        (["--method", "nowhere.py:Mine"], "no such file"),
        (["--method", "gpo", "--model", "sd2"], "unknown family"),
        (["--method", "gpo", "--set", "groop=3"], "groop"),
    ],
)
def test_a_wrong_request_to_check_is_one_line(gpobench: Any, argv: list[str], said: str) -> None:
    done = gpobench("check", *argv)
    assert done.code in (1, 2) and said in done.err + done.out and "Traceback" not in done.err
