"""Every method has a preset for every model: it resolves, states its sources, fits the GPU, and its miniature learns."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gpobench.bench import registry
from gpobench.bench.budget import Budget, Meter
from gpobench.bench.commands.app import app
from gpobench.bench.commands.describe import _fields  # pyright: ignore[reportPrivateUsage]
from gpobench.bench.experiments.config import RunRequest, preset, preset_path, resolve, variants
from gpobench.bench.experiments.cost_estimate import estimate_cost, guidance_branches
from gpobench.bench.flow import ddim_grid, ddpm, ode, sde, to_velocity
from gpobench.bench.model_spec import find_model_spec
from gpobench.bench.models.memory import GB
from gpobench.bench.models.mini import write_flux, write_sd15, write_sdxl
from gpobench.bench.models.open import open_model
from gpobench.bench.spec import Optim, Prompt, Search, batch_size, select_rows
from gpobench.bench.training.rig import MeteredRig

REPO = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("presets_table", REPO / "benchmarks" / "presets.py")
assert SPEC and SPEC.loader
presets: Any = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = presets
SPEC.loader.exec_module(presets)

METHODS = presets.methods()
OWN = ("flux1-dev", "sdxl", "sd15")  # sd35l takes sd35m's
PROMISED = {"tiny": 24, "sd35m": 24, "sd35l": 48, "flux1-dev": 48, "sdxl": 24, "sd15": 24}  # GB, as docs/models.md says
SOURCE = re.compile(
    r"arXiv|paper|code|config|script|\bfile\b|protocol|derived|as \[|as flow_grpo|[Ff]actory|GRPO|D[DGR3]?PO|DRO|SPO|by estimate"
)
BIG = pytest.mark.parametrize("model", presets.MODELS)
EVERY = pytest.mark.parametrize("method", METHODS)


def sections(method: str) -> dict[str, list[str]]:
    """[name] -> the lines of that section of the method's preset file, comments above it left out."""
    path = preset_path(method)
    assert path is not None
    found: dict[str, list[str]] = {}
    name = ""
    for line in path.read_text("utf-8").splitlines():
        if head := re.fullmatch(r"\[([^\]]+)\]", line):
            name = head[1]
            found[name] = []
        elif line and not line.startswith("#"):
            found[name].append(line)
    return found


# Each resolves, and is quoted


@BIG
@EVERY
def test_a_dry_run_is_quoted(method: str, model: str) -> None:
    for name in (method, *(f"{method}:{variant}" for variant in variants(method))):
        told = estimate_cost(resolve(RunRequest(name, "ocr", model)), "h100")
        assert told["memory"]["peak"] > 0 and told["images"] > 100 and told["nfe"] > 0 and told["hours"]["h100"] > 0
        assert any("peak of training" in line for line in told["lines"])


@BIG
@EVERY
def test_the_preset_fits_the_card_that_is_promised(method: str, model: str) -> None:
    one = presets.need(method, model)
    assert one.gpu_gb and one.gpu_gb <= PROMISED[model], f"{one.size.peak / GB:.1f} GB"


@EVERY
def test_the_larger_sd35_takes_the_mediums(method: str) -> None:
    assert find_model_spec("sd35l").preset == "sd35m"
    assert resolve(RunRequest(method, "ocr", "sd35l")).settings == resolve(RunRequest(method, "ocr", "sd35m")).settings


# What stands in the files


@EVERY
def test_every_model_has_a_section_and_a_preset_names_only_fields_of_its_method(method: str) -> None:
    path = preset_path(method)
    assert path is not None
    table, known = tomllib.loads(path.read_text("utf-8")), {f.name: f for f in fields(registry.load("method", method))}
    assert {"tiny", "sd35m", *OWN} <= set(table) and "sd35l" not in table
    for model in OWN:
        for name in (method, *(f"{method}:{variant}" for variant in variants(method))):
            told = preset(name, model, "ocr")
            assert set(told) - {"adapter", "evaluation", "precision", "rows", "tuned"} <= set(known), name
            assert set(told.get("optim", {})) <= {f.name for f in fields(Optim)}
            settings = resolve(RunRequest(name, "ocr", model)).settings
            for key, value in told.items():  # and none is lost on the way
                if not is_dataclass(getattr(settings, key)):
                    assert getattr(settings, key) == (tuple(value) if isinstance(value, list) else value)


