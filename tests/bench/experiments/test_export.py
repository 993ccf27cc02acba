"""Export: the adapter loads, and the hub's own library reads the model card back, warnings included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from huggingface_hub import EvalResult, ModelCard, parse_eval_result_entries
from safetensors.numpy import save_file
from typer.testing import CliRunner

from gpobench.bench.errors import UserError
from gpobench.bench.evaluation import record
from gpobench.bench.evaluation.record import Difference, Flags, Number, Record, ScorerUse
from gpobench.bench.experiments.export import ADAPTER, RESULTS, Exported, export, push
from gpobench.bench.files import digest
from gpobench.leaderboards.commands import export as command

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A finished run's directory; change: of its record."""

    def made(name: str = "run", *, adapter: bool = True, samples: bool = False, **change: Any) -> Path:
        run_dir = tmp_path / name
        run_dir.mkdir()
        number, nothing = Number(mean=1 / 3, ci=(0.1, 0.6), n=40), Number(mean=None, ci=(None, None), n=0)
        few = Number(mean=0.5, ci=(None, None), n=1)
        after = {"engine/exact": number, "other/exact": few, "pretty/score": nothing, "diversity-clip/pairwise": number}
        facts: dict[str, Any] = {
            "method": "flow-grpo:fast", "task": "ocr", "model": "tiny", "seed": 3, "stop": "budget: nfe", "before": after, "after": after,
            "delta": {"engine/exact": Difference(mean=0.1, ci=(0.0, 0.2), n=40, p=0.04, mde=None)}, "spent": {"nfe": 1e5, "flops": 2e13},
            "run_dir": str(run_dir), "flags": Flags(hack=False, invalid=False), "task_version": "1", "wall": {},
            "scorers": {n: ScorerUse(id=f"{n}-1", role=role, calls=0, seconds=0.0, errors=0)
                        for n, role in (("engine", "training"), ("other", "held-out"), ("pretty", "quality"))},
            "config": {"budget": {"name": "tiny", "nfe": 1e5}, "evaluation": {"split": "test", "test_images": 2, "seed": 1}},
            "prompts": {"train": "aa", "test": "bb"}, "embedders": {"clip": "clip-1"},
            "provenance": {"revision": "abc", "weights": "w", "machine": "m", "dtype": "fp32", "versions": {"torch": "2.6"}},
        }  # fmt: skip
        (run_dir / "scores.parquet").write_bytes(b"scores")
        (run_dir / "config.toml").write_text("group = 8\n")
        (run_dir / "README.md").write_text("the run's own")
        if adapter:
            (run_dir / "adapter").mkdir()
            save_file({"transformer.a.lora_A.weight": np.zeros((2, 3), np.float32)}, run_dir / "adapter" / ADAPTER)
        (run_dir / "samples").mkdir()
        if samples:
            (run_dir / "samples" / "pairs.png").write_bytes(b"png")
        names = [path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()]
        facts["checksums"] = {name: digest(run_dir / name) for name in names if name != "README.md"}
        record.write(run_dir / "record.json", Record(**(facts | change)))
        return run_dir

    return made


def model_card(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text("utf-8"))


