"""Config: five layers of settings, of which the last wins, and errors that name the nearest valid setting."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from gpobench.bench.errors import UserError
from gpobench.bench.experiments.config import Config, RunRequest, resolve

METHOD = '''"""A method with defaults of its own."""
from dataclasses import dataclass, field
from gpobench.bench.spec import Optim

@dataclass(frozen=True)
class Mine:
    optim: Optim = field(default_factory=lambda: Optim(lr=0.5, minibatches=7))
    a: int = 1
    b: float = 1.0
    c: str = "one"
    d: bool = False
    e: int = 1
    maybe: float | None = None
'''
PRESET = """
[mini]
b = 2.0
c = "two"
e = 2
optim.epochs = 3
[mini.ocr]
c = "three"
e = 3
[other]
a = 99
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(METHOD)
    (tmp_path / "mine.toml").write_text(PRESET)
    return f"{tmp_path}/mine.py:Mine"


def plan(method: str, task: str, model: Path, *sets: str, **more: Any) -> Config:
    return resolve(RunRequest(method, task, str(model), sets=sets, **more))


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch, tiny_pipe: Path, tmp_path: Path) -> Path:
    """The model with a model spec whose preset section is [mini]."""
    from gpobench.bench import model_spec
    from gpobench.bench.experiments import config

    monkeypatch.setattr(
        config, "find_model_spec", lambda name: replace(model_spec.find_model_spec(name), preset="mini")
    )
    return tiny_pipe


