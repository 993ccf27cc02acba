"""Cache of evaluations: read again, computed again when anything differs, computed once for concurrent processes."""

from __future__ import annotations

import errno
import fcntl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gpobench.bench import registry
from gpobench.bench.errors import UserError
from gpobench.bench.evaluation import evaluation_cache, evaluator, record
from gpobench.bench.evaluation.estimates import Evaluation
from gpobench.bench.evaluation.evaluation_cache import RunConditions
from gpobench.bench.evaluation.request import EvaluationRequest
from gpobench.bench.experiments import run as running
from gpobench.bench.experiments.config import Config, RunRequest, resolve
from gpobench.bench.model_spec import find_model_spec
from gpobench.bench.process_group import ProcessGroup
from gpobench.bench.progress import NullProgress
from gpobench.bench.scoring.scorers import Blend

SETS = """optim.epochs=1 optim.minibatches=2 optim.lr=3e-3 prompts=2 group=4 evaluation.test_images=1""".split()


class Named:
    """An embedder of which the cache needs only the name."""

    id, distance = "named/1", "cosine"

    def __init__(self, name: str):
        self.name = name

    def __call__(self, images: Any) -> Any:
        raise NotImplementedError


def evaluation(value: float, *names: str) -> Evaluation:
    table = pd.DataFrame({"prompt": [0], "ordinal": [0], "scorer": ["s"], "metric": ["m"], "value": [value]})
    return Evaluation(table, np.full((1, 2, 2, 3), 7, np.uint8), {n: np.full((1, 3), value, np.float32) for n in names})


@pytest.fixture
def base_key(redness: str) -> Callable[..., str]:
    model_spec, task = find_model_spec("tiny"), registry.load("task", f"{redness}:Paint")()

    def name(**change: Any) -> str:
        prompts = list(task.prompts("test", model_spec.domain))
        request = EvaluationRequest(
            prompts, [registry.scorer(task.reward(model_spec.domain))], images=2, seed=0, rows=8
        )
        conditions = RunConditions(model_spec, task, precision="fp32", weights_hash="w", device="cpu")
        own = {key: value for key, value in change.items() if hasattr(conditions, key)}
        rest = {key: value for key, value in change.items() if key not in own}
        return evaluation_cache.cache_key(replace(request, **rest), replace(conditions, **own))

    name.model_spec, name.task = model_spec, task  # type: ignore[attr-defined]
    return name