@EVERY
def test_every_line_says_where_it_comes_from(method: str) -> None:
    """All but the embedded model's, which were tuned here (`tuned` there says by which command, best-of-n's one is 0) or are untuned."""
    for name, lines in sections(method).items():
        if "tiny" not in name.split("."):
            assert lines, name
            for line in lines:
                _, mark, why = line.partition(" # ")
                assert mark and SOURCE.search(why), f"[{name}] {line}"


@EVERY
def test_every_section_says_which_code_it_follows_and_show_prints_it(method: str) -> None:
    """The table at the head of the file: section, then the repository and its files, or that there is none."""
    path = preset_path(method)
    assert path is not None
    text = path.read_text("utf-8")
    _, mark, table = text.partition("# What each section follows:\n")
    rows = re.findall(r"^#   (\S.*?)  +(\S.*)$", table.partition("\n\n")[0], re.MULTILINE)
    follows = {name: source for names, source in rows for name in names.split(", ")}
    assert mark and follows
    if follows.keys() != {"every section"}:
        assert set(follows) == {name.partition(".")[0] for name in sections(method)}
        tuned = bool(resolve(RunRequest(method, "ocr", "tiny")).tuned)
        assert follows["tiny"] == "tuned here" if tuned else follows["tiny"].startswith("untuned: ")
        for name in ("sd35m", *OWN):
            assert re.search(r"[\w-]+/[\w-]+|no code|arXiv", follows[name]), name
    printed = CliRunner().invoke(app, ["show", method]).output
    assert all(" ".join(source.split()) in " ".join(printed.split()) for source in follows.values())


@EVERY
def test_show_says_what_every_field_means(method: str) -> None:
    kind = registry.load("method", method)
    unexplained = [name for name, _, meaning in _fields(kind()) if not meaning]
    assert unexplained == []


@EVERY
def test_the_judged_average_is_the_published_one(method: str) -> None:
    """Decay .9 every eighth update in Flow-GRPO's code and what is built on it, .9 at each in NFT's, .99 at each in AWM's."""
    own = resolve(RunRequest(method, "ocr", "sd35m")).settings
    if isinstance(own, Search):
        pytest.skip("it trains nothing")
    average = (own.optim.ema, own.optim.ema_interval, own.optim.ema_warmup)
    assert average == {"awm": (0.99, 1, 10), "diffusion-nft": (0.9, 1, 10)}.get(method, (0.9, 8, 10))
    tiny = resolve(RunRequest(method, "ocr", "tiny")).settings.optim
    assert (tiny.ema, tiny.ema_interval, tiny.ema_warmup) == (0.9, 1, 10)  # alike for all


def test_the_times_of_training_are_those_of_the_code_that_is_followed() -> None:
    shifts = {
        (method, model): resolve(RunRequest(method, "ocr", model)).settings.timestep_shift
        for method in ("gpo", "diffusion-dpo", "sft", "rwr")
        for model in ("tiny", "sd35m", *OWN)
    }
    assert shifts.pop(("diffusion-dpo", "flux1-dev")) == 1  # Flow-Factory's time_shift
    assert set(shifts.values()) == {0.0}  # the model's own, which Flow-GRPO's script indexes


@EVERY
def test_every_model_that_is_pointed_at_has_what_is_pointed_at(method: str) -> None:
    """`as [sd35m]` is the number that stands there, or says what is different."""
    path = preset_path(method)
    assert path is not None
    table = tomllib.loads(path.read_text("utf-8"))
    for name, lines in sections(method).items():
        for line in lines:
            if name in OWN and (borrowed := re.search(r" # as \[(\w+)\]$", line)):
                key = line.partition(" = ")[0].split(".")
                here, there = table[name], table[borrowed[1]]
                for part in key:
                    here, there = here[part], there[part]
                assert here == there, f"[{name}] {line}"


@pytest.mark.parametrize("model", OWN)
@EVERY
def test_the_gigabytes_in_the_comments_are_the_estimate(method: str, model: str) -> None:
    for line in sections(method)[model]:
        if said := re.search(r"(\d+) GB by estimate", line):
            one = presets.need(method, model)
            assert int(said[1]) == round(one.size.peak / GB), line
            assert "of a 48 GB card" in line or one.gpu_gb == 24
            if wide := re.search(r"(\w+) latents", line):
                assert {"eight": 8}.get(wide[1], wide[1]) in (one.held, str(one.held)), line
            if group := re.search(r"a group of (\d+)", line):
                assert int(group[1]) == one.plan.settings.group, line