def test_the_hub_reads_the_card(make: Make, tmp_path: Path) -> None:
    done = export(make(), tmp_path / "a" / "card", repo="me/lora")
    assert set(done.files) == {ADAPTER, "config.toml", "README.md"} and done.warnings == ()
    assert (done.folder / ADAPTER).read_bytes() == (tmp_path / "run" / "adapter" / ADAPTER).read_bytes()
    data = model_card(done.folder).data.to_dict()
    assert (
        data["library_name"] == "diffusers"
        and data["pipeline_tag"] == "text-to-image"
        and data["license"] == "apache-2.0"
    )
    assert {"gpobench", "lora", "ocr", "flow-grpo-fast"} <= set(data["tags"]) and "base_model" not in data
    results: list[EvalResult] = model_card(done.folder).data.eval_results  # type: ignore[attr-defined]
    assert [r.metric_type for r in results] == ["engine/exact", "other/exact", "diversity-clip/pairwise"]
    first, few, spread = results
    assert (first.dataset_split, first.dataset_revision, first.verified) == ("test", "bb", False)
    assert first.metric_value == 1 / 3 and first.metric_config == "engine-1" and spread.metric_config == "clip-1"
    assert first.metric_args == {
        "mean": 1 / 3, "ci95": [0.1, 0.6], "prompts": 40,
        "before": {"mean": 1 / 3, "ci95": [0.1, 0.6], "prompts": 40},
        "difference": {"mean": 0.1, "ci95": [0.0, 0.2], "prompts": 40, "p": 0.04},
    }  # fmt: skip
    assert few.metric_args is not None and "ci95" not in few.metric_args
    text = model_card(done.folder).text
    for words in (
        "| engine/exact | training | 0.333 [0.100, 0.600] | 0.333 [0.100, 0.600] | 0.100 [0.000, 0.200] | 40 |",
        "| pretty/score | quality | not scored |", "| budget | nfe 100,000 |", "flops 2.00e+13", "training seed 3",
        "`other-1`, held-out", "| flags | one seed |", "gpobench `abc`; torch 2.6", 'load_lora_weights("me/lora"', "sha256 `bb`",
    ):  # fmt: skip
        assert words in text, words
    assert (tmp_path / "run" / "README.md").read_text() == "the run's own" and "Warning" not in text


def test_a_base_from_the_hub_is_named_with_its_licence(make: Make, tmp_path: Path) -> None:
    data = model_card(export(make(model="sd35m"), tmp_path / "card").folder).data.to_dict()
    assert data["base_model"] == "stabilityai/stable-diffusion-3.5-medium" and data["license"] == "other"
    assert data["license_name"].startswith("Stability AI") and data["license_link"].endswith("/" + data["base_model"])


@pytest.mark.parametrize(
    "name", ["scores.parquet", "config.toml", "samples/pairs.png", f"adapter/{ADAPTER}", "record.json"]
)
def test_a_file_that_was_edited_is_not_exported(make: Make, tmp_path: Path, name: str) -> None:
    run_dir = make(samples=True)
    content = (run_dir / name).read_bytes()
    (run_dir / name).write_bytes(
        content[:-1] + bytes([content[-1] ^ 1]) if name != "record.json" else content.replace(b"0.1", b"0.9")
    )
    with pytest.raises(UserError, match=f"{name} was changed or cut after the run wrote it"):
        export(run_dir, tmp_path / "card")
    assert not (tmp_path / "card").exists()


def test_samples_are_exported(make: Make, tmp_path: Path) -> None:
    run_dir = make(samples=True)
    done = export(run_dir, tmp_path / "card")
    assert (done.folder / "samples.png").read_bytes() == b"png" and "(samples.png)" in model_card(done.folder).text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"flags": Flags(hack=True, invalid=False)}, "the gain may be the scorer's error"),
        ({"flags": Flags(hack=False, invalid=True)}, "these numbers are not valid"),
        ({"fault": "the loss is nan"}, "ended by a fault, so it is no result and in no ranking: the loss is nan"),
        ({"provenance": {"revision": "abc-dirty"}}, "changes that are in no commit"),
        ({"provenance": {}}, "changes that are in no commit"),
    ],
)
def test_warnings_come_before_the_numbers(make: Make, tmp_path: Path, change: Any, said: str) -> None:
    done = export(make(**change), tmp_path / "card")
    assert len(done.warnings) == 1 and said in done.warnings[0]
    assert model_card(done.folder).text.index(said) < model_card(done.folder).text.index("engine/exact")


def test_a_search_has_no_adapter(make: Make, tmp_path: Path) -> None:
    done = export(make(adapter=False, stop="search: 18 candidates an image"), tmp_path / "card")
    assert set(done.files) == {"config.toml", "README.md"} and "trained nothing" in done.warnings[0]
    assert (
        "lora" not in model_card(done.folder).data.to_dict()["tags"]
        and "load_lora_weights" not in model_card(done.folder).text
    )


