"""Whole runs: charges against an independent counter, the files written, the errors raised."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gpobench.bench import registry
from gpobench.bench.errors import Interrupted, UserError
from gpobench.bench.evaluation import evaluator, record
from gpobench.bench.evaluation.estimates import COLUMNS
from gpobench.bench.evaluation.look_ledger import LEDGER, read_ledger
from gpobench.bench.evaluation.record import Record
from gpobench.bench.evaluation.scorer_set import open_scorer_set
from gpobench.bench.evaluation.splits import prompts_hash
from gpobench.bench.experiments import run as running
from gpobench.bench.experiments.artifacts import truncate_metrics
from gpobench.bench.experiments.budgeted_stage import BudgetedStage
from gpobench.bench.experiments.config import Config, RunRequest, resolve
from gpobench.bench.experiments.evaluate_model import ModelEvaluation, evaluate_model
from gpobench.bench.models.sd3 import SD3
from gpobench.bench.progress import NullProgress
from gpobench.bench.spec import Prompt
from gpobench.bench.training.train import COLLAPSED

SETTINGS = """optim.epochs=1 optim.minibatches=2 optim.weight_decay=0 optim.ema=0 optim.warmup=0 optim.lr=3e-3
prompts=4 group=6 beta=30 t_min=0""".split()


class RecordingProgress(NullProgress):
    """Progress that remembers its messages."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.fractions: list[float] = []
        self.done = 0.0

    def message(self, text: str) -> None:
        self.said.append(text)

    def advance(self, by: float) -> None:
        self.done += by

    def status(self, fraction: float, numbers: Any) -> None:
        self.fractions.append(fraction)


@pytest.fixture
def plan(tiny_pipe: Path, redness: str) -> Callable[..., Config]:
    def make(*sets: str, task: str = "Paint", budget: str = "nfe=2000", model: Path = tiny_pipe, **more: Any) -> Config:
        task = task if task.islower() else f"{redness}:{task}"
        return resolve(RunRequest("gpo", task, str(model), budget=budget, sets=[*SETTINGS, *sets], **more))

    return make