# The numbers that are derived


def test_clips_shrink_as_the_root_of_a_latents_elements() -> None:
    """log rho is a mean over them: 16 x 64 x 64 in SD3.5-M, 4 x 64 x 64 in SD1.5, as many as SD3.5-M's in SDXL, 16 x 90 x 90 in FLUX."""
    elements = {"sd35m": 16 * 64**2, "sd15": 4 * 64**2, "sdxl": 4 * 128**2, "flux1-dev": 16 * 90**2}
    for name in ("grpo-guard", "flow-grpo:fast"):
        clip = {model: resolve(RunRequest(name, "ocr", model)).settings.clip_range for model in elements}
        for model, n in elements.items():
            assert clip[model] == pytest.approx(clip["sd35m"] * math.sqrt(elements["sd35m"] / n), rel=0.02), (
                name,
                model,
            )


def table_of_sd15() -> torch.Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def test_the_noisy_times_are_as_noisy_as_those_of_sd35m() -> None:
    """DGPO learns above shift(0.3): t = 0.5625 of SD3, a ratio of noise to image of 9 / 7."""
    abar = table_of_sd15()
    ratio = ((1 - abar) / abar).sqrt()
    first = (int((ratio >= 0.5625 / 0.4375).nonzero()[0]) + 1) / 1000
    for model in ("sdxl", "sd15"):
        assert resolve(RunRequest("gpo", "ocr", model)).settings.t_min == pytest.approx(first, abs=0.005)
        dgpo = resolve(RunRequest("dgpo", "ocr", model)).settings
        grid = ddim_grid(dgpo.steps, spacing="leading", offset=1, alpha_to_one=False)[:-1]
        assert int((grid >= first).sum()) == dgpo.trunc_steps + 1
    tokens = (720 // 16) ** 2
    shift = math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))  # FLUX.1-dev's scheduler
    noisy = shift * 0.3 / (1 + (shift - 1) * 0.3)
    for method in ("gpo", "diffusion-nft"):
        assert resolve(RunRequest(method, "ocr", "flux1-dev")).settings.t_min == pytest.approx(noisy, abs=0.005)


def test_the_noise_of_the_unets_walk_keeps_the_width_of_its_data() -> None:
    """Exact noise prediction for data of width 1, SD1.5's table: noise_level of sqrt 2 ends nearer to 1 than the ODE does."""
    path = ddpm(table_of_sd15())
    ends: dict[str, float] = {}
    for method in ("flow-grpo", "grpo-guard", "mix-grpo", "tempflow-grpo", "g2rpo", "branch-grpo"):
        own = resolve(RunRequest(method, "ocr", "sd15")).settings
        assert (
            own.noise_level
            == resolve(RunRequest(method, "ocr", "sdxl")).settings.noise_level
            == pytest.approx(math.sqrt(2), abs=0.01)
        )
        grid = ddim_grid(own.steps, spacing="leading", offset=1, alpha_to_one=False)
        for name, kernel in (("ode", ode), ("sde", sde(own.noise_level))):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(64, 256, generator=generator)
            for t, s in zip(grid[:-1], grid[1:], strict=True):
                t, s = t.expand(64), s.expand(64)
                eps = x * path(t.double())[1].float()[:, None]
                step = kernel(path, x, to_velocity(path, x, t, eps, "epsilon"), t, s)
                x = step.draw(torch.randn(64, 256, generator=generator)) if name == "sde" else step.mean
            ends[name] = float(x.std())
        assert abs(ends["sde"] - 1) < abs(ends["ode"] - 1) < 0.1, (method, ends)


@pytest.mark.parametrize("model", ["sdxl", "sd15"])
def test_the_published_dpo_of_the_unets_warms_up_for_a_quarter_of_its_updates(model: str) -> None:
    plan = resolve(RunRequest("dpo:offline", "ocr", model))
    own = plan.settings
    updates = plan.budget.bounds()["nfe"] / (2 * own.prompts * sum(own.cost(50, 7.5).values()))
    assert own.optim.warmup == round(updates / 4)
    assert (
        own.beta == {"sdxl": 5000, "sd15": 2000}[model] and own.prompts == 2048 and own.timestep_sampling == "uniform"
    )
    assert own.optim.lr == pytest.approx(1e-8 * 2048)


