"""A model and a scorer make a set of preference pairs: who wins, what it cost, and the file that says so."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gpobench.bench.budget import Budget, Meter
from gpobench.bench.errors import UserError
from gpobench.bench.experiments.make_pairs import FILE, PairsRequest, make_pairs
from gpobench.bench.model_spec import Adapter, find_model_spec
from gpobench.bench.models import autoencoder
from gpobench.bench.models.open import open_model
from gpobench.bench.progress import NullProgress
from gpobench.bench.registry import scorer
from gpobench.bench.spec import Prompt
from gpobench.bench.training.pairs import STATEMENT, captions, open_pairs
from gpobench.bench.training.rig import MeteredRig


@pytest.fixture
def make(tiny_pipe: Path, redness: str, tmp_path: Path) -> Any:
    def build(name: str = "a", task: str = "Paint", **more: Any) -> dict[str, Any]:
        settings = {"prompts": 5, "group": 4, **more}
        request = PairsRequest(str(tiny_pipe), f"{redness}:{task}", **settings)
        return make_pairs(request, tmp_path / name, NullProgress())

    return build


def table(done: dict[str, Any]) -> list[dict[str, Any]]:
    return pq.read_table(done["path"]).to_pylist()


def picture(content: bytes) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_the_liked_image_is_the_one_its_scorer_likes(make: Any, redness: str) -> None:
    done = make(prompts=30)
    like = scorer(f"{redness}:Redness")
    sides: list[int] = []
    for row in table(done):
        images = np.stack([picture(row["jpg_0"]), picture(row["jpg_1"])])
        assert images.shape == (2, 16, 16, 3)
        value = like(images, [Prompt(row["caption"])] * 2).value["mean"]
        assert [row["reward_0"], row["reward_1"]] == pytest.approx(value, abs=1e-6)  # of the very pixels in the file
        assert row["label_0"] == float(value[0] > value[1]) == 1 - row["label_1"] and row["has_label"]
        sides.append(int(row["label_1"]))
    assert len(sides) == done["pairs"] == 30 and 7 <= sum(sides) <= 23  # the winner's side tells nothing
    assert done["spent"] == {"nfe": 30 * 4 * 4, "images": 120, "reward_calls": 120}


def test_the_stored_pixels_are_the_scored_ones(make: Any, redness: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image's last digits depend on the batch it is decoded in; here the decoder exaggerates, so that no rounding hides it."""
    decode = autoencoder.decode
    monkeypatch.setattr(autoencoder, "decode", lambda vae, x0: decode(vae, x0) * (1 - len(x0) / 100))
    like = scorer(f"{redness}:Redness")
    for row in table(make(choose="all")):
        images = np.stack([picture(row["jpg_0"]), picture(row["jpg_1"])])
        value = like(images, [Prompt(row["caption"])] * 2).value["mean"]
        assert [row["reward_0"], row["reward_1"]] == [float(np.float32(v)) for v in value]


def test_the_set_can_be_learnt_from_and_says_what_it_cost(make: Any, redness: str) -> None:
    done = make()
    found = open_pairs(str(Path(done["path"]).parent))
    assert len(found) == 5 and not found.skipped and found.spent() == done["spent"]
    assert found.statement["scorer"] == "redness-v1" and found.statement["task_version"] == "1"
    train = {"a red circle", "two blue squares", "a green triangle", "three red squares", "a blue circle", "a photo"}
    assert set(captions(found.reference)) <= train
    readme = (Path(done["path"]).parent / "README.md").read_text("utf-8")
    assert "5 preference pairs of mini on paint" in readme and "redness-v1" in readme