class Counter:
    """Rows times calls of the transformer, three for each row that a backward follows; those of evaluations apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        from diffusers import SD3Transformer2DModel

        self.training = self.evaluation = 0
        self._off = 0
        forward, evaluate, flops = SD3Transformer2DModel.forward, evaluator.evaluate, SD3.flops_a_forward

        def counting(module: Any, *args: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            rows = len(hidden_states) * (3 if torch.is_grad_enabled() else 1)
            if self._off:
                self.evaluation += rows
            else:
                self.training += rows
            return forward(module, *args, hidden_states=hidden_states, **kwargs)

        def apart(function: Any) -> Any:
            def inner(*args: Any, **kwargs: Any) -> Any:
                self._off += 1
                try:
                    return function(*args, **kwargs)
                finally:
                    self._off -= 1

            return inner

        monkeypatch.setattr(SD3Transformer2DModel, "forward", counting)
        monkeypatch.setattr(evaluator, "evaluate", apart(evaluate))
        monkeypatch.setattr(SD3, "flops_a_forward", apart(flops))


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_the_meter_is_a_hand_count_of_transformer_calls(
    plan: Any, tiny_pipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:
    model = tmp_path / "mini"
    shutil.copytree(tiny_pipe, model)
    recipe = json.loads((model / "recipe.json").read_text()) | {"guidance": guidance}
    (model / "recipe.json").write_text(json.dumps(recipe))
    counter = Counter(monkeypatch)
    done = running.run(plan(model=model, budget="nfe=1500"), runs=tmp_path, progress=NullProgress())
    assert done.spent["nfe"] == counter.training == sum(done.nfe_by_role.values()) <= 1500
    assert counter.evaluation > 0
    each, rows = (2 if guidance != 1 else 1), 24
    whole, rest = divmod(1500, rows * 4 * each + 4 * rows)
    assert whole >= 5 and done.nfe_by_role["rollout"] >= whole * rows * 4 * each
    assert done.nfe_by_role["rollout"] % (rows * each) == 0 and rest >= 0
    assert done.spent["images"] == done.spent["reward_calls"] == done.nfe_by_role["rollout"] // (4 * each * rows) * rows


@pytest.mark.parametrize(
    ("budget", "currency"),
    [("images=100", "images"), ("reward_calls=100", "reward_calls"), ("updates=5", "updates"), ("nfe=999", "nfe"),
     ("seconds=0.5", "seconds"), ("flops=2e8", "flops"), ("nfe=100000,updates=3", "updates"), ("nfe=1", "nfe")],
)  # fmt: skip
def test_no_bound_is_passed_and_the_one_that_binds_is_named(
    plan: Any, tmp_path: Path, budget: str, currency: str
) -> None:
    config = plan("optim.ema=0.9", budget=budget)
    shown = RecordingProgress()
    done = running.run(config, runs=tmp_path, progress=shown)
    assert done.stop == f"budget: {currency}"
    for name, bound in config.budget.bounds().items():
        if name != "seconds":  # time that has passed cannot be refused: at most one charge is under way
            assert done.spent[name] <= bound
    assert all(0 <= f <= 1 for f in shown.fractions)
    assert json.loads(Path(done.run_dir, "record.json").read_text())["spent"]["nfe"] == done.spent["nfe"]


@pytest.fixture(scope="module")
def finished(tiny_pipe: Path, redness: str, tmp_path_factory: pytest.TempPathFactory) -> Record:
    config = resolve(
        RunRequest("gpo", f"{redness}:Paint", str(tiny_pipe), budget="nfe=6000", sets=[*SETTINGS, "optim.ema=0.5"])
    )
    return running.run(config, runs=tmp_path_factory.mktemp("runs"), progress=NullProgress())


def test_a_run_leaves_all_that_the_design_names(finished: Record) -> None:
    run_dir = Path(finished.run_dir)
    files = {p.relative_to(run_dir).as_posix() for p in run_dir.rglob("*") if p.is_file()}
    assert files >= {
        "record.json", "metrics.jsonl", "scores.parquet", "config.toml", "README.md", "curve.png",
        "adapter/pytorch_lora_weights.safetensors", "samples/before.png", "samples/after.png", "samples/pairs.png",
    }  # fmt: skip
    assert not [name for name in files if ".tmp" in name]
    assert record.read(run_dir / "record.json") == Record.model_validate_json(finished.model_dump_json())
    for name in ("before", "after", "pairs"):
        with Image.open(run_dir / "samples" / f"{name}.png") as picture:
            assert picture.size[0] > 100 and np.asarray(picture).std() > 1


def test_the_scores_are_one_row_an_image_and_scorer(finished: Record) -> None:
    table = pd.read_parquet(Path(finished.run_dir) / "scores.parquet")
    assert list(table.columns) == [*COLUMNS, "phase"] and len(table) == 2 * 6 * 2 * 2
    assert not table.duplicated(["phase", "prompt", "ordinal", "scorer", "metric"]).any()
    for phase, numbers in (("before", finished.before), ("after", finished.after)):
        for name, number in numbers.items():
            own = table[(table.phase == phase) & (table.scorer == name.partition("/")[0])]
            assert number.mean == pytest.approx(own.value.mean()) and number.n == 6
    for name, d in finished.delta.items():
        assert d.mean == pytest.approx(finished.after[name].mean - finished.before[name].mean)  # type: ignore[operator]
        assert d.ci[0] <= d.mean <= d.ci[1] and d.p is not None  # type: ignore[operator]


def test_the_curve_uses_validation_and_ten_eval_points(finished: Record) -> None:
    assert len(finished.curve) == 12 or len(finished.curve) == 11
    spent = [point.spent["nfe"] for point in finished.curve]
    assert spent == sorted(spent) and spent[0] == 0 and spent[-1] == finished.spent["nfe"]
    assert all(point.scores["redness/mean"].n == 2 for point in finished.curve)


def test_the_metrics_are_one_json_line_an_iteration(finished: Record) -> None:
    lines = [json.loads(line) for line in (Path(finished.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[0].keys() >= {"reward/mean", "policy/loss", "policy/kl", "spent/nfe", "spent/updates"}
    nfe = [line["spent/nfe"] for line in lines]
    assert nfe == sorted(nfe) and nfe[-1] <= finished.spent["nfe"]


def test_the_record_says_what_was_used(finished: Record) -> None:
    assert {name: use.role for name, use in finished.scorers.items()} == {"redness": "training", "warmth": "held-out"}
    assert finished.scorers["redness"].calls == finished.spent["reward_calls"] and finished.scorers["warmth"].calls == 0
    assert finished.task_version == "1" and set(finished.prompts) == {"train", "validation", "test"}
    assert len(finished.provenance["weights"]) == 64 and finished.provenance["dtype"] == "fp32"
    assert {"load", "evaluate", "train", "checkpoint"} <= finished.wall.keys()
    assert finished.spent["seconds"] <= finished.wall["train"] * 1.01
    assert not finished.flags.invalid and finished.flags.single_seed


def test_training_on_redness_reddens(finished: Record) -> None:
    delta = finished.delta["redness/mean"]
    assert delta.mean is not None and delta.mean > 0


def test_the_card_names_the_numbers_and_the_way_to_load(finished: Record) -> None:
    text = (Path(finished.run_dir) / "README.md").read_text()
    assert "load_lora_weights" in text and "redness/mean" in text and f"seed {finished.seed}" in text


def test_the_saved_adapter_is_what_was_evaluated(finished: Record, redness: str, tiny_pipe: Path) -> None:
    adapter = Path(finished.run_dir) / "adapter"
    again = evaluate_model(ModelEvaluation(f"{redness}:Paint", str(tiny_pipe), adapter), NullProgress())
    assert again["scores"]["redness/mean"]["mean"] == pytest.approx(finished.after["redness/mean"].mean, abs=1e-4)
    base = evaluate_model(ModelEvaluation(f"{redness}:Paint", str(tiny_pipe)), NullProgress())
    assert base["scores"]["redness/mean"]["mean"] == finished.before["redness/mean"].mean


def test_a_written_config_names_the_same_run(finished: Record, tiny_pipe: Path, redness: str) -> None:
    run_dir = Path(finished.run_dir)
    again = resolve(
        RunRequest("gpo", f"{redness}:Paint", str(tiny_pipe), budget="nfe=6000", config=run_dir / "config.toml")
    )
    assert again.slug() == run_dir.name


# Test looks


def test_a_look_at_the_test_prompts_is_counted_once_and_stays_when_the_run_is_deleted(
    plan: Any, tmp_path: Path
) -> None:
    done = running.run(plan(budget="nfe=500"), runs=tmp_path, progress=NullProgress())
    (look,) = read_ledger(tmp_path).looks
    run_dir = Path(done.run_dir)
    assert (look.run, look.method, look.seed, look.prompts) == (run_dir.name, "gpo", 0, done.prompts["test"])
    assert done.look is not None and done.look.entry == read_ledger(tmp_path).hashes[0]
    readme = (run_dir / "README.md").read_text()
    assert "1 look at these test prompts with gpo (1 setting)." in readme
    running.run(plan(budget="nfe=500"), runs=tmp_path, progress=NullProgress())  # read again
    (run_dir / "record.json").unlink()  # a run that was killed while it evaluated its result
    again = running.run(plan(budget="nfe=500"), runs=tmp_path, progress=NullProgress())
    assert len(read_ledger(tmp_path).looks) == 1 and again.look == done.look
    on_validation = running.run(
        plan("evaluation.split=validation", budget="nfe=500"), runs=tmp_path, progress=NullProgress()
    )
    assert on_validation.look is None and len(read_ledger(tmp_path).looks) == 1
    other = running.run(plan("beta=31", budget="nfe=500"), runs=tmp_path, progress=NullProgress())
    assert other.look is not None and (other.look.looks, other.look.settings) == (2, 2)
    shutil.rmtree(run_dir)
    seed = running.run(plan("beta=31", budget="nfe=500", seed=1), runs=tmp_path, progress=NullProgress())
    assert seed.look is not None and (seed.look.looks, seed.look.settings) == (3, 2)
    assert not read_ledger(tmp_path).damage


def test_a_look_that_cannot_be_counted_is_said_in_the_record(plan: Any, tmp_path: Path) -> None:
    (tmp_path / LEDGER).mkdir()
    shown = RecordingProgress()
    done = running.run(plan(budget="nfe=200"), runs=tmp_path, progress=shown)
    assert done.look is not None and done.look.not_recorded.startswith(f"cannot write {tmp_path / LEDGER}: ")
    assert [text for text in shown.said if "counted nowhere" in text]
    assert "this one is counted nowhere" in (Path(done.run_dir) / "README.md").read_text()


def test_an_adapter_that_is_evaluated_on_test_prompts_is_a_look(
    finished: Record, redness: str, tiny_pipe: Path, tmp_path: Path
) -> None:
    run_dir = Path(finished.run_dir)
    what = ModelEvaluation(f"{redness}:Paint", str(tiny_pipe), run_dir / "adapter", images=1)
    before = read_ledger(run_dir.parent).count(finished.prompts["test"], finished.model, "gpo")
    looks = [evaluate_model(what, NullProgress())["look"] for _ in range(2)]
    assert looks[0] == looks[1] and looks[0]["looks"] == before.looks + 1 and looks[0]["settings"] == before.settings
    assert evaluate_model(replace(what, adapter=None), NullProgress())["look"] is None
    assert evaluate_model(replace(what, split="validation"), NullProgress())["look"] is None
    foreign = shutil.copytree(run_dir / "adapter", tmp_path / "foreign")
    assert "is of no run" in evaluate_model(replace(what, adapter=foreign), NullProgress())["look"]["not_recorded"]
    (tmp_path / "runs").mkdir()
    evaluate_model(replace(what, adapter=foreign, runs=tmp_path / "runs"), NullProgress())
    assert [look.method for look in read_ledger(tmp_path / "runs").looks] == ["adapter"]


# What goes wrong


@pytest.mark.parametrize(
    ("task", "said"),
    [("Broken", "redness gave none of the 12 images of the base a score by mean .*the engine is on fire.*nothing was trained"),
     ("Unread", "warmth gave none of the 12 images of the base a score by mean .*too small.*nothing was trained")],
)  # fmt: skip
def test_a_scorer_that_reads_no_image_of_the_base_stops_the_run_before_training(
    plan: Any, tmp_path: Path, task: str, said: str
) -> None:
    config = plan(task=task, budget="nfe=100000")
    with pytest.raises(UserError, match=said) as caught:
        running.run(config, runs=tmp_path, progress=NullProgress())
    left = {path.name for path in (tmp_path / config.slug()).iterdir()}
    assert "\n" not in str(caught.value) and not left & {"record.json", "metrics.jsonl", "checkpoint", "before.parquet"}


DYING = """
from pathlib import Path
from gpobench.bench.registry import load
Paint, Redness = load("task", "{redness}:Paint"), load("scorer", "{redness}:Redness")
class Dying(Redness):
    def __call__(self, images, prompts):
        if Path("{flag}").exists():
            raise ConnectionError("the server is gone")
        return super().__call__(images, prompts)