def test_the_cache_key_depends_on_everything_the_evaluation_depends_on(
    base_key: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model_spec, prompts = base_key.model_spec, list(base_key.task.prompts("test", "glyphs"))
    changes: list[dict[str, Any]] = [
        {"images": 3}, {"seed": 1}, {"rows": 4}, {"precision": "bf16"}, {"weights_hash": "v"}, {"device": "cuda"},
        {"model_spec": replace(model_spec, steps=model_spec.steps + 1)}, {"model_spec": replace(model_spec, guidance=2.0)},
        {"prompts": prompts[:-1]},
        {"prompts": prompts[::-1]}, {"prompts": [replace(prompts[0], meta={"target": "A"}), *prompts[1:]]},
        {"drift": [Named("a")]}, {"scorers": []},
    ]  # fmt: skip
    names = [base_key(), *(base_key(**change) for change in changes)]
    assert len(set(names)) == len(names) and base_key() == names[0]

    source = tmp_path / "mine.py"  # a person's own scorer, whose id stays while it is worked on
    found = set[str]()
    for body in ("1.0", "2.0"):
        source.write_text(f"class Mine:\n    id = name = 'mine'\n    def __call__(self, *a): return {body}\n")
        space: dict[str, Any] = {"__name__": "mine"}
        exec(compile(source.read_text(), str(source), "exec"), space)
        monkeypatch.setattr(evaluation_cache.inspect, "getfile", lambda kind: str(source))
        found.add(base_key(scorers=[space["Mine"]()]))
    assert len(found) == 2


def test_a_blend_is_named_after_the_files_of_its_parts(base_key: Any, tmp_path: Path) -> None:
    source, found = tmp_path / "mine.py", set[str]()
    for body in ("1.0", "2.0", "1.0"):
        source.write_text(
            f"class Mine:\n    id = name = 'mine'\n    metrics = ['m']\n    def __call__(self, *a): return {body}\n"
        )
        found.add(base_key(scorers=[Blend([(registry.scorer(f"{source}:Mine"), 2.0)])]))
    assert len(found) == 2


def test_two_files_of_one_name_are_two_sources(tmp_path: Path) -> None:
    made: list[Any] = []
    for folder, body in (("a", "1.0"), ("b", "2.0")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"class Mine:\n    value = {body}\n")
        made.append(registry.scorer(f"{tmp_path / folder / 'mine.py'}:Mine"))
    assert [one.value for one in made] == [1.0, 2.0] and evaluation_cache.source(made[0]) != evaluation_cache.source(
        made[1]
    )


def test_an_evaluation_in_which_a_scorer_failed_is_not_stored(tmp_path: Path) -> None:
    assert (
        evaluation_cache.cached_evaluation(tmp_path / "x", lambda: evaluation(float("nan")), [], ProcessGroup())
        .table.value.isna()
        .all()
    )
    assert (
        evaluation_cache.cached_evaluation(
            tmp_path / "x", lambda: evaluation(0.5), [], ProcessGroup()
        ).table.value.iloc[0]
        == 0.5
    )
    assert (
        evaluation_cache.cached_evaluation(
            tmp_path / "x", lambda: evaluation(0.7), [], ProcessGroup()
        ).table.value.iloc[0]
        == 0.5
    )


@pytest.mark.parametrize("kind", ["parquet", "npy", "npz"])
@pytest.mark.parametrize("left", [0, 20, -1])
def test_a_damaged_evaluation_is_reported_and_computed_again(tmp_path: Path, kind: str, left: int) -> None:
    said: list[str] = []
    evaluation_cache.cached_evaluation(tmp_path / "x", lambda: evaluation(0.25), [], ProcessGroup())
    file = tmp_path / f"x.{kind}"
    file.write_bytes(file.read_bytes()[:left])
    found = evaluation_cache.cached_evaluation(tmp_path / "x", lambda: evaluation(0.5), [], ProcessGroup(), said.append)
    assert found.table.value.iloc[0] == 0.5 and len(said) == 1 and "is damaged and is computed again" in said[0]
    assert (
        evaluation_cache.cached_evaluation(
            tmp_path / "x", lambda: evaluation(0.7), [], ProcessGroup(), said.append
        ).table.value.iloc[0]
        == 0.5
    )


@pytest.mark.parametrize("kind", ["parquet", "npy", "npz", "sha256"])
def test_an_edited_evaluation_is_reported_and_computed_again(tmp_path: Path, kind: str) -> None:
    """Each file is a sound one of another evaluation: nothing but its checksum tells."""
    said: list[str] = []
    get = lambda stem, value: evaluation_cache.cached_evaluation(
        tmp_path / stem, lambda: evaluation(value, "a"), [Named("a")], ProcessGroup(), said.append
    )
    get("x", 0.25), get("y", -4.75)
    other = (tmp_path / f"y.{kind}").read_bytes()
    (tmp_path / f"x.{kind}").write_bytes(other[:-1] + b"0" if kind == "npy" else other)  # their images are equal
    assert get("x", 0.5).table.value.iloc[0] == 0.5
    assert len(said) == 1 and "computed again" in said[0]
    assert get("x", 0.75).table.value.iloc[0] == 0.5 and len(said) == 1


@pytest.mark.parametrize("written", range(4))
def test_an_evaluation_whose_writing_was_cut_short_is_computed_again(
    tmp_path: Path, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it replaces an older one, whose checksums must not stand beside new files."""
    get = lambda value, *names: evaluation_cache.cached_evaluation(
        tmp_path / "x", lambda: evaluation(value, *names), [Named(name) for name in names], ProcessGroup()
    )
    get(0.25)
    write, left = evaluation_cache.write_atomically, [written]

    def killed(*args: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation_cache, "write_atomically", killed)
        get(0.5, "a")
    assert get(0.75, "a").table.value.iloc[0] == 0.75 and get(1.0, "a").table.value.iloc[0] == 0.75


def test_what_was_seen_is_found_again_to_the_last_digit(tmp_path: Path) -> None:
    drift, asked = [Named("a"), Named("b")], 0

    def make() -> Evaluation:
        nonlocal asked
        asked += 1
        return evaluation(1 / 3, "a", "b")

    one, two = (
        evaluation_cache.cached_evaluation(tmp_path / "deep" / "x", make, drift, ProcessGroup()) for _ in range(2)
    )
    assert asked == 1
    pd.testing.assert_frame_equal(one.table, two.table, check_exact=True)
    np.testing.assert_array_equal(one.images, two.images)
    assert one.vectors.keys() == two.vectors.keys()
    assert all(np.array_equal(one.vectors[k], two.vectors[k]) for k in one.vectors)

    evaluation_cache.cached_evaluation(
        tmp_path / "deep" / "x", make, [Named("a")], ProcessGroup()
    )  # an embedder came or went
    assert asked == 2


def test_of_concurrent_threads_one_evaluates_and_the_others_wait(tmp_path: Path) -> None:
    asked, found = [0], list[float]()

    def make() -> Evaluation:
        asked[0] += 1
        time.sleep(0.2)
        return evaluation(0.25)

    def ask() -> None:
        found.append(
            float(evaluation_cache.cached_evaluation(tmp_path / "x", make, [], ProcessGroup()).table.value.iloc[0])
        )

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [1] and found == [0.25] * 5


def test_a_failed_evaluation_stores_nothing(tmp_path: Path) -> None:
    def broken() -> Evaluation:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        evaluation_cache.cached_evaluation(tmp_path / "x", broken, [], ProcessGroup())
    assert (
        evaluation_cache.cached_evaluation(
            tmp_path / "x", lambda: evaluation(0.5), [], ProcessGroup()
        ).table.value.iloc[0]
        == 0.5
    )


def test_runs_of_one_folder_share_the_base_and_differ_in_nothing_else(
    tiny_pipe: Path, redness: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(seed: int) -> Config:
        return resolve(RunRequest("gpo", f"{redness}:Paint", str(tiny_pipe), seed=seed, budget="nfe=400", sets=SETS))

    seen = list[str]()
    evaluate = evaluator.evaluate
    monkeypatch.setattr(evaluator, "evaluate", lambda m, r, **k: (seen.append(r.weights), evaluate(m, r, **k))[1])
    alone = running.run(plan(1), runs=tmp_path / "a", progress=NullProgress())
    assert seen.count("ref") == 2  # the test prompts, and the curve's first point
    running.run(plan(0), runs=tmp_path / "b", progress=NullProgress())
    seen.clear()
    behind = running.run(plan(1), runs=tmp_path / "b", progress=NullProgress())
    assert "ref" not in seen
    without: Any = {"wall": {}, "run_dir": "", "spent": {}, "scorers": {}, "curve": [], "observed": None, "look": None}
    assert behind.model_copy(update=without) == alone.model_copy(update=without)
    assert behind.observed and alone.observed and behind.observed.training == alone.observed.training
    assert [m.scores for m in behind.curve] == [m.scores for m in alone.curve]
    for name in ("adapter/pytorch_lora_weights.safetensors", "scores.parquet", "curve.parquet", "samples/images.npz"):
        one, two = ((tmp_path / part / plan(1).slug() / name).read_bytes() for part in "ab")
        assert one == two, name
    assert not list(tmp_path.glob("*/.bases/record.json")) and record.read(Path(behind.run_dir, "record.json"))


def test_the_lock_is_no_link_and_a_file_system_without_locks_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_locks(file: object, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    locked = evaluation_cache._locked  # pyright: ignore[reportPrivateUsage]
    with locked(tmp_path / "base", ProcessGroup()):
        pass
    target = tmp_path / "precious"
    target.write_text("kept")
    (tmp_path / ".other.lock").symlink_to(target)
    with pytest.raises(UserError, match="cannot lock"), locked(tmp_path / "other", ProcessGroup()):
        pass
    assert target.read_text() == "kept"