def test_each_layer_wins_over_the_one_below(mine: str, named: Path, redness: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("e = 4\nd = true\noptim.warmup = 5\n")
    got = plan(mine, f"{redness}:Paint", named, "d=false", "optim.clip=9", config=file).settings
    assert (got.a, got.b, got.c, got.d, got.e) == (1, 2.0, "two", False, 4)
    # a partial optim table keeps this method's own defaults
    assert (got.optim.lr, got.optim.minibatches) == (0.5, 7)
    assert (got.optim.epochs, got.optim.warmup, got.optim.clip) == (3, 5, 9)


def test_a_preset_for_the_task_wins_over_the_models(mine: str, named: Path) -> None:
    got = plan(mine, "ocr", named).settings
    assert (got.a, got.b, got.c, got.e) == (1, 2.0, "three", 3)


def test_the_shipped_preset_is_read(tiny_pipe: Path, redness: str) -> None:
    got = plan("gpo", f"{redness}:Paint", tiny_pipe)
    assert got.settings.group != type(got.settings)().group


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("gruop=4", "unknown setting 'gruop'; did you mean 'group'"),
        ("lr=1e-4", "unknown setting 'lr'; did you mean 'optim.lr'"),
        ("learning_rate=1e-4", "unknown setting 'learning_rate'; did you mean 'optim.lr'"),
        ("rank=4", "unknown setting 'rank'; did you mean 'adapter.rank'"),
        ("split=validation", "unknown setting 'split'; did you mean 'evaluation.split'"),
        ("group_size=4", "unknown setting 'group_size'; did you mean 'group'"),
        ("mixed_precision=bf16", "unknown setting 'mixed_precision'; did you mean 'precision'"),
        ("optim.lrr=1", "unknown setting 'optim.lrr'; did you mean 'optim.lr'"),
        ("adaptor.rank=2", "did you mean 'adapter'"),
        ("adapter.rnak=2", "unknown setting 'adapter.rnak'; did you mean 'adapter.rank'"),
        ("evaluation.sead=2", "did you mean 'evaluation.seed'"),
        ("precision=fp23", "unknown precision 'fp23'; did you mean"),
        ("group=many", "setting group"),
        ("group=2.5", "setting group"),
        ("optim.lr=fast", "setting optim.lr"),
        ("optim.lr=1e400", "setting optim.lr must be a finite number, got inf"),
        ("optim.lr=1e39", "setting optim.lr must be at most 3.4e+38, the largest float32, got 1e+39"),
        ("optim.clip=inf", "setting optim.clip must be a finite number, got inf"),
        ("optim.betas=[nan,0.5]", "setting optim.betas must be a finite number, got nan"),
        ("beta=-inf", "setting beta must be a finite number, got -inf"),
        ("adapter.alpha=nan", "setting adapter.alpha must be a finite number, got nan"),
        ("tuned={trials=1,nfe=inf}", "setting tuned.nfe must be a finite number, got inf"),
        ("optim=3", "setting optim holds several values"),
        ("adapter=3", "setting adapter holds several values"),
        ("adapter.rank=0", "rank"),
        ("loss_type=chain", "setting loss_type"),
        ("group=1", "a group needs at least two"),
        ("optim.minibatches=0", "optim.minibatches must be at least 1"),
        ("evaluation.test_images=0", "at least one image"),
        ("group", "--set needs key=value, got 'group'"),
        ("=4", "--set needs key=value"),
    ],
)
def test_a_wrong_setting_is_one_line(tiny_pipe: Path, redness: str, setting: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        plan("gpo", f"{redness}:Paint", tiny_pipe, setting)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_unreadable_config_is_refused(tiny_pipe: Path, redness: str, tmp_path: Path) -> None:
    for name, content in (("bad.toml", b"x = ["), ("bytes.toml", b"\xff\xfe")):
        (tmp_path / name).write_bytes(content)
    for name in ("gone.toml", "bad.toml", "bytes.toml"):
        with pytest.raises(UserError, match=f"cannot read config .*{name}"):
            plan("gpo", f"{redness}:Paint", tiny_pipe, config=tmp_path / name)


@pytest.mark.parametrize(
    "content", ["x = " + "[" * 100_000, ".".join(["a"] * 5_000) + " = 1", "x = " + "[" * 40 + "]" * 40]
)
def test_settings_that_are_nested_too_deeply_are_one_line(tiny_pipe: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "deep.toml").write_text(content)
    key, _, value = content.partition(" = ")
    for request in (
        RunRequest("gpo", "ocr", str(tiny_pipe), config=tmp_path / "deep.toml"),
        RunRequest("gpo", "ocr", str(tiny_pipe), sets=[f"{key}={value}"]),
    ):
        with pytest.raises(UserError, match="nested") as error:
            resolve(request)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_text_that_is_not_utf_8_is_no_setting(mine: str, named: Path) -> None:
    with pytest.raises(UserError, match=r"is not UTF-8, which settings are written in"):
        resolve(RunRequest(mine, "ocr", str(named), sets=["c=caf\udce9"]))


def test_a_folder_of_prompts_is_part_of_the_runs_name(tiny_pipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    digests: set[str] = set()
    for name, text in (("a.txt", "a red sky"), ("b.txt", "a red sky"), ("b.txt", "a red sea")):
        (folder / name).write_text(text)
        digests.add(resolve(RunRequest("gpo", "ocr", str(tiny_pipe), prompts=[str(folder)])).digest())
    assert len(digests) == 3
    (folder / ".hidden").write_text("x")
    assert resolve(RunRequest("gpo", "ocr", str(tiny_pipe), prompts=[str(folder)])).digest() in digests
    with pytest.raises(UserError, match="there is no file"):
        resolve(RunRequest("gpo", "ocr", str(tiny_pipe), prompts=[str(tmp_path / "none")]))


def test_a_negative_seed_is_refused(tiny_pipe: Path, redness: str) -> None:
    with pytest.raises(UserError, match="--seed"):
        plan("gpo", f"{redness}:Paint", tiny_pipe, seed=-1)


def test_the_digest_names_what_matters_and_nothing_else(tiny_pipe: Path, redness: str, tmp_path: Path) -> None:
    def digest(*sets: str, budget: str = "nfe=100", **more: Any) -> str:
        return plan("gpo", f"{redness}:Paint", tiny_pipe, *sets, budget=budget, **more).digest()

    first = digest()
    assert digest() == first == digest(budget="nfe = 1e2")
    file = tmp_path / "bounds.toml"
    file.write_text("nfe = 100")
    assert digest(budget=str(file)) == first  # the same bounds under another name
    other = [digest("beta=3"), digest("optim.lr=0.1"), digest("adapter.rank=4"), digest("evaluation.seed=1"),
             digest("precision=bf16"), digest(budget="nfe=101"), digest(seed=1)]  # fmt: skip
    assert len({first, *other}) == 8
    base = plan("gpo", f"{redness}:Paint", tiny_pipe, budget="nfe=100")
    assert replace(base, seed=1).digest() == digest(seed=1)


def test_an_edited_file_is_another_run(tiny_pipe: Path, redness: str, mine: str) -> None:
    """A method of one's own is what its file says: an old result is not shown for new code, nor gone on with by it."""
    task = f"{redness}:Paint"
    first = plan(mine, task, tiny_pipe, budget="nfe=100")
    assert set(first.mapping()["sources"]) == {"mine.py", "redness.py"}
    file = Path(mine.rpartition(":")[0])
    file.write_text(METHOD + "\n# changed\n")
    second = plan(mine, task, tiny_pipe, budget="nfe=100")
    assert second.digest() != first.digest() and second.mapping()["settings"] == first.mapping()["settings"]
    file.write_text(METHOD)
    assert plan(mine, task, tiny_pipe, budget="nfe=100").digest() == first.digest()
    assert "sources" not in resolve(RunRequest("gpo", "ocr", "tiny")).mapping()  # ours is known by its version


@pytest.mark.parametrize(
    ("text", "said"),
    [("command = 'gpobench'\n", "should hold its presets, but 'command'"), ("[tinny]\na = 1\n", "did you mean 'tiny'")],
)
def test_a_file_beside_a_method_that_is_no_preset_is_refused(
    mine: str, redness: str, tiny_pipe: Path, text: str, said: str
) -> None:
    Path(mine.rpartition(":")[0]).with_suffix(".toml").write_text(text)
    with pytest.raises(UserError, match=said):
        plan(mine, f"{redness}:Paint", tiny_pipe)


def test_the_config_that_a_run_wrote_gives_the_same_run(
    tiny_pipe: Path, redness: str, tmp_path: Path, mine: str
) -> None:
    for method, sets in (
        (
            "gpo",
            ["beta=12.5", "optim.lr=1e-7", "optim.betas=[0.5,0.25]", "loss_type=pairwise", "adapter.targets=['to_q']"],
        ),
        (mine, ["a=3", 'c="with \\"quotes\\" and ü"']),
    ):
        first = plan(method, f"{redness}:Paint", tiny_pipe, *sets, budget="nfe=1234567,seconds=0.1", seed=3)
        file = tmp_path / "config.toml"
        from gpobench.bench.experiments.artifacts import config_toml

        file.write_text(config_toml(first))
        words = file.read_text().splitlines()[0].split()
        budget = words[words.index("--budget") + 1]  # the command that stands in its first line
        again = plan(method, f"{redness}:Paint", tiny_pipe, config=file, budget=budget, seed=3)
        assert again.digest() == first.digest()
        assert asdict(again.settings) == asdict(first.settings)  # a file is loaded anew, its classes are new too
        assert again.adapter == first.adapter and again.evaluation == first.evaluation


def test_a_variant_is_the_preset_with_its_section_on_top() -> None:
    plain, variant = (resolve(RunRequest(name, "ocr", "tiny")) for name in ("gpo", "gpo:unstandardised"))
    assert plain.settings.std == "group" and variant.settings.std == "none"
    assert variant.settings.t_min == plain.settings.t_min  # what [tiny] says still holds
    assert variant.digest() != plain.digest() and variant.slug().startswith("gpo-unstandardised-ocr-tiny-s0-")
    assert resolve(RunRequest("gpo:unstandardised", "ocr", "tiny", sets=["std=global"])).settings.std == "global"
    with pytest.raises(UserError, match="unknown variant of gpo 'unstandardized'; did you mean 'unstandardised'"):
        resolve(RunRequest("gpo:unstandardized", "ocr", "tiny"))


def test_a_variant_has_sections_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpobench.bench.experiments import config

    file = tmp_path / "gpo.toml"
    file.write_text(
        "[tiny]\nbeta = 1\nkl = 1\ngroup = 4\n[tiny.ocr]\nkl = 2\nt_min = 0.5\n"
        "[fast]\nbeta = 3\ngroup = 6\nt_min = 0.1\n[fast.tiny]\ngroup = 7\n[fast.tiny.ocr]\nt_min = 0.2\n[fast.sd35m]\nbeta = 9\n"
    )
    monkeypatch.setattr(config, "preset_path", lambda method: file)
    s = resolve(RunRequest("gpo:fast", "ocr", "tiny")).settings
    assert (s.beta, s.kl, s.group, s.t_min) == (3, 2, 7, 0.2)
    assert config.variants("gpo") == ["fast"]


def test_an_alias_is_the_same_run() -> None:
    first, second = (resolve(RunRequest(name, "ocr", "tiny")) for name in ("diffusion-dpo", "dpo"))
    assert first.slug() == second.slug() and first.mapping() == second.mapping()


def test_how_settings_were_chosen_is_kept_beside_them(mine: str, named: Path, tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    plain = plan(mine, "ocr", named)
    marked = PRESET.replace(
        "[mini.ocr]", 'tuned = { trials = 8, nfe = 960_000, command = "gpobench tune" }\n[mini.ocr]'
    )
    preset.write_text(marked)
    got = plan(mine, "ocr", named)
    assert got.tuned == {"trials": 8, "command": "gpobench tune", "spent": {"nfe": 960_000}} and plain.tuned == {}
    assert got.digest() == plain.digest() and "tuned" not in got.mapping() and got.settings.c == "three"


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ("8", "tuned is a table"),
        ("{ nfe = 3 }", "tuned needs a number of trials"),
        ("{ trials = 0 }", "tuned needs a number of trials"),
        ("{ trials = 2, nfes = 3 }", "unknown setting 'tuned.nfes'; did you mean 'tuned.nfe'"),
        ('{ trials = 2, nfe = "many" }', "tuned.nfe must be a number"),
    ],
)
def test_an_invalid_tuned_table_is_refused(mine: str, named: Path, tmp_path: Path, marker: str, said: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f"tuned = {marker}\n")
    with pytest.raises(UserError) as caught:
        plan(mine, "ocr", named, config=file)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_hub_id_makes_the_run_of_the_registered_name() -> None:
    by_id, by_name = (
        resolve(RunRequest("gpo", "ocr", model)) for model in ("stabilityai/stable-diffusion-3.5-medium", "sd35m")
    )
    assert by_id == by_name and by_id.digest() == by_name.digest()