class Mine(Paint):
    def reward(self, domain):
        return "{here}:Dying"
"""


@pytest.mark.parametrize("method", ["gpo", "nft", "awm", "best-of-n"])
def test_a_scorer_that_dies_pauses_the_run_and_costs_nothing(
    plan: Any, redness: str, tmp_path: Path, method: str
) -> None:
    """The methods between them have plain weights, copies that collecting moves, and a search."""
    here, flag = tmp_path / "mine.py", tmp_path / "dead"
    here.write_text(DYING.format(redness=redness, flag=flag, here=here))
    sets = ["n=2"] if method == "best-of-n" else ["optim.minibatches=2", "prompts=4", "group=6"]
    sets += {"nft": ["t_min=0"], "awm": ["timesteps=1"]}.get(method, [])
    request = RunRequest(method, f"{here}:Mine", plan().model, budget="nfe=1500", sets=[*sets, "rows=4"])
    config, iterations = resolve(request), list[int]()

    def dies_after_two() -> bool:
        iterations.append(1)
        if len(iterations) == 2:
            flag.touch()
        return False

    whole = running.run(config, runs=tmp_path / "whole", progress=NullProgress())
    cut = tmp_path / "cut" / config.slug()
    for start in range(2):  # still dead at the second start
        with pytest.raises(UserError, match="redness gave no image of one iteration a score .*server is gone.*goes on"):
            running.run(config, runs=tmp_path / "cut", progress=NullProgress(), interrupted=dies_after_two)
        assert len((cut / "metrics.jsonl").read_text().splitlines()) == 2 and not (cut / "record.json").exists(), start
    flag.unlink()
    again = running.run(config, runs=tmp_path / "cut", progress=NullProgress())
    timeless = lambda spent: {currency: amount for currency, amount in spent.items() if currency != "seconds"}
    assert timeless(again.spent) == timeless(whole.spent) and again.nfe_by_role == whole.nfe_by_role
    assert again.after == whole.after and again.failures == [] and again.checksums.keys() == whole.checksums.keys()
    assert again.checksums == whole.checksums
    assert again.scorers["redness"].calls == whole.scorers["redness"].calls and again.scorers["redness"].errors == 0


def test_files_of_a_finished_run_that_were_edited_are_not_shown(plan: Any, tmp_path: Path) -> None:
    config = plan(budget="nfe=300")
    done = running.run(config, runs=tmp_path, progress=NullProgress())
    assert running.run(config, runs=tmp_path, progress=NullProgress()) == done
    moved = tmp_path / "elsewhere"
    shutil.move(done.run_dir, moved / config.slug())
    assert running.run(config, runs=moved, progress=NullProgress()).run_dir == str(moved / config.slug())
    curve = moved / config.slug() / "curve.parquet"
    pd.read_parquet(curve).iloc[:-1].to_parquet(curve, index=False)
    with pytest.raises(UserError, match="curve.parquet was changed or cut"):
        running.run(config, runs=moved, progress=NullProgress())


@pytest.mark.parametrize("damage", ["edited", "cut", "gone"])
def test_scores_that_were_edited_under_an_unfinished_run_are_not_believed(
    plan: Any, tmp_path: Path, damage: str
) -> None:
    """The base is evaluated again; a point of the curve cannot be."""
    config, shown = plan(budget="nfe=1500"), RecordingProgress()
    whole = running.run(config, runs=tmp_path / "whole", progress=NullProgress())
    asked: list[int] = []

    def soon() -> bool:
        asked.append(1)
        return len(asked) >= 3

    with pytest.raises(Interrupted):
        running.run(config, runs=tmp_path / "cut", progress=NullProgress(), interrupted=soon)
    run_dir = tmp_path / "cut" / config.slug()
    sound = (run_dir / "curve.parquet").read_bytes()
    for name in (
        "before.parquet",
        "curve.parquet",
        *(path.name for path in (tmp_path / "cut" / ".bases").glob("*.parquet")),
    ):
        path = (run_dir if (run_dir / name).exists() else tmp_path / "cut" / ".bases") / name
        table = pd.read_parquet(path)
        table.assign(value=table.value - 5).to_parquet(path, index=False)
        if damage == "cut":
            table.iloc[:-1].to_parquet(path, index=False)
        if damage == "gone":
            path.unlink()
    with pytest.raises(UserError, match="curve.parquet was changed or cut.*restore it, or --fresh starts over"):
        running.run(config, runs=tmp_path / "cut", progress=shown)
    (run_dir / "curve.parquet").write_bytes(sound)
    again = running.run(config, runs=tmp_path / "cut", progress=NullProgress())
    assert again.before == whole.before and again.after == whole.after
    assert again.checksums["curve.parquet"] == whole.checksums["curve.parquet"]
    assert damage == "gone" or sum("before.parquet is damaged" in line for line in shown.said) == 1


def test_a_flat_reward_is_a_collapse_and_a_fault(plan: Any, tmp_path: Path) -> None:
    done = running.run(plan(task="Flat", budget="nfe=100000"), runs=tmp_path, progress=NullProgress())
    assert done.stop.startswith("collapsed") and done.fault == done.stop and not done.flags.invalid


def test_a_run_that_diverges_ends_by_a_fault_and_says_so_everywhere(plan: Any, tmp_path: Path) -> None:
    config = plan("optim.lr=1e30", "optim.clip=1e30", budget="nfe=100000")
    done = running.run(config, runs=tmp_path, progress=NullProgress())
    assert "nan" in done.fault or "not finite" in done.fault
    assert done.fault == done.stop and record.disqualification(done) == f"ended by a fault: {done.fault}"
    assert f"**No result.** This run ended by a fault: {done.fault}" in (Path(done.run_dir) / "README.md").read_text()


def test_rewards_that_become_equal_after_a_rise_are_no_fault(
    plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every image is right there is nothing left to learn; where none ever differed the scorer is broken."""
    whole = BudgetedStage.run
    monkeypatch.setattr(BudgetedStage, "run", lambda stage: (whole(stage), f"{COLLAPSED} the rewards are equal")[1])
    done = running.run(plan(budget="nfe=9000"), runs=tmp_path, progress=NullProgress())
    assert done.delta["redness/mean"].ci[0] > 0 and done.fault == ""  # type: ignore[operator]
    done = running.run(plan("optim.lr=1e-12", budget="nfe=500"), runs=tmp_path, progress=NullProgress())
    assert done.fault == done.stop != ""