def test_results_for_a_benchmark(make: Make, tmp_path: Path) -> None:
    done = export(make(), tmp_path / "card", benchmark="me/ocr-bench")
    assert RESULTS in done.files
    entries = parse_eval_result_entries(yaml.safe_load((done.folder / RESULTS).read_text("utf-8")))
    assert [(e.dataset_id, e.task_id) for e in entries][:2] == [
        ("me/ocr-bench", "engine/exact"),
        ("me/ocr-bench", "other/exact"),
    ]
    assert entries[0].value == 1 / 3 and "[0.100, 0.600] over 40 test prompts, scorer engine-1" in str(entries[0].notes)


def test_what_cannot_be_exported_is_refused(make: Make, tmp_path: Path) -> None:
    run_dir, cut, lost = make(), make("cut"), make("lost", adapter=False)
    whole = (cut / "adapter" / ADAPTER).read_bytes()
    (tmp_path / "file").write_text("")
    for size in (len(whole) - 1, len(whole) // 2, 4, 0):
        (cut / "adapter" / ADAPTER).write_bytes(whole[:size])
        with pytest.raises(UserError, match="is damaged"):
            export(cut, tmp_path / "card")
    for run, to, more, said in (
        (tmp_path, tmp_path / "card", {}, "no finished run"),
        (make("eval", kind="eval"), tmp_path / "card", {}, "is no run but an eval"),
        (lost, tmp_path / "card", {}, "no adapter at"),
        (run_dir, run_dir / ".", {}, "is the run directory"),
        (run_dir, tmp_path / "file" / "card", {}, "cannot write"),
        (run_dir, tmp_path / "card", {"repo": "nobody"}, "'nobody' is no owner/name of the hub"),
        (run_dir, tmp_path / "card", {"repo": "me/a b"}, "is no owner/name of the hub"),
        (make("odd", model="tinny"), tmp_path / "card", {}, "did you mean 'tiny'"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            export(run, to, **more)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "card").exists()


def test_an_upload_that_fails_is_one_line(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = export(make(), tmp_path / "card")
    with pytest.raises(UserError, match="cannot upload to me/lora: ") as caught:
        push(done, "me/lora")
    assert "\n" not in str(caught.value)


def test_only_what_was_written_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo, **more: asked.update(repo=repo, **more))
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder", lambda self, **more: asked.update(more) or "https://there"
    )
    assert push(Exported(tmp_path, ("README.md", ADAPTER), ()), "me/lora", private=True) == "https://there"
    assert asked["allow_patterns"] == ["README.md", ADAPTER] and asked["repo"] == "me/lora" and asked["private"] is True


def test_the_command_says_what_it_wrote(make: Make, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command.export)
    run_dir = make(flags=Flags(hack=True, invalid=False))
    done = CliRunner().invoke(app, [str(run_dir), "--to", str(tmp_path / "card")])
    assert done.exit_code == 0 and done.stdout == "" and "gpobench: The training scorer rose" in done.stderr
    assert json.loads((run_dir / "record.json").read_text())["method"] == "flow-grpo:fast"


@pytest.mark.parametrize("name", ["config.toml", "samples", "adapter", "adapter/pytorch_lora_weights.safetensors"])
def test_an_export_follows_no_link(make: Make, tmp_path: Path, name: str) -> None:
    run = make()
    (run / "samples").mkdir(exist_ok=True)
    (run / "samples" / "pairs.png").write_bytes(b"x")
    moved = tmp_path / "elsewhere"
    if (run / name).exists():
        (run / name).rename(moved)
    else:
        moved.write_text("secret")
    (run / name).symlink_to(moved)
    with pytest.raises(UserError, match=f"{name} is a link"):
        export(run, tmp_path / "card")
    assert not (tmp_path / "card").exists()
