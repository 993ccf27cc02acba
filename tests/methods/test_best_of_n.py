"""Best of n on a small random model: the base at n = 1, never a lower training reward, never over the budget."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from gpobench.bench import model_spec as cards
from gpobench.bench.budget import Budget, Meter
from gpobench.bench.errors import Interrupted, UserError
from gpobench.bench.evaluation import record
from gpobench.bench.evaluation.evaluator import sample_protocol
from gpobench.bench.evaluation.record import Record
from gpobench.bench.evaluation.search import ANSWERS, SearchSettings, answers, frontier, search
from gpobench.bench.experiments import run as running
from gpobench.bench.experiments.config import Config, RunRequest, resolve
from gpobench.bench.models.open import open_model
from gpobench.bench.progress import NullProgress
from gpobench.bench.registry import scorer
from gpobench.bench.spec import Prompt, Rig, Scores, Search, SupportsIntermediateAnswers
from gpobench.bench.training.rig import MeteredRig
from gpobench.methods.best_of_n import BestOfN

BOOK = [Prompt(t) for t in ("two green squares", "a red triangle", "three blue circles", "a sign", "a card")]
STEPS = 4  # the small model's protocol, without guidance


@pytest.fixture
def make(tiny_pipe: Path, redness: str) -> Iterator[Callable[..., MeteredRig]]:
    made: list[MeteredRig] = []

    def build(judge: Any = "Redness", rows: int = 64, **bounds: float) -> MeteredRig:
        model = open_model(cards.find_model_spec(str(tiny_pipe)), device="cpu", seed=0)
        judge = scorer(f"{redness}:{judge}") if isinstance(judge, str) else judge
        made.append(MeteredRig(model, BOOK, judge, Meter(Budget(**bounds or {"nfe": 1e9})), rows=rows))
        return made[-1]

    yield build
    for rig in made:
        rig.close()


def look(rig: MeteredRig, n: int, images: int = 2, seed: int = 0) -> str:
    return search(BestOfN(n=n), rig, SearchSettings(images, noise_seed=7, seed=seed))


def rewards(rig: MeteredRig) -> torch.Tensor:
    """Of the answers, by the scorer itself."""
    other = MeteredRig(rig.model, rig.train_prompts, rig.scorer, Meter(Budget(nfe=1e9)))
    try:
        return other.score(answers(rig), torch.arange(len(BOOK)).repeat_interleave(2))
    finally:
        other.close()


def test_it_is_a_search_with_one_candidate_at_least(make: Any) -> None:
    assert isinstance(BestOfN(), Search)
    with pytest.raises(UserError, match="n must not be negative, got -1"):
        BestOfN(n=-1)


def test_each_image_gains_with_every_candidate(make: Any) -> None:
    """The first n of 2n candidates are the n: nobody's best can fall."""
    found = []
    for n in (1, 2, 4, 8):
        rig = make()
        assert look(rig, n) == f"search: {n} candidates an image"
        found.append(rewards(rig))
    for fewer, more in zip(found, found[1:], strict=False):
        assert bool((more >= fewer - 1e-6).all()) and float(more.mean()) > float(fewer.mean())


@pytest.mark.parametrize("n", [1, 3])
def test_the_meter_shows_the_static_cost(make: Any, n: int) -> None:
    rig = make()
    look(rig, n)
    ((role, each),) = BestOfN(n=n).cost(rig.model.steps, rig.model.guidance).items()
    assert dict(rig.meter.roles) == {role: 10 * each} and each == n * STEPS
    assert rig.meter.images == rig.meter.reward_calls == 10 * n and rig.meter.updates == 0


@pytest.mark.parametrize("currency", ["nfe", "images", "reward_calls"])
@pytest.mark.parametrize("bound", [1, 9, 10, 39, 40, 41, 79, 80, 95, 233])
def test_no_budget_is_passed_and_what_it_affords_is_shared_evenly(make: Any, currency: str, bound: int) -> None:
    rig = make(rows=4, **{currency: bound})
    each = STEPS if currency == "nfe" else 1
    why = look(rig, 0)
    spent = rig.meter.spent()[currency]
    assert spent <= bound and len(answers(rig)) == 10
    fits = bound // each // 10
    if fits:
        assert spent == fits * each * 10 and why == f"search: {fits} candidates an image"
    else:
        assert why == f"budget: {currency}"