def test_a_shaky_reward_is_counted_and_invalid(plan: Any, tmp_path: Path) -> None:
    done = running.run(plan(task="Shaky", budget="nfe=1000"), runs=tmp_path, progress=NullProgress())
    assert done.flags.invalid and 0 < done.scorers["redness"].errors < done.scorers["redness"].calls
    assert done.spent["updates"] > 0


def test_a_test_prompt_in_the_train_split_is_refused(plan: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="test prompt stands in the train split .*'A red circle!'"):
        running.run(plan(task="Overlapping"), runs=tmp_path, progress=NullProgress())


def test_an_auxiliary_scorer_that_is_not_installed_is_left_out_with_a_message(plan: Any, tmp_path: Path) -> None:
    shown = RecordingProgress()
    done = running.run(plan(task="Further", budget="nfe=100"), runs=tmp_path, progress=shown)
    assert any("not evaluated by" in line and "pip install absent" in line for line in shown.said)
    assert set(done.scorers) == {"redness", "warmth"} and shown.done > 0


def test_columns_strata_and_the_tasks_own_summary_stand_in_the_record(plan: Any, tmp_path: Path) -> None:
    shown = RecordingProgress()
    done = running.run(plan(task="Rich", budget="nfe=300"), runs=tmp_path, progress=shown)
    assert {name: use.role for name, use in done.scorers.items()} == {
        "redness": "training",
        "warmth": "held-out",
        "brightness": "quality",
    }
    assert done.embedders == {"colour": "colour-v1"} and any("Absent" in line for line in shown.said)
    assert done.before["drift-colour/paired"].mean == 0 and (done.after["drift-colour/paired"].mean or 0) > 0
    assert (done.before["diversity-colour/pairwise"].mean or 0) > 0 and (done.cmmd["colour"].mean or 0) >= 0
    assert set(done.strata) == {"shapes", "other"}
    each = [part.before["redness/mean"].mean for part in done.strata.values()]
    assert done.before["redness/mean"].mean == pytest.approx(sum(x or 0 for x in each) / 2)
    assert done.summary["after"]["rows"] == 6 * 2 and done.summary["before"]["nothing"] is None
    table = pd.read_parquet(Path(done.run_dir) / "scores.parquet")
    assert {"diversity-colour", "drift-colour", "brightness"} <= set(table.scorer)
    assert set(table.stratum) == {"shapes", "other"}