@pytest.mark.parametrize("task", ["pickscore", "pickscore-full"])
def test_what_is_published_for_pickscore_is_used_for_it(task: str) -> None:
    """Sources beside each number in the preset files."""
    own = lambda method: resolve(RunRequest(method, task, "sd35m")).settings
    dgpo, awm = own("dgpo"), own("awm")
    assert (dgpo.group, dgpo.beta, dgpo.clip_range, dgpo.kl) == (24, 10, 5e-2, 1e-3)
    assert (awm.prompts, awm.kl, awm.with_init) == (24, 1e-4, True) and awm.strata(awm.steps)[0] == 0
    assert own("flow-grpo").kl == 0.01 and own("flow-grpo:fast").kl == 0 and own("grpo-guard").clip_range == 4e-6
    assert (own("gpo").beta, own("gpo").kl, own("rwr").temperature) == (10, 1e-3, 26)
    tags = resolve(RunRequest("dgpo", "geneval", "sd35m")).settings
    assert (tags.trunc_steps, tags.switch_ema_ref, tags.std, tags.beta) == (4, 500, "group", 100)


@pytest.mark.parametrize("model", ["tiny", "sd35m", "sd35l", "flux1-dev", "sdxl", "sd15"])
def test_the_reference_of_a_data_set_stays_the_base(model: str) -> None:
    own = resolve(RunRequest("dpo:offline", "ocr", model)).settings
    assert own.ref_update_step == 0 and own.collector == "policy" and own.reference == "ref"


# They teach


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("minis")
    writers = {"flux1-dev": write_flux, "sdxl": write_sdxl, "sd15": write_sd15}
    return {model: write(root / model, seed=0) for model, write in writers.items()}


@pytest.fixture
def mini(folders: dict[str, Path], redness: str) -> Iterator[Callable[[str], MeteredRig]]:
    made: list[MeteredRig] = []

    def rig(model: str) -> MeteredRig:
        model_spec = find_model_spec(str(folders[model]))
        loaded = open_model(model_spec, device="cpu", adapter=model_spec.adapter, seed=0)
        book = [Prompt(text) for text in ("a red circle", "two blue squares", "a green triangle")]
        made.append(MeteredRig(loaded, book, registry.scorer(f"{redness}:Redness"), Meter(Budget(nfe=1e9)), rows=64))
        return made[-1]

    yield rig
    for one in made:
        one.close()


@pytest.mark.slow
@pytest.mark.parametrize("model", OWN)
@EVERY
def test_the_preset_walks_and_learns_on_a_miniature_of_its_class(mini: Any, method: str, model: str) -> None:
    """The preset as it stands but for one small group: sampler, times, noise and guidance are the model's own."""
    own = resolve(RunRequest(method, "ocr", model)).settings
    if isinstance(own, Search):
        pytest.skip("it trains nothing")
    small = {"prompts": 1, "group": 3, "seeds": 1, "branches": 2, "split_steps": (0,)}
    rig, few = mini(model), replace(own, **{key: small[key] for key in small.keys() & {f.name for f in fields(own)}})
    batch = few.collect(rig)
    assert batch_size(batch) > 0
    rows = torch.arange(min(2, batch_size(batch)))
    with rig.keyed(rows):
        loss = few.loss(rig, select_rows(batch, rows))
    loss.backward()
    gradients = [p.grad for p in rig.model.parameters()]
    assert bool(loss.isfinite()) and all(g is not None and bool(g.isfinite().all()) for g in gradients)
    assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 0


# The table in the documentation


def test_guidance_in_the_loss_holds_two_branches_and_an_input_holds_one() -> None:
    held = {model: presets.need("flow-grpo", model) for model in OWN}
    assert {model: one.held // one.plan.settings.optim.micro for model, one in held.items()} == {
        "flux1-dev": 1,
        "sdxl": 2,
        "sd15": 2,
    }
    assert (
        presets.need("flow-grpo:fast", "sd35m").held
        == resolve(RunRequest("flow-grpo:fast", "ocr", "sd35m")).settings.optim.micro
    )
    assert guidance_branches(resolve(RunRequest("gpo", "ocr", "sd15"))) == 1  # guided in the rollout only


def test_the_table_in_the_documentation_is_what_the_command_prints() -> None:
    page = presets.PAGE.read_text("utf-8")
    assert presets.written(page, [*presets.table(), "", *presets.prices()]) == page
    for model, promised in PROMISED.items():
        assert model == "tiny" or any(f"`{model}`" in line and f"| {promised} GB |" in line for line in presets.table())