def test_extremes_and_all_pair_the_same_groups(make: Any) -> None:
    best, every = table(make("a")), table(make("b", choose="all"))
    assert len(best) == 5 and len(every) == 5 * 6
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in every:
        groups[row["caption"]].append(row)
    for row in best:
        gaps = {abs(r["reward_0"] - r["reward_1"]): {r["jpg_0"], r["jpg_1"]} for r in groups[row["caption"]]}
        assert gaps[max(gaps)] == {row["jpg_0"], row["jpg_1"]}
    gap = sorted(abs(r["reward_0"] - r["reward_1"]) for r in every)[14]
    wide = table(make("c", choose="all", margin=gap))
    assert len(wide) == 15 and all(abs(r["reward_0"] - r["reward_1"]) > gap for r in wide)
    assert len(table(make("d", choose="random"))) == 5


def test_the_seed_decides_every_byte(make: Any) -> None:
    first, again, other = (make(name, choose="random", seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert Path(first["path"]).read_bytes() == Path(again["path"]).read_bytes() != Path(other["path"]).read_bytes()


def test_a_prompt_comes_back_only_when_all_had_their_turn(make: Any) -> None:
    texts = [row["caption"] for row in table(make(prompts=12))]
    assert len(texts) == 12 and len(set(texts[:6])) == 6 and sorted(texts[:6]) == sorted(texts[6:])


def test_images_without_a_score_are_in_no_pair(make: Any) -> None:
    """The scorer cannot score the first image it is shown and calls the second infinitely good."""
    done = make(task="Shaky", prompts=3, choose="all")
    assert done["not_scored"] == 2 and done["pairs"] == 6 + 6 + 1 and done["failures"][0] == "it is too dark"
    assert all(math.isfinite(row["reward_0"] + row["reward_1"]) for row in table(done))


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("Flat", "5 of 5 groups had equal rewards, 0 images were not scored"),
        ("Broken", "20 images .*the engine is on fire"),
    ],
)
def test_not_one_pair_is_an_error_and_no_file(make: Any, tmp_path: Path, task: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        make(task=task)
    assert "\n" not in str(error.value) and not list((tmp_path / "a").iterdir())


def test_what_a_killed_start_left_is_deleted(make: Any, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    make()
    leftover = tmp_path / "a" / f".pairs.parquet.{ended.pid}.tmp"
    leftover.touch()
    make()  # the set is there: nothing is written
    assert not leftover.exists() and (tmp_path / "a" / "pairs.parquet").is_file()


@pytest.mark.parametrize("margin", [math.nan, math.inf])
def test_a_margin_that_is_not_finite_is_refused(margin: float) -> None:
    with pytest.raises(UserError, match="margin and seed finite and not negative"):
        PairsRequest("tiny", "ocr", margin=margin)


def test_a_set_that_is_there_is_left_alone(make: Any, tmp_path: Path) -> None:
    done = make()
    stamp = Path(done["path"]).stat().st_mtime_ns
    assert make() == done and Path(done["path"]).stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"is another set \(it differs in seed\): choose another --out"):
        make(seed=1)
    Path(done["path"]).write_bytes(b"something else")
    with pytest.raises(UserError, match="is another set"):
        make()


def test_a_kill_while_writing_leaves_no_half_set(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(table: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"PAR1 half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", cut)
        with pytest.raises(KeyboardInterrupt):
            make()
    assert not (tmp_path / "a" / FILE).exists()
    with pytest.raises(UserError, match="has no data/"):
        open_pairs(str(tmp_path / "a"))
    assert make()["pairs"] == 5


def test_a_disk_that_is_full_is_one_line(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(UserError, match="cannot write .*No space left on device"):
        make()


@pytest.mark.parametrize("bad", [{"prompts": 0}, {"group": 1}, {"margin": -1.0}, {"seed": -1}])
def test_settings_that_make_no_sense_are_refused(make: Any, bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"pairs: .*{next(iter(bad))}"):
        make(**bad)


def test_an_adapter_makes_other_images(make: Any, tiny_pipe: Path, redness: str, tmp_path: Path) -> None:
    model = open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4), seed=0)
    for p in model.parameters():
        p.data += 0.3
    model.save_adapter(tmp_path / "adapter")
    base, adapted = make("a"), make("b", adapter=tmp_path / "adapter")
    assert {r["jpg_0"] for r in table(base)}.isdisjoint({r["jpg_0"] for r in table(adapted)})
    with pytest.raises(UserError, match="no adapter at"):
        make("c", adapter=tmp_path / "gone")


def test_the_rig_draws_them(make: Any, tiny_pipe: Path, redness: str) -> None:
    done = make()
    model = open_model(find_model_spec(str(tiny_pipe)), device="cpu", adapter=Adapter(rank=4), seed=0)
    rig = MeteredRig(model, [Prompt("a sign")], scorer(f"{redness}:Redness"), Meter(Budget(nfe=1e6)))
    batch = rig.pairs(str(Path(done["path"]).parent), 5)
    rig.close()
    assert sorted(p.text for p in rig.texts(batch.prompt_ids)) == sorted(row["caption"] for row in table(done))
    assert rig.meter.roles == {"data": done["spent"]["nfe"]}


# The command


def test_the_command_makes_a_set_that_a_run_learns_from(
    gpobench: Any, tiny_pipe: Path, redness: str, tmp_path: Path
) -> None:
    argv = ["--model", str(tiny_pipe), "--task", f"{redness}:Paint"]
    made = gpobench("pairs", *argv, "--out", tmp_path / "set", "--prompts", "6", "--group", "3", "--json")
    assert made.code == 0, made.err
    told = json.loads(made.out)
    assert told["pairs"] == 6 and told["spent"]["images"] == 18 and "sampling groups" in made.err
    assert json.loads(pq.read_schema(tmp_path / "set" / FILE).metadata[STATEMENT])["pairs"] == 6
    ran = gpobench(
        "run", "--method", "dpo:offline", *argv, "--set", f"pairs={tmp_path / 'set'}", "--set", "prompts=4",
        "--budget", "nfe=400", "--out", tmp_path / "runs", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    assert record["nfe_by_role"]["data"] == 18 * 4 and set(record["nfe_by_role"]) == {"data", "policy", "ref"}
    assert record["spent"]["images"] == 18 and record["stop"] == "budget: nfe" and record["spent"]["updates"] > 0


def test_the_command_says_what_it_did(gpobench: Any, tiny_pipe: Path, redness: str, tmp_path: Path) -> None:
    argv = ["pairs", "--model", str(tiny_pipe), "--out", str(tmp_path / "set"), "--prompts", "3", "--group", "3"]
    ended = gpobench(*argv, "--task", f"{redness}:Paint", "--scorer", f"{redness}:Warmth")
    assert ended.code == 0 and "3 pairs from 3 groups" in ended.out and "images 9" in ended.out, ended.err
    assert open_pairs(str(tmp_path / "set")).statement["scorer"] == "warmth-v1"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--task", "orc"), "unknown task 'orc'; did you mean 'ocr'?"),
        (("--model", "tinny"), "unknown model 'tinny'; did you mean 'tiny'?"),
        (("--scorer", "raeder"), "unknown scorer 'raeder'; did you mean 'reader'?"),
        (("--choose", "extreme"), "unknown choice 'extreme'; did you mean 'extremes'?"),
        (("--group", "1"), "group at least 2"),
        (("--out", "/proc/nowhere"), "cannot write /proc/nowhere"),
    ],
)
def test_a_wrong_request_is_one_line(
    gpobench: Any, tiny_pipe: Path, redness: str, tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    argv = {
        "--model": str(tiny_pipe),
        "--task": f"{redness}:Paint",
        "--out": str(tmp_path / "set"),
        change[0]: change[1],
    }
    ended = gpobench("pairs", *[word for pair in argv.items() for word in pair])
    assert ended.code == 2 and ended.out == ""
    assert said in ended.err.strip().splitlines()[-1] and "Traceback" not in ended.err