def test_drift_goes_on_from_the_base_of_an_earlier_start(plan: Any, tmp_path: Path) -> None:
    config = plan(task="Rich", budget="nfe=1500")
    whole = running.run(config, runs=tmp_path / "whole", progress=NullProgress())
    asked: list[int] = []

    def soon() -> bool:
        asked.append(1)
        return len(asked) >= 2

    with pytest.raises(Interrupted):
        running.run(config, runs=tmp_path / "cut", progress=NullProgress(), interrupted=soon)
    again = running.run(config, runs=tmp_path / "cut", progress=NullProgress())
    assert again.after == whole.after and again.cmmd == whole.cmmd and again.strata == whole.strata


def test_the_users_own_prompts(plan: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("a red house\na blue house\n")
    config = plan(task="Paint", budget="nfe=100", prompts=[str(mine)])
    done = running.run(config, runs=tmp_path, progress=NullProgress())
    assert done.task_version == "1+own" and done.config["prompts"]["train"].startswith("mine.txt@")
    assert done.prompts["train"] == prompts_hash([Prompt("a red house"), Prompt("a blue house")])
    mine.write_text("a red triangle\n")  # a test prompt
    with pytest.raises(UserError, match="stands in the train split"):
        running.run(plan(task="Paint", budget="nfe=100", prompts=[str(mine)]), runs=tmp_path, progress=NullProgress())


def test_an_embedder_that_is_not_installed_is_not_replaced_by_another(redness: str) -> None:
    made = open_scorer_set(registry.load("task", f"{redness}:Patchy")(), "glyphs", lambda _: None)
    assert [e.name for e in made.diversity] == ["colour"] and made.drift == []


def test_two_scorers_of_one_name_are_refused(redness: str) -> None:
    with pytest.raises(UserError, match="called 'redness'"):
        open_scorer_set(registry.load("task", f"{redness}:Twins")(), "glyphs", lambda _: None)


def test_fresh_forgets(plan: Any, tmp_path: Path) -> None:
    config = plan(budget="nfe=100")
    first = running.run(config, runs=tmp_path, progress=NullProgress())
    (Path(first.run_dir) / "stray").mkdir()
    again = running.run(config, runs=tmp_path, progress=NullProgress(), fresh=True)
    assert again.run_dir == first.run_dir and not (Path(first.run_dir) / "stray").exists()
    assert again.wall != first.wall


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_folder_that_cannot_be_written_is_one_line(plan: Any, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("in the way")
    else:
        place = place / "below" / "a.file"
        place.parent.mkdir(parents=True)
        place.write_text("in the way")
        place = place / "deeper"
    with pytest.raises(UserError, match="cannot write"):
        running.run(plan(), runs=place, progress=NullProgress())


def test_half_precision_wants_an_accelerator(plan: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("here it has one")
    with pytest.raises(UserError, match="fp16 needs a CUDA device"):
        running.run(plan("precision=fp16"), runs=tmp_path, progress=NullProgress())


def test_the_metrics_of_a_cut_off_line_are_dropped(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}\n{"iterat')
    truncate_metrics(log, 2)
    assert log.read_text() == '{"iteration": 1}\n{"iteration": 2}\n'


def test_parts_of_a_third_party_package_run(
    tiny_pipe: Path, redness: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task and its scorers from an installed package, by name, as the built-in ones."""
    site = tmp_path / "site"
    site.mkdir()
    code = Path(redness).read_text() + (
        "\n\ndef make(variant):\n    return Redness(id=f'stranger-{variant}')\n\n\n"
        "@dataclass(frozen=True)\nclass Foreign(Paint):\n    name: str = 'foreign'\n\n"
        "    def reward(self, domain):\n        return 'stranger:bold'\n"
    )
    (site / "stranger.py").write_text(code)
    info = site / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[gpobench.tasks]\nforeign = stranger:Foreign\n\n[gpobench.rewards]\nstranger = stranger:make\n"
    )
    monkeypatch.syspath_prepend(site)
    config = resolve(RunRequest("gpo", "foreign", str(tiny_pipe), budget="nfe=500", sets=SETTINGS))
    done = running.run(replace(config), runs=tmp_path / "runs", progress=NullProgress())
    assert done.scorers["redness"].id == "stranger-bold" and done.task == "foreign" and done.spent["updates"] > 0


def test_another_reward_holds_the_tasks_own_out(plan: Any, redness: str, tmp_path: Path) -> None:
    config = plan(budget="nfe=300", reward=f"{redness}:Warmth")
    assert config.digest() != plan(budget="nfe=300").digest()
    done = running.run(config, runs=tmp_path, progress=NullProgress())
    assert {name: use.role for name, use in done.scorers.items()} == {"warmth": "training", "redness": "held-out"}
    assert done.scorers["warmth"].calls == done.spent["images"] > 0 == done.scorers["redness"].calls


def test_a_part_of_a_blend_holds_nothing_out(redness: str) -> None:
    """A scorer that a method is trained on is not held out, under whatever weight."""
    task, say = registry.load("task", f"{redness}:Paint")(), lambda _: None
    for blend in (f"{redness}:Redness*0.5+rapidocr", f"{redness}:Redness*2"):
        made = open_scorer_set(task, "glyphs", say, blend)
        assert [s.name for s in made.held_out] == ["warmth"] and made.training.metrics[0] == "blend"
        assert "redness" not in [s.name for s in made.all]
    with pytest.raises(UserError, match="trains on every scorer that the task paint holds out"):
        open_scorer_set(task, "glyphs", say, f"{redness}:Redness+{redness}:Warmth")
    made = open_scorer_set(registry.load("task", "ocr")(), "glyphs", say, "hpsv2:tiny*0.5+rapidocr")
    assert [s.name for s in made.held_out] == ["reader"]
    assert not {"rapidocr", "hpsv2-tiny"} & {s.name for s in made.all}


def test_a_budget_that_pays_for_no_update_is_reported(plan: Any, tmp_path: Path) -> None:
    said: list[str] = []

    class Heard(NullProgress):
        def message(self, text: str) -> None:
            said.append(text)

    done = running.run(plan(budget="nfe=1"), runs=tmp_path, progress=Heard())
    assert done.spent["updates"] == 0 and any("no update was made" in text for text in said)


def test_a_tracker_hshown_every_iteration(plan: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = running.run(plan(budget="nfe=600"), runs=tmp_path, progress=NullProgress(), track="tensorboard")
    events = EventAccumulator(str(next(Path(done.run_dir).rglob("events.out.*")).parent))
    events.Reload()
    lines = [json.loads(line) for line in (Path(done.run_dir) / "metrics.jsonl").read_text().splitlines()]
    heard = {e.step: e.value for e in events.Scalars("reward/mean")}
    assert heard == pytest.approx({line["iteration"]: line["reward/mean"] for line in lines}) and len(heard) > 1


@pytest.mark.parametrize(("track", "said"), [("nosuch", "--track nosuch"), ("comet_ml", "not installed")])
def test_a_tracker_that_is_not_installed_is_one_line(plan: Any, tmp_path: Path, track: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        running.run(plan(budget="nfe=300"), runs=tmp_path, progress=NullProgress(), track=track)
    assert "\n" not in str(error.value)


def test_other_weights_in_the_same_folder_are_another_run(plan: Any, tiny_pipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_pipe, folder)
    config = plan(budget="nfe=300", model=folder)
    first = running.run(config, runs=tmp_path / "runs", progress=NullProgress())
    assert running.run(config, runs=tmp_path / "runs", progress=NullProgress()) == first
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="--fresh starts over"):
        running.run(config, runs=tmp_path / "runs", progress=NullProgress())
    again = running.run(config, runs=tmp_path / "runs", progress=NullProgress(), fresh=True)
    assert again.provenance["weights"] != first.provenance["weights"]


def test_another_configuration_in_the_same_folder_is_another_run(plan: Any, tiny_pipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_pipe, folder)
    config = plan(budget="nfe=300", model=folder)
    running.run(config, runs=tmp_path / "runs", progress=NullProgress())
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "shift": 1.5}))
    with pytest.raises(UserError, match="the configuration in the folder of .* changed .*--fresh starts over"):
        running.run(config, runs=tmp_path / "runs", progress=NullProgress())


def test_a_scorer_that_changed_its_id_evaluates_no_second_half(plan: Any, tmp_path: Path) -> None:
    source = Path(tmp_path / "mine.py")
    redness = plan().task.partition(":")[0]
    held = f"""
import sys
from gpobench.bench.registry import load
Paint, Warmth = load("task", "{redness}:Paint"), load("scorer", "{redness}:Warmth")
class Mine(Paint):
    def held_out(self, domain): return ["{tmp_path}/held.py:Held"]
"""
    source.write_text(held)
    version = lambda n: (tmp_path / "held.py").write_text(
        f"from gpobench.bench.registry import load\nWarmth = load('scorer', '{redness}:Warmth')\n"
        f"class Held(Warmth):\n    def __init__(self): super().__init__('held-v{n}', 'held')\n"
    )
    version(1)
    config = resolve(RunRequest("gpo", f"{source}:Mine", plan().model, budget="nfe=400", sets=SETTINGS))
    with pytest.raises(Interrupted):
        running.run(config, runs=tmp_path / "runs", progress=NullProgress(), interrupted=lambda: True)
    version(2)
    with pytest.raises(UserError, match="the scorer held changed since .*--fresh starts over"):
        running.run(config, runs=tmp_path / "runs", progress=NullProgress())
    version(1)
    assert running.run(config, runs=tmp_path / "runs", progress=NullProgress()).scorers["held"].id == "held-v1"


def test_what_changed_since_it_was_planned_is_not_run(plan: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("a red circle\na sign\n")
    config = plan(budget="nfe=300", prompts=[str(mine)])
    digest = config.digest()
    mine.write_text("a red circle\na card\n")
    assert config.digest() == digest  # it is named after what was planned
    with pytest.raises(UserError, match="mine.txt changed since this run was planned"):
        running.run(config, runs=tmp_path / "runs", progress=NullProgress())


@pytest.mark.parametrize("how", ["removed", "replaced", "metrics"])
def test_what_is_removed_under_a_run_is_an_error_and_the_same_command_makes_it(
    plan: Any, tmp_path: Path, how: str
) -> None:
    config, asked = plan(budget="nfe=1500"), list[int]()
    run_dir = tmp_path / config.slug()

    def remove() -> bool:
        asked.append(1)
        if len(asked) == 3 and how == "metrics":
            (run_dir / "metrics.jsonl").unlink()
        elif len(asked) == 3:
            shutil.rmtree(run_dir)
        if len(asked) == 3 and how == "replaced":
            run_dir.mkdir()
            (run_dir / ".lock").touch()
        return False

    with pytest.raises(UserError, match="was removed while the run was at work.*the same command") as caught:
        running.run(config, runs=tmp_path, progress=NullProgress(), interrupted=remove)
    assert "\n" not in str(caught.value) and not (run_dir / "record.json").exists()
    assert how == "metrics" or not [
        path for path in tmp_path.glob("*/*") if path.name not in (".lock",) and path.parent == run_dir
    ]
    done = running.run(config, runs=tmp_path, progress=NullProgress())
    assert (run_dir / "metrics.jsonl").is_file() and done.spent["updates"] > 0


def test_on_the_validation_split_no_test_prompt_is_touched(
    plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpobench.bench.models.sd3 import SD3

    texts: list[str] = []
    encode = SD3.encode
    monkeypatch.setattr(SD3, "encode", lambda self, prompts: [texts.extend(prompts), encode(self, prompts)][1])
    shown = RecordingProgress()
    config = plan(
        "evaluation.split=validation", "evaluation.validation_images=3", "evaluation.curve_images=3", budget="nfe=600"
    )
    done = running.run(config, runs=tmp_path, progress=shown)
    drawn = {"four red circles", "five blue triangles"}
    table = pd.read_parquet(Path(done.run_dir) / "scores.parquet")
    assert set(table.text) == drawn and len(table) == 2 * 2 * 3 * 2 and shown.done == 2 * 2 * 3
    assert not {"two green squares", "a sign", "a card"} & set(texts) and drawn <= set(texts)
    for numbers in (done.before, done.after, done.delta):
        assert {n.n for n in numbers.values()} == {2}
    assert done.after["redness/mean"] == done.curve[-1].scores["redness/mean"]
    assert done.config["evaluation"]["split"] == "validation"
    assert "Means over validation prompts" in (Path(done.run_dir) / "README.md").read_text()
    assert config.digest() != plan("evaluation.validation_images=3", budget="nfe=600").digest()


@pytest.mark.parametrize("split", ["test", "validation"])
def test_the_curve_keeps_every_score(plan: Any, tmp_path: Path, split: str) -> None:
    more = "evaluation.validation_images=2"  # judged with two images a prompt, the curve with one
    done = running.run(
        plan(f"evaluation.split={split}", more, budget="nfe=1500"), runs=tmp_path, progress=NullProgress()
    )
    table = pd.read_parquet(Path(done.run_dir) / "curve.parquet")
    assert sorted(table.eval_point.unique()) == list(range(len(done.curve))) and len(done.curve) >= 3
    assert set(table.ordinal) == {0} and set(table.columns) == {
        "prompt",
        "ordinal",
        "stratum",
        "scorer",
        "metric",
        "value",
        "eval_point",
    }
    for k, point in enumerate(done.curve):
        own = table[(table.eval_point == k) & (table.scorer == "redness")]
        assert len(own) == 2 and own.value.mean() == pytest.approx(point.scores["redness/mean"].mean)


def test_what_the_settings_cost_to_find_is_in_the_record(plan: Any, tmp_path: Path) -> None:
    file = tmp_path / "best.toml"
    file.write_text('beta = 31.0\ntuned = { trials = 4, nfe = 8000, command = "gpobench tune" }\n')
    config = plan(budget="nfe=100", config=file)
    done = running.run(config, runs=tmp_path, progress=NullProgress())
    assert done.tuning == {"trials": 4, "command": "gpobench tune", "spent": {"nfe": 8000}}
    assert "chosen in 4 trials" in (Path(done.run_dir) / "README.md").read_text()
    written = Path(done.run_dir) / "config.toml"
    again = resolve(RunRequest(config.method, config.task, config.model, budget="nfe=100", config=written))
    assert again.digest() == config.digest() and again.tuned == config.tuned
    by_hand = replace(plan("beta=31.0", budget="nfe=100"), tuned={})  # the same settings, found at no price
    tuned = replace(by_hand, tuned=config.tuned)
    assert running.run(by_hand, runs=tmp_path / "other", progress=NullProgress()).tuning == {}
    assert running.run(tuned, runs=tmp_path / "other", progress=NullProgress()).tuning == done.tuning
    assert (
        running.run(by_hand, runs=tmp_path / "other", progress=NullProgress()).tuning == done.tuning
    )  # a price stays paid


@pytest.mark.parametrize(
    ("method", "sets", "said"),
    [("mix-grpo", ["window_size=4"], "window_size must be shorter than the 4 steps"),
     ("diffusion-dpo", ["pairs=nowhere"], "no such path: nowhere")],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_the_base_is_evaluated(
    method: str, sets: list[str], said: str, tiny_pipe: Path, redness: str, tmp_path: Path
) -> None:
    config = resolve(RunRequest(method, f"{redness}:Paint", str(tiny_pipe), budget="nfe=500", sets=[*sets, "steps=0"]))
    with pytest.raises(UserError, match=said):
        running.run(config, runs=tmp_path, progress=NullProgress())
    assert not list(tmp_path.glob("*/before.parquet"))