def test_what_the_budget_does_not_reach_is_the_bases(make: Any) -> None:
    rig, base = make(rows=4, nfe=4 * STEPS), make(rows=4)
    assert look(rig, 0) == "budget: nfe" and look(base, 1).startswith("search")
    assert torch.equal(answers(rig), answers(base))
    few = make(rows=10, nfe=10 * STEPS * 2 + 3)  # a given n passes it: what was found until then counts
    many = make(rows=10)
    look(many, 2)
    assert look(few, 9) == "search: 2 candidates an image" and torch.equal(answers(few), answers(many))
    assert few.meter.nfe <= 10 * STEPS * 2 + 3


def test_a_budget_that_bounds_no_candidate_wants_an_n(make: Any) -> None:
    with pytest.raises(UserError, match="sets no bound"):
        look(make(updates=3), 0)
    assert look(make(updates=3), 2) == "search: 2 candidates an image"


def test_neither_batch_size_nor_company_changes_a_draw(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def noises(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        rig, drawn = make(rows=rows), list[torch.Tensor]()
        noise = rig.noise
        monkeypatch.setattr(rig, "noise", lambda n: drawn.append(noise(n)) or drawn[-1])
        look(rig, 3, seed=seed)
        first, second = (torch.cat(drawn[k::2]) for k in (0, 1))
        return torch.stack([first, second]), answers(rig)

    whole, found = noises(64)
    assert len({tuple(x.flatten().tolist()) for x in whole.flatten(0, 1)}) == 20  # every draw is another
    for rows in (1, 3):
        other, answered = noises(rows)
        assert torch.equal(whole, other) and torch.allclose(found, answered, atol=1e-4)
    assert not torch.equal(whole, noises(64, seed=1)[0])


class Says:
    """Scores that are given: one list a call."""

    id = name = "says"
    metrics = ("mean",)

    def __init__(self, *calls: list[float]):
        self.calls = list(calls)

    def __call__(self, images: Any, prompts: Any) -> Scores:
        return Scores({"mean": np.array(self.calls.pop(0))})


def test_what_could_not_be_scored_never_wins(make: Any) -> None:
    nan = math.nan
    rig = make(Says([0, nan, nan, 5, 1], [nan, 1, nan, 5, 2], [1, nan, nan, nan, nan]))
    method = BestOfN(n=3)
    x, prompt_ids = rig.noise(5), torch.arange(5)
    draw = rig.noise
    starts = [x]

    def noise(n: int) -> torch.Tensor:
        starts.append(draw(n))
        return starts[-1]

    rig.noise = noise
    best = method.answer(rig, x, prompt_ids, 5)
    candidates = [sample_protocol(rig.model, start, rig.texts(prompt_ids), weights="ref") for start in starts]
    for row, which in enumerate([2, 1, 0, 0, 1]):  # the third row was never scored, the fourth is a tie
        assert torch.allclose(best[row], candidates[which][row], atol=1e-5)
    assert rig.meter.errors == 8


# A whole run


@pytest.fixture
def plan(tiny_pipe: Path, redness: str) -> Callable[..., Config]:
    def make(*sets: str, task: str = "Paint", budget: str = "nfe=500", **more: Any) -> Config:
        return resolve(RunRequest("best-of-n", f"{redness}:{task}", str(tiny_pipe), budget=budget, sets=sets, **more))

    return make


def start(config: Config, folder: Path, **more: Any) -> Record:
    return running.run(config, runs=folder, progress=NullProgress(), **more)


def table(done: Record) -> pd.DataFrame:
    return pd.read_parquet(Path(done.run_dir) / "scores.parquet")


def test_one_candidate_is_the_base_to_the_last_bit(plan: Any, tmp_path: Path) -> None:
    done = start(plan("n=1", budget="nfe=1e6"), tmp_path)
    after, before = (rows.drop(columns="phase").reset_index(drop=True) for _, rows in table(done).groupby("phase"))
    assert before.equals(after) and done.stop == "search: 1 candidates an image"
    assert all(d.mean == 0 and not done.flags.hack for d in done.delta.values())


def test_a_run_leaves_all_but_an_adapter(plan: Any, tmp_path: Path) -> None:
    done = start(plan(), tmp_path)
    run_dir = Path(done.run_dir)
    assert done.stop == "search: 10 candidates an image" and done.spent["updates"] == 0
    assert done.nfe_by_role == {"inference": done.spent["nfe"]} and done.spent["nfe"] == 12 * 10 * STEPS <= 500
    assert done.scorers["redness"].calls == 120 and done.scorers["warmth"].calls == 0
    scores = table(done)[lambda t: t.scorer == "redness"]
    before, after = (scores[scores.phase == phase].value.to_numpy() for phase in ("before", "after"))
    assert (after >= before).all() and done.delta["redness/mean"].mean > 0.05  # type: ignore[operator]
    files = {p.relative_to(run_dir).as_posix() for p in run_dir.rglob("*") if p.is_file()}
    assert files >= {"record.json", "metrics.jsonl", "curve.png", "samples/pairs.png", "README.md", "config.toml"}
    assert not (run_dir / "adapter").exists()
    model_spec = (run_dir / "README.md").read_text()
    assert "without training" in model_spec and "load_lora" not in model_spec and "held-out" in model_spec
    assert len(done.curve) == 2 and [p.spent["nfe"] for p in done.curve] == [0, done.spent["nfe"]]
    first, last = (p.scores["redness/mean"] for p in done.curve)
    assert first.n == last.n == 2 and last.mean > first.mean  # type: ignore[operator]
    (line,) = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert line["iteration"] == 1 and line["search/best"] == pytest.approx(done.after["redness/mean"].mean, abs=1e-4)


def test_the_frontier_begins_at_the_base_rises_and_ends_at_the_result(plan: Any, tmp_path: Path) -> None:
    done = start(plan(), tmp_path)
    assert [p.candidates for p in done.frontier] == [1, 2, 4, 8, 10] and done.nfe_an_image == STEPS
    assert [p.nfe for p in done.frontier] == [n * STEPS for n in (1, 2, 4, 8, 10)]
    found = pd.read_parquet(record.verified(Path(done.run_dir), done, "frontier.parquet"))
    columns = ["prompt", "ordinal", "stratum", "scorer", "metric", "value"]
    same = lambda point, phase: (
        found[found.point == point][columns]
        .reset_index(drop=True)
        .equals(table(done)[lambda t: t.phase == phase][columns].reset_index(drop=True))
    )
    assert same(0, "before") and same(4, "after") and not same(3, "after")
    assert all(d.mean == 0 for d in done.frontier[0].delta.values()) and done.frontier[-1].delta == done.delta
    by_image = found[found.scorer == "redness"].pivot_table("value", ["prompt", "ordinal"], "point").to_numpy()
    assert (np.diff(by_image, axis=1) >= 0).all()  # more of the same candidates: no image's best can fall
    means = [p.delta["redness/mean"].mean for p in done.frontier]
    assert means == sorted(set(means))
    # Evaluation is off budget: what was charged is what the search computed, and the rest is counted apart.
    assert done.observed is not None and not done.observed.differences
    assert (
        done.observed.training.images == done.spent["images"] == 120 and done.observed.training.nfe == done.spent["nfe"]
    )
    # The base on 12 + 2 images, the off-budget search for two validation prompts, and the forward by which flops are counted: no
    # point of the frontier takes the network.
    assert done.observed.evaluation.nfe_by_weights == {"ref": (12 + 2 + 2 * 10) * STEPS + 1}


@pytest.mark.parametrize("rows", [64, 5])
def test_an_image_whose_search_ended_earlier_keeps_its_answer(make: Any, rows: int) -> None:
    """A given n that passes the budget: with small batches the first get all of it and the last are the base's."""
    rig = make(rows=rows, nfe=37 * STEPS + 1)
    look(rig, 16)
    points = frontier(rig)
    assert torch.equal(points[-1].latents, answers(rig)) and all(len(p.latents) == 10 for p in points)
    assert [p.nfe for p in points] == sorted(p.nfe for p in points)
    tried = {64: [1, 2, 3], 5: [1, (2 + 1) / 2, (4 + 1) / 2, (7 + 1) / 2]}[rows]
    assert [p.candidates for p in points] == tried
    assert [p.nfe for p in points] == [n * STEPS for n in tried]  # the base's image is served at its cost


@dataclass(frozen=True)
class Alone:
    """A search of a third party that states nothing on the way."""

    space = {}

    def cost(self, steps: int, guidance: float) -> Mapping[str, float]:
        return {"rollout": 2 * steps}

    def answer(self, rig: Rig, noise: torch.Tensor, prompt_ids: torch.Tensor, images: int) -> torch.Tensor:
        both = [rig.sample(start, prompt_ids, weights="ref") for start in (noise, rig.noise(len(noise)))]
        first, second = (rig.score(x0, prompt_ids) for x0 in both)
        return both[1].where((second > first).view(-1, 1, 1, 1), both[0])


@dataclass(frozen=True)
class Reuses(Alone):
    """A search that writes each answer over the one before."""

    def answers(self, rig: Rig, noise: torch.Tensor, prompt_ids: torch.Tensor, images: int) -> Iterator[torch.Tensor]:
        x0: Any = rig.sample(noise, prompt_ids, weights="ref")
        for k in range(5):
            yield x0.fill_(k)


def test_a_search_that_states_nothing_on_the_way_has_the_point_of_its_result(make: Any) -> None:
    rig = make(rows=3)
    assert isinstance(Alone(), Search) and not isinstance(Alone(), SupportsIntermediateAnswers)
    assert search(Alone(), rig, SearchSettings(2, noise_seed=7, seed=0)) == "search: 2 candidates an image"
    (point,) = frontier(rig)
    assert torch.equal(point.latents, answers(rig)) and (point.candidates, point.nfe) == (2, 2 * STEPS)


def test_an_answer_that_is_written_over_was_kept_as_it_was(make: Any) -> None:
    rig = make(rows=3)
    search(Reuses(), rig, SearchSettings(2, noise_seed=7, seed=0))
    assert [p.latents.unique().tolist() for p in frontier(rig)] == [[0.0], [1.0], [3.0], [4.0]]


def test_a_third_partys_search_runs_whole(plan: Any, redness: str, tiny_pipe: Path, tmp_path: Path) -> None:
    source = Path(__file__).read_text("utf-8")
    body = source[
        source.index("@dataclass(frozen=True)\nclass Alone") : source.index("@dataclass(frozen=True)\nclass Reuses")
    ]
    head = "from collections.abc import Mapping\nfrom dataclasses import dataclass\nimport torch\nfrom gpobench.bench import Rig\n"
    (tmp_path / "alone.py").write_text(head + body, "utf-8")
    request = RunRequest(f"{tmp_path / 'alone.py'}:Alone", f"{redness}:Paint", str(tiny_pipe), budget="nfe=500")
    done = start(resolve(request), tmp_path / "runs")
    assert [(p.candidates, p.nfe) for p in done.frontier] == [(2, 2 * STEPS)] and not done.fault
    assert done.frontier[0].delta == done.delta


def test_a_search_begun_by_an_earlier_version_has_no_frontier(make: Any) -> None:
    rig, whole = make(rows=5), make(rows=5)
    look(whole, 3)
    rig.bookkeeping[ANSWERS] = answers(whole)[:5]  # of a checkpoint that holds no costs
    look(rig, 3)
    assert frontier(rig) == [] and torch.equal(answers(rig), answers(whole))


def test_on_validation_no_test_prompt_is_touched(plan: Any, tmp_path: Path) -> None:
    done = start(plan("evaluation.split=validation"), tmp_path)
    assert done.stop == "search: 62 candidates an image" and done.after["redness/mean"].n == 2
    assert done.curve[-1].scores["redness/mean"] == done.after["redness/mean"]
    assert set(table(done).text) == {"four red circles", "five blue triangles"}


def test_the_same_command_twice_is_the_same_bytes(plan: Any, tmp_path: Path) -> None:
    done = [start(plan(), tmp_path / name) for name in ("a", "b")]
    files = [Path(d.run_dir) for d in done]
    for name in ("scores.parquet", "frontier.parquet", "samples/pairs.png", "config.toml"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()
    other = start(plan("rows=3"), tmp_path / "c")
    assert other.stop == done[0].stop and other.spent["nfe"] == done[0].spent["nfe"]
    assert np.allclose(table(other).value, table(done[0]).value, atol=1 / 255)
    assert start(plan(seed=1), tmp_path / "a").after != done[0].after


def test_a_search_that_was_stopped_goes_on_to_the_same_bytes(plan: Any, tmp_path: Path) -> None:
    whole = start(plan("rows=5"), tmp_path / "whole")
    asked = iter([False, True])
    with pytest.raises(Interrupted, match="stopped after image 10"):
        start(plan("rows=5"), tmp_path / "cut", interrupted=lambda: next(asked))
    again = start(plan("rows=5"), tmp_path / "cut")
    assert again.after == whole.after and again.nfe_by_role == whole.nfe_by_role and again.curve[0] == whole.curve[0]
    assert table(again).equals(table(whole)) and again.frontier == whole.frontier
    files = [Path(done.run_dir, "frontier.parquet").read_bytes() for done in (again, whole)]
    assert files[0] == files[1]
    homes = Path(again.run_dir), Path(whole.run_dir)
    lines = [[json.loads(line)["iteration"] for line in (h / "metrics.jsonl").read_text().splitlines()] for h in homes]
    assert lines == [[1, 2, 3], [1, 2, 3]]


def test_a_kill_and_a_ctrl_c_on_the_command_line(gpobench: Any, redness: str, tiny_pipe: Path, tmp_path: Path) -> None:
    words = ["run", "--method", "best-of-n", "--task", f"{redness}:Paint", "--model", str(tiny_pipe)]
    words += ["--budget", "nfe=500"]
    slow = "import gpobench.methods.best_of_n as m, time\nold = m.BestOfN._candidate\n"
    slow += "m.BestOfN._candidate = lambda *a: (time.sleep(0.2), old(*a))[1]"

    def send(number: int) -> Callable[[int], None]:
        def later(pid: int) -> None:
            for _ in range(200):
                if list(tmp_path.glob("cut/*/checkpoint/0*")):
                    break
                time.sleep(0.05)
            time.sleep(0.3)
            os.kill(pid, number)

        return later

    ended = gpobench(*words, "--out", tmp_path / "cut", before=slow, meanwhile=send(signal.SIGKILL))
    assert ended.code == -signal.SIGKILL
    small = "import gpobench.bench.experiments.config as c, dataclasses\n"
    small += "find = c.find_model_spec\nc.find_model_spec = lambda n: dataclasses.replace(find(n), rows=2)\n"
    ended = gpobench(
        *words, "--out", tmp_path / "cut", before=small + slow.replace("0.2", "0.05"), meanwhile=send(signal.SIGINT)
    )
    assert ended.code == 130 and "the same command goes on" in ended.err
    cut = json.loads(gpobench(*words, "--out", tmp_path / "cut", "--json", before=small).out)
    whole = json.loads(gpobench(*words, "--out", tmp_path / "whole", "--json", before=small).out)
    assert cut["after"] == whole["after"] and cut["nfe_by_role"] == whole["nfe_by_role"]
    assert cut["frontier"] == whole["frontier"] and len(whole["frontier"]) == 5
    files = [next(tmp_path.glob(f"{name}/*/frontier.parquet")).read_bytes() for name in ("cut", "whole")]
    assert files[0] == files[1]
    shown = gpobench(*words, "--out", tmp_path / "cut")
    assert shown.code == 0 and "adapter/" not in shown.out and "search: 10 candidates" in " ".join(shown.out.split())


def test_a_broken_scorer_stops_a_search_and_a_shaky_one_is_counted(plan: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="redness gave none of the 12 images of the base a score"):
        start(plan("n=3", task="Broken"), tmp_path)
    done = start(plan("n=3", task="Shaky"), tmp_path)
    assert done.flags.invalid and 0 < done.scorers["redness"].errors < done.scorers["redness"].calls
